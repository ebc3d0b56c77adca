// Merging the answers of several ranks, on a CPU.
#include <algorithm>
#include <vector>

#include "../merging.h"
#include "cpu.h"

namespace kvc {
namespace cpu {

void compare_lengths(const MergeParams& p) {
  for (int64_t r = 0; r < p.ranks; ++r) {
    const auto* theirs =
        reinterpret_cast<const int64_t*>(reinterpret_cast<const float*>(p.lengths) + r * p.part_stride);
    const int64_t* mine = p.state + p.layer * p.batch;
    const bool same = std::equal(mine, mine + p.batch, theirs) &&
                      std::equal(mine + p.layers * p.batch, mine + (p.layers + 1) * p.batch, theirs + p.batch) &&
                      theirs[2 * p.batch] == *p.tag;
    if (!same) *p.failure = merge_failure(kMergeOtherCall, static_cast<uint32_t>(r));
  }
}

void merge(const MergeParams& p, int64_t begin, int64_t end) {
  std::vector<float> sums(static_cast<size_t>(p.head_dim));
  for (int64_t row = p.first_row + begin; row < p.first_row + end; ++row) {
    std::fill(sums.begin(), sums.end(), 0.0f);
    Merging merging;
    for (int64_t r = 0; r < p.ranks; ++r) {
      if (!merging.add(p.lses[r * p.part_stride + row])) continue;
      const float* answer = p.answers + r * p.part_stride + row * p.head_dim;
      for (int64_t d = 0; d < p.head_dim; ++d) {
        float& sum = sums[static_cast<size_t>(d)];
        sum = sum * merging.keep + answer[d] * merging.weight;
      }
    }
    const int64_t offset = out_offset(p, row);
    const float factor = merging.factor();
    for (int64_t d = 0; d < p.head_dim; ++d) store_answer(p, offset + d, sums[static_cast<size_t>(d)] * factor);
    if (p.lse != nullptr) p.lse[row] = merging.lse();
  }
}

}  // namespace cpu
}  // namespace kvc
