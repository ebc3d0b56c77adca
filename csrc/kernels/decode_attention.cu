// decode attention: softmax(scale * Q K^T) V for a few queries of each sequence, over FP16 keys and values as they lie
// in the cache, in FP32; and, in the same launch, the append of one new position.
//
// Grid: for each sequence and KV head, and each kQueries of the queries that share it (a group's heads times T), the
// same number of blocks, `splits`; each takes an even share of the rows that the queries see (attend.h), which is known
// on the device alone. Every warp of a block works by itself on every so many'th tile of 16 rows: it copies tiles into
// its own ring of shared memory, some ahead of the one it works on, and multiplies them on tensor cores, so that
// 4 * kTiles queries read a row once. Each warp keeps a running maximum, sum and weighted sum (online softmax: Milakov
// and Gimelshein, 2018); warps, then the splits of a head are merged in a fixed order (flash decoding: Dao et al.,
// 2023), the last by whichever block of the head is the last to sign in.
//
// Tensor cores take FP16, the queries and the weights are FP32: each is two columns of the operand, a high part and
// what it lacks times 2^11, and the products of both are added. Queries are first scaled by a power of two, so that the
// low part is no subnormal; weights, at most 1, by 2^14. Both keep 22 bits. A tensor core truncates as it adds up, so
// that no sum stays in one for longer than a tile: tiles are added to registers in FP32.
//
// Launches overlap (overlap.cuh). Before the previous one is done a block looks where its sequence stands and has its
// first rows put into L2. Once it is done, the block copies those rows while it looks again: in the rare case that the
// sequence has moved on it starts over.
//
// With `appends`, rows past the cached ones come from the call's own keys and values, rounded to FP16 on the way, so
// that the answer is bit for bit what attending after the append gives. For T = 1 one block of each head also stores
// the new row: its slot is that of the position which the append evicts, which nobody reads. Whichever block finds that
// it is the last of its sequence moves the state on: all have read it. For T > 1 the caller appends afterwards.
#include "attend.h"
#include "chosen.cuh"
#include "launch.h"
#include "overlap.cuh"
#include "tensor.cuh"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kMostWarps = 8;
constexpr int kTileRows = 16;
constexpr int kMostStages = 2;           // tiles that a warp has under way: more were no faster (docs/performance.md)
constexpr float kLowPart = 1.0f / 2048;  // what a low part counts for
constexpr float kWeightScale = 16384.0f;
constexpr uint32_t kAllLanes = 0xffffffffu;

using Counter = unsigned long long;

// How a launch is divided.
struct Division {
  FastDivider splits;      // blocks that share the rows of the same queries
  FastDivider tiles;       // parts that the queries of a KV head are cut into
  FastDivider heads;       // KV heads
  FastDivider group_size;  // query heads to a KV head
  uint32_t stages;         // tiles a warp has under way
};

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

// 2^n, -126 <= n <= 127.
__device__ __forceinline__ float power_of_two(int n) { return bits_float(static_cast<uint32_t>(n + 127) << 23); }

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

// An element of a new key or value, as it is stored.
__device__ __forceinline__ uint16_t stored_element(const AppendParams& p, const void* data, int64_t i,
                                                   uint32_t& overflows) {
  if (p.dtype == DType::f16) return static_cast<const uint16_t*>(data)[i];
  return stored_half(load_as_float(data, i, p.dtype), p.saturate, overflows);
}

// Two halves of a register: the high part of x, and what it lacks times 2^11. The high part is 0 for 0 alone, as that
// times an infinite key is NaN.
__device__ __forceinline__ uint32_t high_and_low(float x) {
  uint16_t high = float_to_half(x);
  if (x != 0.0f && (high & 0x7fffu) == 0) high |= 1;
  const uint16_t low = float_to_half((x - half_to_float(high)) * 2048.0f);
  return high | static_cast<uint32_t>(low) << 16;
}

// The same of a weight, which is not negative, with neither part negative and the low one at least the smallest FP16
// number: a value that is infinite is to stay that in both products. (Below 2^-38 of the largest weight the high part
// is 0, and what an infinite value comes to is NaN.)
__device__ __forceinline__ uint32_t weight_parts(float x) {
  const uint16_t high = float_to_half_down(x);
  uint32_t low = float_to_half((x - half_to_float(high)) * 2048.0f);
  if (low == 0 && x > 0) low = 1;
  return high | low << 16;
}

