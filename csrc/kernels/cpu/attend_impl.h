// Attention of a run of rows on a CPU, written once over a vector type S and compiled for each instruction set.
//
// Rows come in tiles. For a tile, every head's scores are taken row by row, so that keys are read as they lie in
// memory, while the values of the same rows are asked for ahead; then weights; then each head's weighted sum in
// registers. Sums are kept apart by tile, by run and by sequence, and so stay exact to a few units in the last place
// over many thousand rows.
#pragma once

#include <cmath>
#include <cstring>

#include "../convert.h"
#include "../visibility.h"
#include "cpu.h"

namespace kvc {
namespace cpu {
namespace {

// The weights 2^x, x <= 0, of finite scores, to within 2 units in the last place, and not 0; NaN stays NaN.
// The polynomial is 2^f's Taylor series on [-0.5, 0.5], whose first term left out is below 2^-26.
template <typename S>
inline typename S::Floats weights_of_finite(typename S::Floats x) {
  const auto exponent = S::max_or_nan(S::set(kLog2LeastWeight), x);
  const auto whole = S::round(exponent);
  const auto f = S::subtract(exponent, whole);
  auto y = S::set(1.5252733804059840e-5f);
  y = S::fma(y, f, S::set(1.5403530393381609e-4f));
  y = S::fma(y, f, S::set(1.3333558146428443e-3f));
  y = S::fma(y, f, S::set(9.6181291076284772e-3f));
  y = S::fma(y, f, S::set(5.5504108664821580e-2f));
  y = S::fma(y, f, S::set(2.4022650695910071e-1f));
  y = S::fma(y, f, S::set(6.9314718055994531e-1f));
  y = S::fma(y, f, S::set(1.0f));
  return S::times_power_of_two(y, whole);
}

// softcap * tanh(x / softcap) as a power of two's exponent, to within a few units in the last place; NaN stays NaN.
// Below 0.625 the hyperbolic tangent is Cephes' polynomial (tanhf.c), above it comes from the exponential.
template <typename S>
inline typename S::Floats capped(typename S::Floats score, float softcap) {
  const auto one = S::set(1.0f);
  const auto x = S::divide(score, S::set(softcap));
  const auto size = S::max_or_nan(x, S::subtract(S::set(0.0f), x));
  const auto square = S::multiply(x, x);
  auto y = S::set(-5.70498872745e-3f);
  y = S::fma(y, square, S::set(2.06390887954e-2f));
  y = S::fma(y, square, S::set(-5.37397155531e-2f));
  y = S::fma(y, square, S::set(1.33314422036e-1f));
  y = S::fma(y, square, S::set(-3.33332819422e-1f));
  const auto near_zero = S::fma(S::multiply(y, square), x, x);
  const auto power = weights_of_finite<S>(S::multiply(size, S::set(-2.0f * kLog2e)));
  const auto far = S::divide(S::subtract(one, power), S::add(one, power));
  const auto with_sign = S::where_less(x, S::set(0.0f), S::subtract(S::set(0.0f), far), far);
  const auto tanh = S::where_less(size, S::set(0.625f), near_zero, with_sign);
  return S::multiply(S::multiply(tanh, S::set(softcap)), S::set(kLog2e));
}

template <typename S>
struct Attention {
  using Floats = typename S::Floats;
  static constexpr int kWidth = S::kWidth;

  const AttendParams& p;
  const AttendPlan& plan;
  int64_t entry;
  int64_t group;  // query heads of a KV head
  int64_t head_dim;
  const float* queries;  // [T * Hq, D], scaled
  float* state;          // [T * Hq, D + 2]: weighted sum, maximum, sum of weights
  float* scores;         // [T * Hq, kTile]
  uint16_t* converted;   // [2, kTile, H, D]: rows of the call's own keys and values as FP16

  const uint16_t* key_rows[kTile];
  const uint16_t* value_rows[kTile];

  // The number of the i-th query that shares a KV head. Divisions are dear here: without them where T is 1.
  int64_t query_number(int64_t head, int64_t i) const {
    if (p.rows == 1) return head * group + i;
    return i / group * p.query_heads + head * group + i % group;
  }

  template <int kCount>
  static void sum_each(const Floats (&a)[kCount], float (&sums)[kCount]) {
    if constexpr (kCount == 4) {
      S::sum_four(a, sums);
    } else {
      for (int i = 0; i < kCount; ++i) sums[i] = S::sum(a[i]);
    }
  }

  // Scores of `kQueries` queries against one head of one row.
  template <int kQueries>
  void score(const uint16_t* key, int64_t head, int64_t i, int r) {
    const float* q[kQueries];
    Floats sum[kQueries];
    for (int m = 0; m < kQueries; ++m) {
      q[m] = queries + query_number(head, i + m) * head_dim;
      sum[m] = S::set(0.0f);
    }
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      const Floats k = S::load_halves(key + d);
      for (int m = 0; m < kQueries; ++m) sum[m] = S::fma(S::load(q[m] + d), k, sum[m]);
    }
    float sums[kQueries];
    sum_each(sum, sums);
    for (int m = 0; m < kQueries; ++m) scores[query_number(head, i + m) * kTile + r] = sums[m];
  }

  // The same for the only query of each of `kHeads` heads side by side: sums that do not wait for each other.
  template <int kHeads>
  void score_heads(const uint16_t* key, int64_t head, int r) {
    Floats sum[kHeads];
    for (int h = 0; h < kHeads; ++h) sum[h] = S::set(0.0f);
    const float* q = queries + head * head_dim;
    for (int64_t d = 0; d < head_dim; d += kWidth) {
      for (int h = 0; h < kHeads; ++h) {
        const int64_t at = h * head_dim + d;
        sum[h] = S::fma(S::load(q + at), S::load_halves(key + at), sum[h]);
      }
    }
    float sums[kHeads];
    sum_each(sum, sums);
    for (int h = 0; h < kHeads; ++h) scores[(head + h) * kTile + r] = sums[h];
  }

  // Adds the tile's weighted values to `kQueries` states, kParts vectors of each at a time.
  template <int kQueries, int kParts>
  int64_t accumulate(int64_t head, int64_t i, int64_t d, int rows) {
    for (; d + kParts * kWidth <= head_dim; d += kParts * kWidth) {
      Floats sum[kQueries][kParts];
      const float* weights[kQueries];
      for (int m = 0; m < kQueries; ++m) {
        weights[m] = scores + query_number(head, i + m) * kTile;
        for (int j = 0; j < kParts; ++j) sum[m][j] = S::set(0.0f);
      }
      for (int r = 0; r < rows; ++r) {
        const uint16_t* value = value_rows[r] + head * head_dim + d;
        for (int j = 0; j < kParts; ++j) {
          const Floats v = S::load_halves(value + j * kWidth);
          for (int m = 0; m < kQueries; ++m) sum[m][j] = S::fma(S::set(weights[m][r]), v, sum[m][j]);
        }
      }
      for (int m = 0; m < kQueries; ++m) {
        float* to = state + query_number(head, i + m) * (head_dim + 2) + d;
        for (int j = 0; j < kParts; ++j) S::store(to + j * kWidth, S::add(S::load(to + j * kWidth), sum[m][j]));
      }
    }
    return d;
  }

  template <int kQueries>
  void accumulate_all(int64_t head, int64_t i, int rows) {
    constexpr int kParts = kQueries == 4 && kWidth == 16 ? 4 : 8 / kQueries;  // AVX-512 has registers for 16 sums
    int64_t d = accumulate<kQueries, kParts>(head, i, 0, rows);
    if constexpr (kParts > 2) d = accumulate<kQueries, 2>(head, i, d, rows);
    accumulate<kQueries, 1>(head, i, d, rows);
  }

  // The same for one query that does not see every row of the tile: what it does not see may hold anything.
  void accumulate_visible(int64_t head, int64_t number, int rows, const bool* visible) {
    float* to = state + number * (head_dim + 2);
    float sum[kMaxHeadDim];  // of this tile
    std::memset(sum, 0, sizeof(float) * static_cast<size_t>(head_dim));
    for (int r = 0; r < rows; ++r) {
      if (!visible[r]) continue;
      const uint16_t* value = value_rows[r] + head * head_dim;
      const Floats weight = S::set(scores[number * kTile + r]);
      for (int64_t d = 0; d < head_dim; d += kWidth) {
        S::store(sum + d, S::fma(weight, S::load_halves(value + d), S::load(sum + d)));
      }
    }
    for (int64_t d = 0; d < head_dim; d += kWidth) S::store(to + d, S::add(S::load(to + d), S::load(sum + d)));
  }

  // Scores become weights; the state is brought to the new maximum.
  void weigh(int64_t number, int rows, const bool* visible) {
    float* s = scores + number * kTile;
    float* to = state + number * (head_dim + 2);
    float& max = to[head_dim];
    if (p.softcap > 0) {
      for (int r = 0; r < kTile; r += kWidth) S::store(s + r, capped<S>(S::load(s + r), p.softcap));
    }
    float new_max = max;
    for (int r = 0; r < kTile; ++r) {
      if (r >= rows || (visible != nullptr && !visible[r])) {
        s[r] = -INFINITY;
      } else if (s[r] > new_max || s[r] != s[r]) {
        new_max = s[r];
      }
    }
    if (new_max != max) {  // also where it has become NaN
      const float rescale = max == -INFINITY ? 0.0f : weight_of_finite(max - new_max);
      for (int64_t d = 0; d < head_dim; d += kWidth) S::store(to + d, S::multiply(S::load(to + d), S::set(rescale)));
      to[head_dim + 1] *= rescale;
      max = new_max;
    }
    const Floats base = S::set(max == -INFINITY ? 0.0f : max);
    Floats sum = S::set(0.0f);
    for (int r = 0; r < kTile; r += kWidth) {
      const Floats score = S::load(s + r);
      const Floats weight = S::zero_where_minus_infinity(weights_of_finite<S>(S::subtract(score, base)), score);
      S::store(s + r, weight);
      sum = S::add(sum, weight);
    }
    to[head_dim + 1] += S::sum(sum);
  }

