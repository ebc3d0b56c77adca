// What the kernels for many queries share: many_queries.cu, for every GPU, and many_queries_sm90.cu.
//
// The queries that share a KV head are numbered t * group + g. A block takes a tile of them, and the keys that they see
// in tiles, the newest first. A warp has 16 of the queries; of these a lane has two, number lane / 4 and eight on: what
// an m16n8 product leaves it. (A 64-row wgmma leaves each of its four warps just that.)
//
// FP32 accuracy on tensor cores, which take FP16: keys and values are FP16 as they lie. A query is scaled by a power of
// two, so that its largest element is one from 2^14 to 2^15; a weight, at most 1, is scaled by 2^14. Each is then two
// FP16 parts, high + low, whose products go to one sum, the low part's first: a tensor core truncates as it adds.
// No sum stays in one for longer than a tile of keys. With kParts = 1 (precision="fp16") there is no low part.
//
// Values that are not finite make NaN of sums: 0 times them is NaN, and so is the difference of infinite products. An
// answer with a NaN is noted in AttendParams::redo, and answered anew by many_queries_finish.cu. So is a query whose
// largest score is beyond kLargeScore: weights may then overflow, and its sum is made NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common.cuh"

namespace kvc {

constexpr float kLog2WeightScale = 14;   // of a weight
constexpr float kLargeScore = 16777216;  // 2^24: larger ones have no bit behind the point in FP32

// How a launch left its outputs: whole (`splits` 1), or as partials that lie behind each other in the workspace, one
// for each unit, piece and split. A partial: weighted sums [queries][width], then states [queries].
struct PartialsLayout {
  int splits;
  int queries;  // of a unit
  int pieces;   // that head_dim is cut into
  int width;    // columns of a piece

  KVC_HD int64_t floats() const { return int64_t{queries} * (width + 2); }
};

// How a launch is divided. Blocks that run at the same time take tiles of few heads, whose keys they share in L2; the
// tiles that see most keys go first, so that the last blocks to run are short ones.
struct ManyDivision {
  Division division;     // a unit is a tile of the queries of a KV head
  FastDivider together;  // KV heads (of all sequences) that are walked together
  FastDivider walk;      // units of so many heads
  bool query_in_pairs;   // two elements of a query lie in an aligned word (FP16, BF16) or two (FP32)
  bool out_in_pairs;     // likewise an answer's

  __device__ __forceinline__ BlockUnit unit(const AttendParams& p, uint32_t block) const {
    BlockUnit b;
    b.split = division.units(block);
    b.unit = block - b.split * division.units.divisor;
    const uint32_t turn = walk(b.unit);
    const uint32_t rest = b.unit - turn * walk.divisor;
    const uint32_t down = together(rest);
    b.tile = division.tiles.divisor - 1 - down;
    const uint32_t sequence_head = turn * together.divisor + rest - down * together.divisor;
    b.entry = division.heads(sequence_head);
    b.head = sequence_head - b.entry * division.heads.divisor;
    b.sequence = sequence_of_entry(p.sequences, b.entry, p.cache.batch);
    return b;
  }
};

template <typename Pointer>
inline bool lies_in_pairs(const Rows<Pointer>& rows, DType dtype) {
  const uintptr_t bytes = 2 * static_cast<uintptr_t>(dtype_size(dtype));
  const int64_t strides = rows.batch_stride | rows.row_stride | rows.head_stride;
  return reinterpret_cast<uintptr_t>(rows.data) % bytes == 0 && strides % 2 == 0;
}

// The division of a call into blocks that take `queries` queries of a KV head, and so many splits of the keys.
inline ManyDivision divide_many(const AttendParams& p, int64_t queries, int64_t splits, const Gpu& gpu) {
  const AttendShape shape = AttendShape::of(p);
  const int64_t units = query_tiles(shape, queries);
  const int64_t together = heads_together(shape, queries, gpu);
  ManyDivision d;
  d.division = Division::of(shape, units, splits);
  d.together = FastDivider::by(static_cast<uint32_t>(together));
  d.walk = FastDivider::by(static_cast<uint32_t>(together * (units / shape.sequence_heads())));
  d.query_in_pairs = lies_in_pairs(p.query, p.dtype);
  d.out_in_pairs = lies_in_pairs(p.out, p.out_dtype);
  return d;
}

// The queries of a block: `queries` of those of its KV head, from number `first_query` on.
struct QueryTile {
  BlockUnit block;
  uint32_t first_query;
  int queries;

