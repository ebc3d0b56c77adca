// Merging what several ranks answer over their shares of a text: the arithmetic, shared by the GPU and the CPU.
//
// Each answer is weighed by exp(lse - the largest lse) (Rabe and Staats, 2021; the merge of flash decoding).
#pragma once

#include <cmath>

#include "convert.h"
#include "params.h"
#include "portable.h"

namespace kvc {

// The softmax over shares, taken in one after the other. `keep` and `weight` are for the weighted sums of answers:
// sum = sum * keep + answer * weight, behind each share that holds something; the answer is sum * factor().
struct Merging {
  float largest = bits_float(0xff800000u);  // LSE so far
  float total = 0.0f;
  float keep = 0.0f;
  float weight = 0.0f;

  // False: the share holds nothing to see, whatever its answer is.
  KVC_HD bool add(float lse) {
    if (lse == bits_float(0xff800000u)) return false;
    const float before = largest;
    largest = lse != lse || lse > largest ? lse : largest;  // NaN stays NaN
    keep = total == 0.0f ? 0.0f : weight_of(before);
    weight = weight_of(lse);
    total = total * keep + weight;
    return true;
  }
  KVC_HD float factor() const { return total == 0.0f ? 0.0f : 1.0f / total; }
  KVC_HD float lse() const { return total == 0.0f ? largest : largest + logf(total); }

 private:
  // Never 0, which times an infinite answer would be NaN.
  KVC_HD float weight_of(float lse) const {
    constexpr float kLeastWeight = 7.888609052210118e-31f;  // 2^-100: nothing beside 1
    const float x = expf(lse - largest);
    return x < kLeastWeight ? kLeastWeight : x;
  }
};

// The place of a row's first element in `out`.
KVC_HD int64_t out_offset(const MergeParams& p, int64_t row) {
  const uint32_t token = p.query_heads(static_cast<uint32_t>(row));
  const uint32_t head = static_cast<uint32_t>(row) - token * p.query_heads.divisor;
  const uint32_t entry = p.positions(token);
  const uint32_t t = token - entry * p.positions.divisor;
  return entry * p.out.batch_stride + t * p.out.row_stride + head * p.out.head_stride;
}

KVC_HD void store_answer(const MergeParams& p, int64_t i, float x) {
  if (p.dtype == DType::f32) {
    static_cast<float*>(p.out.data)[i] = x;
  } else {
    static_cast<uint16_t*>(p.out.data)[i] = p.dtype == DType::f16 ? float_to_half(x) : float_to_bf16(x);
  }
}

}  // namespace kvc
