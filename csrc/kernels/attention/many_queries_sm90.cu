// Attention of many queries for sm_90a (H100, H200): what many_queries.cu does, by the products of warpgroups (wgmma)
// and bulk copies of tiles (TMA), with twice its speed.
//
// A block has three warpgroups. The first finds the next tile of 128 queries that nobody works on, and copies tiles of
// keys and values into shared memory; the other two multiply them with 64 of the queries each, that lie in shared
// memory as FP16 parts. Barriers in shared memory say when a tile is there, and when both have done with it (the scheme
// of FlashAttention-3: Shah et al., 2024). There are as many blocks as multiprocessors: while the answers of one tile
// of queries are written, keys of the next are on their way. A tile whose rows lie one after the other in the cache is
// one bulk copy; what remains (the end of what is held, where the ring wraps, new rows in the call's own tensors) the
// first warpgroup copies row by row.
//
// With one FP16 part (kParts 1) the products of a tile's scores run beside those of the tile's before with its values.
// With two parts there is no room in registers for that, and little to gain: one warpgroup multiplies while the other
// weighs.
#include "../hopper.cuh"
#include "../launch.h"
#include "../tensor_map.h"
#include "many_queries.cuh"

namespace kvc {

#if defined(KVC_WITH_SM90A) || defined(KVC_EMULATED)
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma nv_diag_suppress 177  // constants of a kernel that has no body for other architectures
#endif
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupQueries = 64;   // of one that multiplies
constexpr int kRowBytes = 128;      // of a panel

// Named barriers: of the threads that load, and of each warpgroup that multiplies.
constexpr int kLoadBarrier = 1;
constexpr int kGroupBarrier = 2;

// kParts: FP16 parts of a query and of a weight.
template <typename Config, int kParts_>
struct Sm90Block : Sm90Shape<Config> {
  using Shape = Sm90Shape<Config>;
  using Shape::kDepth, Shape::kKeys, Shape::kStages, Shape::kQueries, Shape::kWidth;
  static_assert(Shape::kGroupThreads == kGroupThreads && Shape::kGroupQueries == kGroupQueries);
  static constexpr int kParts = kParts_;
  static constexpr int kPanels = kWidth / 64;
  static constexpr int kChunks = 2 * kDepth;             // 16-byte chunks of a row
  static constexpr int kPanelBytes = kKeys * kRowBytes;  // of keys or values
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQueryPanelBytes = kGroupQueries * kRowBytes;
  static constexpr int kQueryPartBytes = kPanels * kQueryPanelBytes;
  static constexpr int kColumns = kWidth > 128 ? 64 : kWidth;  // of the answer, that are multiplied at a time
  static constexpr int kPieces = kWidth / kColumns;
  static constexpr bool kAhead = kParts == 1 && kDepth <= 8;

  // A tile of queries, or a part of the keys of one.
  struct Work {
    bool exists;
    QueryTile tile;
    AttendPlan plan;
    KeyTiles<kKeys> tiles;
    int32_t last_tile;  // of keys: the first that is taken
    int32_t stop;       // and the last
    // For each warpgroup, of the tiles of keys: the last that its queries see something of, and those that all of them
    // see all of, if there are any.
    int32_t last_seen[2];
    int32_t first_clear[2], last_clear[2];
  };
  struct Shared {
    Work work[2];
    uint64_t work_full[2], work_empty[2];
    uint64_t keys_full[kStages], keys_empty[kStages], values_full[kStages], values_empty[kStages];
    float factor[kQueries];  // from a query's products to scores
  };
  static constexpr int kKeysAt = 2 * kParts * kQueryPartBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kTileBytes;
  static constexpr int kSharedAt = kValuesAt + kStages * kTileBytes;
  static constexpr int kBytes = kSharedAt + sizeof(Shared) + 1024;  // 1024: panels begin at a multiple of that
  static_assert(kBytes <= 232448);

