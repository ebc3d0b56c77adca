// decode attention: softmax(scale * Q K^T) V for a few queries of each sequence, over FP16 keys and values as they lie
// in the cache, in FP32; and, in the same launch, the append of one new position.
//
// Grid: for each sequence and KV head, and each kQueries of the queries that share it (a group's heads times T), the
// same number of blocks, `splits`. They take turns at tiles of 16 of the rows that the queries see (visibility.h),
// whose number is known on the device alone. A block copies its tiles into rings of shared memory, some ahead of those
// that it works on. One warp or several work on a ring's tile, each with 4 * kTiles queries of its own, and multiply it
// on tensor cores, so that a row is read once for all of the block's queries. Each keeps a running maximum, sum and
// weighted sum (online softmax: Milakov and Gimelshein, 2018); rings, then the splits of a head are merged in a fixed
// order (flash decoding: Dao et al., 2023), the last by whichever block of the head is the last to sign in. One query
// to a KV head is the affair of one_query.cu.
//
// Tensor cores take FP16, the queries and the weights are FP32: each is two columns of the operand, a high part and
// what it lacks times 2^11, and the products of both are added. Queries are first scaled by a power of two, so that the
// low part is no subnormal; weights, at most 1, by 2^14. Both keep 22 bits (fewer of an element that is 2^28 times
// smaller than its query's largest). A tensor core truncates as it adds up, so that no sum stays in one for longer than
// a tile: tiles are added to registers in FP32.
//
// A short launch takes as long as its longest chain of waiting, for memory and, as much, for instructions that no
// launch before has left near: what is executed is kept short, and is there once (docs/performance.md). Launches
// overlap (pdl.cuh), and where the one before is known not to touch this layer (`settled`), rows are asked for
// while it is still at work.
//
// With `appends`, rows past the cached ones come from the call's own keys and values, rounded to FP16 on the way, so
// that the answer is bit for bit what attending after the append gives. For T = 1 one block of each head also stores
// the new row: its slot is that of the position which the append evicts, which nobody reads. Whichever block finds that
// it is the last of its sequence moves the state on: all have read it. For T > 1 the caller appends afterwards.
#include "../launch.h"
#include "common.cuh"
#include "non_finite.cuh"

namespace kvc {
namespace {

constexpr int kTileRows = 16;
constexpr float kLowPart = 1.0f / 2048;  // what a low part counts for
constexpr float kLog2WeightScale = 14;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFromSm100 = true;
#else
constexpr bool kFromSm100 = false;
#endif

// Compiled for compute-sanitizer's racecheck, which takes a barrier of some warps for one of the block: it sees races
// that there are none, unless all warps have passed equally many (docs/reliability.md).
#if defined(KVC_RACECHECK)
constexpr bool kEqualBarriers = true;
#else
constexpr bool kEqualBarriers = false;
#endif

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
// is 0, and what an infinite value comes to is NaN at first: non_finite.cuh.)
__device__ __forceinline__ uint32_t weight_parts(float x) {
  const uint16_t high = float_to_half_down(x);
  uint32_t low = float_to_half((x - half_to_float(high)) * 2048.0f);
  if (low == 0 && x > 0) low = 1;
  return high | low << 16;
}

// What both parts' products come to. An infinite one stays that: the low part's may be of other sign.
__device__ __forceinline__ float whole_score(float high, float low) {
  return (float_bits(high) & 0x7fffffffu) == kFloatInfBits ? high : fmaf(low, kLowPart, high);
}

// kDepth: 16-element steps of a row; 16 * kDepth is the largest head_dim of this instance. kTiles: times four, the
// queries of a warp. kShare: warps that share a ring and its tiles, each with queries of its own. kHalves: of a tile
// that a ring has room for.
template <int kDepth, int kTiles, int kShare, int kHalves>
struct FewQueriesBlock {
  static constexpr int kQueries = 4 * kTiles * kShare;
  static constexpr int kWidth = 16 * kDepth;
  static constexpr int kChunks = 2 * kDepth;                   // 16-byte chunks of a row
  static constexpr int kHalfBytes = kTileRows * kChunks * 16;  // of a tile: its keys, or its values
  // At most; a launch may have fewer. Large blocks of all head sizes over 64 have as many bytes.
  static constexpr int kRings = kDepth > 8 ? 64 / kDepth : kHalves == 2 ? 4 : 8;
  static_assert(kRings < 16, "each is to have a barrier of its own, beside the block's");
  static constexpr int kQueryStride = kWidth + 8;  // of the sums in shared memory, in floats, spread over the banks
  static constexpr int kRingBytes = kHalves * kHalfBytes;
  static_assert(kRingBytes >= (kQueries * kQueryStride + 4) * 4, "a ring has room for its warps' sums");

