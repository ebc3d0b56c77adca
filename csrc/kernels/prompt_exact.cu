// prompt exact: answers once more, in plain FP32, the queries of a call whose answers have a NaN.
//
// On tensor cores values that are not finite make NaN of sums which they do not belong to, or which should be infinite
// (prompt_common.cuh). The kernels for many queries note that there was a NaN, and this one, launched behind each of
// them, looks through the answers where there was: a warp takes a query, and where its answer has a NaN goes through
// the rows that it sees twice, for their maximum and for the sums. That takes long and is rare.
#include "attend_common.cuh"
#include "launch.h"
#include "prompt_common.cuh"

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
    return half_to_float(
        stored_element(new_rows.data, offset, p.append.dtype, p.append.saturate, counted_elsewhere));
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
    const SeenRange range = plan.range_of(place.t);
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
    Running state = {largest, 0.0f};
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
      if (d < p.cache.head_dim) store_float(p.out.data, offset + d, p.dtype, is_nan ? nan : sums[j] * factor);
    }
    if (p.lse != nullptr && threadIdx.x % 32 == 0) {
      p.lse[(block.entry * p.rows + place.t) * p.query_heads + place.head] =
          is_nan ? nan : state.sum == 0.0f ? minus_infinity() : state.max * kLn2 + logf(state.sum);
    }
  }
};

__device__ __forceinline__ bool has_nan(const AttendParams& p, const BlockUnit& block, const QueryPlace& place) {
  const int64_t offset =
      block.entry * p.out.batch_stride + place.t * p.out.row_stride + place.head * p.out.head_stride;
  bool found = false;
  for (int64_t d = threadIdx.x % 32; d < p.cache.head_dim; d += 32) {
    const float x = load_as_float(p.out.data, offset + d, p.dtype);
    found = found || x != x;
  }
  return __any_sync(kAllLanes, found);
}

// A block goes through the queries of some KV heads, each warp through every eighth of them.
__global__ void __launch_bounds__(kThreads)
    exact_kernel(const __grid_constant__ AttendParams p, const __grid_constant__ PromptDivision division) {
  wait_for_previous_launch();
  let_next_launch_begin();
  __shared__ uint32_t any;
  __shared__ AttendPlan plan;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.next_work = 0;
  if (threadIdx.x == 0) any = *static_cast<const volatile uint32_t*>(p.redo);
  __syncthreads();
  if (any == 0) return;
  const uint32_t units = division.division.units.divisor;
  const uint32_t all_queries = division.division.group_size.divisor * static_cast<uint32_t>(p.rows);
  constexpr uint32_t kWarps = kThreads / 32;
#pragma unroll 1
  for (uint32_t unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const BlockUnit block = division.unit(p, unit);
    __syncthreads();  // nobody needs the plan of the unit before
    if (threadIdx.x == 0) plan = prompt_plan(p, block.entry, block.sequence);
    __syncthreads();
    const uint32_t first = block.tile * kWarps;
#pragma unroll 1
    for (uint32_t number = first + threadIdx.x / 32; number < first + kWarps && number < all_queries; ++number) {
      const QueryPlace place(division.division, block, number);
      if (has_nan(p, block, place)) {
        ExactQuery query{p, plan, block, place, {}};
        query.answer();
      }
      break;
    }
  }
  // The last block to have looked takes the note away: those that look later count themselves, too.
  if (threadIdx.x == 0 && atomicAdd(p.redo, 2u) == 1 + 2 * (gridDim.x - 1)) *p.redo = 0;
}

}  // namespace

cudaError_t launch_prompt_exact(const AttendParams& p, cudaStream_t stream) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const PromptDivision division = divide_prompt(p, kThreads / 32, 1);
  const int64_t blocks = imin(int64_t{division.division.units.divisor}, 4 * multiprocessors);
  OverlappingLaunch launch(blocks, kThreads, 0, stream);
  return cudaLaunchKernelEx(&launch.config, exact_kernel, p, division);
}

}  // namespace kvc