  static PartialsLayout KVC_HD layout(int64_t splits) { return {static_cast<int>(splits), kQueries, 1, kWidth}; }

  static __device__ __forceinline__ int place(int row, int chunk) {
    return chunk / 8 * kPanelBytes + row * kRowBytes + ((chunk % 8) ^ (row & 7)) * 16;
  }
};

// A stage's number, and the parity of its barriers' phase.
template <int kStages>
struct Stage {
  int number = 0;
  int parity = 0;
  __device__ __forceinline__ void advance() {
    if (++number == kStages) {
      number = 0;
      parity ^= 1;
    }
  }
};

template <typename Block>
__device__ __forceinline__ void load_tiles(const AttendParams& p, typename Block::Shared& shared,
                                           const typename Block::Work& work, char* panels, const CUtensorMap* key_map,
                                           const CUtensorMap* value_map, Stage<Block::kStages>& stage) {
  const AttendPlan& plan = work.plan;
  const BlockUnit& block = work.tile.block;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int32_t tile = work.last_tile; tile >= work.stop; --tile) {
    const int32_t row0 = work.tiles.row(tile);
    const int32_t end = work.tiles.row_end(tile);
    const bool whole = plan.lie_in_a_row(row0, row0 + Block::kKeys);  // also of rows that nobody here sees
#pragma unroll 1
    for (int of_values = 0; of_values < 2; ++of_values) {
      uint64_t* full = (of_values ? shared.values_full : shared.keys_full) + stage.number;
      uint64_t* empty = (of_values ? shared.values_empty : shared.keys_empty) + stage.number;
      char* at = panels + (of_values ? Block::kValuesAt : Block::kKeysAt) + stage.number * Block::kTileBytes;
      wait_barrier(empty, stage.parity ^ 1);
      sync_threads(kLoadBarrier, kGroupThreads);  // else a slow warp could miss the end of that phase
      if (whole) {
        if (thread != 0) continue;
        arrive_and_expect(full, Block::kTileBytes);
        const int slot = static_cast<int>(plan.slot(row0));
#pragma unroll
        for (int panel = 0; panel < Block::kPanels; ++panel) {
          copy_box(at + panel * Block::kPanelBytes, of_values ? value_map : key_map, full, 64 * panel,
                   static_cast<int>(block.head), slot, static_cast<int>(block.sequence));
        }
        continue;
      }
      const uint16_t* cached = (of_values ? p.cache.v_cache : p.cache.k_cache) + block.cache_offset(p);
      const NewRows rows(p.append, of_values ? p.append.value : p.append.key, block);
      copy_tile<Block::kKeys, Block::kChunks, kGroupThreads>(plan, cached, p.cache.heads * p.cache.head_dim,
                                                             static_cast<int>(p.cache.head_dim) / 8, row0, end, rows, 0,
                                                             at, Block::place, thread);
      end_copy_group();
      wait_for_copies<0>();
      fence_for_products();
      sync_threads(kLoadBarrier, kGroupThreads);
      if (thread == 0) arrive(full);
    }
    stage.advance();
  }
}