__device__ __forceinline__ float capped(float score, float softcap) {
  return softcap * tanhf(score / softcap) * kLog2e;
}

// What both parts' products come to. An infinite one stays that: the low part's may be of other sign.
__device__ __forceinline__ float whole_score(float high, float low) {
  return (float_bits(high) & 0x7fffffffu) == kFloatInfBits ? high : fmaf(low, kLowPart, high);
}

__device__ __forceinline__ bool is_finite_half(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

// The answer's elements d to d + 3 of one query, number `number` of those that share a KV head.
__device__ __forceinline__ void write_answer(const AttendParams& p, const Division& division, int64_t sequence,
                                             int64_t head, uint32_t number, int d, Running state,
                                             const Vec<float, 4>& value) {
  const uint32_t t = division.group_size(number);
  const int64_t query_head = head * division.group_size.divisor + (number - t * division.group_size.divisor);
  const int64_t offset = sequence * p.out.batch_stride + t * p.out.row_stride + query_head * p.out.head_stride + d;
  const float factor = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
#pragma unroll
  for (int i = 0; i < 4; ++i) store_float(p.out.data, offset + i, p.dtype, value.x[i] * factor);
  if (p.lse != nullptr && d == 0) {
    p.lse[(sequence * p.rows + t) * p.query_heads + query_head] =
        state.sum == 0.0f ? minus_infinity() : state.max * kLn2 + logf(state.sum);
  }
}

// kDepth: 16-element steps of a row; 16 * kDepth is the largest head_dim of this instance. kTiles: times four, the
// queries of a block.
template <int kDepth, int kTiles>
struct AttendBlock {
  static constexpr int kQueries = 4 * kTiles;
  static constexpr int kWidth = 16 * kDepth;
  static constexpr int kChunks = 2 * kDepth;                   // 16-byte chunks of a row
  static constexpr int kTileBytes = kTileRows * kChunks * 16;  // of keys; the values' lie behind them
  static constexpr int kStageBytes = 2 * kTileBytes;
  static constexpr int kQueryBytes = kQueries * kWidth * 4;  // as an operand: two FP16 numbers for each FP32 one
  static constexpr int kPartial = kQueries * (kWidth + 2);   // floats that a block leaves for the last one
  static constexpr int kLeastWarps = kDepth <= 8 ? 8 : 64 / kDepth;  // what the smallest shared memory has room for
  static_assert(kQueries * kWidth * 4 <= kStageBytes, "a warp leaves its sums in the first stage of its ring");

  // Where a chunk of a row lies in a tile: rows are spread over the banks, so that eight of them are read at a time.
  static __device__ __forceinline__ int place(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 16; }
  // Where a query's weighted sum of element d lies, likewise.
  static __device__ __forceinline__ int sum_place(int query, int d) { return query * kWidth + (d ^ (query & 3) * 8); }
};

// Blocks that a multiprocessor is to have registers for; 0 leaves it to the compiler, which then spills none of them.
template <int kDepth, int kTiles>
constexpr int kBlocksAtATime = kDepth > 8 || kTiles == 2 ? 1
                               : kTiles == 1             ? 2
                                                         : 0;

template <int kDepth, int kTiles>
__global__ void __launch_bounds__(kMostWarps * 32, kBlocksAtATime<kDepth, kTiles>)
    attend_kernel(const AttendParams p, const Division division) {
  using Block = AttendBlock<kDepth, kTiles>;
  constexpr int kQueries = Block::kQueries;
  constexpr int kChunks = Block::kChunks;
  constexpr int kWidth = Block::kWidth;
  KVC_DYNAMIC_SHARED(shared);
  let_next_launch_begin();

  // Which block this is.
  const uint32_t splits = division.splits.divisor;
  const uint32_t unit = division.splits(blockIdx.x);  // (sequence, KV head, tile of queries)
  const uint32_t split = blockIdx.x - unit * splits;
  const uint32_t sequence_head = division.tiles(unit);
  const uint32_t tile_of_queries = unit - sequence_head * division.tiles.divisor;
  const uint32_t sequence = division.heads(sequence_head);  // of the call
  const int64_t head = sequence_head - sequence * division.heads.divisor;
  const uint32_t group_size = division.group_size.divisor;
  const int thread = static_cast<int>(threadIdx.x);
  const int threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int warps = threads / 32;
  const int head_dim = static_cast<int>(p.cache.head_dim);
  const uint32_t first_query = tile_of_queries * kQueries;
  const uint32_t all_queries = group_size * static_cast<uint32_t>(p.rows);
  const uint32_t queries =
      all_queries - first_query < kQueries ? all_queries - first_query : kQueries;  // of this block
  // Which of the cache's it is; -1 is none of them, which holds nothing and gets nothing.
  const int64_t in_cache = sequence_of_entry(p.sequences, sequence, p.cache.batch);
  const bool stores = p.appends && p.rows == 1 && in_cache >= 0;

  const int64_t entry = p.layer * p.cache.batch + imax(in_cache, 0);
  int64_t* seen = p.cache.state + entry;
  int64_t* first = seen + p.cache.layers * p.cache.batch;
  const int64_t row_elements = p.cache.heads * head_dim;
  const int64_t layer_offset = entry * p.cache.positions * row_elements + head * head_dim;
  uint16_t* keys = p.cache.k_cache + layer_offset;
  uint16_t* values = p.cache.v_cache + layer_offset;

  // Where the sequence stands and what the queries see: one thread's affair.
  __shared__ SequenceState shared_state;
  __shared__ AttendPlan shared_plan;
  const AttendPlan& plan = shared_plan;
  const auto read_state = [&] {
    SequenceState s{*const_cast<volatile int64_t*>(seen), *const_cast<volatile int64_t*>(first)};
    // While the previous launch writes to it, it may be half of one and half of another: this bound must hold for it.
    s.first = imax(s.first, s.seen - p.cache.ring.divisor);
    if (in_cache < 0) s = empty_state(p.cache.sinks);
    return s;
  };
  const auto appended_now = [&] { return p.appends ? appended_rows(p.append, sequence) : 0; };
  char* ring = shared + warp * division.stages * Block::kStageBytes;
  uint32_t begin, end, fetched;  // tiles: [begin, end) are this block's, and this warp is to copy `fetched` next

  // In registers, where there are enough of them: the plan, and below the queries.
  constexpr bool kInRegisters = kTiles * kDepth < 32;
  AttendPlan own_plan;
  const AttendPlan& here = kInRegisters ? own_plan : shared_plan;

  // Starts copying a tile's keys and values. Rows past the last, and what pads head_dim, become zeros.
  const auto fetch = [&](uint32_t tile, char* at) {
    const int64_t row0 = static_cast<int64_t>(tile) * kTileRows;
    const int64_t slot0 = here.slot(row0);
    if (row0 + kTileRows <= here.cached && here.slot(row0 + kTileRows - 1) - slot0 == kTileRows - 1) {
      // The usual tile: 16 slots in a row.
      constexpr int kRowsAtATime = kChunks < 32 ? 32 / kChunks : 1;
      constexpr int kParts = kChunks < 32 ? 1 : kChunks / 32;
      const int first_chunk = lane % kChunks;
      int64_t offset = (slot0 + lane / kChunks) * row_elements + (first_chunk * 8 < head_dim ? first_chunk * 8 : 0);
#pragma unroll
      for (int i = 0; i < kTileRows; i += kRowsAtATime, offset += kRowsAtATime * row_elements) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const int chunk = first_chunk + 32 * part;
          const bool real = chunk * 8 < head_dim;
          char* to = at + Block::place(i + lane / kChunks, chunk);
          copy_async(to, keys + offset + (real ? 256 * part : 0), real);
          copy_async(to + Block::kTileBytes, values + offset + (real ? 256 * part : 0), real);
        }
      }
      return;
    }
#pragma unroll 1
    for (int i = lane; i < kTileRows * kChunks; i += 32) {
      const int chunk = i % kChunks;
      const int64_t row = row0 + i / kChunks;
      char* to = at + Block::place(i / kChunks, chunk);
      const bool real = chunk * 8 < head_dim && row < here.count;
      if (!real || row < here.cached) {
        const int64_t offset = real ? here.slot(row) * row_elements + chunk * 8 : 0;
        copy_async(to, keys + offset, real);
        copy_async(to + Block::kTileBytes, values + offset, real);
        continue;
      }
      const int64_t input = here.input_row(row);
      uint32_t counted_elsewhere = 0;
#pragma unroll 1
      for (int j = 0; j < 16; ++j) {  // eight elements of the key, then of the value
        const Rows<const void*>& rows = j < 8 ? p.append.key : p.append.value;
        const int64_t offset = sequence * rows.batch_stride + input * rows.row_stride + head * rows.head_stride;
        reinterpret_cast<uint16_t*>(to + (j < 8 ? 0 : Block::kTileBytes))[j % 8] =
            stored_element(p.append, rows.data, offset + chunk * 8 + j % 8, counted_elsewhere);
      }
    }
  };

  // First from what can be known while the previous launch is at work, then again if that launch moved it on.
  constexpr int kOfLane = kWidth / 32;  // elements of a query that a lane loads
  constexpr int kOfWarp = (kQueries + Block::kLeastWarps - 1) / Block::kLeastWarps;  // queries that a warp does
  float x[kOfWarp][kOfLane];
