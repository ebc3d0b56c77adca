// Attention of many queries: softmax(scale * Q K^T) V for many queries of each sequence, over FP16 keys and values as
// they lie in the cache, by the tensor core instructions of sm_80 and newer. (many_queries_sm90.cu has the kernel for
// sm_90a.)
//
// Grid: for each sequence, KV head and tile of its queries (many_queries.cuh) a block, or several (`splits`) that
// share the tiles of keys; where head_dim is over 256, one for each 128 columns of the answer. A block copies tiles of
// keys and values into shared memory, one ahead of the one that it works on. Each warp multiplies it with 16 queries of
// its own: scores, weights, weighted sums, with a running maximum and sum (online softmax: Milakov and Gimelshein,
// 2018; tiles and their order: FlashAttention-2, Dao, 2023).
//
// A call's new positions lie in the cache by now, unless storing them would evict what its queries still see: then they
// are read from the call's tensors, rounded to FP16 on the way, and stored afterwards (append_order.cu).
#include <atomic>

#include "../launch.h"
#include "many_queries_output.cuh"

namespace kvc {
namespace {

// kParts: FP16 parts of a query and of a weight. Positions: AllPositions or Share (visibility.h).
template <typename Config, int kParts_, typename Positions>
struct ManyQueriesBlock : ManyQueriesShape<Config> {
  using Shape = ManyQueriesShape<Config>;
  using Plan = AttendPlanOf<Positions>;
  using Shape::kDepth, Shape::kKeys, Shape::kStages, Shape::kHighInRegisters, Shape::kQueries, Shape::kPieces,
      Shape::kWidth;
  static constexpr int kParts = kParts_;
  static constexpr int kKeyChunks = 2 * kDepth;  // 16-byte chunks of a row
  static constexpr int kValueChunks = kWidth / 8;
  static constexpr int kKeyBytes = kKeys * kKeyChunks * 16;
  static constexpr int kStageBytes = kKeyBytes + kKeys * kValueChunks * 16;
  static constexpr int kSharedParts = kHighInRegisters ? kParts - 1 : kParts;  // of queries, in shared memory

  // What a block knows of itself: registers are rare.
  struct Shared {
    Plan plan;
    BlockUnit unit;
    KeyTiles<kKeys> tiles;
    const uint16_t* keys;            // of its head
    const uint16_t* values;          // likewise, from its first column on
    VisibleRange visible[kQueries];  // by the block's queries; by those of a warp that has none, nothing
  };
  static constexpr int kQueriesAt = (sizeof(Shared) + 127) / 128 * 128;
  static constexpr int kStagesAt = kQueriesAt + kSharedParts * kQueries * kDepth * 32;
  static constexpr int kBytes = kStagesAt + kStages * kStageBytes;
  static_assert(kBytes <= 101376, "what a block has on sm_86, sm_89 and sm_120");

  static PartialsLayout KVC_HD layout(int64_t splits) { return {static_cast<int>(splits), kQueries, kPieces, kWidth}; }

