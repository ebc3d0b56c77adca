// decode attention: softmax(scale * Q K^T) V for a few queries of each sequence, over FP16 keys and values as they lie
// in the cache, in FP32; and, in the same launch, the append of one new position.
//
// Grid: for each sequence and KV head, and each `kQueries` of the queries that share it (a group's heads times T), the
// same number of blocks, `splits`; each takes an even share of the rows that the queries see (attend.h), which is known
// on the device alone. A block has 8 warps. A row of K or V is read by a group of 8, 16 or 32 lanes, 16 bytes a lane
// (two times that for head_dim over 256), and a group takes every 8 * groups-th row, two or four rows at a time, their
// K and V loads in flight together. Each group keeps a running maximum, sum and weighted sum of its rows (online
// softmax: Milakov and Gimelshein, 2018); groups, then warps, then the splits of a head are merged in a fixed order
// (flash decoding: Dao et al., 2023), the last by whichever block of the head is the last to sign in.
//
// With `appends`, rows past the cached ones come from the call's own keys and values, rounded to FP16 on the way, so
// that the answer is bit for bit what attending after the append gives. For T = 1 the group that reads the new row also
// stores it: its slot is that of the position which the append evicts, which nobody reads. The state is advanced as in
// append.cu. For T > 1 the caller appends afterwards.
#include "attend.h"
#include "launch.h"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;

using Counter = unsigned long long;

__device__ __forceinline__ float minus_infinity() { return bits_float(0xff800000u); }

// A running softmax of some rows for one query: weights 2^(score - max).
struct Running {
  float max;
  float sum;
};

// What to multiply two states by when they become one: exact zeros for states of no rows.
__device__ __forceinline__ float merge_weight(float max, float merged_max) {
  return max == minus_infinity() ? 0.0f : exp2f(max - merged_max);
}

// Exponents are taken relative to this: the maximum, or 0 while there is none.
__device__ __forceinline__ float exponent_base(float max) { return max == minus_infinity() ? 0.0f : max; }

// The larger, or NaN if either is: a NaN among the scores must reach the answer.
__device__ __forceinline__ float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

__device__ __forceinline__ float load_as_float(const void* data, int64_t i, DType type) {
  if (type == DType::f32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == DType::f16 ? half_to_float(bits) : bf16_to_float(bits);
}

__device__ __forceinline__ void store_float(void* data, int64_t i, DType type, float x) {
  if (type == DType::f32) {
    static_cast<float*>(data)[i] = x;
  } else {
    static_cast<uint16_t*>(data)[i] = type == DType::f16 ? float_to_half(x) : float_to_bf16(x);
  }
}

// Eight elements of a new key or value, as they are stored.
__device__ __forceinline__ Vec<uint16_t, 8> stored_eight(const AppendParams& p, const Rows<const void*>& rows,
                                                         int64_t offset, uint32_t& overflows) {
  Vec<uint16_t, 8> out;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (p.dtype == DType::f32) {
      out.x[i] = stored_half(static_cast<const float*>(rows.data)[offset + i], p.saturate, overflows);
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(rows.data)[offset + i];
      out.x[i] = p.dtype == DType::f16 ? bits : stored_half(bf16_to_float(bits), p.saturate, overflows);
    }
  }
  return out;
}

// The answer's element d of one query, number `number` of those that share a KV head.
__device__ __forceinline__ void write_answer(const AttendParams& p, int64_t sequence, int64_t head, int64_t number,
                                             int64_t d, Running state, float value) {
  const int64_t group_size = p.query_heads / p.cache.heads;
  if (number >= group_size * p.rows) return;
  const int64_t query = number / group_size;
  const int64_t query_head = head * group_size + number % group_size;
  const float answer = state.sum == 0.0f ? 0.0f : value / state.sum;
  store_float(p.out.data, sequence * p.out.batch_stride + query * p.out.row_stride + query_head * p.out.head_stride + d,
              p.dtype, answer);
  if (p.lse != nullptr && d == 0) {
    p.lse[(sequence * p.rows + query) * p.query_heads + query_head] =
        state.sum == 0.0f ? minus_infinity() : state.max * kLn2 + logf(state.sum);
  }
}