#pragma unroll 1
  for (bool waited = false;;) {
    if (thread == 0) {
      shared_state = read_state();
      shared_plan = AttendPlan::make(p, sequence, shared_state);
    }
    __syncthreads();
    if constexpr (kInRegisters) own_plan = shared_plan;
    const uint32_t row_tiles = static_cast<uint32_t>((plan.count + kTileRows - 1) / kTileRows);
    const uint32_t share = division.splits(row_tiles);
    const uint32_t longer = row_tiles - share * splits;  // so many splits have one tile more
    begin = share * split + (split < longer ? split : longer);
    end = begin + share + (split < longer ? 1 : 0);
    if (!waited) {
      const uint32_t tile = begin + warp;
      if (tile < end) {
        const int64_t row = static_cast<int64_t>(tile) * kTileRows + lane % 16;
        if (row < plan.cached) {
          const uint16_t* from = (lane < 16 ? keys : values) + plan.slot(row) * row_elements;
#pragma unroll 1
          for (int d = 0; d < head_dim; d += 64) prefetch_to_l2(from + d);
        }
      }
      wait_for_previous_launch();
      // The queries' loads go before the copies, behind which they would wait.
#pragma unroll
      for (int j = 0; j < kOfWarp; ++j) {
        const uint32_t m = j * warps + warp;
        const uint32_t t = division.group_size(first_query + m);
        const int64_t query_head = head * group_size + (first_query + m - t * group_size);
        const int64_t offset = sequence * p.query.batch_stride + t * p.query.row_stride +
                               query_head * p.query.head_stride + lane * kOfLane;
        const int held = m < queries ? head_dim - lane * kOfLane : 0;  // of this lane's elements
        if (p.dtype == DType::f32) {
#pragma unroll
          for (int i = 0; i < kOfLane; ++i) {
            x[j][i] = i < held ? static_cast<const float*>(p.query.data)[offset + i] : 0.0f;
          }
        } else {
#pragma unroll
          for (int i = 0; i < kOfLane; ++i)
            x[j][i] = i < held ? load_as_float(p.query.data, offset + i, p.dtype) : 0.0f;
        }
      }
    }
    const SequenceState now = read_state();  // likewise
    const bool same_rows = appended_now() == plan.total - plan.seen;
    fetched = begin + warp;
#pragma unroll 1
    for (uint32_t s = 0; s < division.stages; ++s, fetched += warps) {
      if (fetched < end) fetch(fetched, ring + s * Block::kStageBytes);
      end_copy_group();
    }
    if (now.seen == shared_state.seen && now.first == shared_state.first && same_rows) break;
    waited = true;
    wait_for_copies<0>();
    __syncthreads();
  }

  // The queries as an operand, in the order in which lanes hold it: two columns for each. A query's largest magnitude
  // becomes one from 2^13 to 2^14.
  uint32_t* operand = reinterpret_cast<uint32_t*>(shared + warps * division.stages * Block::kStageBytes);
  __shared__ float shared_factor[kQueries];