  // Where a chunk of a row lies in a tile: rows are spread over the banks, so that eight of them are read at a time.
  // From a chunk to the eighth after it, and from a row to the eighth after it, it is always as far.
  static __device__ __forceinline__ int key_place(int row, int chunk) {
    return (row * kKeyChunks + (chunk ^ (row & 7))) * 16;
  }
  static __device__ __forceinline__ int value_place(int row, int chunk) {
    return (row * kValueChunks + (chunk ^ (row & 7))) * 16;
  }
};

// Writes a block's answers, or leaves its part of them in the workspace.
template <typename Block, int kBlocks>
__device__ __forceinline__ void finish(const AttendParams& p, const ManyDivision& division, const LaneSoftmax& rows,
                                       const FragmentC (&sums)[kBlocks], typename Block::Shared& shared) {
  const uint32_t thread = anew(threadIdx.x);
  const BlockUnit block = shared.unit;
  const uint32_t piece = anew(blockIdx.x) % Block::kPieces;
  const int column = static_cast<int>(piece) * Block::kWidth;
  const uint32_t first_query = block.tile * Block::kQueries;
  const uint32_t left = division.division.group_size.divisor * static_cast<uint32_t>(p.rows) - first_query;
  const int queries = static_cast<int>(left < Block::kQueries ? left : Block::kQueries);
  const int lane_row = static_cast<int>(thread / 32 * 16 + thread % 32 / 4);
  const int row[2] = {lane_row, lane_row + 8};
  const uint32_t splits = division.division.splits.divisor;
  if (splits == 1) {
    const uint32_t number[2] = {first_query + static_cast<uint32_t>(row[0]),
                                first_query + static_cast<uint32_t>(row[1])};
    const bool there[2] = {row[0] < queries, row[1] < queries};
    write_rows(p, division, block, rows, number, there, column, sums);
    return;
  }
  const int64_t part = (int64_t{block.unit} * Block::kPieces + piece) * splits + block.split;
  leave_rows<Block::kWidth, Block::kQueries>(p.partials + part * Block::layout(1).floats(), queries, rows, row, 0,
                                             sums);
}

template <typename Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kBlocksAtATime)
    many_queries_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ ManyDivision division) {
  constexpr int kDepth = Block::kDepth;
  constexpr int kParts = Block::kParts;
  constexpr int kKeyBlocks = Block::kKeys / 8;
  constexpr int kColumnBlocks = Block::kWidth / 8;
  KVC_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(shared_bytes);

  const int piece = static_cast<int>(blockIdx.x % Block::kPieces);
  const BlockUnit block = division.unit(p, blockIdx.x / Block::kPieces);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int thread = static_cast<int>(threadIdx.x);
  const int head_dim = static_cast<int>(p.cache.head_dim);
  const FastDivider& group_size = division.division.group_size;
  const uint32_t first_query = block.tile * Block::kQueries;
  const uint32_t all_queries = group_size.divisor * static_cast<uint32_t>(p.rows);
  const int queries = static_cast<int>(all_queries - first_query < Block::kQueries ? all_queries - first_query
                                                                                   : Block::kQueries);  // of this block

  wait_for_previous_launch();
  let_next_launch_begin();
  if (Block::kPieces > 1 && piece * Block::kWidth >= head_dim) return;
  if (threadIdx.x == 0) {
    shared.plan = read_plan<typename Block::Plan>(p, block.entry, block.sequence);
    shared.unit = block;
    shared.tiles =
        KeyTiles<Block::kKeys>::of(shared.plan, group_size(first_query), group_size(first_query + queries - 1));
    shared.keys = p.cache.k_cache + block.cache_offset(p);
    shared.values = p.cache.v_cache + block.cache_offset(p) + piece * Block::kWidth;
  }
  __syncthreads();
  const auto& plan = shared.plan;
  const KeyTiles<Block::kKeys>& tiles = shared.tiles;

  // Tiles [stop, next] of keys are this block's, the last first.
  const int32_t splits = static_cast<int32_t>(division.division.splits.divisor);
  const int32_t split = static_cast<int32_t>(block.split);
  const int32_t stop = first_tile_of(tiles.count, split, splits);
  int32_t next = first_tile_of(tiles.count, split + 1, splits) - 1;
  const auto ask_for = [&](int32_t tile, int stage) {
    if (tile >= stop) {
      const int32_t row0 = tiles.row(tile);
      const int32_t end = tiles.row_end(tile);
      char* at = shared_bytes + Block::kStagesAt + stage * Block::kStageBytes;
      const int64_t row_elements = p.cache.heads * head_dim;
      const int chunks = head_dim / 8;
      copy_tile<Block::kKeys, Block::kKeyChunks, Block::kThreads>(plan, shared.keys, row_elements, chunks, row0, end,
                                                                  NewRows(p.append, p.append.key, shared.unit), 0, at,
                                                                  Block::key_place, thread);
      const int column = piece * Block::kWidth;
      copy_tile<Block::kKeys, Block::kValueChunks, Block::kThreads>(
          plan, shared.values, row_elements, chunks - column / 8, row0, end,
          NewRows(p.append, p.append.value, shared.unit), column, at + Block::kKeyBytes, Block::value_place, thread);
    }
    end_copy_group();
  };
#pragma unroll
  for (int stage = 0; stage < Block::kStages - 1; ++stage) ask_for(next - stage, stage);

  // The warp's queries, and this lane's two of them. What they see waits in shared memory, as registers are rare.
  const int warp_first = warp * 16;
  const auto number_of = [&](int row) {
    return first_query + static_cast<uint32_t>(row < queries ? row : queries - 1);
  };
  const uint32_t number[2] = {number_of(warp_first + lane / 4), number_of(warp_first + lane / 4 + 8)};
  LaneSoftmax rows;
  rows.clear();
  if (lane < 16) {
    VisibleRange range = plan.range_of(group_size(number_of(warp_first + lane)));
    if (warp_first >= queries) range.end = 0;
    shared.visible[warp_first + lane] = range;
  }

  // Queries become FP16 parts, in the order in which a lane holds the left operand of a product.
  FragmentA high[Block::kHighInRegisters ? kDepth : 1];
  const auto shared_part = [&](int part, int k) {
    const int at = ((warp * Block::kSharedParts + part) * kDepth + k) * 32 + lane;
    return reinterpret_cast<uint32_t*>(shared_bytes + Block::kQueriesAt) + 4 * at;
  };
  {
    // So many steps of 16 elements at a time; once, if all fit into registers, else for the largest and then again.
    constexpr int kSteps = kDepth <= 8 ? kDepth : 1;
    float x[kSteps * 4][2];  // of step k the pairs 4 k + j: of query j % 2, the first or (from 2 on) the second half
    const QueryPlace places[2] = {QueryPlace(division.division, block, number[0]),
                                  QueryPlace(division.division, block, number[1])};
    const auto load_steps = [&](int step) {
      load_pairs(
          p.query.data, p.dtype, division.query_in_pairs,
          [&](int i) {
            const int d = 16 * (step + i / 4) + i % 4 / 2 * 8 + lane % 4 * 2;
            const QueryPlace& place = places[i % 2];
            const int64_t offset = block.entry * p.query.batch_stride + place.t * p.query.row_stride +
                                   place.head * p.query.head_stride + d;
            return d < head_dim ? offset : -1;
          },
          x);
    };
    float largest[2] = {0.0f, 0.0f};
#pragma unroll 1
    for (int step = 0; step < kDepth; step += kSteps) {
      load_steps(step);
#pragma unroll
      for (int i = 0; i < kSteps * 4; ++i) {
        largest[i % 2] = fmaxf(largest[i % 2], fmaxf(fabsf(x[i][0]), fabsf(x[i][1])));
      }
    }
    float up[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(kAllLanes, largest[h], 1));
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(kAllLanes, largest[h], 2));
      const QueryScale scale = QueryScale::of(p, largest[h]);
      up[h] = scale.up;
      rows.factor[h] = scale.factor;
    }
    constexpr int kUnroll = Block::kHighInRegisters ? kDepth : 1;