  __device__ __forceinline__ QueryTile(const AttendParams& p, const ManyDivision& division, uint32_t most)
      : QueryTile(division.unit(p, blockIdx.x), p, division, most) {}
  __device__ __forceinline__ QueryTile(const BlockUnit& unit, const AttendParams& p, const ManyDivision& division,
                                       uint32_t most)
      : block(unit), first_query(unit.tile * most) {
    const uint32_t rest = division.division.group_size.divisor * static_cast<uint32_t>(p.rows) - first_query;
    queries = static_cast<int>(rest < most ? rest : most);
  }
  // The number of its query `row`; of the last one behind that.
  __device__ __forceinline__ uint32_t number(int row) const {
    return first_query + static_cast<uint32_t>(row < queries ? row : queries - 1);
  }
};

template <typename Plan>
__device__ __forceinline__ Plan read_plan(const AttendParams& p, int64_t entry, int64_t sequence) {
  SequenceState state = empty_state(p.cache.all_sinks);
  if (sequence >= 0) {
    const volatile int64_t* seqlen = p.cache.state + p.layer * p.cache.batch + sequence;
    state = {seqlen[0], seqlen[p.cache.layers * p.cache.batch]};
  }
  return Plan::make(p, entry, state, p.appends && p.first_lengths[entry] > 0);
}

// The rows that some queries see, in tiles of kKeys. Where a window hides what lies behind the sinks, tiles of sinks
// come first.
template <int kKeys>
struct KeyTiles {
  int32_t sinks = 0;  // that have tiles of their own
  int32_t sink_tiles = 0;
  int32_t begin = 0;  // of the other rows
  int32_t end = 0;
  int32_t count = 0;

  // For queries of the positions from first_t to last_t of the call.
  template <typename Plan>
  static __device__ __forceinline__ KeyTiles of(const Plan& plan, int64_t first_t, int64_t last_t) {
    KeyTiles tiles;
    if (last_t < plan.padding) return tiles;
    tiles.begin = plan.range_of(imax(first_t, plan.padding)).begin;
    tiles.end = plan.range_of(last_t).end;
    const int32_t held = static_cast<int32_t>(plan.sinks_held);
    if (tiles.begin <= held || tiles.end <= held) {
      tiles.begin = 0;
    } else {
      tiles.sinks = held;
      tiles.sink_tiles = (held + kKeys - 1) / kKeys;
    }
    tiles.count = tiles.sink_tiles + (tiles.end - tiles.begin + kKeys - 1) / kKeys;
    return tiles;
  }
  __device__ __forceinline__ int32_t row(int32_t tile) const {
    return tile < sink_tiles ? tile * kKeys : begin + (tile - sink_tiles) * kKeys;
  }
  // Of all tiles, how many begin before a row behind the sinks...
  __device__ __forceinline__ int32_t reaching(int32_t row) const {
    return sink_tiles + (row <= begin ? 0 : (row - begin + kKeys - 1) / kKeys);
  }
  // ...and how many there are up to the last that ends no later, and is full.
  __device__ __forceinline__ int32_t within(int32_t row) const {
    const int32_t most = row < end ? row : end;
    return sink_tiles + (most <= begin ? 0 : (most - begin) / kKeys);
  }
  __device__ __forceinline__ int32_t row_end(int32_t tile) const {
    const int32_t past = row(tile) + kKeys;
    const int32_t most = tile < sink_tiles ? sinks : end;
    return past < most ? past : most;
  }
};

// Copies the rows [row0, end) of a head's keys or values to a tile, and zeros to what is left of it. `cached`: the
// first column wanted of the head's first row; `chunks_held`: from there to the end of head_dim. `thread`: of kThreads.
template <int kRows, int kChunks, int kThreads, typename Plan, typename Place>
__device__ __forceinline__ void copy_tile(const Plan& plan, const uint16_t* cached, int64_t row_elements,
                                          int chunks_held, int32_t row0, int32_t end, const NewRows& rows,
                                          int new_column, char* at, const Place& place, int thread) {
  constexpr int kRowsAtATime = kThreads / kChunks;
  static_assert(kRowsAtATime >= 1 && kRows % kRowsAtATime == 0);
  const int chunk = thread % kChunks;
  const int first = thread / kChunks;
  const bool held = chunk < chunks_held;
  if (plan.lie_in_a_row(row0, end)) {
    const uint16_t* from = cached + (plan.slot(row0) + first) * row_elements + (held ? chunk * 8 : 0);
#pragma unroll
    for (int i = 0; i < kRows; i += kRowsAtATime, from += kRowsAtATime * row_elements) {
      const bool real = held && row0 + i + first < end;
      copy_async(at + place(i + first, chunk), real ? from : cached, real);
    }
    return;
  }
#pragma unroll 1
  for (int i = first; i < kRows; i += kRowsAtATime) {
    const int32_t row = row0 + i;
    if (row >= plan.cached && row < end) {  // a new one
      Vec<uint16_t, 8> elements = {};
      if (held) elements = new_chunk(rows, plan.input_row(row), new_column + chunk * 8);
      store<uint16_t, 8>(reinterpret_cast<uint16_t*>(at + place(i, chunk)), elements);
    } else {
      const bool real = held && row < end;
      copy_async(at + place(i, chunk), real ? cached + plan.slot(row) * row_elements + chunk * 8 : cached, real);
    }
  }
}

// Two FP16 numbers in a register.
__device__ __forceinline__ uint32_t half_pair(float x, float y) {
#if defined(KVC_EMULATED)
  return float_to_half(x) | static_cast<uint32_t>(float_to_half(y)) << 16;
#else
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
  return pair;
#endif
}
__device__ __forceinline__ float first_of(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair)); }
__device__ __forceinline__ float second_of(uint32_t pair) { return half_to_float(static_cast<uint16_t>(pair >> 16)); }
// What the high parts of x and y lack.
__device__ __forceinline__ uint32_t low_pair(float x, float y, uint32_t high) {
  return half_pair(x - first_of(high), y - second_of(high));
}