#pragma unroll
  for (int j = 0; j < kOfWarp; ++j) {
    const int m = j * warps + warp;
    if (m >= kQueries) continue;
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) largest = fmaxf(largest, fabsf(x[j][i]));
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    }
    const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
    const int shift = exponent < -100 ? 113 : exponent > 126 ? -113 : 13 - exponent;
    const float up = power_of_two(shift);
#pragma unroll
    for (int i = 0; i < kOfLane / 2; ++i) {
      const uint32_t a = high_and_low(x[j][2 * i] * up);
      const uint32_t b = high_and_low(x[j][2 * i + 1] * up);
      const int pair = lane * (kOfLane / 2) + i;
      uint32_t* to = operand + (m / 4 * kDepth + pair / 8) * 64 + (m % 4 * 8 + pair % 4) * 2 + pair / 4 % 2;
      to[0] = (a & 0xffff) | b << 16;
      to[8] = a >> 16 | (b & 0xffff0000u);
    }
    // From a product to a score in powers of two.
    if (lane == 0) shared_factor[m] = power_of_two(-shift) * (p.softcap > 0 ? p.scale : p.scale * kLog2e);
  }
  // One block of each head stores a new row.
  if (stores && split == 0 && tile_of_queries == 0 && plan.total > plan.seen) {
#pragma unroll 1
    for (int i = thread; i < 2 * head_dim; i += threads) {
      const bool is_value = i >= head_dim;
      const int d = is_value ? i - head_dim : i;
      const Rows<const void*>& rows = is_value ? p.append.value : p.append.key;
      uint32_t overflows = 0;
      (is_value ? values : keys)[plan.slot(plan.count - 1) * row_elements + d] =
          stored_element(p.append, rows.data, sequence * rows.batch_stride + head * rows.head_stride + d, overflows);
      if (overflows != 0) atomicAdd(reinterpret_cast<Counter*>(p.append.overflow_counts + p.layer), Counter{1});
    }
  }
  __syncthreads();

  // Of an operand a lane holds column lane / 4, of a product those of query lane % 4 of each four.
  const uint32_t mine = lane % 4;
  const auto query_part = [&](int n, int k) {
    const Vec<uint32_t, 2> pair = load<uint32_t, 2>(operand + (n * kDepth + k) * 64 + lane * 2);
    return FragmentB{{pair.x[0], pair.x[1]}};
  };
  FragmentB q[kInRegisters ? kTiles : 1][kInRegisters ? kDepth : 1];
  float factor[kTiles];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    factor[n] = shared_factor[n * 4 + mine];
    if constexpr (kInRegisters) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) q[n][k] = query_part(n, k);
    }
  }
  // Rows [clear_begin, clear_end) are seen by every query of this block.
  int64_t clear_begin = 0;
  int64_t clear_end = plan.count;
  if (p.rows > 1) {
    const int64_t oldest_query = division.group_size(first_query);
    const int64_t newest_query = division.group_size(first_query + queries - 1);
    const int64_t past_oldest = plan.query_position(oldest_query) + 1;
    clear_begin = plan.sinks_held + imax(plan.oldest_for(newest_query) - plan.oldest, 0);
    clear_end = imin(clear_end, plan.sinks_held + imax(past_oldest - plan.oldest, 0));
    if (oldest_query < plan.padding || past_oldest < plan.sinks_held) clear_end = 0;
  }

  Running running[kTiles];
  float acc[kTiles][kDepth][2];  // elements 16 k + lane / 4 and eight on of query lane % 4, times kWeightScale
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    running[n] = {minus_infinity(), 0.0f};  // the sum is this lane's rows' alone
#pragma unroll
    for (int k = 0; k < kDepth; ++k) acc[n][k][0] = acc[n][k][1] = 0.0f;
  }

  uint32_t stage = 0;
