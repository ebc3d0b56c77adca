// append: convert new keys and values to FP16, store them behind what each sequence has, advance its state.
//
// One launch covers the K and V rows of every layer and entry: a matrix of T rows each. Grid: the blocks of all
// matrices, one after the other (tiling.h). The first kThreads threads of a block move keys, the others values, kUnroll
// vectors a thread at a time. A thread loads them, learns from one thread where the sequence stands, converts, counts
// overflows and stores. Few rows have a kernel of their own, below.
//
// Every block reads the state; the last to arrive writes the new one. A block counts itself in after it has read
// `seqlen` and `first`. The last to do so knows that all have read them, writes the new ones and clears the count.
// Nobody waits for a block's stores: only a later launch reads them.
#include "launch.h"
#include "pdl.cuh"
#include "ring.h"
#include "tiling.h"
#include "vec.cuh"

namespace kvc {
namespace {

using Counter = unsigned long long;  // what atomicAdd takes for 64 bits

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

// The state changes during a launch: volatile keeps these loads out of the read-only cache.
__device__ __forceinline__ SequenceState read_state(const int64_t* seqlen, const int64_t* first) {
  return {*static_cast<const volatile int64_t*>(seqlen), *static_cast<const volatile int64_t*>(first)};
}

// Few rows, as in decoding: one block for a layer and entry, so that no arrivals are counted. A thread has at most
// kTurns vectors. What counts here is the time to the last store. So the slots are found while the previous launch is
// still at work, as a guess, and again if that launch moved the sequence on.
constexpr int kFewThreads = 512;  // that move keys, and as many that move values

template <DType kType, int kVector, int kTurns>
__global__ void __launch_bounds__(2 * kFewThreads) append_few_kernel(const AppendParams p, const Tiling tiling) {
  using T = typename Element<kType>::Type;
  let_next_launch_begin();
  const bool is_value = threadIdx.x >= kFewThreads;
  const uint32_t thread = threadIdx.x - (is_value ? kFewThreads : 0);
  const int64_t layer = tiling.entries(blockIdx.x);
  const int64_t entry = blockIdx.x - layer * tiling.entries.divisor;
  const int64_t sequence = sequence_of_entry(p.sequences, entry, p.cache.batch);
  if (sequence < 0) return;
  const Rows<const void*>& rows = is_value ? p.value : p.key;
  const T* source = static_cast<const T*>(rows.data) + layer * rows.layer_stride + entry * rows.batch_stride;
  const int64_t state_row = (p.first_layer + layer) * p.cache.batch + sequence;
  const int64_t row_elements = p.cache.heads * p.cache.head_dim;
  uint16_t* cache = (is_value ? p.cache.v_cache : p.cache.k_cache) + state_row * p.cache.positions * row_elements;
  int64_t* seqlen = p.cache.state + state_row;
  int64_t* first = seqlen + p.cache.layers * p.cache.batch;

  const T* from[kTurns];
  uint16_t* to[kTurns];
  int64_t row[kTurns];  // -1: none
#pragma unroll
  for (int u = 0; u < kTurns; ++u) {
    const uint32_t i = thread + u * kFewThreads;
    row[u] = i / tiling.columns;
    const uint32_t column = i - static_cast<uint32_t>(row[u]) * tiling.columns;
    from[u] = source + row[u] * rows.row_stride + tiling.offset(rows, column);
    to[u] = cache + column * kVector;
    if (row[u] >= p.rows) row[u] = -1;
  }
  int64_t slot[kTurns];
  const auto find_slots = [&](int64_t seqlen_before, int64_t appended) {
    const auto plan = AppendPlanOf<false>::make(seqlen_before, p.rows, appended, p.cache);
#pragma unroll
    for (int u = 0; u < kTurns; ++u) slot[u] = row[u] < 0 ? kPadding : plan.slot(row[u]);
  };
  const SequenceState guess = read_state(seqlen, first);
  find_slots(guess.seqlen, p.rows);
  wait_for_previous_launch();

  const SequenceState now = read_state(seqlen, first);
  Vec<T, kVector> in[kTurns];
#pragma unroll
  for (int u = 0; u < kTurns; ++u) {
    if (row[u] >= 0) in[u] = load<T, kVector>(from[u]);
  }
  const int64_t appended = appended_rows(p, entry);
  if (now.seqlen != guess.seqlen || appended != p.rows) find_slots(now.seqlen, appended);
  uint32_t overflows = 0;
#pragma unroll
  for (int u = 0; u < kTurns; ++u) {
    if (slot[u] == kPadding) continue;
    // Overflows of a row that is not stored count too, as they would if positions were appended one by one.
    const Vec<uint16_t, kVector> out = convert<kType, kVector>(in[u], p.saturate, overflows);
    if (slot[u] >= 0) store<uint16_t, kVector>(to[u] + slot[u] * row_elements, out);
  }
  __syncthreads();  // all threads have read the state
  if (threadIdx.x == 0) {
    const SequenceState next = state_after_append(now, appended, p.cache.all_ring);
    *seqlen = next.seqlen;
    *first = next.first;
  }
  if constexpr (kType != DType::f16) {
    overflows = __reduce_add_sync(0xffffffffu, overflows);
    if (overflows != 0 && threadIdx.x % 32 == 0) {
      atomicAdd(reinterpret_cast<Counter*>(p.overflow_counts + p.first_layer + layer), Counter{overflows});
    }
  }
}

template <DType kType, int kVector, int kThreads, int kUnroll>
__global__ void __launch_bounds__(2 * kThreads) append_kernel(const AppendParams p, const Tiling tiling) {
  using T = typename Element<kType>::Type;
  let_next_launch_begin();
  const BlockPart part = BlockPart::make(tiling, blockIdx.x);
  const bool is_value = threadIdx.x >= kThreads;
  const uint32_t thread = threadIdx.x - (is_value ? kThreads : 0);
  const int64_t layer = tiling.entries(part.matrix);
  const int64_t entry = part.matrix - layer * tiling.entries.divisor;
  const int64_t sequence = sequence_of_entry(p.sequences, entry, p.cache.batch);
  if (sequence < 0) return;

  const Rows<const void*>& rows = is_value ? p.value : p.key;
  const T* source = static_cast<const T*>(rows.data) + layer * rows.layer_stride + entry * rows.batch_stride;
  const int64_t state_row = (p.first_layer + layer) * p.cache.batch + sequence;
  const int64_t row_elements = p.cache.heads * p.cache.head_dim;
  uint16_t* cache = (is_value ? p.cache.v_cache : p.cache.k_cache) + state_row * p.cache.positions * row_elements;
  int64_t* seqlen = p.cache.state + state_row;
  int64_t* first = seqlen + p.cache.layers * p.cache.batch;
  Counter* arrivals = reinterpret_cast<Counter*>(first + p.cache.layers * p.cache.batch);
  wait_for_previous_launch();
  const int64_t appended = appended_rows(p, entry);

  __shared__ AppendPlan shared_plan;
  __shared__ int64_t shared_first_slot;  // of the block's rows, if their slots follow each other; else -1
  SequenceState state{0, 0};
  if (threadIdx.x == 0) {
    state = read_state(seqlen, first);
    const AppendPlan plan = AppendPlan::make(state.seqlen, p.rows, appended, p.cache);
    shared_plan = plan;
    shared_first_slot = plan.run(part.row_begin, part.row_end);
  }

  // Rows are counted from the block's first here. The first are on their way while one thread waits for the state.
  const T* from = source + part.row_begin * rows.row_stride;
  const int row_count = static_cast<int>(part.row_end - part.row_begin);
  const int thread_row = static_cast<int>(thread >> tiling.log2_width);
  const int thread_rows = kThreads >> tiling.log2_width;
  uint32_t column = part.column_begin + (thread & (tiling.width - 1));
  int row0 = thread_row;
  Vec<T, kVector> in[kUnroll];
  const auto load_rows = [&] {
    const T* column_from = from + tiling.offset(rows, column);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = row0 + u * thread_rows;
      if (row < row_count) in[u] = load<T, kVector>(column_from + row * rows.row_stride);
    }
  };
  if (column < part.column_end) load_rows();
  __syncthreads();

