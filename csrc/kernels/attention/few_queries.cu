// Attention of few queries: softmax(scale * Q K^T) V for up to 16 queries that share a KV head, over FP16 keys and
// values as they lie in the cache, in FP32; and, in the same launch, the append of one new position.
//
// Grid: `splits` blocks for each unit, which is up to kQueries of the queries that share a KV head of an entry (a
// group's heads times T). The splits take turns at key tiles of 16 of the rows that the queries see (visibility.h); how
// many those are only the device knows. A team of warps copies its key tiles into stages in shared memory, some ahead
// of the one that it works on. Each of its warps has 4 * kQuads queries and multiplies them with the tile on tensor
// cores, so a row is read once for all of the block's queries. Each keeps a running maximum, sum and weighted sum
// (online softmax: Milakov and Gimelshein, 2018). Teams, then splits are merged in a fixed order (flash decoding: Dao
// et al., 2023), the splits by the block of the unit that arrives last. One query to a KV head is served by
// one_query.cu.
//
// Tensor cores take FP16; queries and weights are FP32. So each is two columns of the operand: a high part, and what it
// lacks times 2^11. The products of both are added. Queries are first scaled by a power of two, so that the low part is
// no subnormal; weights, at most 1, by 2^14. Both keep 22 bits (fewer for an element that is 2^28 times smaller than
// its query's largest). A tensor core truncates as it adds, so no sum stays in one for longer than a tile: the sums of
// tiles are added to registers in FP32.
//
// Short launches are latency-bound, by dependent loads and by instruction-cache misses. So little code is executed, and
// none is inlined twice (docs/performance.md). Launches overlap (pdl.cuh); where the previous one is known not to touch
// this layer (`may_read_before_wait`), rows are asked for while it is still at work.
//
// With `appends`, rows past the cached ones come from the call's own keys and values, rounded to FP16 on the way. So
// the output is bit for bit that of attending after the append. For T = 1 one block of each head also stores the new
// row (store_new_row). Whichever block arrives last of its
// sequence advances the state, as all have read it by then. For T > 1 the caller appends afterwards.
//
// This file is longer than others, as the kernel stays one function. As a struct with a method for each phase, the
// instance of 16 queries of 128 spilled registers, and the others for head sizes over 64 needed up to 11 more of them,
// on sm_80 and sm_90a.
#include "../launch.h"
#include "common.cuh"
#include "non_finite.cuh"

