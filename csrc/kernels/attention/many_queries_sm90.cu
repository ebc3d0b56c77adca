// Attention of many queries for sm_90a (H100, H200): what many_queries.cu does, by the products of warpgroups (wgmma)
// and bulk copies of tiles (TMA). It is about twice as fast (docs/performance.md, rows `prompt/.../portable`).
//
// A block has three warpgroups. The first finds the next tile of 128 queries that nobody works on, and copies tiles of
// keys and values into shared memory; the other two multiply them with 64 of the queries each, that lie in shared
// memory as FP16 parts. Barriers in shared memory say when a tile is there, and when both have done with it (the scheme
// of FlashAttention-3: Shah et al., 2024). There is at most one block a multiprocessor: while the output of one tile
// of queries is written, keys of the next are on their way. A tile whose rows lie one after the other in the cache is
// one bulk copy; what remains (the end of what is held, where the ring wraps, new rows in the call's own tensors) the
// first warpgroup copies row by row.
//
// With one FP16 part (kParts 1) the tensor cores compute a tile's scores while they multiply the previous tile's
// weights with its values. With two parts there is no room in registers for that, and little to gain: one warpgroup
// multiplies while the other weighs.
#include "../launch.h"
#include "../tensor_map.h"
#include "many_queries_output.cuh"
#include "many_queries_sm90.cuh"

namespace kvc {

#if defined(KVC_WITH_SM90A) || defined(KVC_EMULATED)
namespace {

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
  FragmentC sums[Block::kColumnSteps][Block::kColumns / 8];
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
    for (int piece = 0; piece < Block::kColumnSteps; ++piece) {
#pragma unroll
      for (int i = 0; i < Block::kColumns / 8; ++i) sums[piece][i] = {};
    }
  }