// A warpgroup's queries as FP16 parts in shared memory, and the factors of their products.
template <typename Block>
__device__ __forceinline__ void store_queries(const AttendParams& p, const ManyDivision& division,
                                              const QueryTile& tile, int group, char* at, float* factors) {
  constexpr int kLanes = 8;                         // that share a row: each has every eighth chunk of eight elements
  constexpr int kChunks = Block::kChunks / kLanes;  // of a lane
  constexpr int kRows = kChunks == 1 ? 2 : Block::kParts == 2 && kChunks == 2 ? 4 : 1;  // of a lane, at a time
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int first_row = static_cast<int>(threadIdx.x % kGroupThreads / kLanes);
  const int head_dim = static_cast<int>(p.cache.head_dim);
#pragma unroll 1
  for (int row0 = first_row; row0 < kGroupQueries; row0 += 16 * kRows) {
    int64_t offset[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const QueryPlace place(division.division, tile.block, tile.number(kGroupQueries * group + row0 + 16 * r));
      offset[r] = tile.block.entry * p.query.batch_stride + place.t * p.query.row_stride +
                  place.head * p.query.head_stride + 8 * lane;
    }
    float x[kRows * kChunks * 4][2];
    load_pairs(
        p.query.data, p.dtype, division.query_in_pairs,
        [&](int i) {
          const int d = i / 4 % kChunks * 8 * kLanes + i % 4 * 2;
          return d + 8 * lane < head_dim ? offset[i / 4 / kChunks] + d : -1;
        },
        x);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int row = row0 + 16 * r;
      float (*const of_row)[2] = x + r * kChunks * 4;
      float largest = 0.0f;
#pragma unroll
      for (int i = 0; i < kChunks * 4; ++i) {
        largest = fmaxf(largest, fmaxf(fabsf(of_row[i][0]), fabsf(of_row[i][1])));
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, distance));
      }
      const QueryScale scale = QueryScale::of(p, largest);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        Vec<uint32_t, 4> high, low;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float a = of_row[4 * c + i][0] * scale.up;
          const float b = of_row[4 * c + i][1] * scale.up;
          high.x[i] = half_pair(a, b);
          low.x[i] = low_pair(a, b, high.x[i]);
        }
        char* to = at + c * Block::kQueryPanelBytes + row * kRowBytes + (lane ^ (row & 7)) * 16;
        store<uint32_t, 4>(reinterpret_cast<uint32_t*>(to), high);
        if constexpr (Block::kParts == 2) {
          store<uint32_t, 4>(reinterpret_cast<uint32_t*>(to + Block::kQueryPartBytes), low);
        }
      }
      if (lane == 0) factors[row] = scale.factor;
    }
  }
}

// No sum of FP32 accuracy stays in a tensor core for longer than a tile of keys; one of FP16 may (kParts 1).

// Begins the products of a warpgroup's queries with a tile's first 8 kBlocks keys.
template <typename Block, int kBlocks>
__device__ __forceinline__ void begin_scores(FragmentC (&products)[kBlocks], const char* queries, const char* keys) {
  const uint64_t left = operand_at(queries, 0);
  const uint64_t right = operand_at(keys, 0);
  begin_products();
#pragma unroll
  for (int part = Block::kParts - 1; part >= 0; --part) {
#pragma unroll
    for (int k = 0; k < Block::kDepth; ++k) {
      multiply_add_rows(
          products, operand_after(left, part * Block::kQueryPartBytes + k / 4 * Block::kQueryPanelBytes + k % 4 * 32),
          operand_after(right, k / 4 * Block::kPanelBytes + k % 4 * 32), part != Block::kParts - 1 || k > 0);
    }
  }
  end_products();
}

// The products of weights with a tile's values, columns of one or two panels from `values` on: added to `sums` or in
// their place.
template <typename Block, bool kAdds, int kSteps, int kBlocks>
__device__ __forceinline__ void multiply_values(FragmentC (&sums)[kBlocks],
                                                const FragmentA (&weights)[Block::kParts][kSteps], const char* values) {
  const uint64_t right = operand_at(values, Block::kPanelBytes);
#pragma unroll
  for (int part = Block::kParts - 1; part >= 0; --part) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      multiply_add_columns(sums, weights[part][n], operand_after(right, n * 16 * kRowBytes),
                           kAdds || part != Block::kParts - 1 || n > 0);
    }
  }
}

template <int kParts, int kBlocks>
__device__ __forceinline__ void take_weights(FragmentA (&weights)[kParts][kBlocks / 2],
                                             const FragmentC (&products)[kBlocks]) {
#pragma unroll
  for (int n = 0; n < kBlocks / 2; ++n) {
    weights[0][n] = high_weights(products[2 * n], products[2 * n + 1]);
    if constexpr (kParts == 2) weights[1][n] = low_weights(products[2 * n], products[2 * n + 1], weights[0][n]);
  }
}