  void find_rows(int64_t row0, int rows) {
    const int64_t row_elements = p.cache.heads * head_dim;
    const int64_t sequence = imax(p.sequences.sequence(entry, p.cache.batch), 0);
    const int64_t start = (p.layer * p.cache.batch + sequence) * p.cache.positions * row_elements;
    for (int r = 0; r < rows; ++r) {
      if (row0 + r < plan.cached) {
        const int64_t offset = start + plan.slot(row0 + r) * row_elements;
        key_rows[r] = p.cache.k_cache + offset;
        value_rows[r] = p.cache.v_cache + offset;
      } else {
        key_rows[r] = convert_row(p.append.key, row0 + r, converted + r * row_elements);
        value_rows[r] = convert_row(p.append.value, row0 + r, converted + (kTile + r) * row_elements);
      }
    }
  }

  const uint16_t* convert_row(const Rows<const void*>& from, int64_t row, uint16_t* to) {
    const int64_t size = dtype_size(p.append.dtype);
    const int64_t offset = entry * from.batch_stride + plan.input_row(row) * from.row_stride;
    for (int64_t h = 0; h < p.cache.heads; ++h) {
      kGeneric.to_half(p.append.dtype, static_cast<const char*>(from.data) + (offset + h * from.head_stride) * size,
                       to + h * head_dim, head_dim, p.append.saturate, false);
    }
    return to;
  }

  void run(int64_t begin, int64_t end) {
    const int64_t sharing = group * p.rows;  // queries of a KV head
    for (int64_t row0 = begin; row0 < end; row0 += kTile) {
      const int rows = static_cast<int>(imin(kTile, end - row0));
      find_rows(row0, rows);
      bool seen_in_part = false;  // does some query not see some row?
      for (int64_t t = 0; t < p.rows && p.rows > 1; ++t) {
        for (int r = 0; r < rows; ++r) seen_in_part = seen_in_part || !plan.sees(t, row0 + r);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t row_elements = p.cache.heads * head_dim;
        const uint16_t* ahead = r + 2 < rows ? key_rows[r + 2] : key_rows[rows - 1] + (r + 3 - rows) * row_elements;
        int64_t h = 0;
        for (; sharing == 1 && h + 4 <= p.cache.heads; h += 4) {
          for (int64_t d = h * head_dim; d < (h + 4) * head_dim; d += 32) {
            __builtin_prefetch(value_rows[r] + d, 0, 2);
            __builtin_prefetch(ahead + d, 0, 2);
          }
          score_heads<4>(key_rows[r] + h * head_dim, h, r);
        }
        for (; h < p.cache.heads; ++h) {
          const uint16_t* key = key_rows[r] + h * head_dim;
          for (int64_t d = h * head_dim; d < (h + 1) * head_dim; d += 32) {
            __builtin_prefetch(value_rows[r] + d, 0, 2);
            __builtin_prefetch(ahead + d, 0, 2);
          }
          int64_t i = 0;
          for (; i + 4 <= sharing; i += 4) score<4>(key, h, i, r);
          for (; i < sharing; ++i) score<1>(key, h, i, r);
        }
      }
      for (int64_t h = 0; h < p.cache.heads; ++h) {
        int64_t i = 0;
        if (seen_in_part) {
          for (; i < sharing; ++i) {
            const int64_t number = query_number(h, i);
            bool visible[kTile];
            for (int r = 0; r < rows; ++r) visible[r] = plan.sees(i / group, row0 + r);
            weigh(number, rows, visible);
            accumulate_visible(h, number, rows, visible);
          }
        }
        for (int64_t j = i; j < sharing; ++j) weigh(query_number(h, j), rows, nullptr);
        for (; i + 4 <= sharing; i += 4) accumulate_all<4>(h, i, rows);
        for (; i + 2 <= sharing; i += 2) accumulate_all<2>(h, i, rows);
        for (; i < sharing; ++i) accumulate_all<1>(h, i, rows);
      }
    }
  }
};

template <typename S>
void attend_rows(const AttendParams& p, const AttendPlan& plan, int64_t entry, int64_t begin, int64_t end,
                 const float* queries, float* state, float* scores, uint16_t* converted) {
  Attention<S> attention{
      p, plan, entry, p.query_heads / p.cache.heads, p.cache.head_dim, queries, state, scores, converted, {}, {}};
  attention.run(begin, end);
}

}  // namespace
}  // namespace cpu
}  // namespace kvc
