// How a copy between the cache and rows elsewhere is cut into blocks, for append and gather alike.
//
// A launch covers `matrices` matrices of `rows` positions, each row heads * head_dim elements, moved in vectors of a
// few elements: the columns. A block takes some rows and some columns of a matrix. Its threads stand side by side in
// `width` columns and below each other in as many rows as that leaves; each goes down its column kUnroll rows at a
// time, then on to the next of its columns, so that what depends on the column alone is computed once.
#pragma once

#include <cstdint>

#include "params.h"
#include "portable.h"
#include "ring.h"

namespace kvc {

struct Tiling {
  int64_t rows;
  uint32_t columns;   // vectors of one row
  uint32_t vector;    // elements of one vector
  uint32_t head_dim;  // elements of one head
  uint32_t width;     // threads side by side, a power of two
  uint32_t log2_width;
  uint32_t block_rows;        // of a block
  uint32_t block_columns;     // likewise, a multiple of width
  FastDivider column_blocks;  // blocks side by side
  FastDivider blocks;         // blocks of one matrix
  FastDivider head_vectors;   // vectors of one head
  FastDivider entries;        // of the call: entries(matrix) is the matrix's layer

  // For blocks of `threads` threads, a power of two, that each hold `unroll` vectors at a time, at most `turns` times.
  // False when the launch would need more blocks than a grid has.
  static bool make(Tiling& t, int64_t rows, int64_t heads, int64_t head_dim, int vector, int threads, int unroll,
                   int turns, int64_t matrices, int64_t entries, int64_t& grid) {
    const int64_t columns = heads * (head_dim / vector);
    if (columns >= (int64_t{1} << 30) || heads * head_dim >= (int64_t{1} << 31)) return false;
    uint32_t log2_width = 0;
    while ((1 << log2_width) < threads && (1 << log2_width) < columns) ++log2_width;
    const int64_t width = int64_t{1} << log2_width;
    // A block's rows first, then, when there are not that many, more columns.
    const int64_t down = static_cast<int64_t>(threads >> log2_width) * unroll;
    const int64_t block_rows = imin(down * turns, (rows + down - 1) / down * down);
    const int64_t row_turns = block_rows / down;
    const int64_t block_columns = imin(width * (turns / row_turns), (columns + width - 1) / width * width);
    const int64_t column_blocks = (columns + block_columns - 1) / block_columns;
    const int64_t blocks = (rows + block_rows - 1) / block_rows * column_blocks;
    grid = blocks * matrices;
    if (grid >= (int64_t{1} << 31)) return false;
    t.rows = rows;
    t.columns = static_cast<uint32_t>(columns);
    t.vector = static_cast<uint32_t>(vector);
    t.head_dim = static_cast<uint32_t>(head_dim);
    t.width = static_cast<uint32_t>(width);
    t.log2_width = log2_width;
    t.block_rows = static_cast<uint32_t>(block_rows);
    t.block_columns = static_cast<uint32_t>(block_columns);
    t.column_blocks = FastDivider::by(static_cast<uint32_t>(column_blocks));
    t.blocks = FastDivider::by(static_cast<uint32_t>(blocks));
    t.head_vectors = FastDivider::by(static_cast<uint32_t>(head_dim / vector));
    t.entries = FastDivider::by(static_cast<uint32_t>(entries));
    return true;
  }

  // Elements from the start of a row elsewhere to a column.
  template <typename Pointer>
  KVC_HD int64_t offset(const Rows<Pointer>& outside, uint32_t column) const {
    const uint32_t head = head_vectors(column);
    return head * outside.head_stride + static_cast<int64_t>((column - head * head_vectors.divisor) * vector);
  }
};

// Which part of a matrix a block takes.
struct BlockPart {
  uint32_t matrix;
  int64_t row_begin;
  int64_t row_end;
  uint32_t column_begin;
  uint32_t column_end;

  KVC_HD static BlockPart make(const Tiling& t, uint32_t block) {
    BlockPart b;
    b.matrix = t.blocks(block);
    const uint32_t rest = block - b.matrix * t.blocks.divisor;
    const uint32_t down = t.column_blocks(rest);
    b.row_begin = static_cast<int64_t>(down) * t.block_rows;
    b.row_end = imin(b.row_begin + t.block_rows, t.rows);
    b.column_begin = (rest - down * t.column_blocks.divisor) * t.block_columns;
    b.column_end = b.column_begin + t.block_columns < t.columns ? b.column_begin + t.block_columns : t.columns;
    return b;
  }
};

// Can `rows` and the cache be walked in vectors of `vector` elements of `size` bytes, moved by accesses of at most 16?
template <typename Pointer>
inline bool allows_vectors(const CacheView& cache, const Rows<Pointer>& rows, int vector, int size) {
  const int64_t strides = rows.layer_stride | rows.batch_stride | rows.row_stride | rows.head_stride;
  const int bytes = vector * size < 16 ? vector * size : 16;
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && strides * size % bytes == 0 &&
         cache.head_dim % vector == 0 && reinterpret_cast<uintptr_t>(cache.k_cache) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(cache.v_cache) % 16 == 0;
}

}  // namespace kvc