// kLanes: lanes that read a row. kParts: 16-byte parts of a row that each of them reads. kQueries: queries of a block.
// kMasked: T > 1, where the queries of a block see different rows.
template <int kLanes, int kParts, int kQueries, bool kMasked>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const AttendParams p, const uint32_t splits, const uint32_t tiles) {
  constexpr int kGroups = 32 / kLanes;                                             // rows a warp reads at a time
  constexpr int kElements = 8 * kParts;                                            // of a row, a lane's
  constexpr int kRowsInFlight = kQueries * kElements >= 64 || kParts > 1 ? 2 : 4;  // as registers allow
  constexpr int kWidth = kLanes * kElements;  // the largest head_dim of this instance

  // Which block this is.
  const uint32_t split = blockIdx.x % splits;
  const uint32_t unit = blockIdx.x / splits;  // (sequence, KV head, tile of queries)
  const uint32_t tile = unit % tiles;
  const int64_t head = unit / tiles % static_cast<uint32_t>(p.cache.heads);
  const int64_t sequence = unit / tiles / static_cast<uint32_t>(p.cache.heads);
  const int64_t group_size = p.query_heads / p.cache.heads;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int lane_in_row = lane % kLanes;
  const int group = lane / kLanes;
  const int64_t head_dim = p.cache.head_dim;

  // Where the sequence stands. With an append in this launch, the last block of the sequence to sign in moves it on.
  const int64_t entry = p.layer * p.cache.batch + sequence;
  int64_t* seen = p.cache.state + entry;
  int64_t* first = seen + p.cache.layers * p.cache.batch;
  const bool stores = p.appends && p.rows == 1;
  __shared__ AttendPlan shared_plan;
  if (threadIdx.x == 0) {
    const SequenceState state{*const_cast<volatile int64_t*>(seen), *const_cast<volatile int64_t*>(first)};
    shared_plan = AttendPlan::make(p, sequence, state);
    if (stores) {
      Counter* arrivals = reinterpret_cast<Counter*>(first + p.cache.layers * p.cache.batch);
      __threadfence();  // the state was read before this block signs in
      const Counter blocks = static_cast<Counter>(splits) * tiles * p.cache.heads;
      if (atomicAdd(arrivals, Counter{1}) + 1 == blocks) {
        __threadfence();
        const SequenceState next =
            state_after_append(state, shared_plan.total - shared_plan.seen, p.cache.ring.divisor);
        *seen = next.seen;
        *first = next.first;
        *arrivals = 0;
      }
    }
  }

  // This lane's part of the queries, scaled so that scores are powers of two.
  float q[kQueries][kElements];
  int64_t query_of[kQueries];  // t of each, or -1 past the last
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    const int64_t number = static_cast<int64_t>(tile) * kQueries + m;
    const bool real = number < group_size * p.rows;
    query_of[m] = real ? number / group_size : -1;
    const int64_t query_head = head * group_size + (real ? number % group_size : 0);
    const int64_t offset = sequence * p.query.batch_stride + (real ? query_of[m] : 0) * p.query.row_stride +
                           query_head * p.query.head_stride;
    const float factor = p.softcap > 0 ? p.scale : p.scale * kLog2e;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const int64_t d = (i / 8 * kLanes + lane_in_row) * 8 + i % 8;
      q[m][i] = real && d < head_dim ? load_as_float(p.query.data, offset + d, p.dtype) * factor : 0.0f;
    }
  }
  __syncthreads();
  const AttendPlan plan = shared_plan;

  // This block's rows.
  const int64_t begin = plan.count * split / splits;
  const int64_t end = plan.count * (split + 1) / splits;

  Running running[kQueries];
  float acc[kQueries][kElements];
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
    running[m] = {minus_infinity(), 0.0f};
#pragma unroll
    for (int i = 0; i < kElements; ++i) acc[m][i] = 0.0f;
  }

  const int64_t layer_offset = entry * p.cache.positions * p.cache.heads * head_dim + head * head_dim;
  const uint16_t* keys = p.cache.k_cache + layer_offset;
  const uint16_t* values = p.cache.v_cache + layer_offset;
  const int64_t row_elements = p.cache.heads * head_dim;
  uint32_t overflows = 0;

  constexpr int kStep = kWarps * kGroups;
  for (int64_t row0 = begin + warp * kGroups + group; row0 < end + group; row0 += kStep * kRowsInFlight) {
    Vec<uint16_t, 8> k[kRowsInFlight][kParts];
    Vec<uint16_t, 8> v[kRowsInFlight][kParts];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
      const int64_t row = row0 + r * kStep;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int64_t d = (part * kLanes + lane_in_row) * 8;
        k[r][part] = {};
        v[r][part] = {};
        if (row >= end || d >= head_dim) continue;
        if (row < plan.cached) {
          const int64_t offset = plan.slot(row) * row_elements + d;
          k[r][part] = load<uint16_t, 8>(keys + offset);
          v[r][part] = load<uint16_t, 8>(values + offset);
        } else {
          const AppendParams& a = p.append;
          const int64_t input = plan.input_row(row);
          const int64_t key_offset =
              sequence * a.key.batch_stride + input * a.key.row_stride + head * a.key.head_stride + d;
          const int64_t value_offset =
              sequence * a.value.batch_stride + input * a.value.row_stride + head * a.value.head_stride + d;
          uint32_t over = 0;
          k[r][part] = stored_eight(a, a.key, key_offset, over);
          v[r][part] = stored_eight(a, a.value, value_offset, over);
          if (stores && tile == 0) {
            const int64_t offset = plan.slot(row) * row_elements + d;
            store<uint16_t, 8>(p.cache.k_cache + layer_offset + offset, k[r][part]);
            store<uint16_t, 8>(p.cache.v_cache + layer_offset + offset, v[r][part]);
            overflows += over;
          }
        }
      }
    }
    // Scores: each lane's part of every dot product, then the sum over the lanes of a row.
    float score[kRowsInFlight][kQueries];
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int m = 0; m < kQueries; ++m) score[r][m] = 0.0f;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float x = half_to_float(k[r][i / 8].x[i % 8]);
#pragma unroll
        for (int m = 0; m < kQueries; ++m) score[r][m] = fmaf(q[m][i], x, score[r][m]);
      }
