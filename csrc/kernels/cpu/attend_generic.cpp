// Attention in plain C++: eight floats at a time, as the compiler sees fit.
#include "attend_impl.h"
#include "prompt_impl.h"

namespace kvc {
namespace cpu {
namespace {

struct Eight {
  static constexpr int kWidth = 8;
  struct Floats {
    float x[8];
  };
  template <typename F>
  static Floats each(F f) {
    Floats y;
    for (int i = 0; i < 8; ++i) y.x[i] = f(i);
    return y;
  }
  static Floats set(float a) {
    return each([&](int) { return a; });
  }
  static Floats load(const float* at) {
    return each([&](int i) { return at[i]; });
  }
  static Floats load_halves(const uint16_t* at) {
    return each([&](int i) { return half_to_float(at[i]); });
  }
  static void store(float* at, const Floats& a) {
    for (int i = 0; i < 8; ++i) at[i] = a.x[i];
  }
  static Floats add(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.x[i] + b.x[i]; });
  }
  static Floats subtract(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.x[i] - b.x[i]; });
  }
  static Floats multiply(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.x[i] * b.x[i]; });
  }
  static Floats divide(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.x[i] / b.x[i]; });
  }
  static Floats where_less(const Floats& a, const Floats& b, const Floats& then, const Floats& otherwise) {
    return each([&](int i) { return a.x[i] < b.x[i] ? then.x[i] : otherwise.x[i]; });
  }
  static Floats fma(const Floats& a, const Floats& b, const Floats& c) {
    return each([&](int i) { return a.x[i] * b.x[i] + c.x[i]; });
  }
  static Floats max_or_nan(const Floats& a, const Floats& b) {
    return each([&](int i) { return a.x[i] > b.x[i] ? a.x[i] : b.x[i]; });
  }
  static Floats round(const Floats& a) {
    return each([&](int i) { return std::nearbyint(a.x[i]); });
  }
  static Floats times_power_of_two(const Floats& a, const Floats& power) {
    return each([&](int i) {
      if (power.x[i] != power.x[i]) return power.x[i];
      return a.x[i] * bits_float(static_cast<uint32_t>(static_cast<int32_t>(power.x[i]) + 127) << 23);
    });
  }
  static Floats zero_where_minus_infinity(const Floats& a, const Floats& b) {
    return each([&](int i) { return b.x[i] == -INFINITY ? 0.0f : a.x[i]; });
  }
  static void sum_four(const Floats* a, float* sums) {
    for (int i = 0; i < 4; ++i) sums[i] = sum(a[i]);
  }
  static float sum(const Floats& a) {
    return ((a.x[0] + a.x[4]) + (a.x[2] + a.x[6])) + ((a.x[1] + a.x[5]) + (a.x[3] + a.x[7]));
  }
};

}  // namespace

void attend_generic(const AttendParams& p, const AttendPlan& plan, int64_t entry, int64_t begin, int64_t end,
                    const float* queries, float* state, float* scores, uint16_t* converted) {
  attend_rows<Eight>(p, plan, entry, begin, end, queries, state, scores, converted);
}

void prompt_generic(const AttendParams& p, const QueryTile& tile, const Conversions& conversions, float* scratch) {
  attend_query_tile<Eight>(p, tile, conversions, scratch);
}

}  // namespace cpu
}  // namespace kvc
