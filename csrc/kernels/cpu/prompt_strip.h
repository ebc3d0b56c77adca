// The arithmetic of attention of many queries on a CPU, a strip at a time.
//
// A vector holds one number of each of several queries: its lanes are queries. Up to three vectors side by side are a
// strip. Queries, scores, weights and sums of a strip are transposed: element d (or row r) of all lanes, then the next.
// So a score is a sum of (vector of queries) * (one element of a key), an answer one of (vector of weights) * (one
// element of a value), and softmax needs no sums across a vector.
#pragma once

#include "attend_impl.h"
#include "prompt.h"

namespace kvc {
namespace cpu {
namespace {

// Three vectors against four elements are twelve sums in registers, of the sixteen that AVX2 has.
constexpr int kStripVectors = 3;

// Products of a score that are summed at a time, or rounding adds up: of 192 queries of 64 elements, three times over
// 512 positions of N(0, 1), the worst answer was off by 5.0e-7, 6.7e-7 and 1.2e-6 with 16, 32 and 64.
constexpr int64_t kDepth = 32;

// Rows of a key tile that some query of a strip sees, rounded outwards to multiples of kRowRounding.
struct RowRange {
  int64_t begin;
  int64_t end;
  bool partial;  // some query does not see all rows of the key tile
};

// How many rows or elements are worked on together: so many that enough sums do not wait for each other.
constexpr int taken_together(int vectors) { return vectors == 1 ? 8 : 4; }

// Where element d of row r lies in a panel of keys or values: kWidth elements of each row, then the next of each.
template <typename S>
inline float* panel_at(float* panel, int64_t r, int64_t d) {
  return panel + (d / S::kWidth * kPanelRows + r) * S::kWidth + d % S::kWidth;
}

// Adds a[v] * b[i] to each of the sums: one step of a product of matrices.
template <typename S, int kVectors, int kCount>
inline void add_products(const float* a, const float* b, int64_t b_stride,
                         typename S::Floats (&sums)[kCount][kVectors]) {
  typename S::Floats vectors[kVectors];
  for (int v = 0; v < kVectors; ++v) vectors[v] = S::load(a + v * S::kWidth);
  for (int i = 0; i < kCount; ++i) {
    const auto element = S::set(b[i * b_stride]);
    for (int v = 0; v < kVectors; ++v) sums[i][v] = S::fma(vectors[v], element, sums[i][v]);
  }
}

template <typename S, int kVectors, int kCount>
inline void clear(typename S::Floats (&sums)[kCount][kVectors]) {
  for (int i = 0; i < kCount; ++i) {
    for (int v = 0; v < kVectors; ++v) sums[i][v] = S::set(0.0f);
  }
}

// Scores of a strip against a panel of keys.
template <typename S, int kVectors>
void score_strip(const float* queries, float* panel, float* scores, int64_t head_dim, const RowRange& range) {
  constexpr int kRows = taken_together(kVectors);
  constexpr int64_t kLanes = kVectors * S::kWidth;
  for (int64_t r = range.begin; r < range.end; r += kRows) {
    const float* q = queries;
    for (int64_t depth = 0; depth < head_dim; depth += kDepth) {
      typename S::Floats sums[kRows][kVectors];
      clear<S>(sums);
      for (int64_t d = depth; d < imin(depth + kDepth, head_dim); d += S::kWidth) {
        const float* keys = panel_at<S>(panel, r, d);
        for (int j = 0; j < S::kWidth; ++j, q += kLanes) add_products<S>(q, keys + j, S::kWidth, sums);
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          float* at = scores + (r + i) * kLanes + v * S::kWidth;
          S::store(at, depth == 0 ? sums[i][v] : S::add(S::load(at), sums[i][v]));
        }
      }
    }
  }
}

template <typename S, int kVectors>
void cap_strip(float* scores, float softcap, const RowRange& range) {
  constexpr int64_t kLanes = kVectors * S::kWidth;
  for (int64_t i = range.begin * kLanes; i < range.end * kLanes; i += S::kWidth) {
    S::store(scores + i, capped<S>(S::load(scores + i), softcap));
  }
}

// Scores become weights, and the maximum and the sum of weights follow. `rescale`: what earlier sums are to be
// multiplied by. A NaN among the scores is not taken for the maximum, but the sum of weights becomes NaN.
template <typename S, int kVectors>
void softmax_strip(float* scores, float* max, float* sum, float* rescale, const RowRange& range) {
  constexpr int64_t kLanes = kVectors * S::kWidth;
  for (int64_t lane = 0; lane < kLanes; lane += S::kWidth) {
    float* s = scores + lane;
    const auto old = S::load(max + lane);
    auto largest = old;
    for (int64_t r = range.begin; r < range.end; ++r) largest = S::max_or_nan(S::load(s + r * kLanes), largest);
    const auto base = S::zero_where_minus_infinity(largest, largest);
    const auto change = S::zero_where_minus_infinity(weights_of_finite<S>(S::subtract(old, base)), old);
    auto added = S::set(0.0f);
    for (int64_t r = range.begin; r < range.end; ++r) {
      const auto x = S::load(s + r * kLanes);
      const auto weight = S::zero_where_minus_infinity(weights_of_finite<S>(S::subtract(x, base)), x);
      S::store(s + r * kLanes, weight);
      added = S::add(added, weight);
    }
    S::store(max + lane, largest);
    S::store(rescale + lane, change);
    S::store(sum + lane, S::fma(S::load(sum + lane), change, added));
  }
}

// Rescales a strip's sums, and adds the weighted values of a panel to them.
template <typename S, int kVectors>
void accumulate_strip(const float* weights, float* panel, const float* rescale, float* into, int64_t head_dim,
                      const RowRange& range) {
  constexpr int kElements = taken_together(kVectors);
  constexpr int64_t kLanes = kVectors * S::kWidth;
  for (int64_t d = 0; d < head_dim; d += kElements) {
    const float* w = weights + range.begin * kLanes;
    const float* values = panel_at<S>(panel, range.begin, d);
    typename S::Floats sums[kElements][kVectors];
    clear<S>(sums);
    for (int64_t r = range.begin; r < range.end; ++r, w += kLanes, values += S::kWidth) {
      add_products<S>(w, values, 1, sums);
    }
    for (int i = 0; i < kElements; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* at = into + (d + i) * kLanes + v * S::kWidth;
        S::store(at, S::fma(S::load(at), S::load(rescale + v * S::kWidth), sums[i][v]));
      }
    }
  }
}

}  // namespace
}  // namespace cpu
}  // namespace kvc
