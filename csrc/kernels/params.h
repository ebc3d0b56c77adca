// One plain struct per op: everything a kernel needs, passed by value. No torch below this folder.
//
// Sizes: L layers, B batch, N positions (slots) per sequence, H kv_heads, D head_dim, T new positions.
// All strides are in elements. All FP16 data is carried as its bits in uint16_t.
#pragma once

#include <cstdint>

#include "divide.h"
#include "portable.h"

namespace kvc {

enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

constexpr int dtype_size(DType t) { return t == DType::f32 ? 4 : 2; }

// Integers on the device, contiguous.
struct Integers {
  const void* data = nullptr;  // int64_t or int32_t, or null
  bool are_32_bit = false;

  // With programmatic dependent launch the previous kernel may still be writing these. `volatile` forces a fresh load,
  // so a value read before the wait is not reused after it.
  KVC_HD int64_t operator[](int64_t i) const {
    return are_32_bit ? static_cast<const volatile int32_t*>(data)[i] : static_cast<const volatile int64_t*>(data)[i];
  }
};

// The sequences that a call is about: entry i of its tensors belongs to sequence indices[i] of the cache, and where
// that is out of range to none. Without indices, entry b belongs to sequence b, and there are B of them.
struct ChosenSequences {
  Integers indices;  // [count], distinct, or null
  int64_t count = 0;

  KVC_HD int64_t entries(int64_t batch) const { return indices.data == nullptr ? batch : count; }
  // The sequence that an entry belongs to, or -1.
  KVC_HD int64_t sequence(int64_t entry, int64_t batch) const {
    if (indices.data == nullptr) return entry;
    const int64_t sequence = indices[entry];
    return sequence >= 0 && sequence < batch ? sequence : -1;
  }
};

// The positions of a text that a cache stores. A text can be dealt out to W caches, one on each rank of a group of
// processes: rank r stores the positions p with p mod W = r, and numbers them p / W. These numbers are its local
// positions, which its slots are of; the state counts the positions of the text. A cache by itself is rank 0 of 1.
struct Share {
  Divider ranks = {1, ~uint64_t{0}};  // W
  int64_t rank = 0;

  KVC_HD bool is_all() const { return ranks.divisor == 1; }
  // How many of the first n positions are stored here, which is the local position of the next one.
  KVC_HD int64_t local(int64_t n) const { return is_all() ? n : n <= 0 ? 0 : ranks.div(n + ranks.divisor - 1 - rank); }
  KVC_HD int64_t position(int64_t local) const { return is_all() ? local : local * ranks.divisor + rank; }
  KVC_HD int64_t of_all_ranks(int64_t slots) const { return is_all() ? slots : slots * ranks.divisor; }
};

// The same for code that only serves caches of all positions: nothing to compute.
struct AllPositions {
  KVC_HD int64_t local(int64_t n) const { return n; }
  KVC_HD int64_t position(int64_t local) const { return local; }
  KVC_HD int64_t of_all_ranks(int64_t slots) const { return slots; }
};

// The cache as it lies in memory.
struct CacheView {
  uint16_t* k_cache;  // [L, B, N, H, D], contiguous
  uint16_t* v_cache;  // [L, B, N, H, D], contiguous
  int64_t* state;     // [3, L, B]: seqlen, first, arrivals (scratch, zero between launches)
  int64_t layers;     // L
  int64_t batch;      // B
  int64_t positions;  // N
  int64_t heads;      // H
  int64_t head_dim;   // D
  int64_t sinks;      // the slots of sinks, 0 <= sinks < N
  Divider ring;       // N - sinks, the slots that are used in turn
  Share share;        // the positions that are stored here
  int64_t all_sinks;  // sink_positions: `sinks` of all ranks
  int64_t all_ring;   // `ring` of all ranks

