// Attention of few queries: softmax(scale * Q K^T) V for up to 16 queries that share a KV head, over FP16 keys and
// values as they lie in the cache, in FP32; and, in the same launch, the append of one new position.
//
// Grid: `splits` blocks for each unit, which is up to kQueries of the queries that share a KV head of an entry (a
// group's heads times T). The splits take turns at tiles of 16 or 32 of the rows that the queries see (visibility.h).
// How many those are only the device knows: where they are too few for all splits, some of these end at once
// (useful_splits). A team of warps copies its key tiles into stages in shared memory, some ahead of the one that it
// works on. Each of its warps has four or eight of the queries and multiplies them with the tile on tensor cores
// (few_queries_products.cuh), so a row is read once for all of the block's queries. Each query has a running maximum,
// sum and weighted sum (online softmax: Milakov and Gimelshein, 2018). Teams, then splits are merged in a fixed order
// (flash decoding: Dao et al., 2023), the splits by the block of the unit that arrives last (finish_unit). One query to
// a KV head is served by one_query.cu.
//
// Short launches are latency-bound, by dependent loads and by instruction-cache misses. So little code is executed, and
// none is inlined twice (docs/performance.md). Launches overlap (pdl.cuh); where the previous one is known not to touch
// this layer (`may_read_before_wait`), rows are asked for while it is still at work.
//
// With `appends`, rows past the cached ones come from the call's own keys and values, rounded to FP16 on the way. So
// the output is bit for bit that of attending after the append. For T = 1 one block of each head also stores the new
// row (store_new_row), and the block of a sequence that arrives last advances the state, as all have read it by then.
// For T > 1 the caller appends afterwards.
#include "../launch.h"
#include "common.cuh"
#include "few_queries_products.cuh"