  // A tile's products become weights; `rescale`: what the sums of tiles before are to be multiplied with.
  __device__ __forceinline__ void weigh(Products& products, int32_t tile, float (&rescale)[2]) {
    rows.cap(products, p.softcap);
    if (tile > work->last_fully_visible[group] || tile < work->first_fully_visible[group]) {
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
    for (int32_t tile = work->newest_tile; tile >= work->oldest_tile; --tile, stage.advance()) {
      uint64_t* const keys_empty = shared.keys_empty + stage.number;
      uint64_t* const values_empty = shared.values_empty + stage.number;
      wait_barrier(shared.keys_full + stage.number, stage.parity);
      if (tile > work->newest_visible[group]) {
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
        for (int piece = 0; piece < Block::kColumnSteps; ++piece) {
          begin_products();
          multiply_values<Block, true>(sums[piece], weights, values(stage.number, piece));
        }
        end_products();
        wait_for_products<0>();
        hold_products(sums);
        give_back(values_empty);
      } else {
#pragma unroll
        for (int piece = 0; piece < Block::kColumnSteps; ++piece) {
          FragmentC of_tile[Block::kColumns / 8];
          begin_products();
          multiply_values<Block, false>(of_tile, weights, values(stage.number, piece));
          end_products();
          wait_for_products<0>();
          hold_products(of_tile);
          if (piece + 1 == Block::kColumnSteps) give_back(values_empty);
          add_sums(sums[piece], of_tile, rescale);
        }
      }
    }
  }

  // For one FP16 part: see the head of the file.
  __device__ __forceinline__ void take_tiles_ahead() {
    if (work->newest_tile < work->oldest_tile) return;
    Weights weights;
    float rescale[2];
    {
      Products products;
      wait_barrier(shared.keys_full + stage.number, stage.parity);
      begin_scores<Block>(products, queries(), keys(stage.number));
      wait_for_products<0>();
      hold_products(products);
      give_back(shared.keys_empty + stage.number);
      weigh(products, work->newest_tile, rescale);
      take_weights(weights, products);
    }
#pragma unroll 1
    for (int32_t tile = work->newest_tile - 1; tile >= work->oldest_tile; --tile) {
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

  // Writes the output, or this split's partial.
  __device__ __forceinline__ void finish() {
    rows.add_lanes();
    const QueryTile& tile = work->tile;
    const int both[2] = {row(), row() + 8};
    if (division.division.splits.divisor == 1) {
      const uint32_t number[2] = {tile.number(both[0]), tile.number(both[1])};
      const bool there[2] = {both[0] < tile.queries, both[1] < tile.queries};
#pragma unroll
      for (int piece = 0; piece < Block::kColumnSteps; ++piece) {
        write_rows(p, division, tile.block, rows, number, there, piece * Block::kColumns, sums[piece]);
      }
      return;
    }
    const int64_t partial = int64_t{tile.block.unit} * division.division.splits.divisor + tile.block.split;
#pragma unroll
    for (int piece = 0; piece < Block::kColumnSteps; ++piece) {
      leave_rows<Block::kWidth, Block::kQueries>(p.partials + partial * Block::layout(1).floats(), tile.queries, rows,
                                                 both, piece * Block::kColumns, sums[piece]);
    }
  }
};

// The work of this number, found by one thread.
template <typename Block>
__device__ __forceinline__ void find_work(const AttendParams& p, const ManyDivision& division, uint32_t number,
                                          typename Block::Work& work) {
  const uint32_t splits = division.division.splits.divisor;
  work.exists = number < division.division.units.divisor * splits;
  if (!work.exists) return;
  const FastDivider& group_size = division.division.group_size;
  const QueryTile tile(division.unit(p, number), p, division, Block::kQueries);
  const auto plan = read_plan<typename Block::Plan>(p, tile.block.entry, tile.block.sequence);
  const auto tiles =
      KeyTiles<Block::kKeys>::of(plan, group_size(tile.first_query), group_size(tile.number(Block::kQueries)));
  work.tile = tile;
  work.plan = plan;
  work.tiles = tiles;
  work.newest_tile = first_tile_of(tiles.count, tile.block.split + 1, splits) - 1;
  work.oldest_tile = first_tile_of(tiles.count, tile.block.split, splits);
#pragma unroll 1
  for (int group = 0; group < 2; ++group) {
    const VisibleRange oldest = plan.range_of(group_size(tile.number(kGroupQueries * group)));
    const VisibleRange newest = plan.range_of(group_size(tile.number(kGroupQueries * group + kGroupQueries - 1)));
    const bool idle = kGroupQueries * group >= tile.queries || newest.end == 0;
    work.newest_visible[group] = idle ? -1 : tiles.reaching(newest.end) - 1;
    work.last_fully_visible[group] = tiles.within(oldest.end) - 1;
    work.first_fully_visible[group] = newest.begin <= plan.sinks_held
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

template <typename Config, int kParts, typename Positions>
cudaError_t launch_config(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  using Block = Sm90Block<Config, kParts, Positions>;
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

template <int kParts, typename Positions>
cudaError_t launch_parts(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  if (p.cache.head_dim <= 64) return launch_config<Sm90Queries64<kParts>, kParts, Positions>(p, layout, stream);
  if (p.cache.head_dim <= 128) return launch_config<Sm90Queries128<kParts>, kParts, Positions>(p, layout, stream);
  return launch_config<Sm90Queries256<kParts>, kParts, Positions>(p, layout, stream);
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
  if (p.cache.share.is_all()) {
    return p.rounds ? launch_parts<1, AllPositions>(p, layout, stream)
                    : launch_parts<2, AllPositions>(p, layout, stream);
  }
  return p.rounds ? launch_parts<1, Share>(p, layout, stream) : launch_parts<2, Share>(p, layout, stream);
}

#else  // a build without code for sm_90a

bool serves_sm90(const AttendParams&) { return false; }
cudaError_t launch_many_queries_sm90(const AttendParams&, PartialsLayout&, cudaStream_t) {
  return cudaErrorInvalidValue;
}

#endif

}  // namespace kvc
