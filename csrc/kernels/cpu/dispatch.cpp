// Which conversions this machine uses.
#include <atomic>
#include <cstring>
#include <fstream>

#include "cpu.h"

namespace kvc {
namespace cpu {
namespace {

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("popcnt");
#else
  return false;
#endif
}

const Conversions* best() {
#if defined(__x86_64__)
  if (has_avx2()) return &kAvx2;
#endif
  return &kGeneric;
}

std::atomic<const Conversions*>& selected() {
  static std::atomic<const Conversions*> conversions{best()};
  return conversions;
}

}  // namespace

const Conversions& conversions() { return *selected().load(std::memory_order_relaxed); }

bool select_conversions(const char* name) {
  if (std::strcmp(name, kGeneric.name) == 0) {
    selected() = &kGeneric;
    return true;
  }
#if defined(__x86_64__)
  if (std::strcmp(name, kAvx2.name) == 0 && has_avx2()) {
    selected() = &kAvx2;
    return true;
  }
#endif
  return false;
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    // What the kernel says of the first CPU; sysconf() may name the whole socket's sum instead.
    int64_t kilobytes = 0;
    for (const char* path : {"/sys/devices/system/cpu/cpu0/cache/index3/size",
                             "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
      if (kilobytes <= 0) std::ifstream(path) >> kilobytes;
    }
    return kilobytes > 0 ? kilobytes * 1024 : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace cpu
}  // namespace kvc
