// The products of few_queries.cu: what a warp computes of a key tile for its queries. Two ways to lay out the products
// of mma.m16n8k16, whose interfaces are the same:
//
//   KeysAsRows     16 keys are the rows, the two parts of four queries the columns
//   QueriesAsRows  the two parts of eight queries are the rows, eight keys the columns. Half as many instructions for a
//                  query: weights are an operand as they are, and maxima are over four lanes, not eight. It takes eight
//                  queries; with four, half of each product is idle.
//
// Tensor cores take FP16; queries and weights are FP32. So each has two parts: a high part, and what it lacks times
// 2^11. The products of both are added. Queries are first scaled by a power of two, so that the low part is no
// subnormal; weights, at most 1, by 2^14. Both keep 22 bits (fewer for an element that is 2^28 times smaller than its
// query's largest). A tensor core truncates as it adds, so no sum stays in one for longer than a tile: the sums of
// tiles are added to registers in FP32.
#pragma once

#include "common.cuh"
#include "non_finite.cuh"

namespace kvc {
namespace {

constexpr float kLowPart = 1.0f / 2048;  // what a low part counts for
constexpr float kLog2WeightScale = 14;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kFromSm100 = true;
#else
constexpr bool kFromSm100 = false;
#endif

// Two halves of a register: the high part of x, and what it lacks times 2^11. The high part is 0 for 0 alone, as that
// times an infinite key is NaN.
__device__ __forceinline__ uint32_t high_and_low(float x) {
  uint16_t high = float_to_half(x);
  if (x != 0.0f && (high & 0x7fffu) == 0) high |= 1;
  const uint16_t low = float_to_half((x - half_to_float(high)) * 2048.0f);
  return high | static_cast<uint32_t>(low) << 16;
}

// Both parts of a weight. Neither is negative, and a positive weight's low part is never 0. So an infinite value stays
// infinite in both products. (Below 2^-38 of the largest weight the high part is 0. An infinite value then gives NaN at
// first: non_finite.cuh.)
__device__ __forceinline__ uint32_t weight_parts(float x) {
  const uint16_t high = float_to_half_down(x);
  uint32_t low = float_to_half((x - half_to_float(high)) * 2048.0f);
  if (low == 0 && x > 0) low = 1;
  return high | low << 16;
}

// The high parts of two numbers, and the low parts, from both parts of each.
__device__ __forceinline__ uint32_t high_parts(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
__device__ __forceinline__ uint32_t low_parts(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

// What both parts' products come to. An infinite one stays that: the low part's may be of other sign.
__device__ __forceinline__ float whole_score(float high, float low) {
  return (float_bits(high) & 0x7fffffffu) == kFloatInfBits ? high : fmaf(low, kLowPart, high);
}

// Element `bits` of a value that is not finite, as NaN. (With the bit an infinity is NaN, too. A plain NaN here makes
// other instances spill registers.)
__device__ __forceinline__ float as_nan(uint16_t bits) { return half_to_float(bits | kHalfQuietBit); }

// This thread's lane, and its warp's number in the team. (Asked for each time: kept, they would take registers.)
template <typename Block>
struct WarpOfTeam {
  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int member() { return static_cast<int>(threadIdx.x / 32 % Block::kWarps); }
};

template <typename Block>
struct KeysAsRows : WarpOfTeam<Block> {
  static constexpr int kDepth = Block::kDepth;
  static constexpr int kQuads = Block::kWarpQueries / 4;  // a product has the two parts of four queries
  // Two sums, so that one product need not wait for the other; with many queries their own sums suffice.
  static constexpr int kSums = kQuads * Block::kWarps < 4 ? 2 : 1;
  static constexpr bool kInRegisters = kQuads * kDepth <= 8 && !(kFromSm100 && Block::kWarps > 1);
  static_assert(Block::kTileRows == 16);
  using Products = FragmentC[kQuads][kSums];
  using Weights = FragmentB[kQuads];

  using WarpOfTeam<Block>::lane, WarpOfTeam<Block>::member;
  static __device__ __forceinline__ uint32_t mine() { return member() * Block::kWarpQueries + lane() % 4; }

  // A lane holds column lane / 4 of the operand. Of a product it holds the columns of query lane % 4 in each quad of
  // the warp's queries: of the block's, number mine(), and every fourth from there on.
  FragmentB q[kInRegisters ? kQuads : 1][kInRegisters ? kDepth : 1];
  SoftmaxState states[kQuads];   // the sum is this lane's rows' alone
  float acc[kQuads][kDepth][2];  // elements 16 k + lane / 4 and eight on
  float rescale[kQuads];         // what earlier sums are to be multiplied with

  // Elements 2 `pair` and the next of query m of the block, both parts of each.
  static __device__ __forceinline__ void store_query_pair(uint32_t* operand, int m, int pair, uint32_t a, uint32_t b) {
    uint32_t* to = operand + (m / 4 * kDepth + pair / 8) * 64 + (m % 4 * 8 + pair % 4) * 2 + pair / 4 % 2;
    to[0] = high_parts(a, b);
    to[8] = low_parts(a, b);
  }

  static __device__ __forceinline__ FragmentB query_part(const uint32_t* operand, int n, int k) {
    const Vec<uint32_t, 2> pair = load<uint32_t, 2>(operand + ((member() * kQuads + n) * kDepth + k) * 64 + lane() * 2);
    return FragmentB{{pair.x[0], pair.x[1]}};
  }

  __device__ __forceinline__ KeysAsRows(const uint32_t* operand) {
    if constexpr (kInRegisters) {
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
#pragma unroll
        for (int k = 0; k < kDepth; ++k) q[n][k] = query_part(operand, n, k);
      }
    }
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      states[n] = {kLeastScore, 0.0f};
#pragma unroll
      for (int k = 0; k < kDepth; ++k) acc[n][k][0] = acc[n][k][1] = 0.0f;
    }
  }

  __device__ __forceinline__ void multiply_keys(Products& products, const uint32_t* operand, const char* keys) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA keys_part = load_matrices(keys + Block::place(lane() % 16, 2 * k + lane() / 16));
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        if constexpr (kInRegisters) {
          multiply_add(products[n][k % kSums], keys_part, q[n][k]);
        } else {
          multiply_add(products[n][k % kSums], keys_part, query_part(operand, n, k));
        }
      }
    }
  }

  // Products become scores, of rows lane / 4 and eight on; then weights. `clear`: every query sees every row of the
  // tile. Else sees(m, row) says which of the block's queries sees which.
  template <typename Sees>
  __device__ __forceinline__ void weigh(const AttendParams& p, const float* factor, const Products& products,
                                        int64_t row0, bool clear, const Sees& sees, Weights& weights) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
      float score[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        score[h] = whole_score(products[n][0].x[2 * h] + (kSums > 1 ? products[n][kSums - 1].x[2 * h] : 0.0f),
                               products[n][0].x[2 * h + 1] + (kSums > 1 ? products[n][kSums - 1].x[2 * h + 1] : 0.0f)) *
                   factor[n * 4 + mine()];
        if (p.softcap > 0) score[h] = capped(score[h], p.softcap);
        if (!clear && !sees(n * 4 + mine(), row0 + lane() / 4 + 8 * h)) score[h] = minus_infinity();
      }
      float max = fmaxf(states[n].max, fmaxf(score[0], score[1]));
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, distance));
      }
      rescale[n] = power_of_two(states[n].max - max);
      const float weight[2] = {power_of_two(score[0] - max + kLog2WeightScale),
                               power_of_two(score[1] - max + kLog2WeightScale)};
      states[n] = {max, fmaf(states[n].sum, rescale[n], weight[0] + weight[1])};
      weights[n] = {transposed(weight_parts(weight[0])), transposed(weight_parts(weight[1]))};
    }
  }

  // Makes NaN of the sums of the queries that see a value which is not finite.
  template <typename Sees>
  __device__ __forceinline__ void add_non_finite(const char* values, int64_t row0, const Sees& sees) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
