// The CPU twins of the GPU launchers: the same structs, the same ops. What to run in parallel is the caller's affair
// (it has the thread pool): an op is cut into items, and every item may run on any thread.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "../params.h"
#include "../visibility.h"

namespace kvc {
namespace cpu {

// The weight 2^x, x <= 0, of a finite score or of a partial softmax: not 0. NaN stays NaN.
template <typename T>
T weight_of_finite(T x) {
  return std::exp2(x < T{kLog2LeastWeight} ? T{kLog2LeastWeight} : x);
}

// Conversions of a run of elements. `stream`: store past the caches (worth it when the result is larger than they are).
struct Conversions {
  // Returns how many finite inputs overflow FP16.
  int64_t (*to_half)(DType from, const void* in, uint16_t* out, int64_t n, bool saturate, bool stream);
  void (*from_half)(DType to, const uint16_t* in, void* out, int64_t n, bool stream);
};

constexpr int kTile = 16;  // rows that attention works on at a time

// Adds the rows [begin, end) of an entry's sequence to the states of its queries.
//   queries [T * Hq, D] scaled; state [T * Hq, D + 2]: weighted sum, maximum, sum of weights;
//   scores [T * Hq, kTile], converted [2, kTile, H, D]: scratch
using AttendRows = void (*)(const AttendParams& p, const AttendPlan& plan, int64_t entry, int64_t begin, int64_t end,
                            const float* queries, float* state, float* scores, uint16_t* converted);

// Attention of one query tile (prompt.h).
struct QueryTile;
using AttendQueryTile = void (*)(const AttendParams& p, const QueryTile& tile, const Conversions& conversions,
                                 float* scratch);

extern const Conversions kGeneric;  // plain C++, any machine
void attend_generic(const AttendParams&, const AttendPlan&, int64_t, int64_t, int64_t, const float*, float*, float*,
                    uint16_t*);
void prompt_generic(const AttendParams&, const QueryTile&, const Conversions&, float*);
#if defined(__x86_64__)
extern const Conversions kAvx2;  // AVX2, F16C
void attend_avx2(const AttendParams&, const AttendPlan&, int64_t, int64_t, int64_t, const float*, float*, float*,
                 uint16_t*);
void attend_avx512(const AttendParams&, const AttendPlan&, int64_t, int64_t, int64_t, const float*, float*, float*,
                   uint16_t*);
void prompt_avx2(const AttendParams&, const QueryTile&, const Conversions&, float*);
void prompt_avx512(const AttendParams&, const QueryTile&, const Conversions&, float*);
#endif

// What a machine can do: the functions for its instructions.
struct InstructionSet {
  const char* name;
  const Conversions* conversions;
  AttendRows attend;
  AttendRows attend_multiples_of_16;  // the same, for such a head_dim
  AttendQueryTile prompt;
  AttendQueryTile prompt_multiples_of_16;
};

const InstructionSet& instruction_set();        // the best that this machine has, or the one that was selected
bool select_instruction_set(const char* name);  // false: no such name, or this machine lacks the instructions

// The two numbers of a sequence's state, in place. `state_row`: layer * batch + sequence.
inline int64_t* seqlen_of(const CacheView& c, int64_t state_row) { return c.state + state_row; }
inline int64_t* first_of(const CacheView& c, int64_t state_row) { return c.state + c.layers * c.batch + state_row; }

// The state of a sequence of a layer; of sequence -1: one that holds nothing.
SequenceState state_of(const CacheView& cache, int64_t layer, int64_t sequence);

// An item of append is one row of one entry of one layer; of gather, one row of one entry. Items of one call may
// run in any order and on any thread; advance_state comes after all of them.
int64_t append_items(const AppendParams& params);
void append(const AppendParams& params, int64_t begin, int64_t end, bool stream);
void advance_state(const AppendParams& params);

int64_t gather_items(const GatherParams& params);
void gather(const GatherParams& params, int64_t begin, int64_t end, bool stream);

// Attention: the rows that a sequence's queries see are cut into runs, each on any thread; then each query's states of
// all runs are merged, and the answer written. `states` [runs of all sequences, T * Hq, D + 2].
struct AttendRun {
  int64_t entry;
  int64_t begin;
  int64_t end;
};
constexpr int64_t kMaxHeadDim = 512;
void attend(const AttendParams& params, const AttendRun* runs, int64_t begin, int64_t end, float* states);
void finish_attend(const AttendParams& params, int64_t entry, int64_t runs, const float* states);

void truncate(const TruncateParams& params);

// An item is a row. Without an exchange, which is for GPUs.
void merge(const MergeParams& params, int64_t begin, int64_t end);
void compare_lengths(const MergeParams& params);

// The pairs whose data moves. Then an item is one slot of one layer; move_states comes after all items.
std::vector<SequencePair> sequence_pairs(const CopySequencesParams& params);
int64_t copy_sequences_items(const CopySequencesParams& params);
void copy_sequences(const CopySequencesParams& params, const std::vector<SequencePair>& pairs, int64_t begin,
                    int64_t end);
void move_states(const CopySequencesParams& params, const std::vector<SequencePair>& pairs);

// An item is one row that a pair of sequences may move in one layer: by the index that it will have, so many of them as
// either cache has slots. copy_from_states comes after all items.
int64_t copy_from_items(const CopyFromParams& params);
void copy_from(const CopyFromParams& params, int64_t begin, int64_t end);
void copy_from_states(const CopyFromParams& params);

// The size of the last-level cache in bytes: a copy that writes more than this should stream.
int64_t last_level_cache_bytes();

}  // namespace cpu
}  // namespace kvc
