#include "strided_memory.h"

#include <c10/util/SmallVector.h>

#include <algorithm>
#include <numeric>
#include <vector>

namespace kvc {
namespace {

// How the runs of a tensor lie in memory, in bytes. The strides of a torch tensor are never negative.
struct Runs {
  struct Dimension {
    int64_t stride;
    int64_t count;  // at least 2
  };

  int64_t length;                             // of each run
  c10::SmallVector<Dimension, 6> dimensions;  // from one run to the next; the smallest stride first
  bool expanded = false;                      // a dimension has stride 0, so that runs coincide; it is left out above

  explicit Runs(const c10::TensorImpl& t) : length(static_cast<int64_t>(t.itemsize())) {
    for (int64_t i = 0; i < t.dim(); ++i) {
      const int64_t count = t.size(i);
      const int64_t stride = t.stride(i) * static_cast<int64_t>(t.itemsize());
      if (count > 1 && stride == 0) expanded = true;
      if (count > 1 && stride > 0) dimensions.push_back({stride, count});
    }
    std::sort(dimensions.begin(), dimensions.end(),
              [](const Dimension& a, const Dimension& b) { return a.stride < b.stride; });
    // Runs that follow each other without a gap are joined.
    auto first = dimensions.begin();
    for (; first != dimensions.end() && first->stride == length; ++first) length *= first->count;
    dimensions.erase(dimensions.begin(), first);
  }

  // From the first byte of the first run to past the last byte of the last.
  int64_t extent() const {
    int64_t bytes = length;
    for (const Dimension& d : dimensions) bytes += d.stride * (d.count - 1);
    return bytes;
  }

  // Does each dimension step over all that the smaller ones span? Then runs do not overlap, and they lie in the order
  // of their indices.
  bool nested() const {
    int64_t span = length;
    for (const Dimension& d : dimensions) {
      if (d.stride < span) return false;
      span += d.stride * (d.count - 1);
    }
    return true;
  }

  // Are the runs together longer than the extent? Then some of them overlap.
  bool too_many() const {
    const int64_t most = extent() / length;
    int64_t count = 1;
    for (const Dimension& d : dimensions) {
      if (d.count > most / count) return true;
      count *= d.count;
    }
    return false;
  }

  // The first byte of each run, ascending. The first run begins at `base`.
  std::vector<int64_t> starts(int64_t base) const {
    std::vector<int64_t> all{base};
    for (const Dimension& d : dimensions) {
      const size_t inner = all.size();
      all.reserve(inner * static_cast<size_t>(d.count));
      for (int64_t i = 1; i < d.count; ++i) {
        for (size_t j = 0; j < inner; ++j) all.push_back(all[j] + i * d.stride);
      }
    }
    if (!nested()) std::sort(all.begin(), all.end());
    return all;
  }
};

// Do all runs of `a` and of `b` keep to separate parts of a common period? Views that interleave in one buffer do.
bool interleave(const Runs& a, const Runs& b, int64_t from_a_to_b) {
  int64_t period = 0;
  for (const Runs* runs : {&a, &b}) {
    for (const Runs::Dimension& d : runs->dimensions) period = std::gcd(period, d.stride);
  }
  if (period == 0) return false;
  const int64_t shift = (from_a_to_b % period + period) % period;
  return shift >= a.length && shift + b.length <= period;
}

}  // namespace

bool StridedMemory::runs_meet(const StridedMemory& other) const {
  const Runs a(*tensor_);
  const Runs b(*other.tensor_);
  if (a.dimensions.empty() && b.dimensions.empty()) return true;
  const auto from_a_to_b = static_cast<int64_t>(other.begin_ - begin_);
  if (interleave(a, b, from_a_to_b)) return false;
  const std::vector<int64_t> of_a = a.starts(0);
  const std::vector<int64_t> of_b = b.starts(from_a_to_b);
  for (size_t i = 0, j = 0; i < of_a.size() && j < of_b.size();) {
    if (of_a[i] + a.length <= of_b[j]) {
      ++i;
    } else if (of_b[j] + b.length <= of_a[i]) {
      ++j;
    } else {
      return true;
    }
  }
  return false;
}

bool StridedMemory::runs_meet_within() const {
  const Runs runs(*tensor_);
  if (runs.expanded) return true;
  if (runs.nested()) return false;
  if (runs.too_many()) return true;
  const std::vector<int64_t> starts = runs.starts(0);
  return std::adjacent_find(starts.begin(), starts.end(), [&](int64_t a, int64_t b) { return b < a + runs.length; }) !=
         starts.end();
}

}  // namespace kvc
