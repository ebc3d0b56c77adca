// Attention of many queries: what to run.
#include "prompt.h"

#include <algorithm>

namespace kvc {
namespace cpu {
namespace {

// A call of few work items is cut into splits, at most this many items and splits of no fewer rows.
constexpr int64_t kMostItems = 64;
constexpr int64_t kLeastSplit = 1024;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

PromptCall::PromptCall(const AttendParams& params)
    : params_(params), entries_(params.sequences.entries(params.cache.batch)), longest_(0) {
  const CacheView& c = params.cache;
  const int64_t queries = params.rows * (params.query_heads / c.heads);
  tiles_ = divide_up(queries, most_lanes(c.head_dim));
  queries_ = std::min(divide_up(divide_up(queries, tiles_), 16) * 16, most_lanes(c.head_dim));
  plans_.reserve(static_cast<size_t>(entries_));
  for (int64_t entry = 0; entry < entries_; ++entry) {
    const SequenceState state = state_of(c, params.layer, params.sequences.sequence(entry, c.batch));
    plans_.push_back(AttendPlan::make(params, entry, state));
    longest_ = std::max(longest_, plans_.back().count);
  }
  const int64_t unsplit = std::max<int64_t>(1, entries_ * c.heads * tiles_);
  splits_ = std::max<int64_t>(1, std::min(kMostItems / unsplit, longest_ / kLeastSplit));
  if (splits_ > 1) {
    const int64_t partials = entries_ * splits_ * params.rows * params.query_heads;
    partials_.resize(static_cast<size_t>(partials * (c.head_dim + 2)));
  }
}

int64_t PromptCall::multiplications() const {
  return 2 * queries_ * std::max<int64_t>(1, longest_ / splits_) * params_.cache.head_dim;
}

void PromptCall::run(int64_t item, float* scratch) {
  const CacheView& c = params_.cache;
  const int64_t group = params_.query_heads / c.heads;
  const int64_t split = item % splits_;
  const int64_t unsplit = item / splits_;
  const int64_t tile = tiles_ - 1 - unsplit % tiles_;  // the longest come first
  const int64_t head = unsplit / tiles_ % c.heads;
  const int64_t entry = unsplit / tiles_ / c.heads;
  const int64_t begin = tile * queries_;
  const int64_t end = std::min(begin + queries_, params_.rows * group);
  if (begin >= end) return;
  const int64_t entry_floats = splits_ * params_.rows * params_.query_heads * (c.head_dim + 2);
  float* partials = splits_ > 1 ? partials_.data() + entry * entry_floats : nullptr;
  const InstructionSet& use = instruction_set();
  (c.head_dim % 16 == 0 ? use.prompt_multiples_of_16 : use.prompt)(
      params_, QueryTile{plans_[static_cast<size_t>(entry)], entry, head, begin, end, split, splits_, partials},
      *use.conversions, scratch);
}

void PromptCall::finish() {
  if (splits_ == 1) return;
  const int64_t entry_floats = splits_ * params_.rows * params_.query_heads * (params_.cache.head_dim + 2);
  for (int64_t entry = 0; entry < entries_; ++entry) {
    finish_attend(params_, entry, splits_, partials_.data() + entry * entry_floats);
  }
}

}  // namespace cpu
}  // namespace kvc
