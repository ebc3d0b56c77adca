// Attention of a query tile on a CPU, written once over a vector type S and compiled for each instruction set.
//
// Keys and values are converted to FP32 once per key tile, into one panel, and serve every query of the query tile,
// strip by strip (prompt_strip.h). Sums are kept apart by key tile, by kPieceTiles of those and by split, and so stay
// exact to a few units in the last place over many thousand rows.
#pragma once

#include <cmath>
#include <cstring>

#include "attend_impl.h"
#include "prompt.h"
#include "prompt_strip.h"

namespace kvc {
namespace cpu {
namespace {

template <typename S>
struct PromptAttention {
  using Floats = typename S::Floats;
  static constexpr int kWidth = S::kWidth;
  static constexpr int64_t kMostStrips = kMostLanes / kWidth;

  const AttendParams& p;
  const QueryTile& tile;
  const AttendPlan& plan;
  const int64_t head_dim;
  const int64_t group;
  const int64_t lanes;  // tile.end - tile.begin, rounded up to whole vectors
  SeenRows seen;
  const Conversions& use;

  // In the caller's scratch memory:
  float* queries;       // [D, lanes], scaled
  float* sums;          // [D, lanes]: weighted sums since the last merge
  float* totals;        // [D, lanes]: those before
  float* weights;       // [kKeyTile, lanes]: scores, then weights
  float* panel;         // [kPanelRows, D]: keys, then values of a key tile
  uint16_t* converted;  // [D]: a row of the call's own keys or values as FP16

  Sight sights[kMostLanes];
  RowRange ranges[kMostStrips];
  alignas(64) float max[kMostLanes];
  alignas(64) float sum[kMostLanes];
  alignas(64) float rescale[kMostLanes];  // what `sums` is to be multiplied by for the new maximum
  alignas(64) float total_max[kMostLanes];
  alignas(64) float total_sum[kMostLanes];

  PromptAttention(const AttendParams& params, const QueryTile& t, const Conversions& conversions, float* scratch)
      : p(params),
        tile(t),
        plan(t.plan),
        head_dim(params.cache.head_dim),
        group(params.query_heads / params.cache.heads),
        lanes((t.end - t.begin + kWidth - 1) / kWidth * kWidth),
        seen(SeenRows::make(t.plan, t.begin / group, (t.end - 1) / group)),
        use(conversions) {
    const int64_t most = most_lanes(head_dim);
    queries = scratch;
    sums = queries + most * head_dim;
    totals = sums + most * head_dim;
    weights = totals + most * head_dim;
    panel = weights + most * kKeyTile;
    converted = reinterpret_cast<uint16_t*>(panel + kPanelRows * head_dim);
  }

  // Calls f with the number of a strip's vectors as a constant, and with the strip's number and first lane.
  template <typename F>
  void each_strip(const F& f) {
    int64_t strip = 0;
    for (int64_t lane = 0; lane < lanes; lane += kStripVectors * kWidth, ++strip) {
      const int64_t vectors = imin(kStripVectors, (lanes - lane) / kWidth);
      if (vectors == 3) f(std::integral_constant<int, 3>(), strip, lane);
      if (vectors == 2) f(std::integral_constant<int, 2>(), strip, lane);
      if (vectors == 1) f(std::integral_constant<int, 1>(), strip, lane);
    }
  }

  // Where a lane's number lies among those of its strip, for element or row 0; and how far the next element is.
  struct LanePlace {
    int64_t strip_lane;
    int64_t width;
  };
  LanePlace place_of(int64_t lane) const {
    const int64_t strip_lane = lane - lane % (kStripVectors * kWidth);
    return {strip_lane, imin(kStripVectors * kWidth, lanes - strip_lane)};
  }

  void load_queries() {
    const float factor = p.softcap > 0 ? p.scale : p.scale * kLog2e;  // scores become powers of two
    std::memset(queries, 0, sizeof(float) * static_cast<size_t>(lanes * head_dim));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t number = imin(tile.begin + lane, tile.end - 1);
      const int64_t t = number / group;
      sights[lane] = seen.sight(plan, t);
      if (tile.begin + lane >= tile.end) continue;  // a lane without a query of its own
      const LanePlace at = place_of(lane);
      float* to = queries + at.strip_lane * head_dim + (lane - at.strip_lane);
      const int64_t offset = tile.entry * p.query.batch_stride + t * p.query.row_stride +
                             (tile.head * group + number % group) * p.query.head_stride;
      for (int64_t d = 0; d < head_dim; ++d) {
        float x;
        if (p.dtype == DType::f32) {
          x = static_cast<const float*>(p.query.data)[offset + d];
        } else {
          const uint16_t bits = static_cast<const uint16_t*>(p.query.data)[offset + d];
          x = p.dtype == DType::f16 ? half_to_float(bits) : bf16_to_float(bits);
        }
        to[d * at.width] = x * factor;
      }
    }
  }

  void clear_sums() {
    std::memset(sums, 0, sizeof(float) * static_cast<size_t>(lanes * head_dim));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      max[lane] = -INFINITY;
      sum[lane] = 0.0f;
    }
  }

  void clear_totals() {
    std::memset(totals, 0, sizeof(float) * static_cast<size_t>(lanes * head_dim));
    for (int64_t lane = 0; lane < lanes; ++lane) {
      total_max[lane] = -INFINITY;
      total_sum[lane] = 0.0f;
    }
  }

  // What each strip sees of the key tile.
  void find_ranges(int64_t place, int64_t rows) {
    each_strip([&](auto vectors, int64_t strip, int64_t first_lane) {
      int64_t begin = rows;
      int64_t end = 0;
      bool partial = rows % kRowRounding != 0;
      for (int64_t lane = first_lane; lane < first_lane + vectors * kWidth; ++lane) {
        const Sight& s = sights[lane];
        partial = partial || !s.sees_all(place, place + rows);
        if (s.sinks_end > place) {
          begin = 0;
          end = imax(end, imin(s.sinks_end - place, rows));
        }
        const int64_t first = imax(s.begin - place, 0);
        const int64_t last = imin(s.end - place, rows);
        if (first < last) {
          begin = imin(begin, first);
          end = imax(end, last);
        }
      }
      ranges[strip] = {begin / kRowRounding * kRowRounding, (end + kRowRounding - 1) / kRowRounding * kRowRounding,
                       partial};
    });
  }

  // A row of this head as FP16.
  const uint16_t* stored_row(const uint16_t* cache, const Rows<const void*>& fresh, int64_t place) {
    const int64_t row = seen.row(place);
    if (row < plan.cached) {
      const int64_t sequence = imax(p.sequences.sequence(tile.entry, p.cache.batch), 0);
      const int64_t start = (p.layer * p.cache.batch + sequence) * p.cache.positions;
      return cache + ((start + plan.slot(row)) * p.cache.heads + tile.head) * head_dim;
    }
    const int64_t offset =
        tile.entry * fresh.batch_stride + plan.input_row(row) * fresh.row_stride + tile.head * fresh.head_stride;
    use.to_half(p.append.dtype, static_cast<const char*>(fresh.data) + offset * dtype_size(p.append.dtype), converted,
                head_dim, p.append.saturate, false);
    return converted;
  }

  // Asks for a row that will be read soon, if it lies in the cache.
  void prefetch(const uint16_t* cache, int64_t place) {
    if (place >= seen.count || seen.row(place) >= plan.cached) return;
    const uint16_t* from = stored_row(cache, {}, place);
    for (int64_t d = 0; d < head_dim; d += 32) __builtin_prefetch(from + d, 0, 2);
  }

  // Converts the rows of a key tile into the panel. Rows of zeros follow, up to a multiple of kRowRounding. Returns
  // whether all numbers are finite. Meanwhile it asks for the rows that come next.
  bool fill_panel(const uint16_t* cache, const Rows<const void*>& fresh, int64_t place, int64_t rows,
                  const uint16_t* next_cache, int64_t next_place) {
    const Floats zero = S::set(0.0f);
    Floats check = zero;  // becomes NaN with the first number that is not finite
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* from = stored_row(cache, fresh, place + r);
      float* to = panel + r * kWidth;
      for (int64_t d = 0; d < head_dim; d += kWidth, to += kPanelRows * kWidth) {
        const Floats x = S::load_halves(from + d);
        S::store(to, x);
        check = S::fma(x, zero, check);
      }
      prefetch(next_cache, next_place + r);
    }
    for (int64_t r = rows; r % kRowRounding != 0; ++r) {
      for (int64_t d = 0; d < head_dim; d += kWidth) S::store(panel_at<S>(panel, r, d), zero);
    }
    return S::sum(check) == 0.0f;
  }

  // Scores that a query does not see become minus infinity, which weighs nothing.
  void hide_unseen(int64_t first_lane, int64_t count, const RowRange& range, int64_t place) {
    for (int64_t lane = first_lane; lane < first_lane + count; ++lane) {
      float* s = weights + first_lane * kKeyTile + (lane - first_lane);
      for (int64_t r = range.begin; r < range.end; ++r) {
        if (!sights[lane].sees(place + r)) s[r * count] = -INFINITY;
      }
    }
  }

  static bool is_finite(uint16_t bits) { return (bits & 0x7c00u) != 0x7c00u; }

