// gather: copy chronological indices of one layer out of the cache, FP16 to FP32, BF16 or FP16, in order of index.
//
// One launch covers K and V of every sequence: a matrix of n rows each. Grid: the blocks of all matrices, one after the
// other (tiling.h). A block of 256 threads moves kUnroll vectors a thread; one thread reads where the sequence stands.
// A thread loads all its vectors before it stores the first. An index that is not held gives zeros.
#include "launch.h"
#include "layout.h"
#include "tiling.h"
#include "vec.cuh"

namespace kvc {
namespace {

template <DType kType, int kVector, int kUnroll>
__global__ void __launch_bounds__(kCopyThreads, 2) gather_kernel(const GatherParams p, const Tiling tiling) {
  using T = typename Element<kType>::Type;
  const uint32_t matrix = tiling.blocks(blockIdx.x);
  const uint32_t block = blockIdx.x - matrix * tiling.blocks.divisor;
  const bool is_value = matrix & 1;
  const int64_t sequence = matrix >> 1;

  const Rows<void*>& rows = is_value ? p.value : p.key;
  T* out = static_cast<T*>(rows.data) + sequence * rows.batch_stride;
  const int64_t entry = p.layer * p.cache.batch + sequence;
  const uint16_t* cache =
      (is_value ? p.cache.v_cache : p.cache.k_cache) + entry * p.cache.positions * (p.cache.heads * p.cache.head_dim);

  __shared__ ReadPlan shared_plan;
  if (threadIdx.x == 0) {
    const SequenceState state{p.cache.state[entry], p.cache.state[entry + p.cache.layers * p.cache.batch]};
    shared_plan = ReadPlan::make(state, p.cache);
  }
  __syncthreads();
  const ReadPlan plan = shared_plan;

  const Place start = tiling.block_start(block);
  Vec<uint16_t, kVector> in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place at = tiling.place(start, u * kCopyThreads + threadIdx.x);
    int64_t slot = kNoSlot;
    if (at.row < p.rows) {
      const int64_t index = p.indices == nullptr
                                ? p.start + at.row
                                : p.indices[sequence * p.indices_batch_stride + at.row * p.indices_stride];
      slot = plan.slot(index);
    }
    in[u] = {};
    if (slot >= 0) in[u] = load<uint16_t, kVector>(cache + cache_offset(p.cache, slot, at));
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place at = tiling.place(start, u * kCopyThreads + threadIdx.x);
    if (at.row < p.rows) {
      Vec<T, kVector> converted;
#pragma unroll
      for (int i = 0; i < kVector; ++i) converted.x[i] = Element<kType>::from_half(in[u].x[i]);
      store<T, kVector>(out + element_offset(rows, at), converted);
    }
  }
}

template <DType kType, int kVector, int kUnroll>
cudaError_t launch(const GatherParams& p, cudaStream_t stream) {
  Tiling tiling;
  int64_t grid;
  if (!Tiling::make(tiling, p.rows, p.cache.heads, p.cache.head_dim, kVector, kCopyThreads * kUnroll, 2 * p.cache.batch,
                    grid)) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kCopyThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, gather_kernel<kType, kVector, kUnroll>, p, tiling);
}

template <DType kType>
cudaError_t launch_for(const GatherParams& p, cudaStream_t stream) {
  constexpr int kVector = kVectorOf<kType>;
  const bool vectors = allows_vectors(p.cache, p.key, kVector, dtype_size(kType)) &&
                       allows_vectors(p.cache, p.value, kVector, dtype_size(kType));
  return vectors ? launch<kType, kVector, 4>(p, stream) : launch<kType, 1, 4>(p, stream);
}

}  // namespace

cudaError_t launch_gather(const GatherParams& params, cudaStream_t stream) {
  GatherParams p = params;
  if (p.rows == 0) return cudaSuccess;
  join_heads(p.cache, p.key, p.value);
  switch (p.dtype) {
    case DType::f32: return launch_for<DType::f32>(p, stream);
    case DType::f16: return launch_for<DType::f16>(p, stream);
    case DType::bf16: return launch_for<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvc
