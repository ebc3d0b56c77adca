// What the attention kernels share: how a launch is divided, elements of any dtype, the new row of an append, the
// state's advance, and the merging of partials.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "../divide.h"
#include "../mma.cuh"
#include "../pdl.cuh"
#include "../vec.cuh"
#include "../visibility.h"
#include "schedule.h"
#include "softmax.cuh"

namespace kvc {

using Counter = unsigned long long;

// The current device, as schedule.h takes it.
inline cudaError_t current_gpu(Gpu& gpu) {
  int device = 0;
  int multiprocessors = 0;
  int shared_bytes = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&gpu.major, cudaDevAttrComputeCapabilityMajor, device);
  gpu.multiprocessors = multiprocessors;
  gpu.shared_bytes = shared_bytes;
  return error;
}

// How a launch is divided (schedule.h). A unit is a query tile of a KV head of an entry. Blocks that run at the same
// time take neighbouring units and the same rows, so that what they read lies together.
struct Division {
  FastDivider units;       // block b is split b / units of unit b % units
  FastDivider tiles;       // query tiles of a KV head
  FastDivider heads;       // KV heads
  FastDivider group_size;  // query heads to a KV head
  FastDivider splits;      // blocks that share the rows of a unit, at most
  uint32_t most_each;      // few_queries.cu: turns that each of them has, at most

  static Division of(const AttendShape& shape, int64_t units, int64_t splits, int64_t most_each = 0) {
    return {FastDivider::by(static_cast<uint32_t>(units)),
            FastDivider::by(static_cast<uint32_t>(units / shape.sequence_heads())),
            FastDivider::by(static_cast<uint32_t>(shape.kv_heads)),
            FastDivider::by(static_cast<uint32_t>(shape.group)),
            FastDivider::by(static_cast<uint32_t>(splits)),
            static_cast<uint32_t>(most_each)};
  }
};

// The same number, of which the compiler does not know that. What is computed with it is computed anew, where else it
// would wait in registers, or be spilled, since the compiler computed the same before.
__device__ __forceinline__ uint32_t anew(uint32_t x) {
  asm volatile("" : "+r"(x));
  return x;
}

struct BlockUnit {
  uint32_t unit;
  uint32_t split;
  uint32_t tile;  // the query tile
  uint32_t entry;
  int64_t sequence;  // of the entry; -1: none, which holds nothing and gets nothing
  int64_t head;      // the KV head

  static __device__ __forceinline__ BlockUnit of(const AttendParams& p, const Division& division, uint32_t block) {
    BlockUnit b;
    b.split = division.units(block);
    b.unit = block - b.split * division.units.divisor;
    const uint32_t sequence_head = division.tiles(b.unit);
    b.tile = b.unit - sequence_head * division.tiles.divisor;
    b.entry = division.heads(sequence_head);
    b.head = sequence_head - b.entry * division.heads.divisor;
    b.sequence = sequence_of_entry(p.sequences, b.entry, p.cache.batch);
    return b;
  }
  // Elements from the start of the cache's keys to the first of this head's.
  __device__ __forceinline__ int64_t cache_offset(const AttendParams& p) const {
    const int64_t sequence_heads = (p.layer * p.cache.batch + imax(sequence, 0)) * p.cache.positions * p.cache.heads;
    return (sequence_heads + head) * p.cache.head_dim;
  }
};

__device__ __forceinline__ float load_as_float(const void* data, int64_t i, DType type) {
  if (type == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == DType::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

// kCount elements as FP32; zeros from number `held` on. All are loaded before the first is used.
template <int kCount>
__device__ __forceinline__ void load_floats(const void* data, int64_t offset, DType type, int held,
                                            float (&x)[kCount]) {
  if (type == DType::f32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = i < held ? static_cast<const float*>(data)[offset + i] : 0.0f;
    return;
  }
  uint16_t bits[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) bits[i] = i < held ? static_cast<const uint16_t*>(data)[offset + i] : uint16_t{0};
#pragma unroll
  for (int i = 0; i < kCount; ++i) x[i] = type == DType::f16 ? half_to_float(bits[i]) : bf16_to_float(bits[i]);
}

__device__ __forceinline__ void store_float(void* data, int64_t i, DType type, float x) {
  if (type == DType::f32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = type == DType::f16 ? float_to_half(x) : float_to_bf16(x);
  }
}

// An element of a new key or value, as it is stored.
__device__ __forceinline__ uint16_t stored_element(const void* data, int64_t i, DType type, bool saturate,
                                                   uint32_t& overflows) {
  if (type == DType::f16) return static_cast<const uint16_t*>(data)[i];
  return stored_half(load_as_float(data, i, type), saturate, overflows);
}

// New rows of a head in the call's own tensor. Functions that are not inlined take it by value: a kernel's parameters
// are slow to read through a reference.
struct NewRows {
  const void* data;
  int64_t offset;      // of the sequence's head
  int64_t row_stride;  // in elements
  DType dtype;
  bool saturate;

  __device__ __forceinline__ NewRows(const AppendParams& p, const Rows<const void*>& rows, const BlockUnit& block)
      : data(rows.data),
        offset(block.entry * rows.batch_stride + block.head * rows.head_stride),
        row_stride(rows.row_stride),
        dtype(p.dtype),
        saturate(p.saturate) {}
};

// Eight elements of a new row, as they are stored. Overflows are counted elsewhere, where the row is stored.
__device__ __forceinline__ Vec<uint16_t, 8> new_chunk(const NewRows& rows, int64_t row, int d) {
  const int64_t offset = rows.offset + row * rows.row_stride + d;
  Vec<uint16_t, 8> elements;
  if (rows.dtype == DType::f16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) elements.x[j] = static_cast<const uint16_t*>(rows.data)[offset + j];
    return elements;
  }
  float x[8];
  load_floats(rows.data, offset, rows.dtype, 8, x);
  uint32_t counted_elsewhere = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) elements.x[j] = stored_half(x[j], rows.saturate, counted_elsewhere);
  return elements;
}

static __device__ __noinline__ float capped(float score, float softcap) {
  return softcap * tanhf(score / softcap) * kLog2e;
}

// Writes the elements d to d + 3 of a query's output. `number`: of the query, among those that share its KV head.
__device__ __forceinline__ void write_output(const AttendParams& p, const Division& division, const BlockUnit& block,
                                             uint32_t number, uint32_t d, SoftmaxState state,
                                             const Vec<float, 4>& sums) {
  const uint32_t t = division.group_size(number);
  const int64_t query_head = block.head * division.group_size.divisor + (number - t * division.group_size.divisor);
  const int64_t offset = block.entry * p.out.batch_stride + t * p.out.row_stride + query_head * p.out.head_stride + d;
  const float factor = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
  if (p.out_dtype == DType::f32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) static_cast<float*>(p.out.data)[offset + i] = sums.x[i] * factor;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) store_float(p.out.data, offset + i, p.out_dtype, sums.x[i] * factor);
  }
  if (p.lse != nullptr && d == 0) {
    p.lse[(block.entry * p.rows + t) * p.query_heads + query_head] =
        state.sum == 0.0f ? minus_infinity() : state.max * kLn2 + logf(state.sum);
  }
}

// Stores the new row of a head; one block of each head does so. No query of this call sees its slot: it is empty, or
// holds the position that the append evicts.
__device__ __forceinline__ void store_new_row(const AttendParams& p, const BlockUnit& block, uint16_t* key,
                                              uint16_t* value) {
  const int head_dim = static_cast<int>(p.cache.head_dim);
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < 2 * head_dim; i += static_cast<int>(blockDim.x)) {
    const bool is_value = i >= head_dim;
    const int d = is_value ? i - head_dim : i;
    const Rows<const void*>& rows = is_value ? p.append.value : p.append.key;
    uint32_t overflows = 0;
    (is_value ? value : key)[d] =
        stored_element(rows.data, block.entry * rows.batch_stride + block.head * rows.head_stride + d, p.append.dtype,
                       p.append.saturate, overflows);
    if (overflows != 0) atomicAdd(reinterpret_cast<Counter*>(p.append.overflow_counts + p.layer), Counter{1});
  }
}

// Rows that all queries from the oldest to the newest see.
struct RowRange {
  int64_t begin;
  int64_t end;
};

// A function of its own, as one query has no need of it.
static __device__ __noinline__ RowRange fully_visible_rows(const AttendPlan* plan, int64_t oldest_query,
                                                           int64_t newest_query) {
  const int64_t past_oldest = plan->past(oldest_query);
  if (oldest_query < plan->padding || past_oldest < plan->sinks_held) return {0, 0};
  return {plan->sinks_held + imax(plan->oldest_for(newest_query) - plan->oldest, 0),
          plan->sinks_held + imax(past_oldest - plan->oldest, 0)};
}

// Key tiles of which every query of a block sees every row; `first` and `last` of its queries. `plan` lies in shared
// memory.
template <int kTileRows>
__device__ __forceinline__ TileRange fully_visible_tiles(const AttendParams& p, const Division& division,
                                                         const AttendPlan& plan, uint32_t first, uint32_t last) {
  if (p.rows == 1) return {0, static_cast<uint32_t>(plan.count / kTileRows)};
  const int64_t oldest_query = division.group_size(first);
  const int64_t newest_query = division.group_size(last);
  const RowRange rows = fully_visible_rows(&plan, oldest_query, newest_query);
  return {static_cast<uint32_t>((rows.begin + kTileRows - 1) / kTileRows),
          static_cast<uint32_t>(imin(plan.count, rows.end) / kTileRows)};
}

// Advances the state of a sequence when all of its blocks have read it. One thread of each block counts it in, after a
// barrier. The thread that was the last writes the new state later, when it no longer matters how long that takes.
struct StateAdvance {
  Counter arrived = 0;

  static __device__ __forceinline__ bool counts(const AttendParams& p, const BlockUnit& block) {
    return block.sequence >= 0 && p.appends && p.rows == 1 && threadIdx.x == blockDim.x - 1;
  }
  // Where the state lies: the sequence's seqlen, and so much further on `first`, and as far again the arrivals.
  static __device__ __forceinline__ int64_t* place(const AttendParams& p, const BlockUnit& block) {
    return p.cache.state + p.layer * p.cache.batch + block.sequence;
  }
  static __device__ __forceinline__ int64_t stride(const AttendParams& p) { return p.cache.layers * p.cache.batch; }
  static __device__ __forceinline__ Counter* arrivals(const AttendParams& p, const BlockUnit& block) {
    return reinterpret_cast<Counter*>(place(p, block) + 2 * stride(p));
  }
  // volatile keeps these loads out of the read-only cache.
  static __device__ __forceinline__ SequenceState read(const AttendParams& p, const BlockUnit& block) {
    if (block.sequence < 0) return empty_state(p.cache.all_sinks);
    const volatile int64_t* const state = place(p, block);
    return {state[0], state[stride(p)]};
  }
  __device__ __forceinline__ void all_have_read(const AttendParams& p, const BlockUnit& block) {
    if (counts(p, block)) arrived = arrive_relaxed(arrivals(p, block));
  }
  __device__ __forceinline__ void finish(const AttendParams& p, const Division& division, const BlockUnit& block,
                                         SequenceState before, int64_t appended) const {
    const Counter all = Counter{division.splits.divisor} * division.tiles.divisor * division.heads.divisor;
    if (!counts(p, block) || arrived + 1 != all) return;
    const SequenceState next = state_after_append(before, appended, p.cache.all_ring);
    place(p, block)[0] = next.seqlen;
    place(p, block)[stride(p)] = next.first;
    *arrivals(p, block) = 0;
  }
};

// Partials in the workspace that the last block to arrive merges.
struct MergeStep {
  float* partials;
  uint32_t stride;   // from one to the next, in floats
  uint32_t count;    // of partials, each a block's
  uint32_t* ticket;  // counts the blocks
};

// Ends a unit: merges the block's own partials, `own`, which lie in shared memory. With one split that is the output.
// Else it is the split's partial and goes to the workspace; the last block of the unit to arrive merges those of all
// `splits`. (16 queries and many splits: the last of a group of splits does so, then the last of these,
// merged_together.) It copies them to `room`, shared memory for `room_floats`, at least two partials, as many at a time
// as fit. What those come to takes the place of the last of them, and is the first of the next round.
// `resolve(number, d, state, sums)` may change the sums of an output before it is written. It is null if infinite sums
// are kept, see merge_partials.
template <int kWidth, int kQueries, typename Resolve>
__device__ __forceinline__ void finish_unit(const AttendParams& p, const Division& division, const BlockUnit& block,
                                            uint32_t splits, uint32_t first_query, uint32_t queries,
                                            const Partials& own, bool& shared_last, float* room, uint32_t room_floats,
                                            const Resolve& resolve) {
  constexpr uint32_t kFloats = kPartialFloats<kWidth, kQueries>;
  constexpr bool kInGroups = kQueries > 8;  // smaller partials are soon merged, and the code for groups costs time
  float* const of_unit = p.partials + static_cast<int64_t>(block.unit) * division.splits.divisor * kFloats;
  const uint32_t fit = room_floats / kFloats;
  const uint32_t units = division.units.divisor;
  MergeStep step = {of_unit, kFloats, splits, p.tickets + block.unit};  // the last
  const uint32_t each = kInGroups ? merged_together(splits, units, kFloats) : splits;
  if (kInGroups && each < splits) {
    const uint32_t group = block.split / each;
    const uint32_t rest = splits - group * each;
    step = {of_unit + group * each * kFloats, kFloats, rest < each ? rest : each,
            p.tickets + ticket_of_group(units, block.unit, group)};
  }
  uint32_t first = 0;   // of the step's partials that have not been merged
  bool arrives = true;  // one of them is this block's
  Partials partials = own;
  float* merged = splits == 1 ? nullptr : of_unit + block.split * kFloats;  // where they go; null: they are the output
#pragma unroll 1
  for (;;) {
    merge_partials<kWidth, std::is_null_pointer_v<Resolve>>(
        partials, queries, static_cast<uint32_t>(p.cache.head_dim),
        [&](uint32_t m, uint32_t d, SoftmaxState state, Vec<float, 4>& sums) {
          if (merged == nullptr) {
            if constexpr (!std::is_null_pointer_v<Resolve>) resolve(first_query + m, d, state, sums);
            write_output(p, division, block, first_query + m, d, state, sums);
            return;
          }
          store<float, 4>(merged + m * kWidth + d, sums);
          if (d == 0) store<float, 2>(merged + kQueries * kWidth + 2 * m, {state.max, state.sum});
        });
    if (merged == nullptr) return;
    __syncthreads();
    if (arrives) {
      if (threadIdx.x == 0) {
        shared_last = arrive_release(step.ticket) + 1 == step.count;
        if (shared_last) {
          acquire_fence();
          *step.ticket = 0;
        }
      }
      __syncthreads();
      if (!shared_last) return;
      arrives = false;
    }
    const uint32_t now = step.count - first < fit ? step.count - first : fit;
#pragma unroll 1
    for (uint32_t i = threadIdx.x * 4; i < now * kFloats; i += blockDim.x * 4) {
      const uint32_t gaps = kInGroups ? i / kFloats * (step.stride - kFloats) : 0;
      copy_async(room + i, step.partials + first * step.stride + i + gaps, true);
    }
    end_copy_group();
    wait_for_copies<0>();
    __syncthreads();
    partials = {room + kQueries * kWidth, room, kFloats, kFloats, kWidth, now};
    first += now - 1;
    if (first + 1 < step.count) {
      merged = step.partials + first * step.stride;
    } else if (!kInGroups || step.count == splits || step.stride > kFloats) {
      merged = nullptr;
    } else {  // of the groups' results one is this block's now
      merged = step.partials;
      step = {of_unit, each * kFloats, (splits + each - 1) / each, p.tickets + block.unit};
      first = 0;
      arrives = true;
    }
  }
}

}  // namespace kvc
