// The pieces of many_queries_sm90.cu: a block's shared memory, the warpgroup that loads key tiles, the queries as
// operands, and the products of a warpgroup.
#pragma once

#include "../hopper.cuh"
#include "many_queries.cuh"

#if defined(KVC_WITH_SM90A) || defined(KVC_EMULATED)
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma nv_diag_suppress 177  // constants of a kernel that has no body for other architectures
#endif
namespace kvc {
namespace {

constexpr int kGroupThreads = 128;  // of a warpgroup
constexpr int kGroupQueries = 64;   // of one that multiplies
constexpr int kRowBytes = 128;      // of a panel

// Named barriers: of the threads that load, and of each warpgroup that multiplies.
constexpr int kLoadBarrier = 1;
constexpr int kGroupBarrier = 2;

// kParts: FP16 parts of a query and of a weight. Positions: AllPositions or Share (visibility.h).
template <typename Config, int kParts_, typename Positions>
struct Sm90Block : Sm90Shape<Config> {
  using Shape = Sm90Shape<Config>;
  using Plan = AttendPlanOf<Positions>;
  using Shape::kDepth, Shape::kKeys, Shape::kStages, Shape::kQueries, Shape::kWidth;
  static_assert(Shape::kGroupThreads == kGroupThreads && Shape::kGroupQueries == kGroupQueries);
  static constexpr int kParts = kParts_;
  static constexpr int kPanels = kWidth / 64;
  static constexpr int kChunks = 2 * kDepth;             // 16-byte chunks of a row
  static constexpr int kPanelBytes = kKeys * kRowBytes;  // of keys or values
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr int kQueryPanelBytes = kGroupQueries * kRowBytes;
  static constexpr int kQueryPartBytes = kPanels * kQueryPanelBytes;
  static constexpr int kColumns = kWidth > 128 ? 64 : kWidth;  // of the output, that are multiplied at a time
  static constexpr int kColumnSteps = kWidth / kColumns;
  static constexpr bool kAhead = kParts == 1 && kDepth <= 8;

  // A query tile, or one split of it.
  struct Work {
    bool exists;
    QueryTile tile;
    Plan plan;
    KeyTiles<kKeys> tiles;
    // Key tiles, both included; they are taken from the newest to the oldest.
    int32_t newest_tile, oldest_tile;
    // For each warpgroup: the newest key tile of which its queries see a row.
    int32_t newest_visible[2];
    // For each warpgroup: the key tiles of which all its queries see every row, both included, if there are any.
    int32_t first_fully_visible[2], last_fully_visible[2];
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

// Whose turn it is of some buffers that are used in turn, and the parity of its barriers' phase.
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
  const auto& plan = work.plan;
  const BlockUnit& block = work.tile.block;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (int32_t tile = work.newest_tile; tile >= work.oldest_tile; --tile) {
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

}  // namespace
}  // namespace kvc
#endif