template <int kBlocks>
__device__ __forceinline__ void add_sums(FragmentC (&sums)[kBlocks], const FragmentC (&of_tile)[kBlocks],
                                         const float (&rescale)[2]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[i].x[e] = fmaf(sums[i].x[e], rescale[e / 2], of_tile[i].x[e]);
  }
}

template <int kPieces, int kBlocks>
__device__ __forceinline__ void rescale_sums(FragmentC (&sums)[kPieces][kBlocks], const float (&rescale)[2]) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[piece][i].x[e] *= rescale[e / 2];
    }
  }
}

template <int kPieces, int kBlocks>
__device__ __forceinline__ void hold_products(FragmentC (&sums)[kPieces][kBlocks]) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) hold_products(sums[piece]);
}

// A warpgroup that multiplies: its queries, what has come of them so far, and at which stage it is.
template <typename Block>
struct Multiplier {
  static constexpr int kKeys = Block::kKeys;
  static constexpr int kParts = Block::kParts;
  using Products = FragmentC[kKeys / 8];
  using Weights = FragmentA[kParts][kKeys / 16];

  const AttendParams& p;
  const ManyDivision& division;
  typename Block::Shared& shared;
  char* panels;
  int group;  // 0 or 1
  const typename Block::Work* work;
  LaneSoftmax rows;
  FragmentC sums[Block::kPieces][Block::kColumns / 8];
  Stage<Block::kStages> stage;

  // The first of this lane's two queries, counted from the block's first; the other is eight on.
  __device__ __forceinline__ int row() const {
    return kGroupQueries * group + static_cast<int>(threadIdx.x / 32 % 4) * 16 + static_cast<int>(threadIdx.x % 32) / 4;
  }
  __device__ __forceinline__ char* queries() const { return panels + group * kParts * Block::kQueryPartBytes; }
  __device__ __forceinline__ const char* keys(int number) const {
    return panels + Block::kKeysAt + number * Block::kTileBytes;
  }
  __device__ __forceinline__ const char* values(int number, int piece) const {
    return panels + Block::kValuesAt + number * Block::kTileBytes + piece * (Block::kColumns / 64) * Block::kPanelBytes;
  }
  static __device__ __forceinline__ void give_back(uint64_t* empty) {
    if (threadIdx.x % 32 == 0) arrive(empty);
  }

  __device__ __forceinline__ void begin(const typename Block::Work& next) {
    work = &next;
    sync_threads(kGroupBarrier + group, kGroupThreads);  // the queries before have been multiplied
    store_queries<Block>(p, division, work->tile, group, queries(), shared.factor + kGroupQueries * group);
    fence_for_products();
    sync_threads(kGroupBarrier + group, kGroupThreads);
    rows.clear();
    rows.factor[0] = shared.factor[row()];
    rows.factor[1] = shared.factor[row() + 8];
#pragma unroll
    for (int piece = 0; piece < Block::kPieces; ++piece) {
#pragma unroll
      for (int i = 0; i < Block::kColumns / 8; ++i) sums[piece][i] = {};
    }
  }

  // A tile's products become weights; `rescale`: what the sums of tiles before are to be multiplied with.
  __device__ __forceinline__ void weigh(Products& products, int32_t tile, float (&rescale)[2]) {
    rows.cap(products, p.softcap);
    if (tile > work->last_clear[group] || tile < work->first_clear[group]) {
      const int32_t row0 = work->tiles.row(tile);
      const int32_t row_end = work->tiles.row_end(tile);
      const int32_t sinks = static_cast<int32_t>(work->plan.sinks_held);
      const FastDivider& group_size = division.division.group_size;
      const VisibleRange visible[2] = {work->plan.range_of(group_size(work->tile.number(row()))),
                                       work->plan.range_of(group_size(work->tile.number(row() + 8)))};
      hide_invisible(products, visible, row0, row_end, sinks);
    }
    rows.weigh(products, p.softcap, rescale);
  }