namespace kvc {
namespace {

constexpr float kLowPart = 1.0f / 2048;  // what a low part counts for
constexpr float kLog2WeightScale = 14;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFromSm100 = true;
#else
constexpr bool kFromSm100 = false;
#endif

// Set for compute-sanitizer's racecheck, which treats a named barrier as block-wide. It reports false races unless all
// warps pass the same number of them (docs/reliability.md).
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

// Both parts of a weight. Neither is negative, and a positive weight's low part is never 0. So an infinite value stays
// infinite in both products. (Below 2^-38 of the largest weight the high part is 0. An infinite value then gives NaN at
// first: non_finite.cuh.)
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

// Copies a tile's keys or values where they do not simply follow each other in the cache: rows that wrap, new rows (if
// they can be read by now), zeros after the last row and after head_dim. `plan` lies in shared memory.
// A function of its own, so that it costs the usual tile nothing but a call's registers.
template <int kDepth, int kWarps>
__device__ __noinline__ void copy_scattered(const AttendPlan* shared_plan, const uint16_t* cached, int64_t row_elements,
                                            int head_dim, int64_t row0, char* at, const NewRows rows,
                                            bool with_new_rows) {
  using Block = FewQueriesBlock<kDepth, FourQueriesLarge>;  // whose stages lie as those of all others
  constexpr int kTileRows = Block::kTileRows;
  const AttendPlan& plan = *shared_plan;
  constexpr int kLanes = 32 * kWarps;  // of the warps that share the tile
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  constexpr int kRowsAtATime = Block::kChunks < kLanes ? kLanes / Block::kChunks : 1;
  // 32 bits do for rows and slots.
  const int32_t cached_rows = static_cast<int32_t>(plan.cached - row0);
  const int32_t all = static_cast<int32_t>(plan.count - row0);
  const int32_t sinks = static_cast<int32_t>(plan.sinks_held - row0);
  const int32_t ring = static_cast<int32_t>(plan.ring);
  const int32_t wrap = sinks + ring - static_cast<int32_t>(plan.base);
  const int32_t to_slot = static_cast<int32_t>(plan.sinks + plan.base - plan.sinks_held);
#pragma unroll
  for (int i = 0; i < kTileRows; i += kRowsAtATime) {
    const int row = i + lane / Block::kChunks;
    if (row >= cached_rows && row < all) continue;  // a new row
    const int32_t slot = static_cast<int32_t>(row0) + row + (row < sinks ? 0 : row < wrap ? to_slot : to_slot - ring);
    const uint16_t* from = cached + slot * row_elements;
#pragma unroll
    for (int chunk = lane % Block::kChunks; chunk < Block::kChunks; chunk += kLanes) {
      const bool real = chunk * 8 < head_dim && row < cached_rows;
      copy_async(at + Block::place(row, chunk), real ? from + chunk * 8 : cached, real);
    }
  }
  if (!with_new_rows || cached_rows >= kTileRows) return;
#pragma unroll 1
  for (int row = lane / Block::kChunks; row < kTileRows && row < all; row += kRowsAtATime) {
    if (row < cached_rows) continue;
#pragma unroll 1
    for (int chunk = lane % Block::kChunks; chunk < Block::kChunks; chunk += kLanes) {
      Vec<uint16_t, 8> elements = {};
      if (chunk * 8 < head_dim) elements = new_chunk(rows, plan.input_row(row0 + row), chunk * 8);
      store<uint16_t, 8>(reinterpret_cast<uint16_t*>(at + Block::place(row, chunk)), elements);
    }
  }
}

template <int kDepth, typename Config>
__global__ void __launch_bounds__(FewQueriesBlock<kDepth, Config>::kThreads,
                                  FewQueriesBlock<kDepth, Config>::by_registers(kFromSm100))
    few_queries_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Division division) {
  using Block = FewQueriesBlock<kDepth, Config>;
  constexpr int kTileRows = Block::kTileRows;
  constexpr int kQuads = Block::kQuads;
  constexpr int kWarps = Block::kWarps;
  constexpr int kStages = Block::kStages;
  constexpr int kQueries = Block::kQueries;
  constexpr int kChunks = Block::kChunks;
  constexpr int kWidth = Block::kWidth;
  KVC_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(shared_bytes);

  const BlockUnit block = BlockUnit::of(p, division, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int member = warp % kWarps;  // of its team
  const int team = warp / kWarps;
  const int teams = warps / kWarps;
  constexpr int kCopiers = 32 * kWarps;
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
  char* const stages = shared_bytes + Block::kStagesAt + team * Block::kTeamBytes;

  // Copying the team's key tiles: first a tile's keys, then its values.
  const AttendPlan& plan = shared.plan;
  const TileTurns turns = TileTurns::of(block.split, division.splits, team, teams);
  uint32_t tiles = 0;             // of all rows
  uint32_t copied = turns.first;  // the one whose turn it is
  int64_t copied_offset = -1;     // of this thread's first chunk in that tile, if the tile's slots follow each other
  const auto copy_to_stage = [&](bool of_values, char* at, bool with_new_rows) {
    if (copied < tiles) {
      const int64_t row0 = static_cast<int64_t>(copied) * kTileRows;
      if (!of_values) {
        const int64_t slot0 = plan.slot(row0);
        const int chunk = copier % kChunks;
        const bool contiguous =
            row0 + kTileRows <= plan.cached && plan.slot(row0 + kTileRows - 1) - slot0 == kTileRows - 1;
        copied_offset =
            contiguous ? (slot0 + copier / kChunks) * row_elements + (chunk * 8 < head_dim ? chunk * 8 : 0) : -1;
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
        copy_scattered<kDepth, kWarps>(&plan, cached, row_elements, head_dim, row0, at, rows, with_new_rows);
      }
    }
    if (of_values) copied += turns.stride;
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

  // The previous launch may write the state, the queries and the new rows. Where it does not touch this layer
  // (`may_read_before_wait`), the first rows are asked for before the wait. One pass of the loop asks for rows, the
  // other waits. (A loop, so that the code is there once: a launch this short also waits for its instructions.)
  StateAdvance advance(p, block);
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if ((pass == 0) == p.may_read_before_wait) {
      if (threadIdx.x == 0) shared.plan = AttendPlan::make(p, block.entry, advance.read());
      __syncthreads();
      tiles = static_cast<uint32_t>((plan.count + kTileRows - 1) / kTileRows);
#pragma unroll 1
      for (int stage = 0; stage < kStages; ++stage) {
        copy_to_stage(stage % 2 == 1, stages + stage * Block::kStageBytes, !p.may_read_before_wait);
      }
    } else {
      wait_for_previous_launch();
      let_next_launch_begin();
      load_query(warp);  // before rows are asked for, behind which it would wait
    }
  }
  advance.all_have_read();
  if (stores && plan.total > plan.seqlen) {
    if (block.split == 0 && block.tile == 0) {
      const int64_t offset = plan.slot(plan.count - 1) * row_elements;
      store_new_row(p, block, keys + offset, values + offset);
    }
    // If its tile was copied before the wait, the new row is not in it yet.
    const uint32_t tile = static_cast<uint32_t>(plan.cached / kTileRows);
    const uint32_t turn = (tile - turns.first) / turns.stride;
    if (p.may_read_before_wait && tile >= turns.first && (tile - turns.first) % turns.stride == 0 &&
        turn < kStages / 2) {
#pragma unroll 1
      for (int chunk = copier; chunk < 2 * kChunks; chunk += kCopiers) {
        const bool is_value = chunk >= kChunks;
        const int d = chunk % kChunks * 8;
        char* to = stages + (2 * turn + is_value) * Block::kStageBytes +
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

  // Operand: a lane holds column lane / 4. Product: it holds the columns of query lane % 4 in each quad of the warp's
  // queries.
  const uint32_t mine = member * 4 * kQuads + lane % 4;
  const auto query_part = [&](int n, int k) {
    const Vec<uint32_t, 2> pair =
        load<uint32_t, 2>(shared.operand + ((member * kQuads + n) * kDepth + k) * 64 + lane * 2);
    return FragmentB{{pair.x[0], pair.x[1]}};
  };
  constexpr bool kInRegisters = kQuads * kDepth <= 8 && !(kFromSm100 && kWarps > 1);
  FragmentB q[kInRegisters ? kQuads : 1][kInRegisters ? kDepth : 1];
  if constexpr (kInRegisters) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
#pragma unroll
      for (int k = 0; k < kDepth; ++k) q[n][k] = query_part(n, k);
    }
  }
  // Key tiles of which every query of this block sees every row.
  uint32_t fully_visible_begin = 0;
  uint32_t fully_visible_end = static_cast<uint32_t>(plan.count / kTileRows);
  if (p.rows > 1) {
    const int64_t oldest_query = division.group_size(first_query);
    const int64_t newest_query = division.group_size(first_query + queries - 1);
    const int64_t past_oldest = plan.query_position(oldest_query) + 1;
    const int64_t begin = plan.sinks_held + imax(plan.oldest_for(newest_query) - plan.oldest, 0);
    const int64_t end = plan.sinks_held + imax(past_oldest - plan.oldest, 0);
    fully_visible_begin = static_cast<uint32_t>((begin + kTileRows - 1) / kTileRows);
    fully_visible_end = static_cast<uint32_t>(imin(plan.count, end) / kTileRows);
    if (oldest_query < plan.padding || past_oldest < plan.sinks_held) fully_visible_end = 0;
  }

  SoftmaxState states[kQuads];
  float acc[kQuads][kDepth][2];  // elements 16 k + lane / 4 and eight on of query lane % 4
#pragma unroll
  for (int n = 0; n < kQuads; ++n) {
    states[n] = {kLeastScore, 0.0f};  // the sum is this lane's rows' alone
#pragma unroll
    for (int k = 0; k < kDepth; ++k) acc[n][k][0] = acc[n][k][1] = 0.0f;
  }

  uint32_t barriers = 0;  // passed
  const auto sync_team = [&] {
    sync_warps<kWarps>();
    if (kEqualBarriers) ++barriers;
  };
  uint32_t stage = 0;  // that is worked on next
  const auto next_stage = [&] { stage = stage + 1 == kStages ? 0 : stage + 1; };
#pragma unroll 1
  for (uint32_t tile = turns.first; tile < tiles; tile += turns.stride) {
    char* tile_keys = stages + stage * Block::kStageBytes;
    wait_for_copies<kStages - 1>();
    sync_team();

    // Products of keys (rows) and the two parts of the queries (columns). Two sums, so that one product need not wait
    // for the other; with many queries their own sums suffice.
    constexpr int kSums = kQuads * kWarps < 4 ? 2 : 1;
    FragmentC products[kQuads][kSums] = {};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA keys_part = load_matrices(tile_keys + Block::place(lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        if constexpr (kInRegisters) {
          multiply_add(products[n][k % kSums], keys_part, q[n][k]);
        } else {
          multiply_add(products[n][k % kSums], keys_part, query_part(n, k));
        }
      }
    }
    sync_team();
    copy_to_stage(kStages % 2 == 1, tile_keys, true);
    next_stage();
    // Scores of rows lane / 4 and eight on; then weights.
    const int64_t row0 = static_cast<int64_t>(tile) * kTileRows;
    const bool clear = tile >= fully_visible_begin && tile < fully_visible_end;
    const auto sees = [&](int n, int64_t row) {
      const uint32_t m = n * 4 + mine < queries ? n * 4 + mine : 0;
      return row < plan.count && (p.rows == 1 || plan.sees(division.group_size(first_query + m), row));
    };
    FragmentB weights[kQuads];
    float rescale[kQuads];
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      float score[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        score[h] = whole_score(products[n][0].x[2 * h] + (kSums > 1 ? products[n][kSums - 1].x[2 * h] : 0.0f),
                               products[n][0].x[2 * h + 1] + (kSums > 1 ? products[n][kSums - 1].x[2 * h + 1] : 0.0f)) *
                   shared.factor[n * 4 + mine];
        if (p.softcap > 0) score[h] = capped(score[h], p.softcap);
        if (!clear && !sees(n, row0 + lane / 4 + 8 * h)) score[h] = minus_infinity();
      }
      float max = fmaxf(states[n].max, fmaxf(score[0], score[1]));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
      }
      rescale[n] = power_of_two(states[n].max - max);
      const float weight[2] = {power_of_two(score[0] - max + kLog2WeightScale),
                               power_of_two(score[1] - max + kLog2WeightScale)};
      states[n] = {max, fmaf(states[n].sum, rescale[n], weight[0] + weight[1])};
      weights[n] = {transposed(weight_parts(weight[0])), transposed(weight_parts(weight[1]))};
    }
    char* tile_values = stages + stage * Block::kStageBytes;
    wait_for_copies<kStages - 1>();
    sync_team();
    // Zero times NaN is NaN: a value that is not finite and that some query does not see must not be in the product.
    // It makes NaN of the sums of the queries that see it (non_finite.cuh), and is taken out of the tile.
    if (!clear && p.rows > 1) {
      bool non_finite = false;
#pragma unroll 1
      for (int i = lane; i < kTileRows * kWidth; i += 32) {
        non_finite = non_finite || !is_finite_half(reinterpret_cast<const uint16_t*>(tile_values)[i]);
      }
      if (__any_sync(kAllLanes, non_finite)) {
#pragma unroll
        for (int n = 0; n < kQuads; ++n) {
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
        sync_team();
#pragma unroll 1
        for (int i = copier; i < kTileRows * kWidth; i += kCopiers) {
          uint16_t& bits = reinterpret_cast<uint16_t*>(tile_values)[i];
          if (!is_finite_half(bits)) bits = 0;
        }
        sync_team();
      }
    }
    // Products of values (their elements as rows) and the two parts of the weights.
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA values_part =
          load_matrices_transposed(tile_values + Block::place(lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        FragmentC sums = {};
        multiply_add(sums, values_part, weights[n]);
        acc[n][k][0] = fmaf(acc[n][k][0], rescale[n], fmaf(sums.x[1], kLowPart, sums.x[0]));
        acc[n][k][1] = fmaf(acc[n][k][1], rescale[n], fmaf(sums.x[3], kLowPart, sums.x[2]));
      }
    }
    sync_team();
    copy_to_stage(kStages % 2 == 0, tile_values, true);
    next_stage();
  }
  if (kEqualBarriers && kWarps > 1) {
    const uint32_t begin = block.split * teams;  // the first team's first tile: it has the most
    const uint32_t most_tiles = tiles > begin ? (tiles - begin + turns.stride - 1) / turns.stride : 0;
    while (barriers < 6 * most_tiles) sync_team();
  }

  // Each warp leaves its sums in its team's stages, which are empty now.
  float* sums = reinterpret_cast<float*>(stages) + 4 * team;  // 4: the teams' sums lie in different banks
#pragma unroll
  for (int n = 0; n < kQuads; ++n) {
#pragma unroll
    for (int distance = 4; distance < 32; distance *= 2) {
      states[n].sum += __shfl_xor_sync(kAllLanes, states[n].sum, distance);
    }
    if (lane < 4) shared.states[team][n * 4 + mine] = {states[n].max - kLog2WeightScale, states[n].sum};
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int h = 0; h < 2; ++h) sums[(n * 4 + mine) * Block::kQueryStride + 16 * k + 8 * h + lane / 4] = acc[n][k][h];
    }
  }
  advance.finish(division, {plan.seqlen, plan.first}, plan.total - plan.seqlen, p.cache.ring.divisor);
  __syncthreads();
  const Partials partials{&shared.states[0][0].max,
                          reinterpret_cast<float*>(shared_bytes + Block::kStagesAt),
                          2 * kQueries,
                          Block::kTeamBytes / 4 + 4,
                          Block::kQueryStride,
                          static_cast<uint32_t>(teams)};
  finish_unit<kWidth, kQueries>(p, division, block, first_query, queries, partials, shared.last,
                                reinterpret_cast<float*>(shared_bytes + Block::kStagesAt),
                                static_cast<uint32_t>(teams * (Block::kTeamBytes / 4)),
                                ResolveNonFinite{p, division, shared.plan});
}