#pragma unroll 1
      for (int row = 0; row < Block::kTileRows; ++row) {
        if (!sees(n * 4 + mine(), row0 + row)) continue;
#pragma unroll
        for (int chunk = 0; chunk < Block::kChunks; ++chunk) {
          const uint16_t bits = reinterpret_cast<const uint16_t*>(values + Block::place(row, chunk))[lane() / 4];
          if (!is_finite_half(bits)) acc[n][chunk / 2][chunk % 2] += as_nan(bits);
        }
      }
    }
  }

  // Products of values (their elements as rows) and the two parts of the weights.
  __device__ __forceinline__ void multiply_values(const Weights& weights, const char* values) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA values_part =
          load_matrices_transposed(values + Block::place(lane() % 8 + lane() / 16 * 8, 2 * k + lane() / 8 % 2));
#pragma unroll
      for (int n = 0; n < kQuads; ++n) {
        FragmentC sums = {};
        multiply_add(sums, values_part, weights[n]);
        acc[n][k][0] = fmaf(acc[n][k][0], rescale[n], fmaf(sums.x[1], kLowPart, sums.x[0]));
        acc[n][k][1] = fmaf(acc[n][k][1], rescale[n], fmaf(sums.x[3], kLowPart, sums.x[2]));
      }
    }
  }

  // Leaves the warp's states and sums for the merging of its block's teams.
  __device__ __forceinline__ void leave(SoftmaxState* to_states, float* sums) {
#pragma unroll
    for (int n = 0; n < kQuads; ++n) {
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        states[n].sum += __shfl_xor_sync(kAllLanes, states[n].sum, distance);
      }
      if (lane() < 4) to_states[n * 4 + mine()] = {states[n].max - kLog2WeightScale, states[n].sum};
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sums[(n * 4 + mine()) * Block::kQueryStride + 16 * k + 8 * h + lane() / 4] = acc[n][k][h];
        }
      }
    }
  }
};