  // What lies in a block's shared memory, with the rings behind it.
  struct Shared {
    alignas(16) uint32_t operand[kQueries * kWidth];  // the queries: two FP16 numbers for each FP32 one
    Running running[kRings][kQueries];
    float factor[kQueries];
    AttendPlan plan;
    bool last;
  };
  static constexpr int kRingsAt = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int64_t bytes(int rings) { return kRingsAt + int64_t{rings} * kRingBytes; }

  static constexpr int kThreads = kRings * kShare * 32;
  // How many of so many threads a multiprocessor has registers for. (From sm_100 on the compiler needs more.)
  KVC_HD static constexpr int by_registers(bool from_sm_100) {
    if (kHalves == 4) return kDepth <= 8 && kTiles * kShare == 1 && !from_sm_100 ? 2 : 1;
    if (kTiles == 2 && (kDepth > 8 || (kDepth == 8 && from_sm_100))) return 2;
    return kDepth > 8 || from_sm_100 || (kDepth == 4 && kTiles == 1) ? 3 : 4;
  }

  // Where a chunk of a row lies in half a tile: rows are spread over the banks, so that eight of them are read at a
  // time.
  static __device__ __forceinline__ int place(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 16; }
};

// Copies a tile's keys or values where they do not simply follow each other in the cache: rows that wrap, new rows (if
// they can be read by now), zeros after the last row and after head_dim. `plan` lies in shared memory.
// A function of its own, so that it costs the usual tile nothing but a call's registers.
template <int kDepth, int kShare>
__device__ __noinline__ void copy_scattered(const AttendPlan* shared_plan, const uint16_t* cached, int64_t row_elements,
                                            int head_dim, int64_t row0, char* at, const NewRows rows,
                                            bool with_new_rows) {
  using Block = FewQueriesBlock<kDepth, 1, kShare, 4>;
  const AttendPlan& plan = *shared_plan;
  constexpr int kLanes = 32 * kShare;  // of the warps that share the tile
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  constexpr int kRowsAtATime = Block::kChunks < kLanes ? kLanes / Block::kChunks : 1;
  // 32 bits do for rows and slots.
  const int32_t in_cache = static_cast<int32_t>(plan.cached - row0);
  const int32_t all = static_cast<int32_t>(plan.count - row0);
  const int32_t sinks = static_cast<int32_t>(plan.sinks_held - row0);
  const int32_t ring = static_cast<int32_t>(plan.ring);
  const int32_t wrap = sinks + ring - static_cast<int32_t>(plan.base);
  const int32_t to_slot = static_cast<int32_t>(plan.sinks + plan.base - plan.sinks_held);
#pragma unroll
  for (int i = 0; i < kTileRows; i += kRowsAtATime) {
    const int row = i + lane / Block::kChunks;
    if (row >= in_cache && row < all) continue;  // a new row
    const int32_t slot = static_cast<int32_t>(row0) + row + (row < sinks ? 0 : row < wrap ? to_slot : to_slot - ring);
    const uint16_t* from = cached + slot * row_elements;
#pragma unroll
    for (int chunk = lane % Block::kChunks; chunk < Block::kChunks; chunk += kLanes) {
      const bool real = chunk * 8 < head_dim && row < in_cache;
      copy_async(at + Block::place(row, chunk), real ? from + chunk * 8 : cached, real);
    }
  }
  if (!with_new_rows || in_cache >= kTileRows) return;
#pragma unroll 1
  for (int row = lane / Block::kChunks; row < kTileRows && row < all; row += kRowsAtATime) {
    if (row < in_cache) continue;
#pragma unroll 1
    for (int chunk = lane % Block::kChunks; chunk < Block::kChunks; chunk += kLanes) {
      Vec<uint16_t, 8> elements = {};
      if (chunk * 8 < head_dim) elements = new_chunk(rows, plan.input_row(row0 + row), chunk * 8);
      store<uint16_t, 8>(reinterpret_cast<uint16_t*>(at + Block::place(row, chunk)), elements);
    }
  }
}

template <int kDepth, int kTiles, int kShare, int kHalves>
__global__ void __launch_bounds__(FewQueriesBlock<kDepth, kTiles, kShare, kHalves>::kThreads,
                                  FewQueriesBlock<kDepth, kTiles, kShare, kHalves>::by_registers(kFromSm100))
    few_queries_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Division division) {
  using Block = FewQueriesBlock<kDepth, kTiles, kShare, kHalves>;
  constexpr int kQueries = Block::kQueries;
  constexpr int kChunks = Block::kChunks;
  constexpr int kWidth = Block::kWidth;
  KVC_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(shared_bytes);

  const BlockUnit block = BlockUnit::of(p, division, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int member = warp % kShare;  // of those that share a ring
  const int ring_number = warp / kShare;
  const int rings = warps / kShare;
  constexpr int kCopiers = 32 * kShare;
  const int copier = static_cast<int>(threadIdx.x % kCopiers);
  const int head_dim = static_cast<int>(p.cache.head_dim);
  const uint32_t first_query = block.tile * kQueries;
  const uint32_t all_queries = division.group_size.divisor * static_cast<uint32_t>(p.rows);
  const uint32_t queries =
      all_queries - first_query < kQueries ? all_queries - first_query : kQueries;  // of this block
  const bool stores = p.appends && p.rows == 1 && block.sequence >= 0;

  const int64_t row_elements = p.cache.heads * head_dim;
  const int64_t head_offset = block.cache_offset(p);
  uint16_t* keys = p.cache.k_cache + head_offset;
  uint16_t* values = p.cache.v_cache + head_offset;
  char* const ring = shared_bytes + Block::kRingsAt + ring_number * Block::kRingBytes;

  // Copying tiles, each ring its own, so many apart: first a tile's keys, then its values.
  const AttendPlan& plan = shared.plan;
  const uint32_t stride = division.splits * rings;
  const uint32_t first_tile = block.split * rings + ring_number;
  uint32_t tiles = 0;            // of all rows
  uint32_t copied = first_tile;  // the one whose turn it is
  int64_t copied_offset = -1;  // of this thread's first chunk of it, where its rows lie in the cache in a row; else -1
  const auto copy_half = [&](bool of_values, char* at, bool with_new_rows) {
    if (copied < tiles) {
      const int64_t row0 = static_cast<int64_t>(copied) * kTileRows;
      if (!of_values) {
        const int64_t slot0 = plan.slot(row0);
        const int chunk = copier % kChunks;
        const bool in_a_row =
            row0 + kTileRows <= plan.cached && plan.slot(row0 + kTileRows - 1) - slot0 == kTileRows - 1;
        copied_offset =
            in_a_row ? (slot0 + copier / kChunks) * row_elements + (chunk * 8 < head_dim ? chunk * 8 : 0) : -1;
      }
      if (copied_offset >= 0) {
        constexpr int kRowsAtATime = kChunks < kCopiers ? kCopiers / kChunks : 1;
        constexpr int kParts = kChunks < kCopiers ? 1 : kChunks / kCopiers;
        const uint16_t* from = (of_values ? values : keys) + copied_offset;
#pragma unroll
        for (int i = 0; i < kTileRows; i += kRowsAtATime, from += kRowsAtATime * row_elements) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const int chunk = copier % kChunks + kCopiers * part;
            const bool real = chunk * 8 < head_dim;
            copy_async(at + Block::place(i + copier / kChunks, chunk), from + (real ? 8 * kCopiers * part : 0), real);
          }
        }
      } else {
        const NewRows rows(p.append, of_values ? p.append.value : p.append.key, block);
        const uint16_t* cached = of_values ? values : keys;
        copy_scattered<kDepth, kShare>(&plan, cached, row_elements, head_dim, row0, at, rows, with_new_rows);
      }
    }
    if (of_values) copied += stride;
    end_copy_group();
  };

