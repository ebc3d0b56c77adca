// How the kernels for many queries end: a lane's part of the outputs is written, or left as partials.
#pragma once

#include "many_queries.cuh"

namespace kvc {

// Writes a lane's columns of an answer, those of `half` of a product's rows. T: of the answer. Is there a NaN?
template <typename T, bool kInPairs, int kBlocks, typename Convert>
__device__ __forceinline__ bool write_columns(T* row, int columns, const FragmentC (&sums)[kBlocks], int half,
                                              float factor, const Convert& convert) {
  bool is_nan = false;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
    if (8 * i >= columns) continue;
    const float x = sums[i].x[2 * half] * factor;
    const float y = sums[i].x[2 * half + 1] * factor;
    is_nan = is_nan || x != x || y != y;
    if constexpr (kInPairs) {
      store<T, 2>(row + 8 * i, {{convert(x), convert(y)}});
    } else {
      row[8 * i] = convert(x);
      row[8 * i + 1] = convert(y);
    }
  }
  return is_nan;
}

// Writes a lane's part of the answers of its two queries, numbers number[h]: the columns that a product left it, of
// those from `column` on. `there`: the queries exist. The sums are the queries' by now.
template <int kBlocks>
__device__ __forceinline__ void write_rows(const AttendParams& p, const ManyDivision& division, const BlockUnit& block,
                                           const LaneSoftmax& rows, const uint32_t (&number)[2], const bool (&there)[2],
                                           int column, const FragmentC (&sums)[kBlocks]) {
  const int lane_column = column + static_cast<int>(threadIdx.x % 4) * 2;
  const int columns = static_cast<int>(p.cache.head_dim) - lane_column;
  bool is_nan = false;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!there[h]) continue;
    const QueryPlace place(division.division, block, number[h]);
    const int64_t offset =
        block.entry * p.out.batch_stride + place.t * p.out.row_stride + place.head * p.out.head_stride + lane_column;
    const float factor = rows.sum[h] == 0.0f ? 0.0f : 1.0f / rows.sum[h];
    const auto as_it_is = [](float x) { return x; };
    const auto as_half = [&](float x) { return p.out_dtype == DType::f16 ? float_to_half(x) : float_to_bf16(x); };
    float* const floats = static_cast<float*>(p.out.data) + offset;
    uint16_t* const halves = static_cast<uint16_t*>(p.out.data) + offset;
    if (p.out_dtype == DType::f32) {
      is_nan |= division.out_in_pairs ? write_columns<float, true>(floats, columns, sums, h, factor, as_it_is)
                                      : write_columns<float, false>(floats, columns, sums, h, factor, as_it_is);
    } else {
      is_nan |= division.out_in_pairs ? write_columns<uint16_t, true>(halves, columns, sums, h, factor, as_half)
                                      : write_columns<uint16_t, false>(halves, columns, sums, h, factor, as_half);
    }
    if (p.lse != nullptr && lane_column == 0) {
      const SoftmaxState state = rows.running(h);
      p.lse[(block.entry * p.rows + place.t) * p.query_heads + place.head] =
          state.sum == 0.0f ? minus_infinity() : state.max * kLn2 + logf(state.sum);
    }
  }
  if (is_nan) *p.redo = 1;
}

// A block's part of a unit whose keys are split: the weighted sums and states of its queries, left in the workspace.
template <int kWidth, int kQueries, int kBlocks>
__device__ __forceinline__ void leave_rows(float* part, int queries, const LaneSoftmax& rows, const int (&row)[2],
                                           int column, const FragmentC (&sums)[kBlocks]) {
  const int lane = static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (row[h] >= queries) continue;
    if (lane == 0 && column == 0) {
      const SoftmaxState state = rows.running(h);
      store<float, 2>(part + kQueries * kWidth + 2 * row[h], {{state.max, state.sum}});
    }
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      store<float, 2>(part + row[h] * kWidth + column + 8 * i + 2 * lane, {{sums[i].x[2 * h], sums[i].x[2 * h + 1]}});
    }
  }
}

}  // namespace kvc