#pragma unroll 1
  for (uint32_t tile = begin + warp; tile < end; tile += warps) {
    if (division.stages == 1) {
      wait_for_copies<0>();
    } else {
      wait_for_copies<kMostStages - 1>();
    }
    __syncwarp();
    char* tile_keys = ring + stage * Block::kStageBytes;
    char* tile_values = tile_keys + Block::kTileBytes;

    // Products of keys (rows) and the two parts of the queries (columns), in two sums that do not wait for each other
    // (where there are many queries, those do not wait for each other).
    constexpr int kSums = kTiles < 4 ? 2 : 1;
    FragmentC products[kTiles][kSums] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA keys_part = load_matrices(tile_keys + Block::place(lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if constexpr (kInRegisters) {
          multiply_add(products[n][k % kSums], keys_part, q[n][k]);
        } else {
          multiply_add(products[n][k % kSums], keys_part, query_part(n, k));
        }
      }
    }
    // Scores of rows lane / 4 and eight on; then weights.
    const int64_t row0 = static_cast<int64_t>(tile) * kTileRows;
    const bool clear = row0 >= clear_begin && row0 + kTileRows <= clear_end;
    const auto sees = [&](int n, int64_t row) {
      const uint32_t m = n * 4 + mine < queries ? n * 4 + mine : 0;
      return row < plan.count && (p.rows == 1 || plan.sees(division.group_size(first_query + m), row));
    };
    FragmentB weights[kTiles];
    float rescale[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float score[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        score[h] = whole_score(products[n][0].x[2 * h] + (kSums > 1 ? products[n][kSums - 1].x[2 * h] : 0.0f),
                               products[n][0].x[2 * h + 1] + (kSums > 1 ? products[n][kSums - 1].x[2 * h + 1] : 0.0f)) *
                   factor[n];
        if (p.softcap > 0) score[h] = capped(score[h], p.softcap);
        if (!clear && !sees(n, row0 + lane / 4 + 8 * h)) score[h] = minus_infinity();
      }
      float max = fmaxf(running[n].max, fmaxf(score[0], score[1]));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
      }
      rescale[n] = merge_weight(running[n].max, max);
      const float base = exponent_base(max);
      const float weight[2] = {exp2f(score[0] - base), exp2f(score[1] - base)};
      running[n] = {max, running[n].sum * rescale[n] + (weight[0] + weight[1])};
      weights[n] = {transposed(weight_parts(weight[0] * kWeightScale)),
                    transposed(weight_parts(weight[1] * kWeightScale))};
    }
    // Zero times NaN is NaN: a value that is not finite and that some query does not see must not be in the product.
    // It is added to the sums of the queries that see it, and taken out of the tile.
    if (!clear && p.rows > 1) {
      bool strange = false;
#pragma unroll 1
      for (int i = lane; i < kTileRows * kWidth; i += 32) {
        strange = strange || !is_finite_half(reinterpret_cast<const uint16_t*>(tile_values)[i]);
      }
      if (__any_sync(kAllLanes, strange)) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int k = 0; k < kDepth; ++k) {
            acc[n][k][0] *= rescale[n];
            acc[n][k][1] *= rescale[n];
          }
          rescale[n] = 1.0f;
