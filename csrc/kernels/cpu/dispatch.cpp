// Which instructions this machine's kernels use.
#include <atomic>
#include <cstring>
#include <fstream>

#include "cpu.h"

namespace kvc {
namespace cpu {
namespace {

const InstructionSet kSets[] = {
#if defined(__x86_64__)
    {"avx512", &kAvx2, attend_avx2, attend_avx512, prompt_avx2, prompt_avx512},
    {"avx2", &kAvx2, attend_avx2, attend_avx2, prompt_avx2, prompt_avx2},
#endif
    {"generic", &kGeneric, attend_generic, attend_generic, prompt_generic, prompt_generic},
};

bool machine_has([[maybe_unused]] const InstructionSet& set) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("popcnt");
  if (std::strcmp(set.name, "avx2") == 0) return avx2;
  if (std::strcmp(set.name, "avx512") == 0) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  }
#endif
  return true;
}

const InstructionSet* best() {
  const InstructionSet* set = kSets;
  while (!machine_has(*set)) ++set;  // the last needs nothing
  return set;
}

std::atomic<const InstructionSet*>& selected() {
  static std::atomic<const InstructionSet*> set{best()};
  return set;
}

}  // namespace

const InstructionSet& instruction_set() { return *selected().load(std::memory_order_relaxed); }

bool select_instruction_set(const char* name) {
  for (const InstructionSet& set : kSets) {
    if (std::strcmp(name, set.name) == 0 && machine_has(set)) {
      selected() = &set;
      return true;
    }
  }
  return false;
}

int64_t last_level_cache_bytes() {
  static const int64_t bytes = [] {
    // What the kernel says of the first CPU; sysconf() may name the whole socket's sum instead.
    int64_t kilobytes = 0;
    for (const char* path :
         {"/sys/devices/system/cpu/cpu0/cache/index3/size", "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
      if (kilobytes <= 0) std::ifstream(path) >> kilobytes;
    }
    return kilobytes > 0 ? kilobytes * 1024 : int64_t{32} << 20;
  }();
  return bytes;
}

}  // namespace cpu
}  // namespace kvc
