// Values that are not finite in attention on tensor cores (few_queries.cu).
//
// A softmax weight of a finite score is never 0, so an infinite value makes the answer infinite however little it
// weighs. The FP16 parts of a small weight are 0 though, and 0 times an infinity is NaN. So the kernel lets such a
// value make NaN of a sum. Before an answer is written, its elements that are NaN are computed anew from the values
// that its query sees, one by one. That costs time only where there are such values.
#pragma once

#include "common.cuh"

namespace kvc {

__device__ __forceinline__ bool is_finite_half(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

__device__ __forceinline__ bool is_nan(float x) { return x != x; }

// The rows of one head, as one query sees them.
template <typename Plan>
struct VisibleRows {
  const AttendParams& p;
  const Plan& plan;
  const BlockUnit& block;
  int64_t t;           // of the query
  int64_t query_head;  // and its head

  // Element d of a row of this head's keys or values, as it is stored.
  __device__ uint16_t element(const uint16_t* cached, const Rows<const void*>& new_rows, int64_t row, int64_t d) const {
    if (row < plan.cached) {
      return cached[block.cache_offset(p) + plan.slot(row) * p.cache.heads * p.cache.head_dim + d];
    }
    uint32_t counted_elsewhere = 0;
    const int64_t offset = block.entry * new_rows.batch_stride + plan.input_row(row) * new_rows.row_stride +
                           block.head * new_rows.head_stride + d;
    return stored_element(new_rows.data, offset, p.append.dtype, p.append.saturate, counted_elsewhere);
  }

  __device__ bool sees(int64_t row) const { return p.rows == 1 || plan.sees(t, row); }

  // Is the score of a row minus infinity? Its weight is 0 then.
  __device__ bool weighs_nothing(int64_t row) const {
    if (p.softcap > 0) return false;
    const int64_t offset =
        block.entry * p.query.batch_stride + t * p.query.row_stride + query_head * p.query.head_stride;
    float score = 0.0f;
    for (int64_t d = 0; d < p.cache.head_dim; ++d) {
      const float q = load_as_float(p.query.data, offset + d, p.dtype) * p.scale;
      score = fmaf(q, half_to_float(element(p.cache.k_cache, p.append.key, row, d)), score);
    }
    return score == minus_infinity();
  }

  // What the values at place d that are not finite come to: 0, an infinity or NaN.
  __device__ float sum_of_non_finite(int64_t d) const {
    float sum = 0.0f;
    for (int64_t row = 0; row < plan.count && !is_nan(sum); ++row) {
      if (!sees(row)) continue;
      const uint16_t value = element(p.cache.v_cache, p.append.value, row, d);
      if (is_finite_half(value)) continue;
      sum += weighs_nothing(row) ? 0.0f * half_to_float(value) : half_to_float(value);
    }
    return sum;
  }
};

// Element d of the answer of a query, `number` of those that share this block's KV head, which came out as NaN although
// the query's scores are not. The block's place is found once more here, so that the kernel need not keep it for this.
template <typename Plan>
__device__ __noinline__ float resolved_element(const AttendParams& p, const Division& division, const Plan& plan,
                                               uint32_t number, uint32_t d) {
  const BlockUnit block = BlockUnit::of(p, division, blockIdx.x);
  const uint32_t t = division.group_size(number);
  const int64_t query_head = block.head * division.group_size.divisor + (number - t * division.group_size.divisor);
  return VisibleRows<Plan>{p, plan, block, t, query_head}.sum_of_non_finite(d);
}

template <typename Plan>
struct ResolveNonFinite {
  const AttendParams& p;
  const Division& division;
  const Plan& plan;

  __device__ __forceinline__ void operator()(uint32_t number, uint32_t d, SoftmaxState state,
                                             Vec<float, 4>& sums) const {
    if (!is_nan(sums.x[0] + sums.x[1] + sums.x[2] + sums.x[3]) || is_nan(state.sum)) return;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (is_nan(sums.x[i])) sums.x[i] = resolved_element(p, division, plan, number, d + i);
    }
  }
};

}  // namespace kvc