#pragma unroll 1
          for (int row = 0; row < kTileRows; ++row) {
            if (!sees(n, row0 + row)) continue;
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
              const uint16_t bits = reinterpret_cast<const uint16_t*>(tile_values + Block::place(row, chunk))[lane / 4];
              if (!is_finite_half(bits)) acc[n][chunk / 2][chunk % 2] += half_to_float(bits);
            }
          }
        }
        __syncwarp();
#pragma unroll 1
        for (int i = lane; i < kTileRows * kWidth; i += 32) {
          uint16_t& bits = reinterpret_cast<uint16_t*>(tile_values)[i];
          if (!is_finite_half(bits)) bits = 0;
        }
        __syncwarp();
      }
    }
    // Products of values (their elements as rows) and the two parts of the weights.
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA values_part =
          load_matrices_transposed(tile_values + Block::place(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        FragmentC sums = {};
        multiply_add(sums, values_part, weights[n]);
        acc[n][k][0] = fmaf(acc[n][k][0], rescale[n], fmaf(sums.x[1], kLowPart, sums.x[0]));
        acc[n][k][1] = fmaf(acc[n][k][1], rescale[n], fmaf(sums.x[3], kLowPart, sums.x[2]));
      }
    }
    __syncwarp();
    if (fetched < end) fetch(fetched, tile_keys);
    end_copy_group();
    fetched += warps;
    stage = stage + 1 == division.stages ? 0 : stage + 1;
  }

  // Each warp leaves its sums in its ring, which is empty now.
  __shared__ Running shared_running[kMostWarps][kQueries];
  __shared__ float shared_weights[kMostWarps][kQueries];
  const auto sums_of = [&](int w) {
    return reinterpret_cast<float*>(shared + w * division.stages * Block::kStageBytes);
  };
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      running[n].sum += __shfl_xor_sync(kAllLanes, running[n].sum, distance);
    }
    if (lane < 4) shared_running[warp][n * 4 + lane] = running[n];
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums_of(warp)[Block::sum_place(n * 4 + mine, 16 * k + 8 * h + lane / 4)] = acc[n][k][h] * (1.0f / kWeightScale);
      }
    }
  }
  __syncthreads();

  // The warps become one. First, what each warp's sums count for.
  const auto merged_max = [&](int m) {
    float max = minus_infinity();
#pragma unroll
    for (int w = 0; w < kMostWarps; ++w) max = fmaxf(max, w < warps ? shared_running[w][m].max : minus_infinity());
    return max;
  };
  const auto merged_state = [&](int m) {
    Running merged = {merged_max(m), 0.0f};
#pragma unroll
    for (int w = 0; w < kMostWarps; ++w) {
      if (w < warps) merged.sum += shared_running[w][m].sum * shared_weights[w][m];
    }
    return merged;
  };
  if (thread < warps * kQueries) {
    const int m = thread % kQueries;
    const int w = thread / kQueries;
    shared_weights[w][m] = merge_weight(shared_running[w][m].max, merged_max(m));
  }
  __syncthreads();

  // Every thread takes four elements of the answer at a time.
  const int fours = static_cast<int>(queries) * (kWidth / 4);
  float* partial = p.partials + (static_cast<int64_t>(unit) * splits + split) * Block::kPartial;