  KVC_HD void get(AllPositions&) const {}
  KVC_HD void get(Share& stored) const { stored = share; }
};

// A tensor [layers, B, T, H, D] of any strides, the one of D excepted, which is 1.
template <typename Pointer>
struct Rows {
  Pointer data;
  int64_t layer_stride;
  int64_t batch_stride;
  int64_t row_stride;  // from one position to the next
  int64_t head_stride;
};

// Convert T new positions to FP16 and store them behind what each sequence has; advance the state. Here and below, B of
// the call's tensors is the number of chosen sequences.
struct AppendParams {
  CacheView cache;
  int64_t* overflow_counts;  // [L]: += finite inputs with |x| >= 65520
  int64_t first_layer;       // the first layer that is appended to
  int64_t layer_count;       // how many are, from there on
  int64_t rows;              // T
  Rows<const void*> key;     // [layer_count, B, T, H, D] of `dtype`
  Rows<const void*> value;   // [layer_count, B, T, H, D] of `dtype`
  DType dtype;
  bool saturate;         // else finite values beyond the FP16 range become +-inf
  Integers new_lengths;  // [B], or null: all T rows of every entry
  ChosenSequences sequences = {};
};

// Copy chronological indices of one layer out, FP16 to `dtype`. Index `start + i`, or `indices[b, i]`.
// An index that is not held gives a row of zeros.
struct GatherParams {
  CacheView cache;
  int64_t layer;
  int64_t rows;                  // n
  int64_t start;                 // used when indices is null
  const int64_t* indices;        // [B, n] or null
  int64_t indices_batch_stride;  // 0 when all sequences share one list
  int64_t indices_stride;
  Rows<void*> key;    // [1, B, n, H, D] of `dtype`
  Rows<void*> value;  // [1, B, n, H, D] of `dtype`
  DType dtype;
  ChosenSequences sequences = {};
};

// The workspace of attention calls begins with tickets and two words more (AttendParams::redo, next_work). A ticket is
// a counter of a unit that is split, or of a group of its splits: how many have left their partial.
constexpr int64_t kAttendTickets = 1022;
constexpr int64_t kWorkspaceWords = kAttendTickets + 2;

// Whether the GPU's kernels for many queries serve a call. (A CPU's begin at another number: backend_cpu.cpp.) `rows`:
// T. `group`: query heads to a KV head.
KVC_HD bool is_for_many(int64_t rows, int64_t group) { return rows > 1 && rows * group > 16; }

// Attention of T queries of each sequence over what one layer holds; with `appends`, over that and T new positions, as
// if each were appended and attended to in turn.
//
// Query t stands at position p = seqlen - T + t (seqlen counted after the append). It sees the positions up to p that
// are held when it is its turn: the sinks, and of the others the last `ring`, or the last `window` if that is less.
struct AttendParams {
  CacheView cache;
  int64_t layer;
  int64_t rows;             // T
  int64_t query_heads;      // Hq, a multiple of H: query head j reads KV head j / (Hq / H)
  Rows<const void*> query;  // [1, B, T, Hq, D] of `dtype`
  Rows<void*> out;          // [1, B, T, Hq, D] of `out_dtype`
  float* lse;               // [B, T, Hq] natural log-sum-exp, or null
  DType dtype;
  DType out_dtype;  // `dtype`; FP32 if other ranks' answers are still to be merged with these
  float scale;
  float softcap;              // scores become softcap * tanh(score / softcap); 0: they stay
  int64_t window;             // 0: no window
  bool rounds;                // queries and weights may be rounded to FP16 (precision="fp16")
  bool may_read_before_wait;  // the previous launch does not touch this layer: it may be read ahead of the PDL wait
  bool appends;               // the fields of `append` count; else they are not read
  AppendParams append;        // of the same cache and layer, layer_count 1, T rows
  float* partials;            // workspace: what the splits of a unit leave to be merged
  uint32_t* tickets;          // workspace [kAttendTickets]: zero between launches
  int64_t partial_floats;     // the size of `partials`
  // The other fields are for calls with many queries.
  uint32_t* redo;          // workspace: not 0 if an output has a NaN and is to be computed anew; zero between calls
  uint32_t* next_work;     // workspace: the next query tile to work on; zero between calls
  int64_t* first_lengths;  // workspace [B]: how many of an entry's new positions are stored before attention, 0 or all
  int64_t* last_lengths;   // workspace [B]: how many are stored after it, as they evict what queries still see
  bool many;               // whether this is one