  // One tile after the other: scores, weights, sums. While one warpgroup weighs, the other may multiply.
  __device__ __forceinline__ void take_tiles() {
#pragma unroll 1
    for (int32_t tile = work->last_tile; tile >= work->stop; --tile, stage.advance()) {
      uint64_t* const keys_empty = shared.keys_empty + stage.number;
      uint64_t* const values_empty = shared.values_empty + stage.number;
      wait_barrier(shared.keys_full + stage.number, stage.parity);
      if (tile > work->last_seen[group]) {
        give_back(keys_empty);
        wait_barrier(shared.values_full + stage.number, stage.parity);
        give_back(values_empty);
        continue;
      }
      Weights weights;
      float rescale[2];
      {
        Products products;
        begin_scores<Block>(products, queries(), keys(stage.number));
        wait_for_products<0>();
        hold_products(products);
        give_back(keys_empty);
        weigh(products, tile, rescale);
        take_weights(weights, products);
      }
      wait_barrier(shared.values_full + stage.number, stage.parity);
      if constexpr (kParts == 1) {
        rescale_sums(sums, rescale);
#pragma unroll
        for (int piece = 0; piece < Block::kPieces; ++piece) {
          begin_products();
          multiply_values<Block, true>(sums[piece], weights, values(stage.number, piece));
        }
        end_products();
        wait_for_products<0>();
        hold_products(sums);
        give_back(values_empty);
      } else {
#pragma unroll
        for (int piece = 0; piece < Block::kPieces; ++piece) {
          FragmentC of_tile[Block::kColumns / 8];
          begin_products();
          multiply_values<Block, false>(of_tile, weights, values(stage.number, piece));
          end_products();
          wait_for_products<0>();
          hold_products(of_tile);
          if (piece + 1 == Block::kPieces) give_back(values_empty);
          add_sums(sums[piece], of_tile, rescale);
        }
      }
    }
  }

  // The products of a tile's scores run beside those of the tile's before with its values, and both beside the
  // weighing.
  __device__ __forceinline__ void take_tiles_ahead() {
    if (work->last_tile < work->stop) return;
    Weights weights;
    float rescale[2];
    {
      Products products;
      wait_barrier(shared.keys_full + stage.number, stage.parity);
      begin_scores<Block>(products, queries(), keys(stage.number));
      wait_for_products<0>();
      hold_products(products);
      give_back(shared.keys_empty + stage.number);
      weigh(products, work->last_tile, rescale);
      take_weights(weights, products);
    }
#pragma unroll 1
    for (int32_t tile = work->last_tile - 1; tile >= work->stop; --tile) {
      const Stage<Block::kStages> before = stage;  // of the tile whose weights we have
      stage.advance();
      Products products;
      wait_barrier(shared.keys_full + stage.number, stage.parity);
      begin_scores<Block>(products, queries(), keys(stage.number));
      wait_barrier(shared.values_full + before.number, before.parity);
      begin_products();
      multiply_values<Block, true>(sums[0], weights, values(before.number, 0));
      end_products();
      wait_for_products<1>();
      hold_products(products);
      give_back(shared.keys_empty + stage.number);
      weigh(products, tile, rescale);
      wait_for_products<0>();
      hold_products(sums);
      give_back(shared.values_empty + before.number);
      rescale_sums(sums, rescale);
      take_weights(weights, products);
    }
    wait_barrier(shared.values_full + stage.number, stage.parity);
    begin_products();
    multiply_values<Block, true>(sums[0], weights, values(stage.number, 0));
    end_products();
    wait_for_products<0>();
    hold_products(sums);
    give_back(shared.values_empty + stage.number);
    stage.advance();
  }

