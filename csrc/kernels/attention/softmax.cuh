// Partial softmaxes and their merging (online softmax: Milakov and Gimelshein, 2018).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../convert.h"
#include "../vec.cuh"
#include "block_shapes.h"

namespace kvc {

constexpr uint32_t kAllLanes = 0xffffffffu;

__device__ __forceinline__ float minus_infinity() { return bits_float(0xff800000u); }

// The maximum of no rows. Finite, so that nothing is ever minus infinity less itself: the weight of a score of minus
// infinity is 0, also beside this.
constexpr float kLeastScore = -3.402823466e38f;

// 2^n, -126 <= n <= 127.
__device__ __forceinline__ float exact_power_of_two(int n) { return bits_float(static_cast<uint32_t>(n + 127) << 23); }

// 2^x; what is below 2^-126 is 0.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(KVC_EMULATED)
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// The weight 2^x, x <= 0, of a finite score or of a partial softmax: not 0. NaN stays NaN.
__device__ __forceinline__ float weight_of_finite(float x) {
#if defined(KVC_EMULATED)
  return power_of_two(x < kLog2LeastWeight ? kLog2LeastWeight : x);
#else
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(x), "f"(kLog2LeastWeight));  // fmaxf would lose NaN
  return power_of_two(y);
#endif
}

// Where partials lie. All strides are in floats.
struct Partials {
  const float* states;    // a SoftmaxState for each partial and query
  const float* sums;      // the weighted sums that belong to it
  uint32_t state_stride;  // from one partial's states to the next's
  uint32_t sums_stride;   // from one partial's sums to the next's
  uint32_t query_stride;  // from one query's sums to the next's
  uint32_t count;         // of partials
};

// Merges the partials of each query in their order. A thread takes four elements of a query's output at a time:
// emit(query, d, state, sums) is given the merged state and the merged sums of the elements d to d + 3.
// kKeepInfinite: no partial's weight is 0, so infinite sums stay infinite. Else they may become NaN.
template <int kWidth, bool kKeepInfinite, typename Emit>
__device__ __forceinline__ void merge_partials(const Partials& partials, uint32_t queries, uint32_t head_dim,
                                               const Emit& emit) {
  constexpr uint32_t kFours = kWidth / 4;
#pragma unroll 1
  for (uint32_t item = threadIdx.x; item < queries * kFours; item += blockDim.x) {
    const uint32_t query = item / kFours;
    const uint32_t d = item % kFours * 4;
    if (d >= head_dim) continue;
    const float* states = partials.states + 2 * query;
    const float* sums = partials.sums + query * partials.query_stride + d;
    SoftmaxState merged = {kLeastScore, 0.0f};
#pragma unroll 4
    for (uint32_t i = 0; i < partials.count; ++i) merged.max = fmaxf(merged.max, states[i * partials.state_stride]);
    Vec<float, 4> value = {};
#pragma unroll 4
    for (uint32_t i = 0; i < partials.count; ++i) {
      const Vec<float, 2> state = load<float, 2>(states + i * partials.state_stride);
      const Vec<float, 4> sum = load<float, 4>(sums + i * partials.sums_stride);
      const float difference = state.x[0] - merged.max;
      const float weight = kKeepInfinite ? weight_of_finite(difference) : power_of_two(difference);
      merged.sum = fmaf(state.x[1], weight, merged.sum);
#pragma unroll
      for (int j = 0; j < 4; ++j) value.x[j] = fmaf(sum.x[j], weight, value.x[j]);
    }
    emit(query, d, merged, value);
  }
}

}  // namespace kvc