  // The least that `use_workspace` takes, in floats. (Two int64 numbers an entry are four.)
  static int64_t least_workspace(int64_t entries) { return kWorkspaceWords + 4 * entries; }
  // `data`: at a multiple of 16 bytes; tickets and words zero before the first call.
  void use_workspace(float* data, int64_t floats) {
    const int64_t entries = sequences.entries(cache.batch);
    tickets = reinterpret_cast<uint32_t*>(data);
    redo = tickets + kAttendTickets;
    next_work = redo + 1;
    first_lengths = reinterpret_cast<int64_t*>(data + kWorkspaceWords);
    last_lengths = first_lengths + entries;
    partials = data + least_workspace(entries);
    partial_floats = floats - least_workspace(entries);
    many = is_for_many(rows, query_heads / cache.heads);
  }
  ChosenSequences sequences = {};  // `append` has the same
};

// Keep the oldest held positions of some sequences of every layer (all, where fewer are held), or none of them. With
// `newest`, the numbers say instead how many of the newest held positions go: all, where fewer are held.
struct TruncateParams {
  int64_t* state;  // [3, L, B]
  int64_t layers;
  int64_t batch;
  int64_t sinks;     // sink_positions
  bool resets;       // forget everything and begin to number from 0 again: `length` and `lengths` do not count
  bool newest;       // `length` and `lengths` count what goes, not what stays
  int64_t length;    // of every sequence, where `lengths` is null; not negative
  Integers lengths;  // one for each of `sequences`, negative numbers counting as 0; or null
  ChosenSequences sequences;
};

// How ranks whose GPUs reach each other's memory hand over their answers: each writes its own into the inboxes of the
// others (merge.cu says what an inbox holds).
struct Exchange {
  static constexpr int kMostRanks = 16;

  uint32_t* inboxes[kMostRanks] = {};  // of every rank, as this one reaches it: [2, ranks, lines, 4]; all null: none
  int64_t lines = 0;                   // of an inbox, for the rows of one call of one rank
  uint32_t* control = nullptr;         // this rank's, zero at first: calls that are done, blocks arrived, what failed
  int64_t timeout_ns = 0;              // how long a rank waits for another's answers
  // Tests that run all ranks in one process do one after the other: every rank sends, then every rank receives, each
  // with a `control` of its own.
  bool sends = true;
  bool receives = true;

  int64_t most_rows(int64_t head_dim) const { return lines / (head_dim / 2 + 1); }
};

// What went wrong in a merge: a kind, and above it the rank whose answers were missing or did not fit.
constexpr uint32_t kMergeTimedOut = 1;
constexpr uint32_t kMergeOtherCall = 2;
constexpr uint32_t merge_failure(uint32_t kind, uint32_t rank) { return kind | rank << 8; }

// Merge what ranks answer over their shares of a text, in the order of ranks, so that all get the same bits. A row is
// the answer to one query of one head, as in out: row (b * T + t) * Hq + head.
struct MergeParams {
  int64_t first_row;  // the rows from this one on
  int64_t rows;       // so many
  int64_t head_dim;   // D, even
  int64_t ranks;
  int64_t rank;
  const float* answers;  // [all rows, D]: this rank's or, without an exchange, those of every rank, part_stride apart
  const float* lses;     // [all rows]: the same
  int64_t part_stride;   // in floats, even
  Rows<void*> out;       // [1, B, T, Hq, D] of `dtype`
  DType dtype;
  float* lse;               // [all rows] of the merged answers, or null
  FastDivider query_heads;  // Hq
  FastDivider positions;    // T
  uint32_t* failure;        // memory of the host: a merge_failure, if one is met; else it stays
  const int64_t* state;     // [3, L, B] of the cache: ranks whose lengths differ are found by it
  int64_t layer;
  int64_t layers;
  int64_t batch;
  ChosenSequences sequences;
  uint32_t call;       // what else must be the same on every rank, in one number
  const int64_t* tag;  // [1] on the device: the same
  Exchange exchange;
  // Without an exchange: what the ranks' lengths and tags were, behind their answers.
  const int64_t* lengths;  // [2 * B + 1] of the first rank, part_stride floats from one rank's to the next one's
};

constexpr int64_t kMostCopies = 4096;  // pairs that a block of copy_sequences has room for

// Let sequences become copies of others, in every layer: the rows that those hold, slot by slot, and their state. All
// are read before any is written to, so that sequences can change places.
struct CopySequencesParams {
  CacheView cache;
  Integers sources;       // [count] of 0 to B - 1. A pair with a number that is out of range is left out
  Integers destinations;  // [count] distinct ones, or null: 0, 1, ...
  int64_t count;          // at most kMostCopies
};

// Let sequences become copies of another cache's, in every layer: the rows that those hold, and their state. A smaller
// ring keeps the sinks and the newest. The two caches share no memory.
struct CopyFromParams {
  CacheView cache;        // written to
  CacheView source;       // read; layers, heads, head_dim and sinks are those of `cache`
  Integers sources;       // [count] of 0 to source.batch - 1. A pair with a number that is out of range is left out
  Integers destinations;  // [count] of 0 to cache.batch - 1, distinct
  int64_t count;          // at most kMostCopies
};

}  // namespace kvc