  // A query's elements, kOfLane to a lane.
  constexpr int kOfLane = kWidth / 32;
  float x[kOfLane];
  const auto load_query = [&](uint32_t m) {
    const uint32_t t = division.group_size(first_query + m);
    const int64_t query_head =
        block.head * division.group_size.divisor + (first_query + m - t * division.group_size.divisor);
    const int64_t offset =
        block.entry * p.query.batch_stride + t * p.query.row_stride + query_head * p.query.head_stride + lane * kOfLane;
    load_floats(p.query.data, offset, p.dtype, m < queries ? head_dim - lane * kOfLane : 0, x);
  };

  // What the launch before writes is there when it is done. Where it does not touch this layer (`settled`), that can
  // wait until the first rows have been asked for. (A loop, so that the code is there once: a launch this short waits
  // for its instructions, too.)
  StateAdvance advance(p, block);
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) == p.settled) {
      if (threadIdx.x == 0) shared.plan = AttendPlan::make(p, block.entry, advance.read());
      __syncthreads();
      tiles = static_cast<uint32_t>((plan.count + kTileRows - 1) / kTileRows);
#pragma unroll 1
      for (int half = 0; half < kHalves; ++half) {
        copy_half(half % 2 == 1, ring + half * Block::kHalfBytes, !p.settled);
      }
    } else {
      wait_for_previous_launch();
      let_next_launch_begin();
      load_query(warp);  // before rows are asked for, behind which it would wait
    }
  }
  advance.all_have_read();
  if (stores && plan.total > plan.seen) {
    // One block of each head stores the new row. Its slot is that of the position which the append evicts: nobody reads
    // it.
    if (block.split == 0 && block.tile == 0) {
      const int64_t offset = plan.slot(plan.count - 1) * row_elements;
      store_new_row(p, block, keys + offset, values + offset);
    }
    // Where its tile has been asked for before it could be read, it is still missing.
    const uint32_t tile = static_cast<uint32_t>(plan.cached / kTileRows);
    const uint32_t turn = (tile - first_tile) / stride;
    if (p.settled && tile >= first_tile && (tile - first_tile) % stride == 0 && turn < kHalves / 2) {
#pragma unroll 1
      for (int chunk = copier; chunk < 2 * kChunks; chunk += kCopiers) {
        const bool is_value = chunk >= kChunks;
        const int d = chunk % kChunks * 8;
        char* to = ring + (2 * turn + is_value) * Block::kHalfBytes +
                   Block::place(static_cast<int>(plan.cached % kTileRows), chunk % kChunks);
        Vec<uint16_t, 8> elements = {};
        if (d < head_dim) {
          elements = new_chunk(NewRows(p.append, is_value ? p.append.value : p.append.key, block), 0, d);
        }
        store<uint16_t, 8>(reinterpret_cast<uint16_t*>(to), elements);
      }
    }
  }

  // The queries as an operand, in the order in which lanes hold it: two columns for each. A query's largest magnitude
  // becomes one from 2^13 to 2^14.
