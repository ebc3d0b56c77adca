// Attention with AVX-512 (F and DQ): sixteen elements at a time, where head_dim is a multiple of that.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../convert.h"
#include "../visibility.h"
#include "cpu.h"
#include "prompt.h"

// From here on, and after every header of others: this file's own code alone is compiled for these instructions.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 says so of its own AVX-512 header
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx2,fma,f16c")
#include "attend_impl.h"
#include "prompt_impl.h"

namespace kvc {
namespace cpu {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16;
  using Floats = __m512;
  static Floats set(float a) { return _mm512_set1_ps(a); }
  static Floats load(const float* at) { return _mm512_loadu_ps(at); }
  static Floats load_halves(const uint16_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static void store(float* at, Floats a) { _mm512_storeu_ps(at, a); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats divide(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats where_less(Floats a, Floats b, Floats then, Floats otherwise) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, then);
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats max_or_nan(Floats a, Floats b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats times_power_of_two(Floats a, Floats power) { return _mm512_scalef_ps(a, power); }
  static Floats zero_where_minus_infinity(Floats a, Floats b) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(b, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ), a);
  }
  static float sum(Floats a) { return _mm512_reduce_add_ps(a); }
  static Floats pairs(Floats x, Floats y) { return _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y)); }
  // The sums of four, together: a transposition takes half the steps of four reductions.
  static void sum_four(const Floats* a, float* sums) {
    const __m512d first = _mm512_castps_pd(pairs(a[0], a[1]));
    const __m512d second = _mm512_castps_pd(pairs(a[2], a[3]));
    const Floats quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(first, second)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(first, second)));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1)));
  }
};

}  // namespace

void attend_avx512(const AttendParams& p, const AttendPlan& plan, int64_t entry, int64_t begin, int64_t end,
                   const float* queries, float* state, float* scores, uint16_t* converted) {
  attend_rows<Avx512>(p, plan, entry, begin, end, queries, state, scores, converted);
}

void prompt_avx512(const AttendParams& p, const QueryTile& tile, const Conversions& conversions, float* scratch) {
  attend_query_tile<Avx512>(p, tile, conversions, scratch);
}

}  // namespace cpu
}  // namespace kvc
#pragma GCC pop_options
#endif
