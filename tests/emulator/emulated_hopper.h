// kernels/hopper.cuh on a CPU, as unkind as a GPU may be:
//
// - A bulk copy brings its box at once, later, or when no thread of the block can go on without it.
// - A product happens when it is begun, when its group ends, or when it is waited for. Its sums are NaN until the wait.
//   Lanes multiply each for itself: nothing but what the kernel waits for keeps the warps of a warpgroup together.
// - Bulk copies and products do not see what threads store to shared memory until one of them calls fence_for_products.
//
// What a GPU leaves undefined ends the program with a message.
#pragma once

#include <cstring>
#include <map>
#include <vector>

namespace emulator {

// A barrier that counts arrivals and bytes. While it is used its 8 bytes of shared memory hold kBarrierMark.
constexpr uint64_t kBarrierMark = 0x6265747765656e21;
struct PhaseBarrier {
  int arrivals;        // that a phase has
  int missing;         // of this phase
  int64_t bytes = 0;   // announced and not there yet
  unsigned phase = 0;  // how many have ended
  bool shown = false;  // to bulk copies

  void look() {
    if (missing != 0 || bytes != 0) return;
    ++phase;
    missing = arrivals;
  }
};

// One of those that have numbers.
struct NamedBarrier {
  unsigned threads = 0;  // that it is of, as the first to come said
  unsigned here = 0;
  unsigned phase = 0;
};

// What a warp asked of its warpgroup. All four must ask for the same.
struct ProductCall {
  uint64_t a;  // the operand, or 1 if it is in registers
  uint64_t b;
  int blocks;
  bool adds;
  bool operator==(const ProductCall& other) const {
    return a == other.a && b == other.b && blocks == other.blocks && adds == other.adds;
  }
};

// Of a block.
struct Hopper {
  std::map<const uint64_t*, PhaseBarrier> barriers;
  NamedBarrier named[16];
  std::vector<char> seen;                              // shared memory, as bulk copies and products see it
  std::map<unsigned, std::vector<ProductCall>> calls;  // of each warpgroup
  std::map<unsigned, size_t> calls_of_warp;            // how many
};
Hopper& hopper_of_block();

// A product as one lane has it: its two rows and its share of the columns.
struct Product {
  kvc::FragmentC* sums;
  ProductCall call;
  float a[2][16];  // the rows, where they are in registers
  unsigned group;
};

// Of a thread.
struct Products {
  std::vector<Product> under_way;
  size_t done = 0;                                     // of these
  std::map<kvc::FragmentC*, std::vector<float>> sums;  // what they are in truth
  unsigned group = 0;                                  // that products go to now
  bool begun = false;
};
Products& products_of_thread();

inline PhaseBarrier& barrier_at(const uint64_t* address) {
  check_alignment(address, 8);
  const auto found = hopper_of_block().barriers.find(address);
  if (found == hopper_of_block().barriers.end()) stop("a barrier in shared memory is used that nobody initialised");
  if (*address != kBarrierMark) stop("something was written over a barrier in shared memory");
  return found->second;
}

inline void arrive_at(PhaseBarrier& barrier) {
  if (barrier.missing == 0) stop("more threads arrive at a barrier in shared memory than it was initialised for");
  --barrier.missing;
  barrier.look();
}

inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void check_is_shared(const void* begin, size_t bytes) {
  const char* from = static_cast<const char*>(begin);
  if (from >= dynamic_shared() && from + bytes <= dynamic_shared() + dynamic_shared_bytes()) return;
  stop("an address outside the block's dynamic shared memory");
}

inline void bring_box(char* to, const CUtensorMap& map, PhaseBarrier& barrier, const int (&at)[4]) {
  if (map.box[1] != 1 || map.box[3] != 1) stop("a box of several heads or sequences");
  const uint32_t start = kvc::shared_address(to);
  for (uint32_t r = 0; r < map.box[2]; ++r) {
    for (uint32_t e = 0; e < map.box[0]; ++e) {
      const int64_t place[4] = {int64_t{at[0]} + e, at[1], int64_t{at[2]} + r, at[3]};
      const char* from = map.data;
      bool inside = true;
      for (int i = 0; i < 4; ++i) {
        inside = inside && place[i] >= 0 && place[i] < static_cast<int64_t>(map.sizes[i]);
        from += place[i] * static_cast<int64_t>(map.strides[i]);
      }
      uint16_t element = 0;
      if (inside) std::memcpy(&element, from, 2);
      const uint32_t address = swizzled(start + r * 128 + e * 2);
      std::memcpy(shared_base() + address, &element, 2);
      std::memcpy(hopper_of_block().seen.data() + address, &element, 2);
    }
  }
  barrier.bytes -= int64_t{map.box[0]} * map.box[2] * 2;
  barrier.look();
}

// An element of an operand in shared memory, `offset` bytes from the operand's place.
inline float operand_element(uint64_t operand, uint32_t offset) {
  const uint32_t address = swizzled((static_cast<uint32_t>(operand & 0x3fff) << 4) + offset);
  const std::vector<char>& seen = hopper_of_block().seen;
  if (address + 2 > seen.size()) stop("an operand lies outside shared memory");
  uint16_t bits;
  std::memcpy(&bits, seen.data() + address, 2);
  return kvc::half_to_float(bits);
}
inline uint32_t bytes_between_panels(uint64_t operand) { return static_cast<uint32_t>(operand >> 16 & 0x3fff) << 4; }
inline uint32_t bytes_of_eight_rows(uint64_t operand) { return static_cast<uint32_t>(operand >> 32 & 0x3fff) << 4; }

inline void multiply(Products& products, const Product& product) {
  const unsigned warp = threadIdx.x / 32 % 4, g = threadIdx.x % 32 / 4, i = threadIdx.x % 4;
  const auto& [a, b, blocks, adds] = product.call;
  const bool a_in_registers = a == 1;
  float rows[2][16];
  for (unsigned h = 0; h < 2; ++h) {
    const unsigned row = 16 * warp + g + 8 * h;
    for (unsigned k = 0; k < 16; ++k) {
      rows[h][k] = a_in_registers ? product.a[h][k]
                                  : operand_element(a, row / 8 * bytes_of_eight_rows(a) + row % 8 * 128 + 2 * k);
    }
  }
  std::vector<float>& sums = products.sums[product.sums];
  for (unsigned column = 2 * i; column < 8 * static_cast<unsigned>(blocks); column += column % 2 == 0 ? 1 : 7) {
    float right[16];
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t offset = a_in_registers ? column / 64 * bytes_between_panels(b) + column % 64 * 2 +
                                                   k / 8 * bytes_of_eight_rows(b) + k % 8 * 128
                                             : column / 8 * bytes_of_eight_rows(b) + column % 8 * 128 + 2 * k;
      right[k] = operand_element(b, offset);
    }
    for (unsigned h = 0; h < 2; ++h) {
      float& out = sums[column / 8 * 4 + 2 * h + column % 2];
      double sum = adds ? out : 0.0;
      for (unsigned k = 0; k < 16; ++k) sum += static_cast<double>(rows[h][k]) * right[k];
      out = static_cast<float>(sum);
    }
  }
}