#pragma unroll 1
  for (int m = warp; m < kQueries; m += warps) {
    if (m != warp) load_query(m);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) largest = fmaxf(largest, fabsf(x[i]));
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
    }
    const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
    const int shift = exponent < -100 ? 113 : exponent > 126 ? -113 : 13 - exponent;
    const float up = exact_power_of_two(shift);
#pragma unroll
    for (int i = 0; i < kOfLane / 2; ++i) {
      const uint32_t a = high_and_low(x[2 * i] * up);
      const uint32_t b = high_and_low(x[2 * i + 1] * up);
      const int pair = lane * (kOfLane / 2) + i;
      uint32_t* to = shared.operand + (m / 4 * kDepth + pair / 8) * 64 + (m % 4 * 8 + pair % 4) * 2 + pair / 4 % 2;
      to[0] = (a & 0xffff) | b << 16;
      to[8] = a >> 16 | (b & 0xffff0000u);
    }
    // From a product to a score in powers of two.
    if (lane == 0) shared.factor[m] = exact_power_of_two(-shift) * (p.softcap > 0 ? p.scale : p.scale * kLog2e);
  }
  __syncthreads();

  // Of an operand a lane holds column lane / 4, of a product those of query lane % 4 of each four of the warp's.
  const uint32_t mine = member * 4 * kTiles + lane % 4;
  const auto query_part = [&](int n, int k) {
    const Vec<uint32_t, 2> pair =
        load<uint32_t, 2>(shared.operand + ((member * kTiles + n) * kDepth + k) * 64 + lane * 2);
    return FragmentB{{pair.x[0], pair.x[1]}};
  };
  constexpr bool kInRegisters = kTiles * kDepth <= 8 && !(kFromSm100 && kShare > 1);
  FragmentB q[kInRegisters ? kTiles : 1][kInRegisters ? kDepth : 1];
  if constexpr (kInRegisters) {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) q[n][k] = query_part(n, k);
    }
  }
  // Tiles [clear_begin, clear_end) are seen by every query of this block.
  uint32_t clear_begin = 0;
  uint32_t clear_end = static_cast<uint32_t>(plan.count / kTileRows);
  if (p.rows > 1) {
    const int64_t oldest_query = division.group_size(first_query);
    const int64_t newest_query = division.group_size(first_query + queries - 1);
    const int64_t past_oldest = plan.query_position(oldest_query) + 1;
    const int64_t begin = plan.sinks_held + imax(plan.oldest_for(newest_query) - plan.oldest, 0);
    const int64_t end = plan.sinks_held + imax(past_oldest - plan.oldest, 0);
    clear_begin = static_cast<uint32_t>((begin + kTileRows - 1) / kTileRows);
    clear_end = static_cast<uint32_t>(imin(plan.count, end) / kTileRows);
    if (oldest_query < plan.padding || past_oldest < plan.sinks_held) clear_end = 0;
  }

  Running running[kTiles];
  float acc[kTiles][kDepth][2];  // elements 16 k + lane / 4 and eight on of query lane % 4
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    running[n] = {kLeastScore, 0.0f};  // the sum is this lane's rows' alone
#pragma unroll
    for (int k = 0; k < kDepth; ++k) acc[n][k][0] = acc[n][k][1] = 0.0f;
  }

  uint32_t barriers = 0;  // passed
  const auto sync_ring = [&] {
    sync_warps<kShare>();
    if (kEqualBarriers) ++barriers;
  };
  uint32_t half = 0;  // of the ring
  const auto next_half = [&] { half = half + 1 == kHalves ? 0 : half + 1; };
