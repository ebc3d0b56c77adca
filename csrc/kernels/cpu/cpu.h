// The CPU twins of the GPU launchers: the same structs, the same ops. What to run in parallel is the caller's affair
// (it has the thread pool): an op is cut into items, and every item may run on any thread.
#pragma once

#include <cstdint>

#include "../params.h"

namespace kvc {
namespace cpu {

// Conversions of a run of elements. `stream`: store past the caches (worth it when the result is larger than they are).
struct Conversions {
  const char* name;
  // Returns how many finite inputs overflow FP16.
  int64_t (*to_half)(DType from, const void* in, uint16_t* out, int64_t n, bool saturate, bool stream);
  void (*from_half)(DType to, const uint16_t* in, void* out, int64_t n, bool stream);
};

extern const Conversions kGeneric;   // plain C++, any machine
#if defined(__x86_64__)
extern const Conversions kAvx2;      // AVX2, F16C
#endif

const Conversions& conversions();         // the best that this machine has, or the one that was selected
bool select_conversions(const char* name);  // false: no such name, or this machine lacks the instructions

// An item of append is one row of one sequence of one layer; of gather, one row of one sequence. Items of one call may
// run in any order and on any thread; advance_state comes after all of them.
int64_t append_items(const AppendParams& params);
void append(const AppendParams& params, int64_t begin, int64_t end, bool stream);
void advance_state(const AppendParams& params);

int64_t gather_items(const GatherParams& params);
void gather(const GatherParams& params, int64_t begin, int64_t end, bool stream);

void truncate(const TruncateParams& params);

// The size of the last-level cache in bytes: a copy that writes more than this should stream.
int64_t last_level_cache_bytes();

}  // namespace cpu
}  // namespace kvc