#pragma unroll
      for (int m = 0; m < kQueries; ++m) {
#pragma unroll
        for (int distance = kLanes / 2; distance > 0; distance /= 2) {
          score[r][m] += __shfl_xor_sync(0xffffffffu, score[r][m], distance);
        }
      }
    }
    // Weights, and what they are the weights of.
    bool visible[kRowsInFlight][kQueries];
#pragma unroll
    for (int m = 0; m < kQueries; ++m) {
      float max = running[m].max;
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        const int64_t row = row0 + r * kStep;
        visible[r][m] = row < end && (!kMasked || (query_of[m] >= 0 && plan.sees(query_of[m], row)));
        if (p.softcap > 0) score[r][m] = p.softcap * tanhf(score[r][m] / p.softcap) * kLog2e;
        if (visible[r][m]) max = max_or_nan(max, score[r][m]);
      }
      const float rescale = merge_weight(running[m].max, max);
      running[m].max = max;
      running[m].sum *= rescale;
#pragma unroll
      for (int i = 0; i < kElements; ++i) acc[m][i] *= rescale;
#pragma unroll
      for (int r = 0; r < kRowsInFlight; ++r) {
        score[r][m] = visible[r][m] ? exp2f(score[r][m] - exponent_base(max)) : 0.0f;
        running[m].sum += score[r][m];
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsInFlight; ++r) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const float x = half_to_float(v[r][i / 8].x[i % 8]);
#pragma unroll
        for (int m = 0; m < kQueries; ++m) {
          // A row that a query does not see may hold anything, NaN too: zero times it must not count.
          if (!kMasked || visible[r][m]) acc[m][i] = fmaf(score[r][m], x, acc[m][i]);
        }
      }
    }
  }
  if (stores) {
    overflows = __reduce_add_sync(0xffffffffu, overflows);
    if (overflows != 0 && lane == 0) {
      atomicAdd(reinterpret_cast<Counter*>(p.append.overflow_counts + p.layer), Counter{overflows});
    }
  }

  // The groups of a warp become one.
