// How many blocks of which size an attention launch is made of: what all of its kernels choose by. Host code. The
// figures are an H200's, see docs/performance.md.
#pragma once

#include <cstdint>

#include "../ring.h"

namespace kvc {

// Blocks of one size that a launch could be made of.
struct Blocks {
  int64_t units;
  int64_t multiprocessors;
  int64_t at_a_time;    // on a multiprocessor
  int64_t most_splits;  // of a unit, at least 1
  int64_t part_floats;  // that a split leaves

  // How much of the GPU is at work until the end, 1 at most: some multiprocessors may get one block less than others,
  // and where not all run at once, the last to run may be few.
  double filling(int64_t splits) const {
    const int64_t blocks = units * splits;
    const int64_t turn = multiprocessors * (blocks > multiprocessors * at_a_time ? at_a_time : 1);
    return static_cast<double>(blocks) / static_cast<double>((blocks + turn - 1) / turn * turn);
  }
  // As many as run at once.
  int64_t all_splits() const { return imax(imin(multiprocessors * at_a_time / units, most_splits), 1); }
  // As many or fewer: those that fill the GPU best.
  int64_t best_splits() const {
    int64_t best = 1;
    for (int64_t splits = 2; splits <= all_splits(); ++splits) {
      if (filling(splits) > filling(best)) best = splits;
    }
    return best;
  }
  double best_filling() const { return filling(best_splits()); }
  bool all_run() const { return units <= multiprocessors * at_a_time; }

  struct Choice {
    int64_t splits;
    int64_t time;  // in 0.1 us on an H200, roughly
  };
  // As many or fewer: those that take the least time, where one block would take so many turns for a unit's rows, and
  // loads the rows of two at once. Measured on an H200 (docs/performance.md).
  Choice quickest(int64_t turns, int64_t turn_time = 10) const {
    constexpr int64_t kMerge = 10;  // whatever the number of parts
    Choice best = {1, INT64_MAX};
    for (int64_t splits = all_splits(); splits > 0; --splits) {
      const int64_t each = imax((turns + splits - 1) / splits, 1);
      if (turn_time * each >= best.time) break;
      splits = imax((turns + each - 1) / each, 1);
      // The third turn has to wait for memory again. Each multiprocessor has so many blocks.
      const int64_t waits =
          turn_time * (each + (each > 2)) * ((units * splits + multiprocessors - 1) / multiprocessors);
      const int64_t time = waits + splits * part_floats / 1024 + (splits > 1 ? kMerge : 0);
      if (time <= best.time) best = {splits, time};
    }
    return best;
  }
};

// Whether small blocks fill the GPU better than large ones, by so much.
inline bool fill_better(const Blocks& small, const Blocks& large, double by) {
  return small.best_filling() >= large.filling(large.all_splits()) + by;
}

// Where large blocks, of so many splits, all run at once, small ones mean more splits to merge. It takes a cache of so
// many positions, too few multiprocessors for as many splits as there could be, and that much more of the GPU, to be
// worth that (docs/performance.md).
constexpr int64_t kWorthSplitting = 1024;
inline bool worth_splitting(const Blocks& small, const Blocks& large, int64_t splits, int64_t positions, double by) {
  if (positions < kWorthSplitting || splits == large.most_splits || splits < large.all_splits()) return false;
  return large.filling(splits) + by <= 1 && fill_better(small, large, by);
}

}  // namespace kvc