template <int kDepth, typename Config>
cudaError_t launch_config(const AttendParams& p, const AttendShape& shape, const FewQueriesSchedule& schedule,
                          const Gpu& gpu, cudaStream_t stream) {
  const auto kernel = few_queries_kernel<kDepth, Config>;
  // The same for every call, as two threads may be about to launch different sizes.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(gpu.shared_bytes));
  if (error != cudaSuccess) return error;
  PdlLaunch launch(schedule.blocks, schedule.threads, schedule.shared_bytes, stream, gpu.major);
  return cudaLaunchKernelEx(&launch.config, kernel, p, Division::of(shape, schedule.units, schedule.splits));
}

template <int kDepth>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t error = current_gpu(gpu);
  if (error != cudaSuccess) return error;
  const AttendShape shape = AttendShape::of(p);
  const FewQueriesSchedule s = schedule_few_queries<kDepth>(shape, gpu);
  if (!s.exists()) return cudaErrorInvalidConfiguration;
  print_if_asked(s, gpu);
  switch (s.which) {
    case FewQueriesConfig::four_large: return launch_config<kDepth, FourQueriesLarge>(p, shape, s, gpu, stream);
    case FewQueriesConfig::four_small: return launch_config<kDepth, FourQueriesSmall>(p, shape, s, gpu, stream);
    default: break;
  }
  if constexpr (kDepth <= 16) {
    switch (s.which) {
      case FewQueriesConfig::eight_large: return launch_config<kDepth, EightQueriesLarge>(p, shape, s, gpu, stream);
      case FewQueriesConfig::eight_small: return launch_config<kDepth, EightQueriesSmall>(p, shape, s, gpu, stream);
      case FewQueriesConfig::sixteen: return launch_config<kDepth, SixteenQueries>(p, shape, s, gpu, stream);
      default: break;
    }
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_attend(const AttendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  if (p.many) return launch_attend_many(p, stream);
  if (is_one_query(AttendShape::of(p), p.cache.head_dim)) return launch_one_query(p, stream);
  if (p.cache.head_dim <= 64) return launch<4>(p, stream);
  if (p.cache.head_dim <= 128) return launch<8>(p, stream);
  if (p.cache.head_dim <= 256) return launch<16>(p, stream);
  if (p.cache.head_dim <= 512) return launch<32>(p, stream);
  return cudaErrorInvalidValue;
}

}  // namespace kvc