#pragma unroll
  for (int m = 0; m < kQueries; ++m) {
#pragma unroll
    for (int distance = kLanes; distance < 32; distance *= 2) {
      const float other_max = __shfl_xor_sync(0xffffffffu, running[m].max, distance);
      const float other_sum = __shfl_xor_sync(0xffffffffu, running[m].sum, distance);
      const float max = max_or_nan(running[m].max, other_max);
      const float mine = merge_weight(running[m].max, max);
      const float others = merge_weight(other_max, max);
      running[m] = {max, running[m].sum * mine + other_sum * others};
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        acc[m][i] = acc[m][i] * mine + __shfl_xor_sync(0xffffffffu, acc[m][i], distance) * others;
      }
    }
  }

  // The warps become one: every thread takes some elements of the answer.
  __shared__ float shared_acc[kWarps][kQueries][kWidth];
  __shared__ Running shared_running[kWarps][kQueries];
  if (group == 0) {
#pragma unroll
    for (int m = 0; m < kQueries; ++m) {
      if (lane == 0) shared_running[warp][m] = running[m];
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        shared_acc[warp][m][(i / 8 * kLanes + lane_in_row) * 8 + i % 8] = acc[m][i];
      }
    }
  }
  __syncthreads();
  const int64_t partial_size = kQueries * (head_dim + 2);
  float* partial = p.partials + (static_cast<int64_t>(unit) * splits + split) * partial_size;
  for (int64_t e = threadIdx.x; e < kQueries * head_dim; e += kThreads) {
    const int m = static_cast<int>(e / head_dim);
    const int64_t d = e - m * head_dim;
    Running merged = {minus_infinity(), 0.0f};
    for (int w = 0; w < kWarps; ++w) merged.max = max_or_nan(merged.max, shared_running[w][m].max);
    float value = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      const float weight = merge_weight(shared_running[w][m].max, merged.max);
      merged.sum += shared_running[w][m].sum * weight;
      value += shared_acc[w][m][d] * weight;
    }
    if (splits == 1) {
      write_answer(p, sequence, head, tile * kQueries + m, d, merged, value);
    } else {
      partial[e] = value;
      if (d == 0) {
        partial[kQueries * head_dim + 2 * m] = merged.max;
        partial[kQueries * head_dim + 2 * m + 1] = merged.sum;
      }
    }
  }
  if (splits == 1) return;

  // The last block of these queries merges what all of them left, in the order of the splits.
  __shared__ bool shared_last;
  __threadfence();  // this thread's part is in memory before the block signs in
  __syncthreads();
  if (threadIdx.x == 0) shared_last = atomicAdd(p.tickets + unit, 1u) + 1 == splits;
  __syncthreads();
  if (!shared_last) return;
  __threadfence();  // and read after
  const volatile float* partials = p.partials + static_cast<int64_t>(unit) * splits * partial_size;
  for (int64_t e = threadIdx.x; e < kQueries * head_dim; e += kThreads) {
    const int m = static_cast<int>(e / head_dim);
    const int64_t d = e - m * head_dim;
    const volatile float* states = partials + kQueries * head_dim + 2 * m;
    Running merged = {minus_infinity(), 0.0f};
    for (uint32_t s = 0; s < splits; ++s) merged.max = max_or_nan(merged.max, states[s * partial_size]);
    float value = 0.0f;
    for (uint32_t s = 0; s < splits; ++s) {
      const float weight = merge_weight(states[s * partial_size], merged.max);
      merged.sum += states[s * partial_size + 1] * weight;
      value += partials[s * partial_size + e] * weight;
    }
    write_answer(p, sequence, head, tile * kQueries + m, d, merged, value);
  }
  if (threadIdx.x == 0) p.tickets[unit] = 0;
}

// Blocks that fill the GPU twice over: enough loads in flight, and each head's work still in few pieces.
constexpr int kBlocksPerMultiprocessor = 2;
// A split of fewer rows than this is not worth its merge.
constexpr int64_t kRowsPerSplit = 64;

template <int kLanes, int kParts, int kQueries, bool kMasked>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return error;
  // The split depends on shapes alone, so that a call's answer does not depend on how it came to its lengths.
  const int64_t queries = p.rows * (p.query_heads / p.cache.heads);
  const int64_t tiles = (queries + kQueries - 1) / kQueries;
  const int64_t units = p.cache.batch * p.cache.heads * tiles;
  const int64_t room = p.partial_floats / (units * kQueries * (p.cache.head_dim + 2));
  int64_t splits = kBlocksPerMultiprocessor * multiprocessors / units;
  splits = imin(splits, imin(room, (p.cache.positions + kRowsPerSplit - 1) / kRowsPerSplit));
  splits = units > kAttendTickets ? 1 : imax(splits, 1);
  if (units * splits >= (int64_t{1} << 31)) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(units * splits));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, attend_kernel<kLanes, kParts, kQueries, kMasked>, p, static_cast<uint32_t>(splits),
                            static_cast<uint32_t>(tiles));
}

// The instance for a number of queries that share a KV head. kMost: of a block at most, for registers and shared
// memory.
template <int kLanes, int kParts, int kMost>
cudaError_t launch_for(const AttendParams& p, cudaStream_t stream) {
  const int64_t queries = p.rows * (p.query_heads / p.cache.heads);
  if (p.rows > 1) return launch < kLanes, kParts, kMost<4 ? kMost : 4, true>(p, stream);
  if (queries == 1) return launch<kLanes, kParts, 1, false>(p, stream);
  if (queries == 2) return launch<kLanes, kParts, 2, false>(p, stream);
  if (queries <= 4) return launch < kLanes, kParts, kMost<4 ? kMost : 4, false>(p, stream);
  return launch<kLanes, kParts, kMost, false>(p, stream);
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  if (p.cache.head_dim <= 64) return launch_for<8, 1, 8>(p, stream);
  if (p.cache.head_dim <= 128) return launch_for<16, 1, 8>(p, stream);
  if (p.cache.head_dim <= 256) return launch_for<32, 1, 4>(p, stream);
  if (p.cache.head_dim <= 512) return launch_for<32, 2, 2>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace kvc