namespace kvc {
namespace {

// Set for compute-sanitizer's racecheck, which treats a named barrier as block-wide. It reports false races unless all
// warps pass the same number of them (docs/reliability.md).
#if defined(KVC_RACECHECK)
constexpr bool kEqualBarriers = true;
#else
constexpr bool kEqualBarriers = false;
#endif

// Copies a tile's keys or values where they do not simply follow each other in the cache: rows that wrap, new rows (if
// they can be read by now), zeros after the last row and after head_dim. `plan` lies in shared memory.
// A function of its own, so that it costs the usual tile nothing but a call's registers.
template <int kDepth, int kWarps, int kTileRows>
__device__ __noinline__ void copy_scattered(const AttendPlan* shared_plan, const uint16_t* cached, int64_t row_elements,
                                            int head_dim, int64_t row0, char* at, const NewRows rows,
                                            bool with_new_rows) {
  using Block = FewQueriesBlock<kDepth, FourQueriesLarge>;  // whose rows lie as those of all others
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

// A function of its own, as the other calls are many and short.
__device__ __noinline__ void take_share(AttendPlan* plan, const CacheView* cache) { plan->take_share(*cache, false); }

template <int kDepth, typename Config>
__global__ void __launch_bounds__(FewQueriesBlock<kDepth, Config>::kThreads,
                                  FewQueriesBlock<kDepth, Config>::by_registers(kFromSm100))
    few_queries_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Division division) {
  using Block = FewQueriesBlock<kDepth, Config>;
  constexpr int kTileRows = Block::kTileRows;
  using Layout = std::conditional_t<Block::kQueriesAsRows, QueriesAsRows<Block>, KeysAsRows<Block>>;
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
  const int team = warp / kWarps;
  const int teams = warps / kWarps;
  constexpr int kCopiers = 32 * kWarps;
  const int copier = static_cast<int>(threadIdx.x % kCopiers);
  const int head_dim = static_cast<int>(p.cache.head_dim);
  const uint32_t first_query = block.tile * kQueries;
  const auto queries_from = [&](uint32_t first) {  // of a block whose first query that is
    const uint32_t rest = division.group_size.divisor * static_cast<uint32_t>(p.rows) - first;
    return rest < kQueries ? rest : kQueries;
  };
  const uint32_t queries = queries_from(first_query);
  const bool stores = p.appends && p.rows == 1 && block.sequence >= 0;

  const int64_t row_elements = p.cache.heads * head_dim;
  const int64_t head_offset = block.cache_offset(p);
  uint16_t* keys = p.cache.k_cache + head_offset;
  uint16_t* values = p.cache.v_cache + head_offset;
  char* const stages = shared_bytes + Block::kStagesAt + team * Block::kTeamBytes;

  // Copying the team's key tiles: first a tile's keys, then its values.
  const AttendPlan& plan = shared.plan;
  TileTurns kept_turns = {};
  const auto turns = [&] {  // blocks of 16 queries have no registers to keep them
    return Block::kQueriesAsRows ? TileTurns::of(block.split, shared.splits, team, teams) : kept_turns;
  };
  uint32_t tiles = 0;          // of all rows
  uint32_t copied = 0;         // the one whose turn it is
  int64_t copied_offset = -1;  // of this thread's first chunk in that tile, if the tile's slots follow each other
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
        copy_scattered<kDepth, kWarps, kTileRows>(&plan, cached, row_elements, head_dim, row0, at, rows, with_new_rows);
      }
    }
    if (of_values) copied += turns().stride;
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
  StateAdvance advance;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {
    if ((pass == 0) == p.may_read_before_wait) {
      if (threadIdx.x == 0) {
        shared.plan = AttendPlan::make_of_all(p, block.entry, StateAdvance::read(p, block));
        if (!p.cache.share.is_all()) take_share(&shared.plan, &p.cache);
        const uint32_t rows_of_turn = static_cast<uint32_t>(teams * kTileRows);
        shared.splits = useful_splits<Block>((static_cast<uint32_t>(plan.count) + rows_of_turn - 1) / rows_of_turn,
                                             division.splits, division.most_each);
      }
      __syncthreads();
      tiles = block.split < shared.splits ? static_cast<uint32_t>((plan.count + kTileRows - 1) / kTileRows) : 0;
      kept_turns = TileTurns::of(block.split, shared.splits, team, teams);
      copied = turns().first;
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
  advance.all_have_read(p, block);
  if (stores && plan.cached < plan.count) {
    if (block.split == 0 && block.tile == 0) {
      const int64_t offset = plan.slot(plan.count - 1) * row_elements;
      store_new_row(p, block, keys + offset, values + offset);
    }
    // If its tile was copied before the wait, the new row is not in it yet.
    const uint32_t tile = static_cast<uint32_t>(plan.cached / kTileRows);
    const uint32_t turn = (tile - turns().first) / turns().stride;
    if (p.may_read_before_wait && tile >= turns().first && (tile - turns().first) % turns().stride == 0 &&
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

  // The queries as an operand, in the order in which lanes hold it. A query's largest magnitude
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
      Layout::store_query_pair(shared.operand, m, pair, a, b);
    }
    // From a product to a score in powers of two.
    if (lane == 0) shared.factor[m] = exact_power_of_two(-shift) * (p.softcap > 0 ? p.scale : p.scale * kLog2e);
  }
  if (threadIdx.x == 0) {
    shared.fully_visible = fully_visible_tiles<kTileRows>(p, division, plan, first_query, first_query + queries - 1);
  }
  __syncthreads();

  Layout products(shared.operand);
  uint32_t barriers = 0;  // passed
  const auto sync_team = [&] {
    sync_warps<kWarps>();
    if (kEqualBarriers) ++barriers;
  };
  uint32_t stage = 0;  // that is worked on next
  const auto next_stage = [&] { stage = stage + 1 == kStages ? 0 : stage + 1; };
#pragma unroll 1
  for (uint32_t tile = turns().first; tile < tiles; tile += turns().stride) {
    char* tile_keys = stages + stage * Block::kStageBytes;
    wait_for_copies<kStages - 1>();
    sync_team();

    typename Layout::Products of_keys = {};
    products.multiply_keys(of_keys, shared.operand, tile_keys);
    sync_team();
    copy_to_stage(kStages % 2 == 1, tile_keys, true);
    next_stage();
    const int64_t row0 = static_cast<int64_t>(tile) * kTileRows;
    const bool clear = tile >= shared.fully_visible.begin && tile < shared.fully_visible.end;
    const auto sees = [&](uint32_t m, int64_t row) {
      if (m >= queries) m = 0;
      return row < plan.count && (p.rows == 1 || plan.sees(division.group_size(first_query + m), row));
    };
    typename Layout::Weights weights;
    products.weigh(p, shared.factor, of_keys, row0, clear, sees, weights);
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
        products.add_non_finite(tile_values, row0, sees);
        sync_team();
#pragma unroll 1
        for (int i = copier; i < kTileRows * kWidth; i += kCopiers) {
          uint16_t& bits = reinterpret_cast<uint16_t*>(tile_values)[i];
          if (!is_finite_half(bits)) bits = 0;
        }
        sync_team();
      }
    }
    products.multiply_values(weights, tile_values);
    sync_team();
    copy_to_stage(kStages % 2 == 0, tile_values, true);
    next_stage();
  }
  if (kEqualBarriers && kWarps > 1) {
    const uint32_t begin = block.split * teams;  // the first team's first tile: it has the most
    const uint32_t most_tiles = tiles > begin ? (tiles - begin + turns().stride - 1) / turns().stride : 0;
    while (barriers < 6 * most_tiles) sync_team();
  }

  // Each warp leaves its sums in its team's stages, which are empty now.
  float* sums = reinterpret_cast<float*>(stages) + 4 * team;  // 4: the teams' sums lie in different banks
  products.leave(shared.states[team], sums);
  // Blocks of 16 queries have no registers to keep their place.
  const BlockUnit place = Block::kQueriesAsRows ? BlockUnit::of(p, division, anew(blockIdx.x)) : block;
  advance.finish(p, division, place, {plan.seqlen, plan.first}, plan.total - plan.seqlen);
  if (place.split >= shared.splits) return;  // the others have all the rows
  __syncthreads();
  float* const room = reinterpret_cast<float*>(shared_bytes + Block::kStagesAt);
  const Partials partials{
      &shared.states[0][0].max,    room, 2 * kQueries, Block::kTeamBytes / 4 + 4, Block::kQueryStride,
      static_cast<uint32_t>(teams)};
  finish_unit<kWidth, kQueries>(p, division, place, shared.splits, place.tile * kQueries,
                                queries_from(place.tile * kQueries), partials, shared.last, room,
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
  return cudaLaunchKernelEx(&launch.config, kernel, p,
                            Division::of(shape, schedule.units, schedule.splits, schedule.most_each));
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
