// What remains to be done behind a kernel for many queries: a warp for each query.
//
// Where splits shared the keys of a query tile, they have left their partials in the workspace, which are merged
// here in their order (flash decoding: Dao et al., 2023).
//
// On tensor cores values that are not finite make NaN of sums which they do not belong to, or which should be infinite
// (many_queries.cuh). An answer that has a NaN is answered anew in plain FP32: its warp goes through the rows that the
// query sees twice, for their maximum and for the sums. That takes long and is rare; where all answers are whole and no
// NaN was noted, nothing is looked at.
#include "../launch.h"
#include "common.cuh"
#include "many_queries.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 256;
constexpr int kOfLane = 16;  // elements of a row at most

// One query and what it sees, for a warp. Of a row of head_dim elements lane l has l, l + 32, ...
struct ExactQuery {
  const AttendParams& p;
  const AttendPlan& plan;
  const BlockUnit& block;
  QueryPlace place;
  float x[kOfLane];  // the query, scaled

  // An element of a row's key or value, as it is stored.
  __device__ __forceinline__ float element(const uint16_t* cached, const Rows<const void*>& new_rows, int64_t row,
                                           int d) const {
    if (row < plan.cached) {
      return half_to_float(cached[block.cache_offset(p) + plan.slot(row) * p.cache.heads * p.cache.head_dim + d]);
    }
    uint32_t counted_elsewhere = 0;
    const int64_t offset = block.entry * new_rows.batch_stride + plan.input_row(row) * new_rows.row_stride +
                           block.head * new_rows.head_stride + d;
    return half_to_float(stored_element(new_rows.data, offset, p.append.dtype, p.append.saturate, counted_elsewhere));
  }

  __device__ __forceinline__ void load() {
    const int64_t offset =
        block.entry * p.query.batch_stride + place.t * p.query.row_stride + place.head * p.query.head_stride;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int d = static_cast<int>(threadIdx.x % 32) + 32 * i;
      x[i] = d < p.cache.head_dim ? load_as_float(p.query.data, offset + d, p.dtype) * p.scale : 0.0f;
    }
  }

  __device__ __forceinline__ float score(int64_t row) const {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kOfLane; ++i) {
      const int d = static_cast<int>(threadIdx.x % 32) + 32 * i;
      if (d < p.cache.head_dim) sum = fmaf(x[i], element(p.cache.k_cache, p.append.key, row, d), sum);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
    return p.softcap > 0 ? capped(sum, p.softcap) : sum * kLog2e;
  }

  __device__ __forceinline__ void answer() {
    load();
    const VisibleRange range = plan.range_of(place.t);
    const int64_t sinks = imin(plan.sinks_held, range.end);
    const int64_t begin = imax(range.begin, sinks);
    const int64_t count = range.end < 0 ? 0 : sinks + imax(range.end - begin, 0);
    const auto row_of = [&](int64_t i) { return i < sinks ? i : begin + (i - sinks); };
    float largest = kLeastScore;
    bool is_nan = false;
#pragma unroll 1
    for (int64_t i = 0; i < count && !is_nan; ++i) {
      const float s = score(row_of(i));
      is_nan = s != s || s == -minus_infinity();  // the weight of an infinite score is NaN
      largest = fmaxf(largest, s);
    }
    SoftmaxState state = {largest, 0.0f};
    float sums[kOfLane] = {};
#pragma unroll 1
    for (int64_t i = 0; i < count && !is_nan; ++i) {
      const int64_t row = row_of(i);
      const float s = score(row);
      const float weight = s == minus_infinity() ? 0.0f : weight_of_finite(s - largest);
      state.sum += weight;
#pragma unroll
      for (int j = 0; j < kOfLane; ++j) {
        const int d = static_cast<int>(threadIdx.x % 32) + 32 * j;
        if (d < p.cache.head_dim) sums[j] = fmaf(weight, element(p.cache.v_cache, p.append.value, row, d), sums[j]);
      }
    }
    const float nan = bits_float(0x7fffffffu);
    const int64_t offset =
        block.entry * p.out.batch_stride + place.t * p.out.row_stride + place.head * p.out.head_stride;
    const float factor = state.sum == 0.0f ? 0.0f : 1.0f / state.sum;
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int d = static_cast<int>(threadIdx.x % 32) + 32 * j;
      if (d < p.cache.head_dim) store_float(p.out.data, offset + d, p.out_dtype, is_nan ? nan : sums[j] * factor);
    }
    if (p.lse != nullptr && threadIdx.x % 32 == 0) {
      p.lse[(block.entry * p.rows + place.t) * p.query_heads + place.head] = is_nan ? nan
                                                                             : state.sum == 0.0f
                                                                                 ? minus_infinity()
                                                                                 : state.max * kLn2 + logf(state.sum);
    }
  }
};

__device__ __noinline__ void answer_exactly(const AttendParams& p, const BlockUnit& block, const QueryPlace& place) {
  const auto plan = read_plan<AttendPlan>(p, block.entry, block.sequence);
  ExactQuery query{p, plan, block, place, {}};
  query.answer();
}