  // The answers, or a part of them to be merged.
  __device__ __forceinline__ void finish() {
    rows.add_lanes();
    const QueryTile& tile = work->tile;
    const int both[2] = {row(), row() + 8};
    if (division.division.splits == 1) {
      const uint32_t number[2] = {tile.number(both[0]), tile.number(both[1])};
      const bool there[2] = {both[0] < tile.queries, both[1] < tile.queries};
#pragma unroll
      for (int piece = 0; piece < Block::kPieces; ++piece) {
        write_rows(p, division, tile.block, rows, number, there, piece * Block::kColumns, sums[piece]);
      }
      return;
    }
    const int64_t part = int64_t{tile.block.unit} * division.division.splits + tile.block.split;
#pragma unroll
    for (int piece = 0; piece < Block::kPieces; ++piece) {
      leave_rows<Block::kWidth, Block::kQueries>(p.partials + part * Block::layout(1).floats(), tile.queries, rows,
                                                 both, piece * Block::kColumns, sums[piece]);
    }
  }
};

// The work of this number, found by one thread.
template <typename Block>
__device__ __forceinline__ void find_work(const AttendParams& p, const ManyDivision& division, uint32_t number,
                                          typename Block::Work& work) {
  const uint32_t splits = division.division.splits;
  work.exists = number < division.division.units.divisor * splits;
  if (!work.exists) return;
  const FastDivider& group_size = division.division.group_size;
  const QueryTile tile(division.unit(p, number), p, division, Block::kQueries);
  const AttendPlan plan = read_plan(p, tile.block.entry, tile.block.sequence);
  const auto tiles =
      KeyTiles<Block::kKeys>::of(plan, group_size(tile.first_query), group_size(tile.number(Block::kQueries)));
  work.tile = tile;
  work.plan = plan;
  work.tiles = tiles;
  work.last_tile = first_tile_of(tiles.count, tile.block.split + 1, splits) - 1;
  work.stop = first_tile_of(tiles.count, tile.block.split, splits);
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {
    const VisibleRange oldest = plan.range_of(group_size(tile.number(kGroupQueries * group)));
    const VisibleRange newest = plan.range_of(group_size(tile.number(kGroupQueries * group + kGroupQueries - 1)));
    const bool idle = kGroupQueries * group >= tile.queries || newest.end == 0;
    work.last_seen[group] = idle ? -1 : tiles.reaching(newest.end) - 1;
    work.last_clear[group] = tiles.within(oldest.end) - 1;
    work.first_clear[group] = newest.begin <= plan.sinks_held
                                  ? 0
                                  : static_cast<int32_t>(imax(tiles.reaching(newest.begin), tiles.sink_tiles));
  }
}

template <typename Block>
__global__ void __launch_bounds__(Block::kThreads, 1)
    many_queries_sm90_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ ManyDivision division,
                             const __grid_constant__ CUtensorMap key_map,
                             const __grid_constant__ CUtensorMap value_map) {
#if defined(KVC_EMULATED) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  KVC_DYNAMIC_SHARED(shared_bytes);
  char* const panels = align_for_panels(shared_bytes);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(panels + Block::kSharedAt);
  if (threadIdx.x == 0) {
    constexpr int kMultiplyingWarps = 8;  // a lane of each gives a tile back
#pragma unroll 1
    for (int i = 0; i < Block::kStages; ++i) {
      init_barrier(shared.keys_full + i, 1);
      init_barrier(shared.values_full + i, 1);
      init_barrier(shared.keys_empty + i, kMultiplyingWarps);
      init_barrier(shared.values_empty + i, kMultiplyingWarps);
    }
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      init_barrier(shared.work_full + i, 1);
      init_barrier(shared.work_empty + i, kMultiplyingWarps);
    }
    show_barriers();
  }
  wait_for_previous_launch();
  let_next_launch_begin();
  __syncthreads();
  Stage<2> turn;
  if (threadIdx.x < kGroupThreads) {
    give_registers<40>();
    Stage<Block::kStages> stage;
#pragma unroll 1
    for (;; turn.advance()) {
      typename Block::Work& work = shared.work[turn.number];
      if (threadIdx.x == 0) {
        wait_barrier(shared.work_empty + turn.number, turn.parity ^ 1);
        find_work<Block>(p, division, atomicAdd(p.next_work, 1u), work);
        arrive(shared.work_full + turn.number);
      }
      sync_threads(kLoadBarrier, kGroupThreads);
      if (!work.exists) break;
      load_tiles<Block>(p, shared, work, panels, &key_map, &value_map, stage);
    }
  } else {
    take_registers<232>();
    // From one lane for all: what depends on it can then be kept once for a warp.
    const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kGroupThreads) - 1, 0);
    Multiplier<Block> multiplier{p, division, shared, panels, group};
