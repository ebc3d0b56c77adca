// One plain struct per op: everything a kernel needs, passed by value. No torch below this folder.
//
// Sizes: L layers, B batch, N positions (slots) per sequence, H kv_heads, D head_dim, T new positions.
// All strides are in elements. All FP16 data is carried as its bits in uint16_t.
#pragma once

#include <cstdint>

#include "divide.h"

namespace kvc {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

// The cache as it lies in memory.
struct CacheView {
  uint16_t* k_cache;  // [L, B, N, H, D], contiguous
  uint16_t* v_cache;  // [L, B, N, H, D], contiguous
  int64_t* state;     // [3, L, B]: seen, first, arrivals (scratch of append, zero between launches)
  int64_t layers;     // L
  int64_t batch;      // B
  int64_t positions;  // N
  int64_t heads;      // H
  int64_t head_dim;   // D
  int64_t sinks;      // sink_positions, 0 <= sinks < N
  Divider ring;       // N - sinks, the slots that are used in turn
};

// A tensor [layers, B, T, H, D] of any strides, the one of D excepted, which is 1.
template <typename Pointer>
struct Rows {
  Pointer data;
  int64_t layer_stride;
  int64_t batch_stride;
  int64_t row_stride;   // from one position to the next
  int64_t head_stride;
};

// Convert T new positions to FP16 and store them behind what each sequence has; advance the state.
struct AppendParams {
  CacheView cache;
  int64_t* overflow_counts;  // [L]: += finite inputs with |x| >= 65520
  int64_t first_layer;       // the layers [first_layer, first_layer + layer_count) are appended to
  int64_t layer_count;
  int64_t rows;              // T
  Rows<const void*> key;     // [layer_count, B, T, H, D] of `dtype`
  Rows<const void*> value;   // [layer_count, B, T, H, D] of `dtype`
  DType dtype;
  const void* new_lengths;   // [B] int32 or int64, or null: all T rows of every sequence
  bool new_lengths_are_32_bit;
  bool saturate;             // else finite values beyond the FP16 range become +-inf
};

// Copy chronological indices of one layer out, FP16 to `dtype`. Index `start + i`, or `indices[b, i]`.
// An index that is not held gives a row of zeros.
struct GatherParams {
  CacheView cache;
  int64_t layer;
  int64_t rows;                  // n
  int64_t start;                 // used when indices is null
  const int64_t* indices;        // [B, n] or null
  int64_t indices_batch_stride;  // 0 when all sequences share one list
  int64_t indices_stride;
  Rows<void*> key;               // [1, B, n, H, D] of `dtype`
  Rows<void*> value;             // [1, B, n, H, D] of `dtype`
  DType dtype;
};

// Keep the `length` oldest held positions of every layer and sequence (all, where fewer are held).
struct TruncateParams {
  int64_t* state;  // [3, L, B]
  int64_t layers;
  int64_t batch;
  int64_t sinks;
  int64_t length;
};

}  // namespace kvc
