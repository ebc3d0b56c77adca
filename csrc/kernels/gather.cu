// gather: copy chronological indices of one layer out of the cache, FP16 to FP32, BF16 or FP16, in order of index.
//
// One launch covers K and V of every entry: a matrix of n rows each. Grid: the blocks of all matrices, one after the
// other (tiling.h). A thread loads kUnroll rows of a column before it stores the first. An index that is not held gives
// zeros.
#include "launch.h"
#include "pdl.cuh"
#include "ring.h"
#include "tiling.h"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 128;

// Blocks on a multiprocessor at a time: many small ones hide the latency, as far as registers allow.
template <int kVector>
constexpr int kBlocksAtATime = kVector == 4 ? 12 : 8;

template <DType kType, int kVector, int kUnroll, typename Plan>
__global__ void __launch_bounds__(kThreads, kBlocksAtATime<kVector>)
    gather_kernel(const GatherParams p, const Tiling tiling) {
  using T = typename Element<kType>::Type;
  let_next_launch_begin();
  const BlockPart part = BlockPart::make(tiling, blockIdx.x);
  const bool is_value = part.matrix & 1;
  const int64_t entry = part.matrix >> 1;
  const int64_t sequence = sequence_of_entry(p.sequences, entry, p.cache.batch);

  const Rows<void*>& rows = is_value ? p.value : p.key;
  T* out = static_cast<T*>(rows.data) + entry * rows.batch_stride;
  const int64_t state_row = p.layer * p.cache.batch + imax(sequence, 0);
  const int64_t row_elements = p.cache.heads * p.cache.head_dim;
  const uint16_t* cache = (is_value ? p.cache.v_cache : p.cache.k_cache) + state_row * p.cache.positions * row_elements;
  const int64_t thread_row = part.row_begin + (threadIdx.x >> tiling.log2_width);
  const int thread_rows = kThreads >> tiling.log2_width;
  const int64_t* indices = p.indices == nullptr ? nullptr : p.indices + entry * p.indices_batch_stride;
  wait_for_previous_launch();

  SequenceState state{p.cache.state[state_row], p.cache.state[state_row + p.cache.layers * p.cache.batch]};
  if (sequence < 0) state = empty_state(p.cache.all_sinks);
  const Plan plan = Plan::make(state, p.cache);
  const int64_t run =
      indices == nullptr ? plan.run(p.start + part.row_begin, p.start + part.row_end) : kNoSlot;  // the usual range
  for (uint32_t column = part.column_begin + (threadIdx.x & (tiling.width - 1)); column < part.column_end;
       column += tiling.width) {
    const uint16_t* from = cache + column * kVector;
    T* to = out + tiling.offset(rows, column);
    for (int64_t row0 = thread_row; row0 < part.row_end; row0 += kUnroll * thread_rows) {
      Vec<uint16_t, kVector> in[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t row = row0 + u * thread_rows;
        int64_t slot = kNoSlot;
        if (row < part.row_end) {
          slot = run >= 0 ? run + (row - part.row_begin)
                          : plan.slot(indices == nullptr ? p.start + row : indices[row * p.indices_stride]);
        }
        in[u] = {};
        if (slot >= 0) in[u] = load<uint16_t, kVector>(from + slot * row_elements);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t row = row0 + u * thread_rows;
        if (row >= part.row_end) continue;
        Vec<T, kVector> converted;
#pragma unroll
        for (int i = 0; i < kVector; ++i) converted.x[i] = Element<kType>::from_half(in[u].x[i]);
        store<T, kVector>(to + row * rows.row_stride, converted);
      }
    }
  }
}

template <DType kType, int kVector, int kUnroll>
cudaError_t launch(const GatherParams& p, cudaStream_t stream) {
  Tiling tiling;
  int64_t grid;
  const int64_t entries = p.sequences.entries(p.cache.batch);
  if (!Tiling::make(tiling, p.rows, p.cache.heads, p.cache.head_dim, kVector, kThreads, kUnroll, 1, 2 * entries,
                    entries, grid)) {
    return cudaErrorInvalidConfiguration;
  }
  PdlLaunch launch(grid, kThreads, 0, stream);
  const auto kernel = p.cache.share.is_all() ? gather_kernel<kType, kVector, kUnroll, ReadPlan>
                                             : gather_kernel<kType, kVector, kUnroll, ReadShare>;
  return cudaLaunchKernelEx(&launch.config, kernel, p, tiling);
}

template <DType kType>
cudaError_t launch_for(const GatherParams& p, cudaStream_t stream) {
  constexpr int kVector = kVectorOf<kType>;
  const bool vectors = allows_vectors(p.cache, p.key, kVector, dtype_size(kType)) &&
                       allows_vectors(p.cache, p.value, kVector, dtype_size(kType));
  return vectors ? launch<kType, kVector, 4>(p, stream) : launch<kType, 1, 4>(p, stream);
}

}  // namespace

cudaError_t launch_gather(const GatherParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::f32: return launch_for<DType::f32>(p, stream);
    case DType::f16: return launch_for<DType::f16>(p, stream);
    case DType::bf16: return launch_for<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvc
