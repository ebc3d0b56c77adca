// append, gather and attend on a CPU, but for the inner loops of conversion and attention. Rows are taken one after the
// other, each a run of elements.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../convert.h"
#include "../ring.h"
#include "cpu.h"

namespace kvc {
namespace cpu {
namespace {

// Streaming stores are not ordered with what follows: before another thread may read them, they must have left.
void finish_streaming() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Rows are worked on in tiles: K's, then V's, and within each head after head where heads do not lie side by side, so
// that reading and writing each go through memory in few long strides.
constexpr int64_t kTileRows = 32;

// A tensor's row as runs of unit stride: one for all heads where they lie side by side, else one a head.
struct Runs {
  int64_t count;
  int64_t length;

  template <typename Pointer>
  static Runs of(const CacheView& c, const Rows<Pointer>& rows) {
    const bool joined = c.heads == 1 || rows.head_stride == c.head_dim;
    return {joined ? 1 : c.heads, joined ? c.heads * c.head_dim : c.head_dim};
  }
};

// A row that later rows overwrite is not stored, but its overflows count.
int64_t count_overflows(const Conversions& use, DType dtype, const char* from, int64_t n) {
  constexpr int64_t kPiece = 512;
  uint16_t discarded[kPiece];
  int64_t overflows = 0;
  for (int64_t i = 0; i < n; i += kPiece) {
    overflows += use.to_half(dtype, from + i * dtype_size(dtype), discarded, imin(kPiece, n - i), false, false);
  }
  return overflows;
}

// Stores a tile of rows of K or V. slots: where each goes. Returns how many values overflowed.
int64_t store_tile(const Conversions& use, const AppendParams& p, const Rows<const void*>& rows, int64_t start,
                   int64_t first_row, int64_t count, const int64_t* slots, uint16_t* cache, bool stream) {
  const CacheView& c = p.cache;
  const int64_t size = dtype_size(p.dtype);
  const Runs runs = Runs::of(c, rows);
  const char* data = static_cast<const char*>(rows.data) + start * size;
  int64_t overflows = 0;
  for (int64_t r = 0; r < runs.count; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      if (slots[i] == kPadding) continue;
      const char* from = data + ((first_row + i) * rows.row_stride + r * rows.head_stride) * size;
      if (slots[i] == kNoSlot) {
        overflows += count_overflows(use, p.dtype, from, runs.length);
      } else {
        uint16_t* to = cache + slots[i] * c.heads * c.head_dim + r * runs.length;
        overflows += use.to_half(p.dtype, from, to, runs.length, p.saturate, stream);
      }
    }
  }
  return overflows;
}

void load_tile(const Conversions& use, const GatherParams& p, const Rows<void*>& rows, int64_t start, int64_t first_row,
               int64_t count, const int64_t* slots, const uint16_t* cache, bool stream) {
  const CacheView& c = p.cache;
  const int64_t size = dtype_size(p.dtype);
  const Runs runs = Runs::of(c, rows);
  char* data = static_cast<char*>(rows.data) + start * size;
  for (int64_t r = 0; r < runs.count; ++r) {
    for (int64_t i = 0; i < count; ++i) {
      char* to = data + ((first_row + i) * rows.row_stride + r * rows.head_stride) * size;
      if (slots[i] == kNoSlot) {
        std::memset(to, 0, static_cast<size_t>(runs.length * size));
      } else {
        use.from_half(p.dtype, cache + slots[i] * c.heads * c.head_dim + r * runs.length, to, runs.length, stream);
      }
    }
  }
}

}  // namespace

SequenceState state_of(const CacheView& c, int64_t layer, int64_t sequence) {
  if (sequence < 0) return empty_state(c.all_sinks);
  const int64_t state_row = layer * c.batch + sequence;
  return {*seqlen_of(c, state_row), *first_of(c, state_row)};
}

int64_t append_items(const AppendParams& p) { return p.layer_count * p.sequences.entries(p.cache.batch) * p.rows; }

void append(const AppendParams& p, int64_t begin, int64_t end, bool stream) {
  const CacheView& c = p.cache;
  const Conversions& use = *instruction_set().conversions;
  const int64_t entries = p.sequences.entries(c.batch);
  while (begin < end) {  // a run of rows of one entry of one layer
    const int64_t matrix = begin / p.rows;
    const int64_t first_row = begin - matrix * p.rows;
    const int64_t last_row = imin(p.rows, first_row + (end - begin));
    begin += last_row - first_row;
    const int64_t layer = matrix / entries;
    const int64_t entry = matrix - layer * entries;  // of the call's tensors
    const int64_t sequence = p.sequences.sequence(entry, c.batch);
    if (sequence < 0) continue;
    const int64_t state_row = (p.first_layer + layer) * c.batch + sequence;
    const AppendPlan plan = AppendPlan::make(*seqlen_of(c, state_row), p.rows, appended_rows(p, entry), c);
    const int64_t key_start = layer * p.key.layer_stride + entry * p.key.batch_stride;
    const int64_t value_start = layer * p.value.layer_stride + entry * p.value.batch_stride;
    const int64_t cache_start = state_row * c.positions * c.heads * c.head_dim;
    int64_t overflows = 0;
    for (int64_t row = first_row; row < last_row; row += kTileRows) {
      const int64_t count = imin(kTileRows, last_row - row);
      int64_t slots[kTileRows];
      for (int64_t i = 0; i < count; ++i) slots[i] = plan.slot(row + i);
      overflows += store_tile(use, p, p.key, key_start, row, count, slots, c.k_cache + cache_start, stream);
      overflows += store_tile(use, p, p.value, value_start, row, count, slots, c.v_cache + cache_start, stream);
    }
    if (overflows != 0) __atomic_fetch_add(p.overflow_counts + p.first_layer + layer, overflows, __ATOMIC_RELAXED);
  }
  if (stream) finish_streaming();
}

void advance_state(const AppendParams& p) {
  const CacheView& c = p.cache;
  for (int64_t layer = 0; layer < p.layer_count; ++layer) {
    for (int64_t entry = 0; entry < p.sequences.entries(c.batch); ++entry) {
      const int64_t sequence = p.sequences.sequence(entry, c.batch);
      if (sequence < 0) continue;
      const int64_t state_row = (p.first_layer + layer) * c.batch + sequence;
      const SequenceState next =
          state_after_append({*seqlen_of(c, state_row), *first_of(c, state_row)}, appended_rows(p, entry), c.all_ring);
      *seqlen_of(c, state_row) = next.seqlen;
      *first_of(c, state_row) = next.first;
    }
  }
}

int64_t gather_items(const GatherParams& p) { return p.sequences.entries(p.cache.batch) * p.rows; }

void gather(const GatherParams& p, int64_t begin, int64_t end, bool stream) {
  const CacheView& c = p.cache;
  const Conversions& use = *instruction_set().conversions;
  while (begin < end) {  // a run of rows of one entry
    const int64_t entry = begin / p.rows;
    const int64_t first_row = begin - entry * p.rows;
    const int64_t last_row = imin(p.rows, first_row + (end - begin));
    const int64_t sequence = p.sequences.sequence(entry, c.batch);
    const int64_t state_row = p.layer * c.batch + imax(sequence, 0);
    const ReadShare plan = ReadShare::make(state_of(c, p.layer, sequence), c);
    const int64_t cache_start = state_row * c.positions * c.heads * c.head_dim;
    for (int64_t row = first_row; row < last_row; row += kTileRows) {
      const int64_t count = imin(kTileRows, last_row - row);
      int64_t slots[kTileRows];
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = row + i;
        slots[i] = plan.slot(p.indices == nullptr ? p.start + at
                                                  : p.indices[entry * p.indices_batch_stride + at * p.indices_stride]);
      }
      load_tile(use, p, p.key, entry * p.key.batch_stride, row, count, slots, c.k_cache + cache_start, stream);
      load_tile(use, p, p.value, entry * p.value.batch_stride, row, count, slots, c.v_cache + cache_start, stream);
    }
    begin += last_row - first_row;
  }
  if (stream) finish_streaming();
}

