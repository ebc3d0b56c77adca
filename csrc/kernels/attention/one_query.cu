// Attention of one query to a KV head, T = 1: what a model without grouped-query attention does at every step. Tensor
// cores (few_queries.cu) could do little for a single query. Here FP32 arithmetic works straight from the registers
// that rows are loaded into, which streams faster than copies into shared memory.
//
// Grid: `splits` blocks for each entry and head. A warp takes kLoads * kRows neighbouring rows at a step: kLanes lanes
// load a row, 16 bytes each, so one instruction loads kRows rows. The warps of a head take turns. The lanes of each of
// the kRows rows keep a running softmax of their own. These partials, then those of the splits are merged in a fixed
// order (common.cuh).
//
// The next step's rows are asked for as soon as this step's have been used: keys, then values.
#include "../launch.h"
#include "common.cuh"

namespace kvc {
namespace {

struct Half8 {
  uint32_t x[4];
};

__device__ __forceinline__ void to_floats(const Half8& h, float (&f)[8]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = half_to_float(static_cast<uint16_t>(h.x[i]));
    f[2 * i + 1] = half_to_float(static_cast<uint16_t>(h.x[i] >> 16));
  }
}

template <int kLanes, typename Positions>
__global__ void __launch_bounds__(OneQueryBlock<kLanes>::kMostWarps * 32, OneQueryBlock<kLanes>::kBlocksAtATime)
    one_query_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ Division division) {
  using Block = OneQueryBlock<kLanes>;
  constexpr int kLoads = Block::kLoads;
  constexpr int kRows = Block::kRows;
  constexpr int kStep = Block::kStep;
  KVC_DYNAMIC_SHARED(shared_bytes);
  auto& shared = *reinterpret_cast<typename Block::Shared*>(shared_bytes);

  const BlockUnit block = BlockUnit::of(p, division, blockIdx.x);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const int warps = static_cast<int>(blockDim.x / 32);
  const int chunk = lane % kLanes;
  const int head_dim = static_cast<int>(p.cache.head_dim);
  const bool real = chunk * 8 < head_dim;  // else this lane is there for the shape alone
  const auto first_of = [&](int32_t row) { return row - lane / kLanes; };  // of the warp's step

  const int64_t row_elements = p.cache.heads * head_dim;
  const int64_t head_offset = block.cache_offset(p);
  const int64_t lane_offset = head_offset + chunk * 8;
  const uint16_t* keys = p.cache.k_cache + lane_offset;
  const uint16_t* values = p.cache.v_cache + lane_offset;
  StateAdvance advance;
  const int32_t stride = static_cast<int32_t>(division.splits.divisor) * warps * kStep;
  int32_t row = (static_cast<int32_t>(block.split) * warps + warp) * kStep + lane / kLanes;  // this lane's first
  DecodePlan plan;
  Half8 k[kLoads], v[kLoads];
  float q[8];
  // Rows that are not in the cache become zeros.
  const auto load_rows = [&](const uint16_t* from, int32_t row0, Half8(&to)[kLoads]) {
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const int32_t r = row0 + u * kRows;
      Vec<uint32_t, 4> x = {};
      if (r < plan.cached && real) x = load_streaming(from + plan.slot(r) * row_elements);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[u].x[i] = x.x[i];
    }
  };
  // The new row lies in shared memory.
  const auto take_new_row = [&](const uint16_t* from, int32_t row0, Half8(&to)[kLoads]) {
    if (first_of(row0) + kStep <= plan.cached) return;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      if (row0 + u * kRows != plan.cached || plan.cached == plan.count || !real) continue;
      const Vec<uint32_t, 4> x = *reinterpret_cast<const Vec<uint32_t, 4>*>(from + chunk * 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[u].x[i] = x.x[i];
    }
  };
  // The previous launch may write the state, the queries and the new rows. Where it does not touch this layer
  // (`may_read_before_wait`), the first rows are asked for before the wait. (A loop, so that the code is there once: a
  // launch this short also waits for its instructions.)
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) == p.may_read_before_wait) {
      plan = DecodePlan::make<Positions>(p, block.entry, StateAdvance::read(p, block));
      load_rows(keys, row, k);
      load_rows(values, row, v);
      continue;
    }
    wait_for_previous_launch();
    let_next_launch_begin();
    const int64_t offset = block.entry * p.query.batch_stride + block.head * p.query.head_stride + chunk * 8;
    load_floats(p.query.data, offset, p.dtype, real ? 8 : 0, q);
  }
  // The new row, as it is stored. Each block keeps it for itself, and one stores it (as store_new_row says).
  if (plan.cached != plan.count) {
    const int64_t slot_offset = head_offset + plan.slot(plan.count - 1) * row_elements;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < 2 * head_dim; i += static_cast<int>(blockDim.x)) {
      const bool is_value = i >= head_dim;
      const int d = is_value ? i - head_dim : i;
      const Rows<const void*>& rows = is_value ? p.append.value : p.append.key;
      uint32_t overflows = 0;
      const uint16_t bits =
          stored_element(rows.data, block.entry * rows.batch_stride + block.head * rows.head_stride + d, p.append.dtype,
                         p.append.saturate, overflows);
      (is_value ? shared.new_value : shared.new_key)[d] = bits;
      if (block.split != 0) continue;
      (is_value ? p.cache.v_cache : p.cache.k_cache)[slot_offset + d] = bits;
      if (overflows != 0) atomicAdd(reinterpret_cast<Counter*>(p.append.overflow_counts + p.layer), Counter{1});
    }
  }
  __syncthreads();  // the new row is there, and all have read the state
  advance.all_have_read(p, block);
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] *= p.softcap > 0 ? p.scale : p.scale * kLog2e;

  SoftmaxState running = {kLeastScore, 0.0f};  // of this part; the sum is that of this lane's rows, see below
  float acc[8] = {};
