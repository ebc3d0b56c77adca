// Attention of many queries on a CPU: how a call is cut into work, and which rows a query sees.
//
// The T * group queries that share a KV head are numbered t * group + g. They are cut into query tiles. One work item
// is one query tile against the rows that it sees, or against one of the splits of those rows.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

#include "../params.h"
#include "../visibility.h"
#include "cpu.h"

namespace kvc {
namespace cpu {

constexpr int64_t kKeyTile = 64;  // rows of keys and values that are worked on at a time
// Rows of the panel that they are converted into. The two more keep what is stored together from going to the same few
// sets of the first-level cache.
constexpr int64_t kPanelRows = kKeyTile + 2;
constexpr int64_t kMostLanes = 96;   // queries of a query tile
constexpr int64_t kRowRounding = 8;  // the kernels take this many rows of a key tile at a time, or fewer
constexpr int64_t kPieceTiles = 16;  // key tiles whose sums are kept apart, or rounding adds up
constexpr int64_t kLongHeadDim =
    256;  // above this, query tiles have half as many lanes, to stay in a second-level cache

inline int64_t most_lanes(int64_t head_dim) { return head_dim > kLongHeadDim ? kMostLanes / 2 : kMostLanes; }

// What one query sees of the rows of its tile: the places [0, sinks_end) and [begin, end).
struct Sight {
  int64_t sinks_end;
  int64_t begin;
  int64_t end;

  bool sees(int64_t place) const { return place < sinks_end || (place >= begin && place < end); }
  bool sees_all(int64_t first, int64_t last) const { return last <= sinks_end || (first >= begin && last <= end); }
};

// The rows that some query of a query tile sees. They have places 0, 1, ...: first the sinks, then a run of others.
struct SeenRows {
  int64_t sinks;  // places below this are sinks, and place = row
  int64_t begin;  // the row at place `sinks`
  int64_t count;

  // `first` and `last` are the times t of the tile's queries.
  static SeenRows make(const AttendPlan& plan, int64_t first, int64_t last) {
    if (last < plan.padding) return {0, 0, 0};
    const int64_t sinks = sinks_end(plan, last);
    const int64_t begin = run_begin(plan, imax(first, plan.padding));
    return {sinks, begin, sinks + imax(run_end(plan, last) - begin, 0)};
  }

  int64_t row(int64_t place) const { return place < sinks ? place : begin + (place - sinks); }

  Sight sight(const AttendPlan& plan, int64_t t) const {
    if (t < plan.padding) return {0, 0, 0};
    Sight s{sinks_end(plan, t), sinks + run_begin(plan, t) - begin, sinks + run_end(plan, t) - begin};
    if (s.begin <= s.sinks_end) s.begin = 0;  // one run
    return s;
  }

 private:
  static int64_t sinks_end(const AttendPlan& plan, int64_t t) { return imin(imax(plan.past(t), 0), plan.sinks_held); }
  static int64_t run_begin(const AttendPlan& plan, int64_t t) {
    return plan.sinks_held + imax(plan.oldest_for(t) - plan.oldest, 0);
  }
  static int64_t run_end(const AttendPlan& plan, int64_t t) {
    return imin(plan.sinks_held + imax(plan.past(t) - plan.oldest, 0), plan.count);
  }
};

// One work item.
struct QueryTile {
  const AttendPlan& plan;
  int64_t entry;
  int64_t head;   // KV head
  int64_t begin;  // the numbers of its queries: [begin, end)
  int64_t end;
  int64_t split;  // which of `splits` parts of the rows that it sees
  int64_t splits;
  float* partials;  // [splits, T * Hq, D + 2] of its entry: weighted sum, maximum, sum of weights. Null for one split
};

// What a thread works in. It begins with a cache line, so that no vector straddles two.
class PromptScratch {
 public:
  explicit PromptScratch(int64_t head_dim) : memory_(new float[static_cast<size_t>(floats(head_dim)) + kLine]) {}

  float* data() const {
    const auto address = reinterpret_cast<uintptr_t>(memory_.get()) / sizeof(float);
    return memory_.get() + (kLine - address % kLine) % kLine;
  }

 private:
  static constexpr size_t kLine = 16;  // floats

  static int64_t floats(int64_t head_dim) {
    return most_lanes(head_dim) * (3 * head_dim + kKeyTile) + kPanelRows * head_dim + head_dim;
  }

  std::unique_ptr<float[]> memory_;
};

// A call, cut into work items. They may run in any order and on any thread; finish comes after all of them.
class PromptCall {
 public:
  explicit PromptCall(const AttendParams& params);

  int64_t items() const { return entries_ * params_.cache.heads * tiles_ * splits_; }
  int64_t multiplications() const;  // of an item, at most
  void run(int64_t item, float* scratch);
  void finish();

 private:
  const AttendParams& params_;
  const int64_t entries_;
  int64_t tiles_;    // query tiles of a KV head
  int64_t queries_;  // of a query tile
  int64_t splits_;   // of the rows that a query tile sees. They depend on lengths alone and not on threads
  int64_t longest_;
  std::vector<AttendPlan> plans_;
  std::vector<float> partials_;  // [entries, splits, T * Hq, D + 2], if there are several splits
};

}  // namespace cpu
}  // namespace kvc