#pragma unroll 1
  for (uint32_t tile = first_tile; tile < tiles; tile += stride) {
    char* tile_keys = ring + half * Block::kHalfBytes;
    wait_for_copies<kHalves - 1>();
    sync_ring();

    // Products of keys (rows) and the two parts of the queries (columns), in two sums that do not wait for each other
    // (where there are many queries, those do not wait for each other).
    constexpr int kSums = kTiles * kShare < 4 ? 2 : 1;
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
    sync_ring();
    copy_half(kHalves % 2 == 1, tile_keys, true);
    next_half();
    // Scores of rows lane / 4 and eight on; then weights.
    const int64_t row0 = static_cast<int64_t>(tile) * kTileRows;
    const bool clear = tile >= clear_begin && tile < clear_end;
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
                   shared.factor[n * 4 + mine];
        if (p.softcap > 0) score[h] = capped(score[h], p.softcap);
        if (!clear && !sees(n, row0 + lane / 4 + 8 * h)) score[h] = minus_infinity();
      }
      float max = fmaxf(running[n].max, fmaxf(score[0], score[1]));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
      }
      rescale[n] = power_of_two(running[n].max - max);
      const float weight[2] = {power_of_two(score[0] - max + kLog2WeightScale),
                               power_of_two(score[1] - max + kLog2WeightScale)};
      running[n] = {max, fmaf(running[n].sum, rescale[n], weight[0] + weight[1])};
      weights[n] = {transposed(weight_parts(weight[0])), transposed(weight_parts(weight[1]))};
    }
    char* tile_values = ring + half * Block::kHalfBytes;
    wait_for_copies<kHalves - 1>();
    sync_ring();
    // Zero times NaN is NaN: a value that is not finite and that some query does not see must not be in the product.
    // It makes NaN of the sums of the queries that see it (non_finite.cuh), and is taken out of the tile.
    if (!clear && p.rows > 1) {
      bool strange = false;
#pragma unroll 1
      for (int i = lane; i < kTileRows * kWidth; i += 32) {
        strange = strange || !is_finite_half(reinterpret_cast<const uint16_t*>(tile_values)[i]);
      }
      if (__any_sync(kAllLanes, strange)) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll 1
          for (int row = 0; row < kTileRows; ++row) {
            if (!sees(n, row0 + row)) continue;
#pragma unroll
            for (int chunk = 0; chunk < kChunks; ++chunk) {
              const uint16_t bits = reinterpret_cast<const uint16_t*>(tile_values + Block::place(row, chunk))[lane / 4];
              // (With the bit an infinity is NaN, too. A plain NaN here makes other instances spill registers.)
              if (!is_finite_half(bits)) acc[n][chunk / 2][chunk % 2] += half_to_float(bits | kHalfQuietBit);
            }
          }
        }
        sync_ring();
