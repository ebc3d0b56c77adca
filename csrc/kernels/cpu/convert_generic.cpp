// Conversions in plain C++: the fallback on any machine, and what the vector versions are compared with.
#include <cstring>

#include "../convert.h"
#include "cpu.h"

namespace kvc {
namespace cpu {
namespace {

int64_t to_half(DType from, const void* in, uint16_t* out, int64_t n, bool saturate, bool) {
  uint32_t overflows = 0;
  int64_t total = 0;
  switch (from) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) {
        overflows = 0;
        out[i] = stored_half(static_cast<const float*>(in)[i], saturate, overflows);
        total += overflows;
      }
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) {
        overflows = 0;
        out[i] = stored_half(bf16_to_float(static_cast<const uint16_t*>(in)[i]), saturate, overflows);
        total += overflows;
      }
      break;
    case DType::f16: std::memcpy(out, in, static_cast<size_t>(n) * 2); break;
  }
  return total;
}

void from_half(DType to, const uint16_t* in, void* out, int64_t n, bool) {
  switch (to) {
    case DType::f32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = half_to_float(in[i]);
      break;
    case DType::bf16:
      for (int64_t i = 0; i < n; ++i) static_cast<uint16_t*>(out)[i] = float_to_bf16(half_to_float(in[i]));
      break;
    case DType::f16: std::memcpy(out, in, static_cast<size_t>(n) * 2); break;
  }
}

}  // namespace

const Conversions kGeneric = {to_half, from_half};

}  // namespace cpu
}  // namespace kvc
