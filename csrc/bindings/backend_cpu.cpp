// The CPU's backend: how many threads of torch's pool an op runs on, and what each of them does.
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../kernels/cpu/cpu.h"
#include "../kernels/cpu/prompt.h"
#include "backend.h"

namespace kvc {
namespace {

// Below this many elements a thread's start costs more than its help.
constexpr int64_t kElementsPerThread = int64_t{1} << 16;

template <typename Run>
void run_items(int64_t items, int64_t elements_per_item, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerThread / elements_per_item);
  if (items <= grain) {
    run(0, items);
  } else {
    at::parallel_for(0, items, grain, run);
  }
}

void append(const AppendParams& p, c10::Device) {
  const int64_t items = cpu::append_items(p);
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  // A KV cache larger than the processor's last-level cache evicts a new row from there before it is read again. So
  // even a single row is stored past the processor's caches.
  const int64_t cache_bytes = 2 * p.cache.layers * p.cache.batch * p.cache.positions * elements;
  const bool stream = cache_bytes > cpu::last_level_cache_bytes();
  run_items(items, elements, [&](int64_t begin, int64_t end) { cpu::append(p, begin, end, stream); });
  cpu::advance_state(p);
}

void gather(const GatherParams& p, c10::Device) {
  const int64_t items = cpu::gather_items(p);
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  const bool stream = items * elements * dtype_size(p.dtype) > cpu::last_level_cache_bytes();
  run_items(items, elements, [&](int64_t begin, int64_t end) { cpu::gather(p, begin, end, stream); });
}

// The rows of all sequences are cut into at most kMostRuns runs, none shorter than kLeastRun unless its sequence is.
// The cuts depend on lengths and not on threads, and so does the result of a call.
constexpr int64_t kMostRuns = 64;
constexpr int64_t kLeastRun = 256;

// The kernel for many queries serves calls with at least this many queries of a KV head, T * group. It works on eight
// at a time, so it takes as long for one as for eight. Measured with AVX2, one thread, 8 KV heads of 128, in ms a call:
// this kernel, then the kernel for few queries.
//   4,096 positions from memory   6 queries 5.1, 4.2    8: 5.0, 5.6   16: 7.6, 8.8    32: 11.5, 17.2
//   4,096 in the cache            6 queries 4.1, 4.1    8: 4.1, 5.0   16: 5.6, 10.3   64: 16.0, 41.6
//   256                           4 queries 0.27, 0.2   8: 0.26, 0.4  16: 0.36, 0.76  32: 0.58, 1.6
constexpr int64_t kManyQueries = 10;

// Below this many multiplications a thread's start costs more than its help.
constexpr int64_t kMultiplicationsPerThread = int64_t{1} << 20;

// Items differ in their cost, so each thread takes the next item when it is done with one.
void attend_many(const AttendParams& p) {
  cpu::PromptCall call(p);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    const cpu::PromptScratch scratch(p.cache.head_dim);
    for (int64_t item = next++; item < call.items(); item = next++) call.run(item, scratch.data());
  };
  const int64_t per_item = std::max<int64_t>(1, call.multiplications());
  const int64_t threads =
      std::min<int64_t>({at::get_num_threads(), call.items(), call.items() * per_item / kMultiplicationsPerThread});
  if (threads <= 1) {
    work(0, 1);
  } else {
    at::parallel_for(0, threads, 1, work);
  }
  call.finish();
}

void attend_few(const AttendParams& p) {
  const CacheView& c = p.cache;
  std::vector<cpu::AttendRun> runs;
  const int64_t entries = p.sequences.entries(c.batch);
  std::vector<int64_t> first_run(static_cast<size_t>(entries) + 1);
  const int64_t most = std::max<int64_t>(1, kMostRuns / std::max<int64_t>(1, entries * p.rows));
  for (int64_t entry = 0; entry < entries; ++entry) {
    const SequenceState state = cpu::state_of(c, p.layer, p.sequences.sequence(entry, c.batch));
    const AttendPlan plan = AttendPlan::make(p, entry, state);
    const int64_t length = std::max(kLeastRun, (plan.count + most - 1) / most);
    for (int64_t row = 0; row < plan.count; row += length) {
      runs.push_back({entry, row, std::min(plan.count, row + length)});
    }
    first_run[static_cast<size_t>(entry) + 1] = static_cast<int64_t>(runs.size());
  }
  const int64_t state_floats = p.rows * p.query_heads * (c.head_dim + 2);
  const auto count = static_cast<int64_t>(runs.size());
  std::vector<float> states(static_cast<size_t>(count * state_floats));
  run_items(count, kLeastRun * c.heads * c.head_dim,
            [&](int64_t begin, int64_t end) { cpu::attend(p, runs.data(), begin, end, states.data()); });
  for (int64_t entry = 0; entry < entries; ++entry) {
    const int64_t from = first_run[static_cast<size_t>(entry)];
    cpu::finish_attend(p, entry, first_run[static_cast<size_t>(entry) + 1] - from, states.data() + from * state_floats);
  }
}

void attend(const AttendParams& p, c10::Device device) {
  if (p.rows * (p.query_heads / p.cache.heads) >= kManyQueries) {
    attend_many(p);
  } else {
    attend_few(p);
  }
  if (p.appends) append(p.append, device);
}

void copy_sequences(const CopySequencesParams& p, c10::Device) {
  const std::vector<SequencePair> pairs = cpu::sequence_pairs(p);
  if (pairs.empty()) return;
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim * static_cast<int64_t>(pairs.size());
  run_items(cpu::copy_sequences_items(p), elements,
            [&](int64_t begin, int64_t end) { cpu::copy_sequences(p, pairs, begin, end); });
  cpu::move_states(p, pairs);
}

void copy_from(const CopyFromParams& p, c10::Device) {
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  run_items(cpu::copy_from_items(p), elements, [&](int64_t begin, int64_t end) { cpu::copy_from(p, begin, end); });
  cpu::copy_from_states(p);
}

void truncate(const TruncateParams& p, c10::Device) { cpu::truncate(p); }

void merge(const MergeParams& p, c10::Device) {
  cpu::compare_lengths(p);
  run_items(p.rows, p.ranks * p.head_dim, [&](int64_t begin, int64_t end) { cpu::merge(p, begin, end); });
}

}  // namespace

const Backend kCpuBackend = {
    .append = append,
    .gather = gather,
    .attend = attend,
    .copy_sequences = copy_sequences,
    .copy_from = copy_from,
    .truncate = truncate,
    .merge = merge,
    .graph_capture = [](c10::Device) -> uint64_t { return 0; },
};

}  // namespace kvc