#pragma unroll 1
        for (int i = copier; i < kTileRows * kWidth; i += kCopiers) {
          uint16_t& bits = reinterpret_cast<uint16_t*>(tile_values)[i];
          if (!is_finite_half(bits)) bits = 0;
        }
        sync_ring();
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
    sync_ring();
    copy_half(kHalves % 2 == 0, tile_values, true);
    next_half();
  }
  if (kEqualBarriers && kShare > 1) {
    const uint32_t begin = block.split * rings;  // the first ring's first tile: it has the most
    const uint32_t turns = tiles > begin ? (tiles - begin + stride - 1) / stride : 0;
    while (barriers < 6 * turns) sync_ring();
  }

  // Each warp leaves its sums in its ring, which is empty now.
  float* sums = reinterpret_cast<float*>(ring) + 4 * ring_number;  // 4: the rings' sums lie in different banks
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      running[n].sum += __shfl_xor_sync(kAllLanes, running[n].sum, distance);
    }
    if (lane < 4) shared.running[ring_number][n * 4 + mine] = {running[n].max - kLog2WeightScale, running[n].sum};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums[(n * 4 + mine) * Block::kQueryStride + 16 * k + 8 * h + lane / 4] = acc[n][k][h];
    }
  }
  advance.finish(division, {plan.seen, plan.first}, plan.total - plan.seen, p.cache.ring.divisor);
  __syncthreads();
  const Parts parts{&shared.running[0][0].max,
                    reinterpret_cast<float*>(shared_bytes + Block::kRingsAt),
                    2 * kQueries,
                    Block::kRingBytes / 4 + 4,
                    Block::kQueryStride,
                    static_cast<uint32_t>(rings)};
  finish_unit<kWidth, kQueries>(p, division, block, first_query, queries, parts, shared.last,
                                reinterpret_cast<float*>(shared_bytes + Block::kRingsAt),
                                static_cast<uint32_t>(rings * (Block::kRingBytes / 4)),
                                SettleNonFinite{p, division, shared.plan});
}