inline void multiply_first(Products& products, size_t count) {
  for (; products.done < count; ++products.done) multiply(products, products.under_way[products.done]);
}

// Notes a product for this lane, and checks that its warpgroup is of one mind.
template <int kBlocks>
void begin_product(kvc::FragmentC (&c)[kBlocks], const kvc::FragmentA& a, const ProductCall& call) {
  Hopper& hopper = hopper_of_block();
  Products& products = products_of_thread();
  if (blockDim.x % 128 != 0) stop("a product of a warpgroup in a block that is not made of warpgroups");
  if (!products.begun) stop("a product without begin_products");
  for (const uint64_t operand : {call.a, call.b}) {
    if (operand == 1) continue;
    if ((operand & 0x3fff) << 4 & 0x380) stop("an operand's rows do not begin at a multiple of 1,024 bytes");
  }
  const uint64_t* lanes = warp_exchange(call.a ^ call.b << 1 ^ static_cast<uint64_t>(call.adds) << 63);
  for (int i = 1; i < 32; ++i) {
    if (lanes[i] != lanes[0]) stop("lanes of a warp begin different products");
  }
  const Operands* of = warp_operands({{a.x[0], a.x[1], a.x[2], a.x[3]}, {}});
  const unsigned lane = threadIdx.x % 32, g = lane / 4;
  Product product{c, call, {}, products.group};
  for (unsigned h = 0; h < 2; ++h) {
    for (unsigned k = 0; k < 16; ++k) product.a[h][k] = half_at(&of[g * 4 + k % 8 / 2].a[h + k / 8 * 2], k % 2);
  }
  if (lane == 0) {
    std::vector<ProductCall>& calls = hopper.calls[threadIdx.x / 128];
    const size_t number = hopper.calls_of_warp[threadIdx.x / 32]++;
    if (number == calls.size()) calls.push_back(call);
    if (!(calls[number] == call)) stop("the warps of a warpgroup begin different products");
  }
  if (products.sums.count(c) == 0) {
    std::vector<float>& sums = products.sums[c];
    for (kvc::FragmentC& block : c) {
      for (float& x : block.x) {
        sums.push_back(x);
        x = std::nanf("");
      }
    }
  }
  products.under_way.push_back(product);
  if (random_below(4) == 0) multiply_first(products, products.under_way.size());
}

// Ends the products of groups that are more than `pending` old: their sums are to be seen.
inline void end_old_products(Products& products, unsigned pending) {
  size_t old = 0;
  for (const Product& product : products.under_way) old += product.group + pending < products.group;
  multiply_first(products, old);
  std::vector<Product> later(products.under_way.begin() + static_cast<std::ptrdiff_t>(old), products.under_way.end());
  products.under_way = later;
  products.done -= old;
  for (auto at = products.sums.begin(); at != products.sums.end();) {
    bool pends = false;
    for (const Product& product : later) pends = pends || product.sums == at->first;
    if (pends) {
      ++at;
      continue;
    }
    for (size_t i = 0; i < at->second.size(); ++i) at->first[i / 4].x[i % 4] = at->second[i];
    at = products.sums.erase(at);
  }
}