// The power of two that a query is scaled by, and what its products are multiplied with to be scores: powers of two, or
// natural where there is a softcap. The sign of `scale` goes with the query, so that the larger product is the larger
// score.
struct QueryScale {
  float up;
  float factor;

  __device__ __forceinline__ static QueryScale of(const AttendParams& p, float largest) {
    const int exponent = static_cast<int>(float_bits(largest) >> 23) - 127;
    const int shift = exponent < -100 ? 114 : exponent > 126 ? -113 : 14 - exponent;
    const float scale = p.softcap > 0 ? p.scale : p.scale * kLog2e;
    const float factor = fabsf(scale) * exact_power_of_two(-shift);
    if (factor == 0.0f) return {0.0f, 1.0f};  // all scores are 0
    return {scale < 0 ? -exact_power_of_two(shift) : exact_power_of_two(shift), factor};
  }
};

// Pairs of elements as FP32, all on their way before the first is looked at. at(i): where pair i begins; negative:
// zeros.
template <int kCount, typename At>
__device__ __forceinline__ void load_pairs(const void* data, DType type, bool in_pairs, const At& at,
                                           float (&x)[kCount][2]) {
  if (type == DType::f32) {
    const float* from = static_cast<const float*>(data);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t offset = at(i);
      Vec<float, 2> pair = {};
      if (offset >= 0 && in_pairs) pair = load<float, 2>(from + offset);
      if (offset >= 0 && !in_pairs) pair = {{from[offset], from[offset + 1]}};
      x[i][0] = pair.x[0];
      x[i][1] = pair.x[1];
    }
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data);
  Vec<uint16_t, 2> pairs[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int64_t offset = at(i);
    pairs[i] = {};
    if (offset >= 0 && in_pairs) pairs[i] = load<uint16_t, 2>(from + offset);
    if (offset >= 0 && !in_pairs) pairs[i] = {{from[offset], from[offset + 1]}};
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      x[i][j] = type == DType::f16 ? half_to_float(pairs[i].x[j]) : bf16_to_float(pairs[i].x[j]);
    }
  }
}