// A call's shape and the GPU that it is for: all that the choice of blocks depends on, so that a call's answer does not
// depend on how it came to its lengths.
struct Call {
  const AttendParams& p;
  cudaStream_t stream;
  int64_t sequence_heads;
  int64_t queries;  // of a KV head
  int multiprocessors = 0;
  int shared = 0;  // bytes, of a block, at most
  bool from_sm_100 = false;

  Call(const AttendParams& params, cudaStream_t s)
      : p(params),
        stream(s),
        sequence_heads(params.sequences.entries(params.cache.batch) * params.cache.heads),
        queries(params.rows * (params.query_heads / params.cache.heads)) {}

  cudaError_t find_device() {
    int device = 0;
    int major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    from_sm_100 = major >= 10;
    return error;
  }
};

// Blocks of a kernel instance, of `rings` rings.
template <int kDepth, int kTiles, int kShare, int kHalves>
struct Kernel {
  using Block = FewQueriesBlock<kDepth, kTiles, kShare, kHalves>;
  Blocks blocks;
  int rings;
  int64_t turns;  // of one block over the rows of a unit

  Kernel(const Call& call, int most_rings) : rings(most_rings) {
    while (Block::bytes(rings) > call.shared && rings > 1) rings /= 2;
    turns = (call.p.cache.positions + rings * kTileRows - 1) / (rings * kTileRows);
    blocks.units = call.sequence_heads * ((call.queries + Block::kQueries - 1) / Block::kQueries);
    blocks.multiprocessors = call.multiprocessors;
    // 1024: what the GPU keeps of a block's shared memory.
    const int64_t by_shared = (call.shared + 1024) / (Block::bytes(rings) + 1024);
    blocks.at_a_time = imax(imin(by_shared, Block::by_registers(call.from_sm_100) * Block::kRings / rings), 1);
    blocks.part_floats = kPartialFloats<Block::kWidth, Block::kQueries>;
    const int64_t room = call.p.partial_floats / (blocks.units * blocks.part_floats);
    // Two parts at least must fit into the rings, where they are merged.
    const bool can_merge = rings * Block::kRingBytes >= 2 * 4 * blocks.part_floats;
    blocks.most_splits = blocks.units <= kAttendTickets && can_merge ? imax(imin(room, turns), 1) : 1;
  }

  cudaError_t launch(const Call& call, int64_t splits) const {
    const AttendParams& p = call.p;
    const int64_t units = blocks.units;
    if (units * splits >= (int64_t{1} << 31)) return cudaErrorInvalidConfiguration;
    const int64_t bytes = shared_for_a_share(Block::bytes(rings), units * splits, blocks.multiprocessors, call.shared);
    const Division division{FastDivider::by(static_cast<uint32_t>(units)),
                            FastDivider::by(static_cast<uint32_t>(units / call.sequence_heads)),
                            FastDivider::by(static_cast<uint32_t>(p.cache.heads)),
                            FastDivider::by(static_cast<uint32_t>(p.query_heads / p.cache.heads)),
                            static_cast<uint32_t>(splits)};
    const auto kernel = few_queries_kernel<kDepth, kTiles, kShare, kHalves>;
    // The same for every call, as two threads may be about to launch different sizes.
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, call.shared);
    if (error != cudaSuccess) return error;
    PdlLaunch launch(units * splits, rings * kShare * 32, bytes, call.stream);
    return cudaLaunchKernelEx(&launch.config, kernel, p, division);
  }
};