#pragma unroll 1
    for (;; turn.advance()) {
      wait_barrier(shared.work_full + turn.number, turn.parity);
      if (!shared.work[turn.number].exists) break;
      multiplier.begin(shared.work[turn.number]);
      if constexpr (Block::kAhead) {
        multiplier.take_tiles_ahead();
      } else {
        multiplier.take_tiles();
      }
      multiplier.finish();
      __syncwarp();
      Multiplier<Block>::give_back(shared.work_empty + turn.number);
    }
  }
#endif
}

template <typename Config, int kParts>
cudaError_t launch_config(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  using Block = Sm90Block<Config, kParts>;
  Gpu gpu;
  CUtensorMap key_map;
  CUtensorMap value_map;
  cudaError_t error = current_gpu(gpu);
  if (error == cudaSuccess) error = make_tensor_map(&key_map, p.cache, p.cache.k_cache, p.layer, Block::kKeys);
  if (error == cudaSuccess) error = make_tensor_map(&value_map, p.cache, p.cache.v_cache, p.layer, Block::kKeys);
  if (error != cudaSuccess) return error;
  const Schedule schedule =
      schedule_many_queries<Sm90Shape<Config>>(AttendShape::of(p), gpu, "many_queries_sm90", true);
  if (!schedule.exists()) return cudaErrorInvalidConfiguration;
  print_if_asked(schedule, gpu);
  layout = Block::layout(schedule.splits);
  const auto kernel = many_queries_sm90_kernel<Block>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Block::kBytes);
  if (error != cudaSuccess) return error;
  PdlLaunch launch(schedule.blocks, schedule.threads, Block::kBytes, stream, gpu.major);
  return cudaLaunchKernelEx(&launch.config, kernel, p, divide_many(p, Block::kQueries, schedule.splits, gpu), key_map,
                            value_map);
}

template <int kParts>
cudaError_t launch_parts(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  if (p.cache.head_dim <= 64) return launch_config<Sm90Queries64<kParts>, kParts>(p, layout, stream);
  if (p.cache.head_dim <= 128) return launch_config<Sm90Queries128<kParts>, kParts>(p, layout, stream);
  return launch_config<Sm90Queries256<kParts>, kParts>(p, layout, stream);
}

}  // namespace

bool serves_sm90(const AttendParams& p) {
  int device = 0;
  int major = 0;
  int minor = 0;
  if (p.cache.head_dim > 256 || !tensor_maps_serve(p.cache)) return false;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return major == 9 && minor == 0;
}

cudaError_t launch_many_queries_sm90(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  return p.rounds ? launch_parts<1>(p, layout, stream) : launch_parts<2>(p, layout, stream);
}

#else  // a build without code for sm_90a

bool serves_sm90(const AttendParams&) { return false; }
cudaError_t launch_many_queries_sm90(const AttendParams&, PartialsLayout&, cudaStream_t) {
  return cudaErrorInvalidValue;
}

#endif

}  // namespace kvc