// Products of a lane's two queries with keys that they do not see become minus infinity. The tile has the rows [row0,
// row_end), and zeros behind them; `sinks` are held.
template <int kBlocks>
__device__ __forceinline__ void hide_invisible(FragmentC (&products)[kBlocks], const VisibleRange (&visible)[2],
                                               int32_t row0, int32_t row_end, int32_t sinks) {
  const int32_t column = row0 + static_cast<int32_t>(threadIdx.x % 4) * 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int32_t end = visible[h].end < row_end ? visible[h].end : row_end;
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int32_t row = column + 8 * i + e;
        if (row >= end || (row < visible[h].begin && row >= sinks)) products[i].x[2 * h + e] = minus_infinity();
      }
    }
  }
}

// The softmax of a lane's two queries.
struct LaneSoftmax {
  float factor[2];  // from products to scores
  float max[2];     // of scores, in powers of two
  float sum[2];     // of this lane's weights, each times 2^14

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max[h] = kLeastScore;
      sum[h] = 0.0f;
    }
  }

  // With a softcap products become scores at once: before those of unseen keys are minus infinity.
  template <int kBlocks>
  __device__ __forceinline__ void cap(FragmentC (&products)[kBlocks], float softcap) const {
    if (!(softcap > 0)) return;
    const float inverse = 1.0f / fmaxf(softcap, 1.17549435e-38f);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        products[i].x[e] = softcap * tanhf(products[i].x[e] * factor[e / 2] * inverse) * kLog2e;
      }
    }
  }

  // Products, or scores where there is a softcap, become weights. `rescale`: what earlier sums are to be multiplied
  // with.
  template <int kBlocks>
  __device__ __forceinline__ void weigh(FragmentC (&products)[kBlocks], float softcap, float (&rescale)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float scale = softcap > 0 ? 1.0f : factor[h];
      float largest = fmaxf(products[0].x[2 * h], products[0].x[2 * h + 1]);
#pragma unroll
      for (int i = 1; i < kBlocks; ++i) {
        largest = fmaxf(largest, fmaxf(products[i].x[2 * h], products[i].x[2 * h + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      const float new_max = fmaxf(max[h], largest * scale);
      rescale[h] = power_of_two(max[h] - new_max);
      max[h] = new_max;
      const float base = kLog2WeightScale - new_max;
      float weights[2] = {0.0f, 0.0f};
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = products[i].x[2 * h + e];
          x = power_of_two(fmaf(x, scale, base));
          weights[e] += x;
        }
      }
      sum[h] = fmaf(sum[h], rescale[h], weights[0] + weights[1]);
    }
  }

  // The lanes' sums become the queries'; a NaN where the scores were too large.
  __device__ __forceinline__ void add_lanes() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 1);
      sum[h] += __shfl_xor_sync(kAllLanes, sum[h], 2);
      if (fabsf(max[h]) > kLargeScore && max[h] != kLeastScore) sum[h] = bits_float(0x7fffffffu);
    }
  }
  __device__ __forceinline__ SoftmaxState running(int h) const { return {max[h] - kLog2WeightScale, sum[h]}; }
};

// Weights of 16 keys (two blocks of a product) as the left operand of a product with those keys' values.
__device__ __forceinline__ FragmentA high_weights(const FragmentC& first, const FragmentC& second) {
  return {{half_pair(first.x[0], first.x[1]), half_pair(first.x[2], first.x[3]), half_pair(second.x[0], second.x[1]),
           half_pair(second.x[2], second.x[3])}};
}
__device__ __forceinline__ FragmentA low_weights(const FragmentC& first, const FragmentC& second,
                                                 const FragmentA& high) {
  return {{low_pair(first.x[0], first.x[1], high.x[0]), low_pair(first.x[2], first.x[3], high.x[1]),
           low_pair(second.x[0], second.x[1], high.x[2]), low_pair(second.x[2], second.x[3], high.x[3])}};
}

// Where a query of the call lies.
struct QueryPlace {
  uint32_t t;
  int64_t head;

  __device__ __forceinline__ QueryPlace(const Division& division, const BlockUnit& block, uint32_t number)
      : t(division.group_size(number)),
        head(block.head * division.group_size.divisor + (number - t * division.group_size.divisor)) {}
};

}  // namespace kvc