template <typename Block>
struct QueriesAsRows : WarpOfTeam<Block> {
  static constexpr int kDepth = Block::kDepth;
  static constexpr int kSteps = Block::kTileRows / 16;
  static_assert(Block::kWarpQueries == 8);
  using Products = FragmentC[2 * kSteps];
  using Weights = FragmentA[kSteps];

  using WarpOfTeam<Block>::lane, WarpOfTeam<Block>::member;
  static __device__ __forceinline__ uint32_t mine() { return member() * Block::kWarpQueries + lane() / 4; }

  // A lane has query mine() of the block. Its two parts are rows lane / 4 and eight on of the operand.
  SoftmaxState state;            // the sum is this lane's rows' alone
  float acc[Block::kChunks][2];  // elements 8 c + 2 (lane % 4) and the next
  float rescale;

  static __device__ __forceinline__ void store_query_pair(uint32_t* operand, int m, int pair, uint32_t a, uint32_t b) {
    uint32_t* to = operand + (m / 8 * kDepth + pair / 8) * 128 + (m % 8 * 4 + pair % 4) * 4 + pair / 4 % 2 * 2;
    store<uint32_t, 2>(to, {{high_parts(a, b), low_parts(a, b)}});
  }

  static __device__ __forceinline__ FragmentA query_part(const uint32_t* operand, int k) {
    const Vec<uint32_t, 4> part = load<uint32_t, 4>(operand + (member() * kDepth + k) * 128 + lane() * 4);
    return FragmentA{{part.x[0], part.x[1], part.x[2], part.x[3]}};
  }

  __device__ __forceinline__ QueriesAsRows(const uint32_t*) : state{kLeastScore, 0.0f} {
#pragma unroll
    for (int c = 0; c < Block::kChunks; ++c) acc[c][0] = acc[c][1] = 0.0f;
  }

