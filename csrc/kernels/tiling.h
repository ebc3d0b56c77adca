// How a copy between the cache and rows elsewhere is cut into blocks, for append and gather alike.
//
// A launch covers `matrices` matrices of `rows` positions, each row heads * head_dim elements, moved in vectors of a
// few elements. The vectors of a matrix are numbered in the cache's memory order; a block takes a run of them.
#pragma once

#include <cstdint>

#include "layout.h"
#include "params.h"
#include "portable.h"

namespace kvc {

constexpr int kCopyThreads = 256;

struct Place {
  int64_t row;
  uint32_t head;
  uint32_t element;  // within the head
};

struct Tiling {
  int64_t rows;
  uint32_t head_dim;
  uint32_t vector;           // elements of one vector
  uint32_t block_vectors;    // vectors a block moves
  FastDivider blocks;        // blocks of one matrix
  FastDivider row_vectors;   // vectors of one row
  Divider row_vectors_wide;  // the same, for the numbers of vectors of a whole matrix
  FastDivider head_vectors;  // vectors of one head

  // False when the launch would need more blocks than a grid has.
  static bool make(Tiling& t, int64_t rows, int64_t heads, int64_t head_dim, int vector, int block_vectors,
                   int64_t matrices, int64_t& grid) {
    const int64_t row_vectors = heads * (head_dim / vector);
    const int64_t blocks = (rows * row_vectors + block_vectors - 1) / block_vectors;
    grid = blocks * matrices;
    if (row_vectors >= (int64_t{1} << 30) || grid >= (int64_t{1} << 31)) return false;
    t.rows = rows;
    t.head_dim = static_cast<uint32_t>(head_dim);
    t.vector = static_cast<uint32_t>(vector);
    t.block_vectors = static_cast<uint32_t>(block_vectors);
    t.blocks = FastDivider::by(static_cast<uint32_t>(blocks));
    t.row_vectors = FastDivider::by(static_cast<uint32_t>(row_vectors));
    t.row_vectors_wide = Divider::by(row_vectors);
    t.head_vectors = FastDivider::by(static_cast<uint32_t>(head_dim / vector));
    return true;
  }

  // The first vector of a block: its row, and its number within that row (in `Place::element`, still in vectors).
  KVC_HD Place block_start(uint32_t block) const {
    const int64_t first = static_cast<int64_t>(block) * block_vectors;
    const int64_t row = row_vectors_wide.div(first);
    return {row, 0, static_cast<uint32_t>(first - row * row_vectors_wide.divisor)};
  }

  // The place of the i-th vector of a block. May lie past the last row.
  KVC_HD Place place(const Place& start, uint32_t i) const {
    const uint32_t n = start.element + i;
    const uint32_t rows_on = row_vectors(n);
    const uint32_t in_row = n - rows_on * row_vectors.divisor;
    const uint32_t head = head_vectors(in_row);
    return {start.row + rows_on, head, (in_row - head * head_vectors.divisor) * vector};
  }
};

template <typename Pointer>
KVC_HD int64_t element_offset(const Rows<Pointer>& rows, const Place& at) {
  return at.row * rows.row_stride + at.head * rows.head_stride + at.element;
}

KVC_HD int64_t cache_offset(const CacheView& c, int64_t slot, const Place& at) {
  return slot * (c.heads * c.head_dim) + at.head * c.head_dim + at.element;
}

// Heads that lie side by side are one long head: a vector may then cross from one to the next.
template <typename RowsType>
inline void join_heads(CacheView& cache, RowsType& key, RowsType& value) {
  if (cache.heads == 1 || (key.head_stride == cache.head_dim && value.head_stride == cache.head_dim)) {
    cache.head_dim *= cache.heads;
    cache.heads = 1;
    key.head_stride = value.head_stride = 0;
  }
}

// Can `rows` and the cache be walked in vectors of `vector` elements of `size` bytes?
template <typename Pointer>
inline bool allows_vectors(const CacheView& cache, const Rows<Pointer>& rows, int vector, int size) {
  const int64_t strides = rows.layer_stride | rows.batch_stride | rows.row_stride | rows.head_stride;
  return reinterpret_cast<uintptr_t>(rows.data) % (vector * size) == 0 && (strides & (vector - 1)) == 0 &&
         cache.head_dim % vector == 0 && reinterpret_cast<uintptr_t>(cache.k_cache) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(cache.v_cache) % 16 == 0;
}

}  // namespace kvc