#pragma unroll 1
  for (int e = thread; e < fours; e += threads) {
    const int m = e / (kWidth / 4);
    const int d = e % (kWidth / 4) * 4;
    if (d >= head_dim) continue;
    Vec<float, 4> value = {};
#pragma unroll
    for (int w = 0; w < kMostWarps; ++w) {
      if (w >= warps) break;
      const Vec<float, 4> part = load<float, 4>(sums_of(w) + Block::sum_place(m, d));
      const float weight = shared_weights[w][m];
#pragma unroll
      for (int i = 0; i < 4; ++i) value.x[i] += part.x[i] * weight;
    }
    if (splits == 1) {
      write_answer(p, division, sequence, head, first_query + m, d, merged_state(m), value);
    } else {
      store<float, 4>(partial + m * kWidth + d, value);
    }
  }
  if (splits > 1 && thread < static_cast<int>(queries)) {
    const Running merged = merged_state(thread);
    store<float, 2>(partial + kQueries * kWidth + 2 * thread, {merged.max, merged.sum});
  }

  // All of this block have read the state. When those of all blocks of the sequence have, it moves on.
  __shared__ bool shared_last;
  __syncthreads();
  if (stores && thread == threads - 1) {
    Counter* arrivals = reinterpret_cast<Counter*>(first + p.cache.layers * p.cache.batch);
    if (sign_in(arrivals) + 1 == static_cast<Counter>(splits) * division.tiles.divisor * division.heads.divisor) {
      const SequenceState next = state_after_append(shared_state, plan.total - plan.seen, p.cache.ring.divisor);
      *seen = next.seen;
      *first = next.first;
      *arrivals = 0;
    }
  }
  if (splits == 1) return;
  // The last block of these queries goes on, and merges what all of them left, in the order of the splits.
  if (thread == 0) shared_last = sign_in(p.tickets + unit) + 1 == splits;
  __syncthreads();
  if (!shared_last) return;

  const float* partials = p.partials + static_cast<int64_t>(unit) * splits * Block::kPartial;
  constexpr int kParts = kDepth <= 8 && kTiles == 1 ? 16 : 4;  // on their way at a time, as registers allow
  Vec<float, 4> parts[kParts];
  const auto load_parts = [&](int e, uint32_t s0) {
    if (e % (kWidth / 4) * 4 >= head_dim) return;
    const float* from = partials + e / (kWidth / 4) * kWidth + e % (kWidth / 4) * 4;
#pragma unroll
    for (int j = 0; j < kParts; ++j) {
      if (s0 + j < splits) parts[j] = load_from_l2<4>(from + static_cast<int64_t>(s0 + j) * Block::kPartial);
    }
  };
  if (thread < fours) load_parts(thread, 0);
  __shared__ Running shared_merged[kQueries];
  float* split_weights = reinterpret_cast<float*>(shared);  // [queries][splits]