  __device__ __forceinline__ void multiply_keys(Products& products, const uint32_t* operand, const char* keys) const {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      const FragmentA part = query_part(operand, k);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const FragmentA keys_part =
            load_matrices(keys + Block::place(16 * s + lane() % 8 + lane() / 16 * 8, 2 * k + lane() / 8 % 2));
        multiply_add(products[2 * s], part, FragmentB{{keys_part.x[0], keys_part.x[1]}});
        multiply_add(products[2 * s + 1], part, FragmentB{{keys_part.x[2], keys_part.x[3]}});
      }
    }
  }

  // Scores of rows 8 i + 2 (lane % 4) and the next.
  template <typename Sees>
  __device__ __forceinline__ void weigh(const AttendParams& p, const float* factor, const Products& products,
                                        int64_t row0, bool clear, const Sees& sees, Weights& weights) {
    const float of_query = factor[mine()];
    float score[2 * kSteps][2];
    float max = state.max;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        score[i][e] = whole_score(products[i].x[e], products[i].x[2 + e]) * of_query;
        if (p.softcap > 0) score[i][e] = capped(score[i][e], p.softcap);
        if (!clear && !sees(mine(), row0 + 8 * i + lane() % 4 * 2 + e)) score[i][e] = minus_infinity();
        max = fmaxf(max, score[i][e]);
      }
    }
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 1));
    max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, 2));
    rescale = power_of_two(state.max - max);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 2 * kSteps; ++i) {
      uint32_t parts[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float weight = power_of_two(score[i][e] - max + kLog2WeightScale);
        sum += weight;
        parts[e] = weight_parts(weight);
      }
      weights[i / 2].x[i % 2 * 2] = high_parts(parts[0], parts[1]);
      weights[i / 2].x[i % 2 * 2 + 1] = low_parts(parts[0], parts[1]);
    }
    state = {max, fmaf(state.sum, rescale, sum)};
  }

  template <typename Sees>
  __device__ __forceinline__ void add_non_finite(const char* values, int64_t row0, const Sees& sees) {
#pragma unroll 1
    for (int row = 0; row < Block::kTileRows; ++row) {
      if (!sees(mine(), row0 + row)) continue;
#pragma unroll
      for (int c = 0; c < Block::kChunks; ++c) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const uint16_t bits = reinterpret_cast<const uint16_t*>(values + Block::place(row, c))[lane() % 4 * 2 + e];
          if (!is_finite_half(bits)) acc[c][e] += as_nan(bits);
        }
      }
    }
  }

  // Products of the two parts of the weights (rows) and the values' elements (columns).
  __device__ __forceinline__ void multiply_values(const Weights& weights, const char* values) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      FragmentC sums[2] = {};
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const FragmentA values_part =
            load_matrices_transposed(values + Block::place(16 * s + lane() % 16, 2 * k + lane() / 16));
        multiply_add(sums[0], weights[s], FragmentB{{values_part.x[0], values_part.x[1]}});
        multiply_add(sums[1], weights[s], FragmentB{{values_part.x[2], values_part.x[3]}});
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          acc[2 * k + h][e] = fmaf(acc[2 * k + h][e], rescale, fmaf(sums[h].x[2 + e], kLowPart, sums[h].x[e]));
        }
      }
    }
  }

  __device__ __forceinline__ void leave(SoftmaxState* to_states, float* sums) {
    state.sum += __shfl_xor_sync(kAllLanes, state.sum, 1);
    state.sum += __shfl_xor_sync(kAllLanes, state.sum, 2);
    if (lane() % 4 == 0) to_states[mine()] = {state.max - kLog2WeightScale, state.sum};
#pragma unroll
    for (int c = 0; c < Block::kChunks; ++c) {
      store<float, 2>(sums + mine() * Block::kQueryStride + 8 * c + lane() % 4 * 2, {{acc[c][0], acc[c][1]}});
    }
  }
};

}  // namespace
}  // namespace kvc
