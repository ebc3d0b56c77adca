// kernels/mma.cuh on a CPU. Copies into shared memory happen at once or when they are waited for, as chance has it;
// products are summed in double and rounded once.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace emulator {

struct Copy {
  char* to;
  char bytes[16];
  unsigned group;
};

struct Copies {
  std::vector<Copy> under_way;
  unsigned group = 0;  // that copies go to now
};

Copies& copies_of_thread();

// Every lane's operands; two sets, as a lane may be at its next product while another still reads the last one's.
struct Operands {
  uint32_t a[4];
  uint32_t b[2];
};
const Operands* warp_operands(const Operands& mine);

inline float half_at(const uint32_t* registers, int i) {
  return kvc::half_to_float(static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16));
}

}  // namespace emulator

namespace kvc {

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - emulator::shared_base());
}

inline void copy_async(void* shared, const void* global, bool real) {
  emulator::check_alignment(shared, 16);
  emulator::Copy copy{static_cast<char*>(shared), {}, emulator::copies_of_thread().group};
  if (real) {
    emulator::check_alignment(global, 16);
    std::memcpy(copy.bytes, global, 16);
  }
  if (emulator::random_below(2) == 0) {
    std::memcpy(copy.to, copy.bytes, 16);
  } else {
    emulator::copies_of_thread().under_way.push_back(copy);
  }
}
inline void end_copy_group() { ++emulator::copies_of_thread().group; }
template <int kPending>
inline void wait_for_copies() {
  emulator::Copies& copies = emulator::copies_of_thread();
  std::vector<emulator::Copy> later;
  for (const emulator::Copy& copy : copies.under_way) {
    if (copy.group + kPending < copies.group) {
      std::memcpy(copy.to, copy.bytes, 16);
    } else {
      later.push_back(copy);
    }
  }
  copies.under_way = later;
}

template <int kWarps>
void sync_warps() {
  emulator::warps_barrier(kWarps);
}

inline uint16_t element_of_row(uint64_t row, unsigned i) {
  uint16_t bits;
  std::memcpy(&bits, reinterpret_cast<const char*>(row) + 2 * i, 2);
  return bits;
}
inline FragmentA load_matrices_either(const void* row, bool transpose) {
  emulator::check_alignment(row, 16);
  const uint64_t* rows = emulator::warp_exchange(reinterpret_cast<uint64_t>(row));
  const unsigned lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  FragmentA a;
  for (unsigned m = 0; m < 4; ++m) {
    uint16_t pair[2];
    for (unsigned j = 0; j < 2; ++j) {
      pair[j] = transpose ? element_of_row(rows[m * 8 + 2 * i + j], g) : element_of_row(rows[m * 8 + g], 2 * i + j);
    }
    a.x[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
  emulator::warp_exchange(0);  // nobody overwrites what another lane has yet to read
  return a;
}
inline FragmentA load_matrices(const void* row) { return load_matrices_either(row, false); }
inline FragmentA load_matrices_transposed(const void* row) { return load_matrices_either(row, true); }

inline uint32_t transposed(uint32_t pair) {
  const uint64_t* pairs = emulator::warp_exchange(pair);
  const unsigned lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  uint32_t out = 0;
  for (unsigned j = 0; j < 2; ++j)
    out |= static_cast<uint32_t>(pairs[(2 * i + j) * 4 + g / 2] >> g % 2 * 16 & 0xffff) << j * 16;
  return out;
}

inline void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  const emulator::Operands* of = emulator::warp_operands({{a.x[0], a.x[1], a.x[2], a.x[3]}, {b.x[0], b.x[1]}});
  const unsigned lane = threadIdx.x % 32, g = lane / 4, i = lane % 4;
  for (unsigned out = 0; out < 4; ++out) {
    const unsigned row = g + out / 2 * 8, column = 2 * i + out % 2;
    double sum = c.x[out];
    for (unsigned k = 0; k < 16; ++k) {
      // A: registers (row, 2i), (row + 8, 2i), (row, 2i + 8), (row + 8, 2i + 8); B: (2i, column), (2i + 8, column).
      const uint32_t ra = of[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t rb = of[column * 4 + k % 8 / 2].b[k / 8];
      sum += static_cast<double>(half_to_float(static_cast<uint16_t>(ra >> k % 2 * 16))) *
             half_to_float(static_cast<uint16_t>(rb >> k % 2 * 16));
    }
    c.x[out] = static_cast<float>(sum);
  }
}

inline uint16_t float_to_half_down(float x) {
  const uint16_t h = float_to_half(x);
  return half_to_float(h) > x ? static_cast<uint16_t>(h - 1) : h;
}

inline uint32_t arrive_release(uint32_t* counter) { return (*counter)++; }
inline unsigned long long arrive_relaxed(unsigned long long* counter) { return (*counter)++; }
inline void acquire_fence() {}

#define KVC_DYNAMIC_SHARED(name) char* const name = ::emulator::dynamic_shared()

}  // namespace kvc