#pragma unroll 1
  for (int m = warp; m < static_cast<int>(queries); m += warps) {
    const auto state_of = [&](uint32_t s) {
      return load_from_l2<2>(partials + static_cast<int64_t>(s) * Block::kPartial + kQueries * kWidth + 2 * m);
    };
    Vec<float, 2> of_lane = {minus_infinity(), 0.0f};
    if (static_cast<uint32_t>(lane) < splits) of_lane = state_of(lane);
    float max = of_lane.x[0];
#pragma unroll 1
    for (uint32_t s = lane + 32; s < splits; s += 32) max = fmaxf(max, state_of(s).x[0]);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
    float sum = 0.0f;
#pragma unroll 1
    for (uint32_t s = lane; s < splits; s += 32) {
      if (s >= 32) of_lane = state_of(s);
      const float weight = merge_weight(of_lane.x[0], max);
      split_weights[m * splits + s] = weight;
      sum += of_lane.x[1] * weight;
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    if (lane == 0) shared_merged[m] = {max, sum};
  }
  __syncthreads();
#pragma unroll 1
  for (int e = thread; e < fours; e += threads) {
    const int m = e / (kWidth / 4);
    const int d = e % (kWidth / 4) * 4;
    Vec<float, 4> value = {};
#pragma unroll 1
    for (uint32_t s0 = 0; s0 < splits; s0 += kParts) {
      if (e != thread || s0 != 0) load_parts(e, s0);
#pragma unroll
      for (int j = 0; j < kParts; ++j) {
        if (s0 + j >= splits) break;
        const float weight = split_weights[m * splits + s0 + j];
#pragma unroll
        for (int i = 0; i < 4; ++i) value.x[i] += parts[j].x[i] * weight;
      }
    }
    if (d < head_dim) write_answer(p, division, sequence, head, first_query + m, d, shared_merged[m], value);
  }
  if (thread == 0) p.tickets[unit] = 0;
}

// A split of fewer rows than this is not worth its merge.
constexpr int64_t kRowsPerSplit = 64;

template <int kDepth, int kTiles>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  using Block = AttendBlock<kDepth, kTiles>;
  int device = 0;
  int multiprocessors = 0;
  int shared = 0;
  cudaError_t error = cudaGetDevice(&device);
  const auto look_up = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  look_up(multiprocessors, cudaDevAttrMultiProcessorCount);
  look_up(shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  shared -= 4096;  // what the kernel declares by itself

  // The split depends on shapes alone, so that a call's answer does not depend on how it came to its lengths. One block
  // a multiprocessor, with all of its shared memory, if that is enough for everything.
  const int64_t group_size = p.query_heads / p.cache.heads;
  const int64_t queries = p.rows * group_size;
  const int64_t tiles = (queries + Block::kQueries - 1) / Block::kQueries;
  const int64_t units = p.sequences.entries(p.cache.batch) * p.cache.heads * tiles;
  const int64_t room = p.partial_floats / (units * Block::kPartial);
  int64_t splits = multiprocessors / units;
  splits = imin(splits, imin(room, (p.cache.positions + kRowsPerSplit - 1) / kRowsPerSplit));
  splits = units > kAttendTickets ? 1 : imax(splits, 1);
  if (units * splits >= (int64_t{1} << 31)) return cudaErrorInvalidConfiguration;

  // As much of the preferred pipeline as there is room for.
  int warps = kMostWarps;
  int stages = units > 4 * multiprocessors ? 1 : kMostStages;
  const auto bytes_of = [&] {
    return imax(int64_t{warps} * stages * Block::kStageBytes + Block::kQueryBytes,
                Block::kQueries * splits * static_cast<int64_t>(sizeof(float)));
  };
  while (bytes_of() > shared && warps > 1) {
    if (stages > 1) {
      --stages;
    } else {
      warps /= 2;
    }
  }
  const int64_t bytes = bytes_of();
  const Division division{FastDivider::by(static_cast<uint32_t>(splits)), FastDivider::by(static_cast<uint32_t>(tiles)),
                          FastDivider::by(static_cast<uint32_t>(p.cache.heads)),
                          FastDivider::by(static_cast<uint32_t>(group_size)), static_cast<uint32_t>(stages)};
  const auto kernel = attend_kernel<kDepth, kTiles>;
  // The same for every call, as two threads may be about to launch different sizes.
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  OverlappingLaunch launch(units * splits, warps * 32, bytes, stream);
  return cudaLaunchKernelEx(&launch.config, kernel, p, division);
}

template <int kDepth, int kMostTiles>
cudaError_t launch_for(const AttendParams& p, cudaStream_t stream) {
  const int64_t queries = p.rows * (p.query_heads / p.cache.heads);
  if constexpr (kMostTiles >= 4) {
    if (queries > 8) return launch<kDepth, 4>(p, stream);
  }
  if constexpr (kMostTiles >= 2) {
    if (queries > 4) return launch<kDepth, 2>(p, stream);
  }
  return launch<kDepth, 1>(p, stream);
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  if (p.cache.head_dim <= 64) return launch_for<4, 4>(p, stream);
  if (p.cache.head_dim <= 128) return launch_for<8, 4>(p, stream);
  if (p.cache.head_dim <= 256) return launch_for<16, 2>(p, stream);
  if (p.cache.head_dim <= 512) return launch_for<32, 1>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace kvc