  // Values that are not finite would reach queries that do not see them: weight 0 times infinity is NaN. So they are
  // taken out of the panel, and add_non_finite adds them one by one.
  void clear_non_finite(int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t d = 0; d < head_dim; ++d) {
        float* x = panel_at<S>(panel, r, d);
        if (!(std::fabs(*x) < INFINITY)) *x = 0.0f;
      }
    }
  }

  void add_non_finite(int64_t place, int64_t rows) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint16_t* row = stored_row(p.cache.v_cache, p.append.value, place + r);
      for (int64_t d = 0; d < head_dim; ++d) {
        if (is_finite(row[d])) continue;
        const float value = half_to_float(row[d]);
        for (int64_t lane = 0; lane < lanes; ++lane) {
          if (!sights[lane].sees(place + r)) continue;
          const LanePlace at = place_of(lane);
          const int64_t in_strip = lane - at.strip_lane;
          sums[at.strip_lane * head_dim + d * at.width + in_strip] +=
              weights[at.strip_lane * kKeyTile + r * at.width + in_strip] * value;
        }
      }
    }
  }

  // Adds `sums` to `totals`, and begins anew.
  void merge() {
    each_strip([&](auto vectors, int64_t, int64_t first_lane) {
      constexpr int64_t kLanes = decltype(vectors)::value * kWidth;
      for (int64_t lane = first_lane; lane < first_lane + kLanes; lane += kWidth) {
        const Floats mine = S::load(total_max + lane);
        const Floats others = S::load(max + lane);
        const Floats largest = S::max_or_nan(mine, others);
        const Floats base = S::zero_where_minus_infinity(largest, largest);
        const Floats my_weight = S::zero_where_minus_infinity(weights_of_finite<S>(S::subtract(mine, base)), mine);
        const Floats weight = S::zero_where_minus_infinity(weights_of_finite<S>(S::subtract(others, base)), others);
        const auto merged = [&](float* into, const float* from) {
          S::store(into, S::fma(S::load(into), my_weight, S::multiply(S::load(from), weight)));
        };
        S::store(total_max + lane, largest);
        merged(total_sum + lane, sum + lane);
        const int64_t at = first_lane * head_dim + (lane - first_lane);
        for (int64_t d = 0; d < head_dim; ++d) merged(totals + at + d * kLanes, sums + at + d * kLanes);
      }
    });
    clear_sums();
  }

  void work_on(int64_t place, int64_t rows) {
    find_ranges(place, rows);
    fill_panel(p.cache.k_cache, p.append.key, place, rows, p.cache.v_cache, place);
    each_strip([&](auto vectors, int64_t strip, int64_t lane) {
      constexpr int kVectors = decltype(vectors)::value;
      const RowRange& range = ranges[strip];
      if (range.begin >= range.end) return;
      float* scores = weights + lane * kKeyTile;
      score_strip<S, kVectors>(queries + lane * head_dim, panel, scores, head_dim, range);
      if (p.softcap > 0) cap_strip<S, kVectors>(scores, p.softcap, range);
      if (range.partial) hide_unseen(lane, kVectors * kWidth, range, place);
      softmax_strip<S, kVectors>(scores, max + lane, sum + lane, rescale + lane, range);
    });
    const bool finite = fill_panel(p.cache.v_cache, p.append.value, place, rows, p.cache.k_cache, place + kKeyTile);
    if (!finite) clear_non_finite(rows);
    each_strip([&](auto vectors, int64_t strip, int64_t lane) {
      constexpr int kVectors = decltype(vectors)::value;
      const RowRange& range = ranges[strip];
      if (range.begin >= range.end) return;
      accumulate_strip<S, kVectors>(weights + lane * kKeyTile, panel, rescale + lane, sums + lane * head_dim, head_dim,
                                    range);
    });
    if (!finite) add_non_finite(place, rows);
  }

  void write_partial(int64_t lane, int64_t number) {
    const LanePlace at = place_of(lane);
    const float* from = totals + at.strip_lane * head_dim + (lane - at.strip_lane);
    float* to = tile.partials + (tile.split * p.rows * p.query_heads + number) * (head_dim + 2);
    for (int64_t d = 0; d < head_dim; ++d) to[d] = from[d * at.width];
    to[head_dim] = total_max[lane];
    to[head_dim + 1] = total_sum[lane];
  }

  void write_output(int64_t lane, int64_t t, int64_t query_head) {
    const LanePlace at = place_of(lane);
    const float* from = totals + at.strip_lane * head_dim + (lane - at.strip_lane);
    const double total = total_sum[lane];
    const double factor = total == 0.0 ? 0.0 : 1.0 / total;
    const int64_t offset = tile.entry * p.out.batch_stride + t * p.out.row_stride + query_head * p.out.head_stride;
    for (int64_t d = 0; d < head_dim; ++d) {
      const float answer = total == 0.0 ? 0.0f : static_cast<float>(from[d * at.width] * factor);
      if (p.out_dtype == DType::f32) {
        static_cast<float*>(p.out.data)[offset + d] = answer;
      } else {
        static_cast<uint16_t*>(p.out.data)[offset + d] =
            p.out_dtype == DType::f16 ? float_to_half(answer) : float_to_bf16(answer);
      }
    }
    if (p.lse != nullptr) {
      p.lse[(tile.entry * p.rows + t) * p.query_heads + query_head] =
          total == 0.0 ? -INFINITY : static_cast<float>(static_cast<double>(total_max[lane]) * kLn2 + std::log(total));
    }
  }

  void run() {
    load_queries();
    clear_sums();
    clear_totals();
    const int64_t tiles = (seen.count + kKeyTile - 1) / kKeyTile;
    const int64_t last = tiles * (tile.split + 1) / tile.splits;
    int64_t pending = 0;
    for (int64_t i = tiles * tile.split / tile.splits; i < last; ++i) {
      work_on(i * kKeyTile, imin(kKeyTile, seen.count - i * kKeyTile));
      if (++pending == kPieceTiles) {
        merge();
        pending = 0;
      }
    }
    if (pending > 0) merge();
    for (int64_t lane = 0; lane < tile.end - tile.begin; ++lane) {
      const int64_t t = (tile.begin + lane) / group;
      const int64_t query_head = tile.head * group + (tile.begin + lane) % group;
      if (tile.partials != nullptr) {
        write_partial(lane, t * p.query_heads + query_head);
      } else {
        write_output(lane, t, query_head);
      }
    }
  }
};

template <typename S>
void attend_query_tile(const AttendParams& p, const QueryTile& tile, const Conversions& conversions, float* scratch) {
  PromptAttention<S>(p, tile, conversions, scratch).run();
}

}  // namespace
}  // namespace cpu
}  // namespace kvc
