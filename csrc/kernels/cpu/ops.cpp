// append, gather and truncate on a CPU: rows one after the other, each a run of elements to convert.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <cstring>

#include "../layout.h"
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

// A tensor's row as runs of unit stride: one for all heads where they lie side by side, else one a head.
template <typename Pointer>
bool heads_are_joined(const CacheView& c, const Rows<Pointer>& rows) {
  return c.heads == 1 || rows.head_stride == c.head_dim;
}

int64_t* seen_of(const CacheView& c, int64_t entry) { return c.state + entry; }
int64_t* first_of(const CacheView& c, int64_t entry) { return c.state + c.layers * c.batch + entry; }

// Converts one row of K or V to FP16, into the cache or, for a row that is not kept, only to count its overflows.
int64_t store_row(const Conversions& use, const AppendParams& p, const Rows<const void*>& rows, int64_t offset,
                  uint16_t* to, bool stream) {
  const CacheView& c = p.cache;
  const char* from = static_cast<const char*>(rows.data) + offset * dtype_size(p.dtype);
  if (heads_are_joined(c, rows)) return use.to_half(p.dtype, from, to, c.heads * c.head_dim, p.saturate, stream);
  int64_t overflows = 0;
  for (int64_t h = 0; h < c.heads; ++h) {
    overflows += use.to_half(p.dtype, from + h * rows.head_stride * dtype_size(p.dtype), to + h * c.head_dim,
                             c.head_dim, p.saturate, stream);
  }
  return overflows;
}

int64_t count_row(const Conversions& use, const AppendParams& p, const Rows<const void*>& rows, int64_t offset) {
  constexpr int64_t kPiece = 512;
  uint16_t discarded[kPiece];
  const CacheView& c = p.cache;
  const char* from = static_cast<const char*>(rows.data) + offset * dtype_size(p.dtype);
  int64_t overflows = 0;
  for (int64_t h = 0; h < c.heads; ++h) {
    for (int64_t d = 0; d < c.head_dim; d += kPiece) {
      overflows += use.to_half(p.dtype, from + (h * rows.head_stride + d) * dtype_size(p.dtype), discarded,
                               imin(kPiece, c.head_dim - d), p.saturate, false);
    }
  }
  return overflows;
}

void load_row(const Conversions& use, const GatherParams& p, const Rows<void*>& rows, int64_t offset,
              const uint16_t* from, bool stream) {
  const CacheView& c = p.cache;
  const int64_t size = dtype_size(p.dtype);
  char* to = static_cast<char*>(rows.data) + offset * size;
  const bool joined = heads_are_joined(c, rows);
  const int64_t runs = joined ? 1 : c.heads;
  const int64_t length = joined ? c.heads * c.head_dim : c.head_dim;
  for (int64_t r = 0; r < runs; ++r) {
    char* run = to + r * rows.head_stride * size;
    if (from == nullptr) {
      std::memset(run, 0, static_cast<size_t>(length * size));
    } else {
      use.from_half(p.dtype, from + r * length, run, length, stream);
    }
  }
}

}  // namespace

int64_t append_items(const AppendParams& p) { return p.layer_count * p.cache.batch * p.rows; }

void append(const AppendParams& p, int64_t begin, int64_t end, bool stream) {
  const CacheView& c = p.cache;
  const Conversions& use = conversions();
  const int64_t row_elements = c.heads * c.head_dim;
  while (begin < end) {  // a run of rows of one sequence of one layer
    const int64_t matrix = begin / p.rows;
    const int64_t first_row = begin - matrix * p.rows;
    const int64_t last_row = imin(p.rows, first_row + (end - begin));
    const int64_t layer = matrix / c.batch;
    const int64_t sequence = matrix - layer * c.batch;
    const int64_t entry = (p.first_layer + layer) * c.batch + sequence;
    const AppendPlan plan = AppendPlan::make(*seen_of(c, entry), p.rows, appended_rows(p, sequence), c);
    const int64_t key_start = layer * p.key.layer_stride + sequence * p.key.batch_stride;
    const int64_t value_start = layer * p.value.layer_stride + sequence * p.value.batch_stride;
    int64_t overflows = 0;
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t slot = plan.slot(row);
      if (slot == kPadding) continue;
      const int64_t key = key_start + row * p.key.row_stride;
      const int64_t value = value_start + row * p.value.row_stride;
      if (slot == kNoSlot) {
        overflows += count_row(use, p, p.key, key) + count_row(use, p, p.value, value);
      } else {
        const int64_t at = (entry * c.positions + slot) * row_elements;
        overflows += store_row(use, p, p.key, key, c.k_cache + at, stream);
        overflows += store_row(use, p, p.value, value, c.v_cache + at, stream);
      }
    }
    if (overflows != 0) __atomic_fetch_add(p.overflow_counts + p.first_layer + layer, overflows, __ATOMIC_RELAXED);
    begin += last_row - first_row;
  }
  if (stream) finish_streaming();
}

void advance_state(const AppendParams& p) {
  const CacheView& c = p.cache;
  for (int64_t layer = 0; layer < p.layer_count; ++layer) {
    for (int64_t b = 0; b < c.batch; ++b) {
      const int64_t entry = (p.first_layer + layer) * c.batch + b;
      const SequenceState next =
          state_after_append({*seen_of(c, entry), *first_of(c, entry)}, appended_rows(p, b), c.ring.divisor);
      *seen_of(c, entry) = next.seen;
      *first_of(c, entry) = next.first;
    }
  }
}

int64_t gather_items(const GatherParams& p) { return p.cache.batch * p.rows; }

void gather(const GatherParams& p, int64_t begin, int64_t end, bool stream) {
  const CacheView& c = p.cache;
  const Conversions& use = conversions();
  const int64_t row_elements = c.heads * c.head_dim;
  while (begin < end) {  // a run of rows of one sequence
    const int64_t sequence = begin / p.rows;
    const int64_t first_row = begin - sequence * p.rows;
    const int64_t last_row = imin(p.rows, first_row + (end - begin));
    const int64_t entry = p.layer * c.batch + sequence;
    const ReadPlan plan = ReadPlan::make({*seen_of(c, entry), *first_of(c, entry)}, c);
    for (int64_t row = first_row; row < last_row; ++row) {
      const int64_t index = p.indices == nullptr
                                ? p.start + row
                                : p.indices[sequence * p.indices_batch_stride + row * p.indices_stride];
      const int64_t slot = plan.slot(index);
      const int64_t at = (entry * c.positions + slot) * row_elements;
      load_row(use, p, p.key, sequence * p.key.batch_stride + row * p.key.row_stride,
               slot < 0 ? nullptr : c.k_cache + at, stream);
      load_row(use, p, p.value, sequence * p.value.batch_stride + row * p.value.row_stride,
               slot < 0 ? nullptr : c.v_cache + at, stream);
    }
    begin += last_row - first_row;
  }
  if (stream) finish_streaming();
}

void truncate(const TruncateParams& p) {
  const int64_t entries = p.layers * p.batch;
  for (int64_t i = 0; i < entries; ++i) {
    const SequenceState s = state_after_truncate({p.state[i], p.state[entries + i]}, p.length, p.sinks);
    p.state[i] = s.seen;
    p.state[entries + i] = s.first;
  }
}

}  // namespace cpu
}  // namespace kvc