  bool last = threadIdx.x == 0;
  if (threadIdx.x == 0 && tiling.blocks.divisor > 1) {
    __threadfence();  // the state was read before this block is counted
    last = atomicAdd(arrivals, Counter{1}) + 1 == tiling.blocks.divisor;
  }

  uint32_t overflows = 0;
  const int64_t run = shared_first_slot;
  if (run >= 0) {
    cache += run * row_elements;
    while (column < part.column_end && row0 < row_count) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int row = row0 + u * thread_rows;
        if (row >= row_count) break;
        const Vec<uint16_t, kVector> out = convert<kType, kVector>(in[u], p.saturate, overflows);
        store<uint16_t, kVector>(cache + row * row_elements + column * kVector, out);
      }
      row0 += kUnroll * thread_rows;
      if (row0 >= row_count) {
        column += tiling.width;
        row0 = thread_row;
        if (column >= part.column_end) break;
      }
      load_rows();
    }
  } else {
    // Where the ring wraps, where rows are padding or overwritten by later ones of the same call.
#pragma unroll 1
    for (; column < part.column_end; column += tiling.width) {
#pragma unroll 1
      for (int row = thread_row; row < row_count; row += thread_rows) {
        const int64_t slot = shared_plan.slot(part.row_begin + row);
        if (slot == kPadding) continue;
        const Vec<T, kVector> one = load<T, kVector>(from + tiling.offset(rows, column) + row * rows.row_stride);
        const Vec<uint16_t, kVector> out = convert<kType, kVector>(one, p.saturate, overflows);
        if (slot >= 0) store<uint16_t, kVector>(cache + slot * row_elements + column * kVector, out);
      }
    }
  }
  if constexpr (kType != DType::f16) {
    overflows = __reduce_add_sync(0xffffffffu, overflows);
    if (overflows != 0 && threadIdx.x % 32 == 0) {
      atomicAdd(reinterpret_cast<Counter*>(p.overflow_counts + p.first_layer + layer), Counter{overflows});
    }
  }

  if (last) {
    if (tiling.blocks.divisor > 1) {
      __threadfence();  // every block's reads of the state come before these writes
      *arrivals = 0;
    }
    const SequenceState next = state_after_append(state, appended, p.cache.all_ring);
    *seqlen = next.seqlen;
    *first = next.first;
  }
}

