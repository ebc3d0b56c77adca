// Conversions with AVX2 and F16C, eight elements at a time. The functions carry their target themselves, so the file
// needs no flags of its own and the library still runs on a machine without these instructions.
#include "cpu.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "../convert.h"

#define KVC_AVX2 __attribute__((target("avx2,f16c,popcnt")))

namespace kvc {
namespace cpu {
namespace {

// How many elements come before `out` reaches an address that a streaming store of `bytes` may use.
int64_t elements_before_alignment(const void* out, int64_t element_size, int64_t bytes, int64_t n) {
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out) % bytes);
  const int64_t before = past == 0 ? 0 : (bytes - past) / element_size;
  return before < n ? before : n;
}

// Asks for the input that a streaming loop will want in a while. Past the end of the input it asks in vain, harmlessly.
KVC_AVX2 inline void prefetch(const char* at, int64_t bytes) {
  constexpr int64_t kAhead = 1024;
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(at + kAhead + i, _MM_HINT_NTA);
}

template <DType kFrom>
KVC_AVX2 inline __m256 load_floats(const void* in, int64_t i) {
  if constexpr (kFrom == DType::f32) {
    return _mm256_loadu_ps(static_cast<const float*>(in) + i);
  } else {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(in) + i));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
}

// Eight elements as they are stored; their overflows are added to `overflows`.
template <DType kFrom>
KVC_AVX2 inline __m128i convert_checked(const void* in, int64_t i, bool saturate, int64_t& overflows) {
  const __m256i bits = _mm256_castps_si256(load_floats<kFrom>(in, i));
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i over = _mm256_andnot_si256(_mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kFloatInfBits - 1)),
                                           _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(kHalfOverflowBits - 1)));
  overflows += __builtin_popcount(static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(over))));
  const __m256i sign = _mm256_andnot_si256(_mm256_set1_epi32(0x7fffffff), bits);
  const __m256i largest = _mm256_or_si256(sign, _mm256_set1_epi32(kHalfMaxBits));
  const __m256i limited = saturate ? _mm256_blendv_epi8(bits, largest, over) : bits;
  return _mm256_cvtps_ph(_mm256_castsi256_ps(limited), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Sixteen elements as they are stored. An overflow shows as an infinity in the result; only then is it worth asking
// whether the input was one already.
template <DType kFrom>
KVC_AVX2 inline __m256i convert_sixteen(const void* in, int64_t i, bool saturate, int64_t& overflows) {
  constexpr int kRounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i halves = _mm256_set_m128i(_mm256_cvtps_ph(load_floats<kFrom>(in, i + 8), kRounding),
                                          _mm256_cvtps_ph(load_floats<kFrom>(in, i), kRounding));
  const __m256i magnitude = _mm256_and_si256(halves, _mm256_set1_epi16(0x7fff));
  const __m256i infinite = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7c00));
  if (__builtin_expect(_mm256_testz_si256(infinite, infinite), 1)) return halves;
  const __m128i low = convert_checked<kFrom>(in, i, saturate, overflows);
  return _mm256_set_m128i(convert_checked<kFrom>(in, i + 8, saturate, overflows), low);
}

template <DType kFrom>
KVC_AVX2 int64_t to_half_from(const void* in, uint16_t* out, int64_t n, bool saturate, bool stream) {
  constexpr int64_t size = dtype_size(kFrom);
  int64_t i = 0;
  int64_t overflows = 0;
  if (stream) {
    i = elements_before_alignment(out, 2, 64, n);
    overflows += kGeneric.to_half(kFrom, in, out, i, saturate, false);
    for (; i + 32 <= n; i += 32) {
      prefetch(static_cast<const char*>(in) + i * size, 32 * size);
      const __m256i low = convert_sixteen<kFrom>(in, i, saturate, overflows);
      const __m256i high = convert_sixteen<kFrom>(in, i + 16, saturate, overflows);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), low);
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + 16), high);
    }
  } else {
    for (; i + 16 <= n; i += 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), convert_sixteen<kFrom>(in, i, saturate, overflows));
    }
  }
  const char* rest = static_cast<const char*>(in) + i * size;
  return overflows + kGeneric.to_half(kFrom, rest, out + i, n - i, saturate, false);
}

KVC_AVX2 void copy_halves(const void* in, void* out, int64_t n, bool stream) {
  const uint16_t* from = static_cast<const uint16_t*>(in);
  uint16_t* to = static_cast<uint16_t*>(out);
  if (!stream) {
    std::memcpy(to, from, static_cast<size_t>(n) * 2);
    return;
  }
  int64_t i = elements_before_alignment(to, 2, 32, n);
  std::memcpy(to, from, static_cast<size_t>(i) * 2);
  for (; i + 16 <= n; i += 16) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
  std::memcpy(to + i, from + i, static_cast<size_t>(n - i) * 2);
}

KVC_AVX2 int64_t to_half(DType from, const void* in, uint16_t* out, int64_t n, bool saturate, bool stream) {
  switch (from) {
    case DType::f32: return to_half_from<DType::f32>(in, out, n, saturate, stream);
    case DType::bf16: return to_half_from<DType::bf16>(in, out, n, saturate, stream);
    case DType::f16: copy_halves(in, out, n, stream); return 0;
  }
  return 0;
}

KVC_AVX2 inline __m256 load_halves(const uint16_t* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

KVC_AVX2 void to_f32(const uint16_t* in, float* out, int64_t n, bool stream) {
  int64_t i = 0;
  if (stream) {
    i = elements_before_alignment(out, 4, 32, n);
    kGeneric.from_half(DType::f32, in, out, i, false);
    for (; i + 8 <= n; i += 8) _mm256_stream_ps(out + i, load_halves(in + i));
  } else {
    for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, load_halves(in + i));
  }
  kGeneric.from_half(DType::f32, in + i, out + i, n - i, false);
}

// Round to nearest even on the bits that go; NaN stays NaN.
KVC_AVX2 inline __m256i bf16_words(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded =
      _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i quiet = _mm256_or_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0x40));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}

KVC_AVX2 void to_bf16(const uint16_t* in, uint16_t* out, int64_t n, bool stream) {
  int64_t i = 0;
  if (stream) {
    i = elements_before_alignment(out, 2, 32, n);
    kGeneric.from_half(DType::bf16, in, out, i, false);
  }
  for (; i + 16 <= n; i += 16) {
    const __m256i low = bf16_words(load_halves(in + i));
    const __m256i high = bf16_words(load_halves(in + i + 8));
    // packus works within 128-bit lanes: put the four quarters back in order.
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    if (stream) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), packed);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), packed);
    }
  }
  kGeneric.from_half(DType::bf16, in + i, out + i, n - i, false);
}

KVC_AVX2 void from_half(DType to, const uint16_t* in, void* out, int64_t n, bool stream) {
  switch (to) {
    case DType::f32: to_f32(in, static_cast<float*>(out), n, stream); break;
    case DType::bf16: to_bf16(in, static_cast<uint16_t*>(out), n, stream); break;
    case DType::f16: copy_halves(in, out, n, stream); break;
  }
}

}  // namespace

const Conversions kAvx2 = {to_half, from_half};

}  // namespace cpu
}  // namespace kvc
#endif