namespace {

// Sums over more rows than this are kept apart and merged, or their rounding adds up.
constexpr int64_t kPieceRows = 1024;

// States [n, D + 2]: weighted sum, maximum, sum of weights.
void clear_states(float* states, int64_t n, int64_t head_dim) {
  std::fill_n(states, n * (head_dim + 2), 0.0f);
  for (int64_t m = 0; m < n; ++m) states[m * (head_dim + 2) + head_dim] = -INFINITY;
}

float max_or_nan(float a, float b) { return b > a || b != b ? b : a; }

void merge_states(float* into, const float* other, int64_t n, int64_t head_dim) {
  for (int64_t m = 0; m < n; ++m, into += head_dim + 2, other += head_dim + 2) {
    const float max = max_or_nan(into[head_dim], other[head_dim]);
    const float mine = into[head_dim] == -INFINITY ? 0.0f : weight_of_finite(into[head_dim] - max);
    const float others = other[head_dim] == -INFINITY ? 0.0f : weight_of_finite(other[head_dim] - max);
    for (int64_t d = 0; d < head_dim; ++d) into[d] = into[d] * mine + other[d] * others;
    into[head_dim] = max;
    into[head_dim + 1] = into[head_dim + 1] * mine + other[head_dim + 1] * others;
  }
}

}  // namespace