__device__ __forceinline__ bool has_nan(const AttendParams& p, const BlockUnit& block, const QueryPlace& place) {
  const int64_t offset = block.entry * p.out.batch_stride + place.t * p.out.row_stride + place.head * p.out.head_stride;
  bool found = false;
  for (int64_t d = threadIdx.x % 32; d < p.cache.head_dim; d += 32) {
    const float x = load_as_float(p.out.data, offset + d, p.out_dtype);
    found = found || x != x;
  }
  return __any_sync(kAllLanes, found);
}

// Merges what the splits of a unit left of its query `row`, and writes the answer. Does it have a NaN?
__device__ __forceinline__ bool merge_output(const AttendParams& p, const ManyDivision& division,
                                             const BlockUnit& block, uint32_t number, uint32_t row,
                                             const PartialsLayout& layout) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t first = int64_t{block.unit} * layout.pieces * layout.splits;
  const auto part_of = [&](int piece, int split) {
    return p.partials + (first + int64_t{piece} * layout.splits + split) * layout.floats();
  };
  const auto state_of = [&](int piece, int split) {
    const Vec<float, 2> state = load<float, 2>(part_of(piece, split) + layout.queries * layout.width + 2 * row);
    return SoftmaxState{state.x[0], state.x[1]};
  };
  bool found = false;
#pragma unroll 1
  for (int d = 4 * lane; d < p.cache.head_dim; d += 128) {
    const int piece = d / layout.width;
    float max = kLeastScore;
#pragma unroll 4
    for (int i = 0; i < layout.splits; ++i) max = fmaxf(max, state_of(piece, i).max);
    // In FP64, as many parts of little weight may come behind one of much.
    double weights = 0.0;
    double merged[4] = {};
#pragma unroll 4
    for (int i = 0; i < layout.splits; ++i) {
      const SoftmaxState state = state_of(piece, i);
      const Vec<float, 4> part = load<float, 4>(part_of(piece, i) + row * layout.width + d - piece * layout.width);
      const double weight = power_of_two(state.max - max);
      weights += state.sum * weight;
#pragma unroll
      for (int j = 0; j < 4; ++j) merged[j] += part.x[j] * weight;
    }
    Vec<float, 4> sums;
#pragma unroll
    for (int j = 0; j < 4; ++j) sums.x[j] = static_cast<float>(merged[j]);
    const float sum = static_cast<float>(weights);
    write_output(p, division.division, block, number, static_cast<uint32_t>(d), {max, sum}, sums);
    const float all = sums.x[0] + sums.x[1] + sums.x[2] + sums.x[3] + sum;
    found = found || all != all;
  }
  return __any_sync(kAllLanes, found);
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ ManyDivision division,
                  const PartialsLayout layout) {
  wait_for_previous_launch();
  let_next_launch_begin();
  __shared__ uint32_t noted;
  if (threadIdx.x == 0) {
    noted = *static_cast<const volatile uint32_t*>(p.redo);
    if (blockIdx.x == 0) *p.next_work = 0;
  }
  __syncthreads();
  if (noted == 0 && layout.splits == 1) return;
  constexpr uint32_t kWarps = kThreads / 32;
  const uint32_t warp = threadIdx.x / 32;
  const uint32_t turns = static_cast<uint32_t>(layout.queries) / kWarps;  // of a block over a unit's queries
  const uint32_t items = division.division.units.divisor * turns;
  const uint32_t all_queries = division.division.group_size.divisor * static_cast<uint32_t>(p.rows);
#pragma unroll 1
  for (uint32_t item = blockIdx.x; item < items; item += gridDim.x) {
    const BlockUnit block = division.unit(p, item / turns);
    const uint32_t row = item % turns * kWarps + warp;
    const uint32_t number = block.tile * static_cast<uint32_t>(layout.queries) + row;
    if (number >= all_queries) continue;
    const QueryPlace place(division.division, block, number);
    const bool found =
        layout.splits > 1 ? merge_output(p, division, block, number, row, layout) : has_nan(p, block, place);
    if (found) answer_exactly(p, block, place);
  }
  // The last block to have looked takes the note away: those that look later count themselves, too.
  if (noted != 0 && threadIdx.x == 0 && atomicAdd(p.redo, 2u) == 1 + 2 * (gridDim.x - 1)) *p.redo = 0;
}

}  // namespace

cudaError_t launch_many_queries_finish(const AttendParams& p, const PartialsLayout& layout, cudaStream_t stream) {
  Gpu gpu;
  const cudaError_t error = current_gpu(gpu);
  if (error != cudaSuccess) return error;
  const ManyDivision division = divide_many(p, layout.queries, 1, gpu);
  const int64_t items = int64_t{division.division.units.divisor} * (layout.queries / (kThreads / 32));
  const int64_t blocks = imin(items, (layout.splits > 1 ? 4 : 1) * gpu.multiprocessors);
  PdlLaunch launch(blocks, kThreads, 0, stream, gpu.major);
  return cudaLaunchKernelEx(&launch.config, finish_kernel, p, division, layout);
}

}  // namespace kvc
