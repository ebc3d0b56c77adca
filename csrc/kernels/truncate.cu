// truncate: move the state of sequences back to their oldest positions, or to none, in every layer. No data moves.
//
// Grid: one block for each layer; its threads take the sequences in turn.
#include <cuda_runtime.h>

#include "launch.h"
#include "ring.h"

namespace kvc {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) truncate_kernel(const TruncateParams p) {
  for (int64_t entry = threadIdx.x; entry < p.sequences.entries(p.batch); entry += kThreads)
    truncate_entry(p, blockIdx.x, entry);
}

}  // namespace

cudaError_t launch_truncate(const TruncateParams& p, cudaStream_t stream) {
  if (p.sequences.entries(p.batch) == 0) return cudaSuccess;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(p.layers));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, truncate_kernel, p);
}

}  // namespace kvc
