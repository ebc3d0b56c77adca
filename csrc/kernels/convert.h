// One element at a time: FP32 and BF16 to FP16 and back, and what overflow means. Bit for bit the same on every device
// (the payload of a NaN aside).
#pragma once

#include <cstdint>
#include <cstring>

#include "portable.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace kvc {

constexpr uint32_t kFloatInfBits = 0x7f800000u;
constexpr uint32_t kHalfOverflowBits =
    0x477ff000u;                                // 65520: the least magnitude that rounds past the largest FP16 number
constexpr uint16_t kHalfQuietBit = 0x0200u;     // of an FP16 NaN
constexpr uint32_t kHalfMaxBits = 0x477fe000u;  // 65504: the largest FP16 number

KVC_HD uint32_t float_bits(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
#endif
}

KVC_HD float bits_float(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
#endif
}

// Is x finite and beyond what FP16 rounds to a finite number? Magnitudes of floats compare as their bits.
KVC_HD bool overflows_half(float x) {
  const uint32_t magnitude = float_bits(x) & 0x7fffffffu;
  return magnitude - kHalfOverflowBits < kFloatInfBits - kHalfOverflowBits;
}

KVC_HD float saturated(float x) { return bits_float((float_bits(x) & 0x80000000u) | kHalfMaxBits); }

// IEEE round to nearest even; subnormals kept; beyond the range +-inf.
KVC_HD uint16_t float_to_half(float x) {
#if defined(__CUDA_ARCH__)
  return __half_as_ushort(__float2half_rn(x));
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > kFloatInfBits) {
    half = 0x7e00u | ((magnitude >> 13) & 0x03ffu);  // NaN: quiet, the top of its payload
  } else if (magnitude >= kHalfOverflowBits) {
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {  // 2^-14: a normal FP16 number; round on the 13 bits that go
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0x0fffu + odd) >> 13;
  } else {
    // Subnormal: adding 0.5 puts the last place of the sum at 2^-24, FP16's smallest step, and rounds there.
    half = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  return static_cast<uint16_t>(sign | half);
#endif
}

// Exact.
KVC_HD float half_to_float(uint16_t h) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(h));
#else
  const uint32_t sign = (static_cast<uint32_t>(h) & 0x8000u) << 16;
  const uint32_t magnitude = h & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf and NaN (made quiet, as hardware does)
    bits = kFloatInfBits | ((magnitude & 0x03ffu) << 13) | (magnitude > 0x7c00u ? 0x00400000u : 0u);
  } else if (magnitude >= 0x0400u) {
    bits = (magnitude << 13) + 0x38000000u;
  } else {  // subnormal: magnitude * 2^-24
    bits = float_bits(static_cast<float>(magnitude) * 5.9604644775390625e-8f);
  }
  return bits_float(sign | bits);
#endif
}

KVC_HD float bf16_to_float(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }

// IEEE round to nearest even.
KVC_HD uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > kFloatInfBits) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// One element as it is stored: the user's overflow policy applied, the overflow counted.
KVC_HD uint16_t stored_half(float x, bool saturate, uint32_t& overflows) {
  if (overflows_half(x)) {
    ++overflows;
    if (saturate) x = saturated(x);
  }
  return float_to_half(x);
}

}  // namespace kvc
