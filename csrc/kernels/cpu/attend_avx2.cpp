// Attention with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "../convert.h"
#include "../visibility.h"
#include "cpu.h"
#include "prompt.h"

// From here on, and after every header of others: this file's own code alone is compiled for these instructions.
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#include "attend_impl.h"
#include "prompt_impl.h"

namespace kvc {
namespace cpu {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8;
  using Floats = __m256;
  static Floats set(float a) { return _mm256_set1_ps(a); }
  static Floats load(const float* at) { return _mm256_loadu_ps(at); }
  static Floats load_halves(const uint16_t* at) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }
  static void store(float* at, Floats a) { _mm256_storeu_ps(at, a); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats subtract(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats divide(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats where_less(Floats a, Floats b, Floats then, Floats otherwise) {
    return _mm256_blendv_ps(otherwise, then, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats max_or_nan(Floats a, Floats b) { return _mm256_max_ps(a, b); }  // b where either is NaN
  static Floats round(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats times_power_of_two(Floats a, Floats power) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(power), _mm256_set1_epi32(127)), 23);
    const Floats scaled = _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
    return _mm256_blendv_ps(scaled, power, _mm256_cmp_ps(power, power, _CMP_UNORD_Q));
  }
  static Floats zero_where_minus_infinity(Floats a, Floats b) {
    return _mm256_andnot_ps(_mm256_cmp_ps(b, _mm256_set1_ps(-INFINITY), _CMP_EQ_OQ), a);
  }
  static float sum(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // The sums of four, together.
  static void sum_four(const Floats* a, float* sums) {
    const Floats quarters = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps(quarters, 1)));
  }
};

}  // namespace

void attend_avx2(const AttendParams& p, const AttendPlan& plan, int64_t entry, int64_t begin, int64_t end,
                 const float* queries, float* state, float* scores, uint16_t* converted) {
  attend_rows<Avx2>(p, plan, entry, begin, end, queries, state, scores, converted);
}

void prompt_avx2(const AttendParams& p, const QueryTile& tile, const Conversions& conversions, float* scratch) {
  attend_query_tile<Avx2>(p, tile, conversions, scratch);
}

}  // namespace cpu
}  // namespace kvc
#pragma GCC pop_options
#endif