// When a block's threads are done.
inline void check_hopper(unsigned threads) {
  const Hopper& hopper = hopper_of_block();
  for (const auto& [group, calls] : hopper.calls) {
    for (unsigned warp = 4 * group; warp < 4 * group + 4 && 32 * warp < threads; ++warp) {
      const auto found = hopper.calls_of_warp.find(warp);
      if (found == hopper.calls_of_warp.end() || found->second != calls.size()) {
        stop("a warp leaves out products of its warpgroup");
      }
    }
  }
}

}  // namespace emulator

namespace kvc {

inline char* align_for_panels(char* shared) { return shared + (1024 - shared_address(shared) % 1024) % 1024; }

inline void init_barrier(uint64_t* barrier, int arrivals) {
  emulator::check_alignment(barrier, 8);
  if (arrivals < 1) emulator::stop("a barrier in shared memory of no arrivals");
  if (!emulator::hopper_of_block().barriers.insert({barrier, {arrivals, arrivals}}).second) {
    emulator::stop("a barrier in shared memory is initialised twice");
  }
  *barrier = emulator::kBarrierMark;
}
inline void show_barriers() {
  for (auto& [address, barrier] : emulator::hopper_of_block().barriers) barrier.shown = true;
}
inline void arrive(uint64_t* barrier) {
  emulator::arrive_at(emulator::barrier_at(barrier));
  emulator::give_way();
}
inline void arrive_and_expect(uint64_t* barrier, int bytes) {
  emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
  b.bytes += bytes;
  emulator::arrive_at(b);
}
inline void wait_barrier(uint64_t* barrier, int parity) {
  const emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
  emulator::wait_until([&b, parity] { return (b.phase & 1) != static_cast<unsigned>(parity); });
}
inline void fence_for_products() {
  std::vector<char>& seen = emulator::hopper_of_block().seen;
  std::memcpy(seen.data(), emulator::shared_base(), seen.size());
}

inline void copy_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int element, int head, int row,
                     int sequence) {
  char* const to = static_cast<char*>(shared);
  if (shared_address(to) % 1024 != 0) emulator::stop("a bulk copy to a place that is no multiple of 1,024 bytes");
  emulator::check_is_shared(to, size_t{map->box[2]} * 128);
  emulator::PhaseBarrier& b = emulator::barrier_at(barrier);
  if (!b.shown) emulator::stop("a bulk copy with a barrier that nobody has shown to it");
  const auto bring = [=, &b] { emulator::bring_box(to, *map, b, {element, head, row, sequence}); };
  if (emulator::random_below(2) == 0) {
    bring();
  } else {
    emulator::do_later(bring);
  }
}

inline void sync_threads(int number, int threads) {
  if (number < 1 || number > 15 || threads < 32 || threads % 32 != 0) emulator::stop("no such barrier of some threads");
  emulator::NamedBarrier& b = emulator::hopper_of_block().named[number];
  if (b.here > 0 && b.threads != static_cast<unsigned>(threads)) {
    emulator::stop("threads come to a barrier that say different numbers of them");
  }
  b.threads = static_cast<unsigned>(threads);
  const unsigned phase = b.phase;
  if (++b.here == b.threads) {
    b.here = 0;
    ++b.phase;
  }
  emulator::wait_until([&b, phase] { return b.phase != phase; });
}

template <int kRegisters>
inline void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
inline void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}

inline void begin_products() { emulator::products_of_thread().begun = true; }
inline void end_products() {
  emulator::Products& products = emulator::products_of_thread();
  products.begun = false;
  ++products.group;
  if (emulator::random_below(4) == 0) emulator::multiply_first(products, products.under_way.size());
}
template <int kPending>
inline void wait_for_products() {
  emulator::give_way();
  emulator::end_old_products(emulator::products_of_thread(), kPending);
  emulator::warp_exchange(0);  // a lane that goes on knows that those of its whole warp are done
}
template <int kBlocks>
inline void hold_products(FragmentC (&)[kBlocks]) {}

inline uint64_t operand_at(const void* shared, int panel_bytes) {
  emulator::check_alignment(shared, 16);
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
inline uint64_t operand_after(uint64_t operand, int bytes) { return operand + static_cast<uint64_t>(bytes >> 4); }

template <int kBlocks>
inline void multiply_add_rows(FragmentC (&c)[kBlocks], uint64_t a, uint64_t b, bool adds) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  emulator::begin_product(c, {}, {a, b, kBlocks, adds});
}
template <int kBlocks>
inline void multiply_add_columns(FragmentC (&c)[kBlocks], const FragmentA& a, uint64_t b, bool adds) {
  static_assert(kBlocks == 8 || kBlocks == 16);
  emulator::begin_product(c, a, {1, b, kBlocks, adds});
}

}  // namespace kvc