void attend(const AttendParams& p, const AttendRun* runs, int64_t begin, int64_t end, float* states) {
  const CacheView& c = p.cache;
  const InstructionSet& use = instruction_set();
  const AttendRows attend_rows = c.head_dim % 16 == 0 ? use.attend_multiples_of_16 : use.attend;
  const int64_t queries = p.rows * p.query_heads;
  const float factor = p.softcap > 0 ? p.scale : p.scale * kLog2e;  // scores become powers of two
  std::vector<float> piece;
  std::vector<float> scaled(static_cast<size_t>(queries * c.head_dim));
  std::vector<float> scores(static_cast<size_t>(queries * kTile));
  std::vector<uint16_t> converted(p.appends ? static_cast<size_t>(2 * kTile * c.heads * c.head_dim) : 0);
  for (int64_t run = begin; run < end; ++run) {
    const int64_t entry = runs[run].entry;
    const AttendPlan plan = AttendPlan::make(p, entry, state_of(c, p.layer, p.sequences.sequence(entry, c.batch)));
    for (int64_t m = 0; m < queries; ++m) {
      const int64_t offset = entry * p.query.batch_stride + m / p.query_heads * p.query.row_stride +
                             m % p.query_heads * p.query.head_stride;
      float* to = scaled.data() + m * c.head_dim;
      if (p.dtype == DType::f32) {
        std::memcpy(to, static_cast<const float*>(p.query.data) + offset, static_cast<size_t>(c.head_dim) * 4);
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(p.query.data) + offset;
        for (int64_t d = 0; d < c.head_dim; ++d) {
          to[d] = p.dtype == DType::f16 ? half_to_float(from[d]) : bf16_to_float(from[d]);
        }
      }
      for (int64_t d = 0; d < c.head_dim; ++d) to[d] *= factor;
    }
    float* state = states + run * queries * (c.head_dim + 2);
    clear_states(state, queries, c.head_dim);
    for (int64_t row = runs[run].begin; row < runs[run].end; row += kPieceRows) {
      const int64_t piece_end = imin(runs[run].end, row + kPieceRows);
      if (row == runs[run].begin) {
        attend_rows(p, plan, entry, row, piece_end, scaled.data(), state, scores.data(), converted.data());
      } else {
        piece.resize(static_cast<size_t>(queries * (c.head_dim + 2)));
        clear_states(piece.data(), queries, c.head_dim);
        attend_rows(p, plan, entry, row, piece_end, scaled.data(), piece.data(), scores.data(), converted.data());
        merge_states(state, piece.data(), queries, c.head_dim);
      }
    }
  }
}

void finish_attend(const AttendParams& p, int64_t entry, int64_t runs, const float* states) {
  const int64_t head_dim = p.cache.head_dim;
  const int64_t queries = p.rows * p.query_heads;
  for (int64_t m = 0; m < queries; ++m) {
    const auto state = [&](int64_t run) { return states + (run * queries + m) * (head_dim + 2); };
    float max = -INFINITY;
    for (int64_t run = 0; run < runs; ++run) max = max_or_nan(max, state(run)[head_dim]);
    double merged[kMaxHeadDim] = {};
    double sum = 0.0;
    for (int64_t run = 0; run < runs; ++run) {
      const float* s = state(run);
      const double weight = s[head_dim] == -INFINITY ? 0.0 : weight_of_finite(static_cast<double>(s[head_dim]) - max);
      sum += weight * s[head_dim + 1];
      for (int64_t d = 0; d < head_dim; ++d) merged[d] += weight * s[d];
    }
    const int64_t offset =
        entry * p.out.batch_stride + m / p.query_heads * p.out.row_stride + m % p.query_heads * p.out.head_stride;
    for (int64_t d = 0; d < head_dim; ++d) {
      const float answer = sum == 0.0 ? 0.0f : static_cast<float>(merged[d] / sum);
      if (p.out_dtype == DType::f32) {
        static_cast<float*>(p.out.data)[offset + d] = answer;
      } else {
        static_cast<uint16_t*>(p.out.data)[offset + d] =
            p.out_dtype == DType::f16 ? float_to_half(answer) : float_to_bf16(answer);
      }
    }
    if (p.lse != nullptr) {
      p.lse[entry * queries + m] =
          sum == 0.0 ? -INFINITY : static_cast<float>(static_cast<double>(max) * kLn2 + std::log(sum));
    }
  }
}

}  // namespace cpu
}  // namespace kvc