#pragma unroll kUnroll
    for (int k = 0; k < kDepth; ++k) {
      if (kDepth > kSteps && k % kSteps == 0) load_steps(k);
      Vec<uint32_t, 4> high_part, low_part;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = x[k % kSteps * 4 + j][0] * up[j % 2];
        const float b = x[k % kSteps * 4 + j][1] * up[j % 2];
        high_part.x[j] = half_pair(a, b);
        low_part.x[j] = low_pair(a, b, high_part.x[j]);
      }
      if constexpr (Block::kHighInRegisters) {
        high[k] = {{high_part.x[0], high_part.x[1], high_part.x[2], high_part.x[3]}};
      } else {
        store<uint32_t, 4>(shared_part(0, k), high_part);
      }
      if constexpr (kParts == 2) store<uint32_t, 4>(shared_part(Block::kSharedParts - 1, k), low_part);
    }
  }
  __syncwarp();

  FragmentC sums[kColumnBlocks] = {};
  int stage = 0;
#pragma unroll 1
  for (; next >= stop; --next) {
    if constexpr (Block::kStages == 1) ask_for(next, 0);
    wait_for_copies<Block::kStages == 1 ? 0 : Block::kStages - 2>();
    __syncthreads();
    if constexpr (Block::kStages > 1) {
      ask_for(next - (Block::kStages - 1), stage == 0 ? Block::kStages - 1 : stage - 1);
    }
    const char* keys = shared_bytes + Block::kStagesAt + stage * Block::kStageBytes;
    const char* values = keys + Block::kKeyBytes;
    stage = stage + 1 == Block::kStages ? 0 : stage + 1;
    const int32_t row0 = tiles.row(next);
    const int32_t row_end = tiles.row_end(next);
    const VisibleRange oldest = shared.visible[warp_first];
    const VisibleRange newest = shared.visible[warp_first + 15];
    const int32_t sinks_held = static_cast<int32_t>(plan.sinks_held);
    const bool unseen = row0 >= newest.end || (row0 >= sinks_held && row_end <= oldest.begin);
    if (!unseen) {
      const int lane = static_cast<int>((kDepth <= 8 ? anew(threadIdx.x) : threadIdx.x) % 32);
      // Products of queries (rows) and keys (columns).
      FragmentC products[kKeyBlocks] = {};
      const char* keys_of_lane[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        keys_of_lane[k] = keys + Block::key_place(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
      }
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
        FragmentA parts[2];
        if constexpr (Block::kHighInRegisters) {
          parts[0] = high[k];
        } else {
          const Vec<uint32_t, 4> x = load<uint32_t, 4>(shared_part(0, k));
          parts[0] = {{x.x[0], x.x[1], x.x[2], x.x[3]}};
        }
        if constexpr (kParts == 2) {
          const Vec<uint32_t, 4> x = load<uint32_t, 4>(shared_part(Block::kSharedParts - 1, k));
          parts[1] = {{x.x[0], x.x[1], x.x[2], x.x[3]}};
        }
#pragma unroll
        for (int n = 0; n < kKeyBlocks / 2; ++n) {
          const FragmentA both = load_matrices(keys_of_lane[k % 4] + Block::key_place(16 * n, k / 4 * 8));
          const FragmentB first = {{both.x[0], both.x[1]}};
          const FragmentB second = {{both.x[2], both.x[3]}};
#pragma unroll
          for (int part = kParts - 1; part >= 0; --part) {
            multiply_add(products[2 * n], parts[part], first);
            multiply_add(products[2 * n + 1], parts[part], second);
          }
        }
      }
      rows.cap(products, p.softcap);
      const bool clear =
          row_end - row0 == Block::kKeys && row_end <= oldest.end && (row0 >= newest.begin || row_end <= sinks_held);
      if (!clear) {
        const VisibleRange visible[2] = {shared.visible[warp_first + lane / 4],
                                         shared.visible[warp_first + lane / 4 + 8]};
        hide_invisible(products, visible, row0, row_end, sinks_held);
      }
      float rescale[2];
      rows.weigh(products, p.softcap, rescale);
      FragmentA weights[kParts][Block::kKeys / 16];
#pragma unroll
      for (int n = 0; n < Block::kKeys / 16; ++n) {
        weights[0][n] = high_weights(products[2 * n], products[2 * n + 1]);
        if constexpr (kParts == 2) {
          weights[1][n] = low_weights(products[2 * n], products[2 * n + 1], weights[0][n]);
        }
      }
      // Products of weights (rows) and values (columns), four blocks of eight columns at a time.
      const int value_row = lane / 8 % 2 * 8 + lane % 8;
      const char* values_of_lane[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) values_of_lane[j] = values + Block::value_place(value_row, 2 * j + lane / 16);
      const auto value_at = [&](int row, int chunk) {  // two ways of saying so: each spills less in its place
        if constexpr (kDepth <= 8) {
          return values_of_lane[chunk / 2 % 4] + Block::value_place(row, chunk / 8 * 8);
        } else {
          return values + Block::value_place(row + value_row, chunk + lane / 16);
        }
      };
#pragma unroll
      for (int c = 0; c < kColumnBlocks; c += 4) {
        FragmentC tile_sums[4] = {};
#pragma unroll
        for (int n = 0; n < Block::kKeys / 16; ++n) {
          FragmentA both[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            both[j] = load_matrices_transposed(value_at(16 * n, c + 2 * j));
          }
#pragma unroll
          for (int part = kParts - 1; part >= 0; --part) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const FragmentA& of = both[j / 2];
              multiply_add(tile_sums[j], weights[part][n],
                           j % 2 == 0 ? FragmentB{{of.x[0], of.x[1]}} : FragmentB{{of.x[2], of.x[3]}});
            }
          }
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            sums[c + j].x[e] = fmaf(sums[c + j].x[e], rescale[e / 2], tile_sums[j].x[e]);
          }
        }
      }
    }
    if constexpr (Block::kStages == 1) __syncthreads();
  }

  rows.add_lanes();
  finish<Block>(p, division, rows, sums, shared);
}

