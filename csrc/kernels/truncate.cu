// truncate: move the state of every layer and sequence back to its `length` oldest positions. No data moves.
//
// Grid: one thread for each layer and sequence.
#include <cuda_runtime.h>

#include "launch.h"
#include "layout.h"

namespace kvc {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) truncate_kernel(const TruncateParams p) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t entries = p.layers * p.batch;
  if (entry >= entries) return;
  const SequenceState s = state_after_truncate({p.state[entry], p.state[entries + entry]}, p.length, p.sinks);
  p.state[entry] = s.seen;
  p.state[entries + entry] = s.first;
}

}  // namespace

cudaError_t launch_truncate(const TruncateParams& p, cudaStream_t stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((p.layers * p.batch + kThreads - 1) / kThreads));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, truncate_kernel, p);
}

}  // namespace kvc