// 4 or 8 queries a block. `Large` blocks have long rings, two tiles each; `Small` ones, of shorter rings and up to a
// head_dim of 128 half as many, fill the GPU better where there are many.
template <typename Large, typename Small>
cudaError_t launch_sized(const Call& call, int64_t long_cache) {
  const int64_t positions = call.p.cache.positions;
  const Large large(call, Large::Block::kRings);
  const Small small(call, Small::Block::kRings);
  const int64_t splits = large.blocks.quickest(large.turns).splits;
  // Where large blocks do not all run at once, it is enough that small ones do not fill the GPU worse, and for many
  // units, unless rings should be long, not even that: they are at different stages.
  const bool many = large.blocks.units >= 2 * call.multiprocessors;
  const bool smaller = large.blocks.all_run()
                           ? worth_splitting(small.blocks, large.blocks, splits, positions, 0.2)
                           : (many ? positions < long_cache : fill_better(small.blocks, large.blocks, 0));
  if (!smaller) return large.launch(call, splits);
  // In between, half as many long rings: of short caches if they all run at once, of longer ones where so many fit.
  const Large medium(call, Large::Block::kRings / 2);
  const bool fits = (positions <= 2 * kWorthSplitting && medium.blocks.all_run()) ||
                    (positions >= kWorthSplitting && medium.blocks.best_filling() >= small.blocks.best_filling() + 0.1);
  if (Large::Block::kWidth <= 128 && fits) return medium.launch(call, medium.blocks.best_splits());
  return small.launch(call, small.blocks.best_splits());
}

template <int kDepth>
cudaError_t launch_for(const Call& call) {
  if constexpr (kDepth <= 16) {
    using Kernel8 = Kernel<kDepth, 1, 2, 4>;
    if (call.queries > 8) {
      // Blocks of 16 queries read a row half as often as those of 8, for 1.6 times the work. Where they are few, what
      // they leave for the last to merge is the larger part of the time.
      using Kernel16 = Kernel<kDepth, 2, 2, 4>;
      const Kernel16 large(call, Kernel16::Block::kRings);
      const Kernel8 of_8(call, Kernel8::Block::kRings);
      const Blocks::Choice choice = large.blocks.quickest(large.turns, 16);
      if (choice.time <= of_8.blocks.quickest(of_8.turns).time) {
        const Kernel16 small(call, Kernel16::Block::kRings / 2);
        const bool smaller = large.blocks.all_run() ? worth_splitting(small.blocks, large.blocks, choice.splits,
                                                                      call.p.cache.positions, 0.2)
                                                    : fill_better(small.blocks, large.blocks, 0);
        return smaller ? small.launch(call, small.blocks.best_splits()) : large.launch(call, choice.splits);
      }
    }
    if (call.queries > 4) return launch_sized<Kernel8, Kernel<kDepth, 2, 1, 2>>(call, 8192);
  }
  return launch_sized<Kernel<kDepth, 1, 1, 4>, Kernel<kDepth, 1, 1, 2>>(call, INT64_MAX);
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  if (p.many) return launch_attend_many(p, stream);
  if (p.rows == 1 && p.query_heads == p.cache.heads && p.cache.head_dim <= 256) return launch_one_query(p, stream);
  Call call(p, stream);
  const cudaError_t error = call.find_device();
  if (error != cudaSuccess) return error;
  if (p.cache.head_dim <= 64) return launch_for<4>(call);
  if (p.cache.head_dim <= 128) return launch_for<8>(call);
  if (p.cache.head_dim <= 256) return launch_for<16>(call);
  if (p.cache.head_dim <= 512) return launch_for<32>(call);
  return cudaErrorInvalidValue;
}

}  // namespace kvc