template <typename Config, int kParts, typename Positions>
cudaError_t launch_config(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  using Block = ManyQueriesBlock<Config, kParts, Positions>;
  Gpu gpu;
  cudaError_t error = current_gpu(gpu);
  if (error != cudaSuccess) return error;
  const Schedule schedule =
      schedule_many_queries<ManyQueriesShape<Config>>(AttendShape::of(p), gpu, "many_queries", false);
  if (!schedule.exists()) return cudaErrorInvalidConfiguration;
  print_if_asked(schedule, gpu);
  layout = Block::layout(schedule.splits);
  const auto kernel = many_queries_kernel<Block>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Block::kBytes);
  if (error != cudaSuccess) return error;
  PdlLaunch launch(schedule.blocks, schedule.threads, Block::kBytes, stream, gpu.major);
  return cudaLaunchKernelEx(&launch.config, kernel, p, divide_many(p, Block::kQueries, schedule.splits, gpu));
}

std::atomic<bool> portable_preferred{false};

template <int kParts, typename Positions>
cudaError_t launch_parts(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  if (p.cache.head_dim <= 64) return launch_config<ManyQueries64, kParts, Positions>(p, layout, stream);
  if (p.cache.head_dim <= 128) return launch_config<ManyQueries128, kParts, Positions>(p, layout, stream);
  if (p.cache.head_dim <= 256) return launch_config<ManyQueries256, kParts, Positions>(p, layout, stream);
  if (p.cache.head_dim <= 512) return launch_config<ManyQueries512, kParts, Positions>(p, layout, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

void prefer_portable_prompts(bool portable) { portable_preferred = portable; }

cudaError_t launch_many_queries(const AttendParams& p, PartialsLayout& layout, cudaStream_t stream) {
  if (!portable_preferred && serves_sm90(p)) return launch_many_queries_sm90(p, layout, stream);
  if (p.cache.share.is_all()) {
    return p.rounds ? launch_parts<1, AllPositions>(p, layout, stream)
                    : launch_parts<2, AllPositions>(p, layout, stream);
  }
  return p.rounds ? launch_parts<1, Share>(p, layout, stream) : launch_parts<2, Share>(p, layout, stream);
}

}  // namespace kvc
