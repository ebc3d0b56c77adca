// Division by a divisor that is known before a launch, by multiplying with what the host prepared: on a GPU a 64-bit
// division is a call that spills registers around it, and a 32-bit one is some 20 instructions.
#pragma once

#include <cstdint>

#include "portable.h"

namespace kvc {

// 0 <= n < 2^31 by 1 <= d <= 2^31: multiply and shift (Granlund and Montgomery, 1994).
struct FastDivider {
  uint32_t divisor = 1;
  uint32_t multiplier = 1;
  uint32_t shift = 0;

  static FastDivider by(uint32_t d) {
    FastDivider f;
    f.divisor = d;
    while ((uint64_t{1} << f.shift) < d) ++f.shift;
    f.multiplier = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << f.shift) - d)) / d + 1);
    return f;
  }

  KVC_HD uint32_t operator()(uint32_t n) const {
#if defined(__CUDA_ARCH__)
    const uint32_t high = __umulhi(n, multiplier);
#else
    const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
#endif
    return (high + n) >> shift;
  }
};

// 0 <= n < 2^63 by 1 <= d < 2^63. The reciprocal is rounded down, so the quotient is right or one too small.
struct Divider {
  int64_t divisor;
  uint64_t reciprocal;

  static Divider by(int64_t d) { return {d, ~uint64_t{0} / static_cast<uint64_t>(d)}; }

  KVC_HD int64_t div(int64_t n) const {
#if defined(__CUDA_ARCH__)
    const int64_t quotient = static_cast<int64_t>(__umul64hi(static_cast<uint64_t>(n), reciprocal));
#else
    const int64_t quotient =
        static_cast<int64_t>((static_cast<unsigned __int128>(static_cast<uint64_t>(n)) * reciprocal) >> 64);
#endif
    return n - quotient * divisor >= divisor ? quotient + 1 : quotient;
  }

  KVC_HD int64_t mod(int64_t n) const { return n - div(n) * divisor; }
};

}  // namespace kvc