#pragma unroll 1
  for (; first_of(row) < plan.count; row += stride) {
    take_new_row(shared.new_key, row, k);
    float score[kLoads];
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      float x[8];
      to_floats(k[u], x);
      float sum = x[0] * q[0];
#pragma unroll
      for (int i = 1; i < 8; ++i) sum = fmaf(x[i], q[i], sum);
      score[u] = sum;
    }
    load_rows(keys, row + stride, k);
    // Sums over the lanes of a row, for all four loads at once: a lane ends with that of load `load`.
    const bool high = lane & (kLanes / 2);
    const bool low = lane & (kLanes / 4);
    float a = high ? score[2] : score[0];
    float b = high ? score[3] : score[1];
    a += __shfl_xor_sync(kAllLanes, high ? score[0] : score[2], kLanes / 2);
    b += __shfl_xor_sync(kAllLanes, high ? score[1] : score[3], kLanes / 2);
    float mine = low ? b : a;
    mine += __shfl_xor_sync(kAllLanes, low ? a : b, kLanes / 4);
#pragma unroll
    for (int distance = kLanes / 8; distance > 0; distance /= 2) mine += __shfl_xor_sync(kAllLanes, mine, distance);
    if (p.softcap > 0) mine = capped(mine, p.softcap);
    const int load = (high ? 2 : 0) + (low ? 1 : 0);
    if (row + load * kRows >= plan.count) mine = minus_infinity();
    float max = fmaxf(running.max, mine);
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, kLanes / 2));
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, kLanes / 4));
    const float rescale = weight_of_finite(running.max - max);
    const float weight = mine == minus_infinity() ? 0.0f : weight_of_finite(mine - max);
    running = {max, fmaf(running.sum, rescale, weight)};
    take_new_row(shared.new_value, row, v);
#pragma unroll
    for (int i = 0; i < 8; ++i) acc[i] *= rescale;
#pragma unroll
    for (int u = 0; u < kLoads; ++u) {
      const float w = __shfl_sync(kAllLanes, weight, lane / kLanes * kLanes + u * (kLanes / 4));
      float x[8];
      to_floats(v[u], x);
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i] = fmaf(x[i], w, acc[i]);
    }
    load_rows(values, row + stride, v);
  }

  // Each part leaves its state and its sums. The lanes of one load have the same sum.
  const int part = lane / kLanes;
  float* sums = reinterpret_cast<float*>(shared_bytes + Block::kSumsAt);
  running.sum += __shfl_xor_sync(kAllLanes, running.sum, kLanes / 2);
  running.sum += __shfl_xor_sync(kAllLanes, running.sum, kLanes / 4);
  if (chunk == 0) shared.states[warp * kRows + part] = running;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    store<float, 4>(sums + (warp * kRows + part) * Block::kSumsStride + chunk * 8 + i,
                    {acc[i], acc[i + 1], acc[i + 2], acc[i + 3]});
  }
  advance.finish(p, division, block, plan.state, plan.appended);
  // Of the splits, as many have rows. (At least one, as somebody has to write the answer.)
  const uint32_t turn = static_cast<uint32_t>(warps * kStep);
  const uint32_t turns = plan.count > 0 ? (static_cast<uint32_t>(plan.count) + turn - 1) / turn : 1;
  const uint32_t splits = turns < division.splits.divisor ? turns : division.splits.divisor;
  if (block.split >= splits) return;
  __syncthreads();
  const Partials partials{&shared.states[0].max, sums, 2, Block::kSumsStride, 0, static_cast<uint32_t>(warps * kRows)};
  finish_unit<Block::kWidth, 1>(p, division, block, splits, 0, 1, partials, shared.last, sums,
                                static_cast<uint32_t>(warps * kRows * Block::kSumsStride), nullptr);
}

template <int kLanes>
cudaError_t launch(const AttendParams& p, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t error = current_gpu(gpu);
  if (error != cudaSuccess) return error;
  const AttendShape shape = AttendShape::of(p);
  const Schedule schedule = schedule_one_query<kLanes>(shape, gpu);
  if (!schedule.exists()) return cudaErrorInvalidConfiguration;
  print_if_asked(schedule, gpu);
  PdlLaunch launch(schedule.blocks, schedule.threads, schedule.shared_bytes, stream, gpu.major);
  const auto kernel = p.cache.share.is_all() ? one_query_kernel<kLanes, AllPositions> : one_query_kernel<kLanes, Share>;
  return cudaLaunchKernelEx(&launch.config, kernel, p, Division::of(shape, schedule.units, schedule.splits));
}

}  // namespace

cudaError_t launch_one_query(const AttendParams& p, cudaStream_t stream) {
  if (p.cache.head_dim <= 64) return launch<8>(p, stream);
  if (p.cache.head_dim <= 128) return launch<16>(p, stream);
  return launch<32>(p, stream);
}

}  // namespace kvc