template <DType kType, int kVector, int kThreads, int kUnroll>
cudaError_t launch(const AppendParams& p, int turns, cudaStream_t stream) {
  Tiling tiling;
  int64_t grid;
  const int64_t entries = p.sequences.entries(p.cache.batch);
  if (!Tiling::make(tiling, p.rows, p.cache.heads, p.cache.head_dim, kVector, kThreads, kUnroll, turns,
                    p.layer_count * entries, entries, grid)) {
    return cudaErrorInvalidConfiguration;
  }
  PdlLaunch launch(grid, 2 * kThreads, 0, stream);
  return cudaLaunchKernelEx(&launch.config, append_kernel<kType, kVector, kThreads, kUnroll>, p, tiling);
}

template <DType kType, int kVector, int kTurns>
cudaError_t launch_few(const AppendParams& p, cudaStream_t stream) {
  Tiling tiling;
  int64_t grid;
  const int64_t entries = p.sequences.entries(p.cache.batch);
  if (!Tiling::make(tiling, p.rows, p.cache.heads, p.cache.head_dim, kVector, kFewThreads, 1, kTurns,
                    p.layer_count * entries, entries, grid)) {
    return cudaErrorInvalidConfiguration;
  }
  PdlLaunch launch(p.layer_count * entries, 2 * kFewThreads, 0, stream);
  return cudaLaunchKernelEx(&launch.config, append_few_kernel<kType, kVector, kTurns>, p, tiling);
}

// A call of fewer vectors (of eight elements, 16 bytes of the cache) spreads them over many blocks, one to a thread,
// for latency. In a call of more, a thread takes two at a time and two turns, for bandwidth.
constexpr int64_t kManyVectors = int64_t{1} << 17;

template <DType kType>
cudaError_t launch_for(const AppendParams& p, cudaStream_t stream) {
  constexpr int kVector = 8;
  if (!allows_vectors(p.cache, p.key, kVector, dtype_size(kType)) ||
      !allows_vectors(p.cache, p.value, kVector, dtype_size(kType))) {
    return launch<kType, 1, 128, 4>(p, 1, stream);
  }
  const int64_t vectors = p.rows * p.cache.heads * (p.cache.head_dim / kVector);
  const bool few = p.cache.share.is_all();  // the other kernel serves shares
  if (few && vectors <= kFewThreads) return launch_few<kType, kVector, 1>(p, stream);
  if (few && vectors <= 2 * kFewThreads) return launch_few<kType, kVector, 2>(p, stream);
  return vectors * p.layer_count * p.sequences.entries(p.cache.batch) < kManyVectors
             ? launch<kType, kVector, 128, 1>(p, 1, stream)
             : launch<kType, kVector, 128, 2>(p, 2, stream);
}

}  // namespace

cudaError_t launch_append(const AppendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  switch (p.dtype) {
    case DType::f32: return launch_for<DType::f32>(p, stream);
    case DType::f16: return launch_for<DType::f16>(p, stream);
    case DType::bf16: return launch_for<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace kvc
