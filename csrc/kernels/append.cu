// append: convert new keys and values to FP16, store them behind what each sequence has, advance its state.
//
// One launch covers the K and V rows of every layer and sequence appended to: a matrix of T rows each. Grid: the blocks
// of all matrices, one after the other (tiling.h). A block of 256 threads moves kUnroll vectors a thread: it loads
// them, learns from one thread where the sequence stands, converts, counts overflows and stores.
//
// The state is read by every block and advanced by none of them but the last to arrive: a block signs in after it has
// read `seen` and `first`, and whoever signs in last knows that all have, writes the new ones and clears the count.
// Signing in does not wait for the block's own stores: nothing but a later launch reads them.
#include "launch.h"
#include "layout.h"
#include "tiling.h"
#include "vec.cuh"

namespace kvc {
namespace {

using Counter = unsigned long long;  // what atomicAdd takes for 64 bits

// A row that is not stored is still counted: the counters are those of appending position by position.
template <DType kType, int kVector>
__device__ __forceinline__ Vec<uint16_t, kVector> convert(const Vec<typename Element<kType>::Type, kVector>& in,
                                                          bool saturate, uint32_t& overflows) {
  if constexpr (kType == DType::f16) {
    return in;
  } else {
    Vec<uint16_t, kVector> out;
#pragma unroll
    for (int i = 0; i < kVector; ++i) out.x[i] = stored_half(Element<kType>::to_float(in.x[i]), saturate, overflows);
    return out;
  }
}

template <DType kType, int kVector, int kUnroll>
__global__ void __launch_bounds__(kCopyThreads, 2) append_kernel(const AppendParams p, const Tiling tiling) {
  using T = typename Element<kType>::Type;
  const uint32_t matrix = tiling.blocks(blockIdx.x);
  const uint32_t block = blockIdx.x - matrix * tiling.blocks.divisor;
  const bool is_value = matrix & 1;
  const int64_t layer = (matrix >> 1) / static_cast<uint32_t>(p.cache.batch);
  const int64_t sequence = (matrix >> 1) - layer * p.cache.batch;

  const Rows<const void*>& rows = is_value ? p.value : p.key;
  const T* source = static_cast<const T*>(rows.data) + layer * rows.layer_stride + sequence * rows.batch_stride;
  const int64_t entry = (p.first_layer + layer) * p.cache.batch + sequence;
  uint16_t* cache =
      (is_value ? p.cache.v_cache : p.cache.k_cache) + entry * p.cache.positions * (p.cache.heads * p.cache.head_dim);
  int64_t* seen = p.cache.state + entry;
  int64_t* first = seen + p.cache.layers * p.cache.batch;
  Counter* arrivals = reinterpret_cast<Counter*>(first + p.cache.layers * p.cache.batch);

  const int64_t appended = appended_rows(p, sequence);
  __shared__ AppendPlan shared_plan;
  SequenceState state{0, 0};
  if (threadIdx.x == 0) {
    // The state changes during this launch: volatile keeps these loads out of the read-only cache.
    state = {*const_cast<volatile int64_t*>(seen), *const_cast<volatile int64_t*>(first)};
    shared_plan = AppendPlan::make(state.seen, p.rows, appended, p.cache);
  }

  // The rows do not depend on the state: they are on their way while thread 0 waits for it.
  const Place start = tiling.block_start(block);
  Vec<T, kVector> in[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place at = tiling.place(start, u * kCopyThreads + threadIdx.x);
    if (at.row < p.rows && at.row >= p.rows - appended) in[u] = load<T, kVector>(source + element_offset(rows, at));
  }
  __syncthreads();
  const AppendPlan plan = shared_plan;

  const Counter blocks_of_entry = 2 * static_cast<Counter>(tiling.blocks.divisor);
  Counter arrived = 0;
  if (threadIdx.x == 0) {
    __threadfence();  // the state was read before this block signs in
    arrived = atomicAdd(arrivals, Counter{1}) + 1;
  }

  uint32_t overflows = 0;
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const Place at = tiling.place(start, u * kCopyThreads + threadIdx.x);
    const int64_t slot = at.row < p.rows ? plan.slot(at.row) : kPadding;
    if (slot != kPadding) {
      const Vec<uint16_t, kVector> out = convert<kType, kVector>(in[u], p.saturate, overflows);
      if (slot >= 0) store<uint16_t, kVector>(cache + cache_offset(p.cache, slot, at), out);
    }
  }
  if constexpr (kType != DType::f16) {
    overflows = __reduce_add_sync(0xffffffffu, overflows);
    if (overflows != 0 && threadIdx.x % 32 == 0) {
      atomicAdd(reinterpret_cast<Counter*>(p.overflow_counts + p.first_layer + layer), Counter{overflows});
    }
  }

  if (threadIdx.x == 0 && arrived == blocks_of_entry) {
    __threadfence();  // every block's reads of the state come before these writes
    const SequenceState next = state_after_append(state, appended, p.cache.ring.divisor);
    *seen = next.seen;
    *first = next.first;
    *arrivals = 0;
  }
}

template <DType kType, int kVector, int kUnroll>
cudaError_t launch(const AppendParams& p, cudaStream_t stream) {
  Tiling tiling;
  int64_t grid;
  if (!Tiling::make(tiling, p.rows, p.cache.heads, p.cache.head_dim, kVector, kCopyThreads * kUnroll,
                    2 * p.layer_count * p.cache.batch, grid)) {
    return cudaErrorInvalidConfiguration;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(kCopyThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, append_kernel<kType, kVector, kUnroll>, p, tiling);
}

// Little work is spread over many blocks, one vector a thread, for latency; much of it takes four loads in flight a
// thread, for bandwidth.
constexpr int64_t kManyVectors = int64_t{1} << 20;

template <DType kType>
cudaError_t launch_for(const AppendParams& p, cudaStream_t stream) {
  constexpr int kVector = kVectorOf<kType>;
  if (!allows_vectors(p.cache, p.key, kVector, dtype_size(kType)) ||
      !allows_vectors(p.cache, p.value, kVector, dtype_size(kType))) {
    return launch<kType, 1, 4>(p, stream);
  }
  const int64_t vectors = 2 * p.layer_count * p.cache.batch * p.rows * p.cache.heads * (p.cache.head_dim / kVector);
  return vectors < kManyVectors ? launch<kType, kVector, 1>(p, stream) : launch<kType, kVector, 4>(p, stream);
}

}  // namespace

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream) {
  AppendParams p = params;
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
