#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../kernels/cpu/cpu.h"
#include "../kernels/cpu/prompt.h"
#include "devices.h"

namespace kvc {
namespace {

// The ops of a library that load_cpu_ops() was given; each returns 0 or an error number.
struct LoadedOps {
  int (*append)(const AppendParams*) = nullptr;
  int (*gather)(const GatherParams*) = nullptr;
  int (*attend)(const AttendParams*) = nullptr;
  int (*copy_sequences)(const CopySequencesParams*) = nullptr;
  int (*copy_from)(const CopyFromParams*) = nullptr;
  int (*truncate)(const TruncateParams*) = nullptr;
};
LoadedOps loaded_ops;

void check_loaded(int error) { TORCH_CHECK(error == 0, "the loaded CPU ops failed with error ", error); }

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

}  // namespace

void append_cpu(const AppendParams& p) {
  if (loaded_ops.append != nullptr) return check_loaded(loaded_ops.append(&p));
  const int64_t items = cpu::append_items(p);
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  // Where the cache as a whole is larger than the processor's, a new row will not be read again before it has gone from
  // there: even a single one is stored past it.
  const int64_t cache_bytes = 2 * p.cache.layers * p.cache.batch * p.cache.positions * elements;
  const bool stream = cache_bytes > cpu::last_level_cache_bytes();
  run_items(items, elements, [&](int64_t begin, int64_t end) { cpu::append(p, begin, end, stream); });
  cpu::advance_state(p);
}

void gather_cpu(const GatherParams& p) {
  if (loaded_ops.gather != nullptr) return check_loaded(loaded_ops.gather(&p));
  const int64_t items = cpu::gather_items(p);
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  const bool stream = items * elements * dtype_size(p.dtype) > cpu::last_level_cache_bytes();
  run_items(items, elements, [&](int64_t begin, int64_t end) { cpu::gather(p, begin, end, stream); });
}

namespace {

// A sequence's rows are cut into at most this many runs (over all sequences), each no shorter than kLeastRun. That
// depends on lengths alone and not on threads, so a call's answer does not either.
constexpr int64_t kMostRuns = 64;
constexpr int64_t kLeastRun = 256;

// From this many queries of a KV head on, T * group, the kernel for many queries serves. It works on eight at a time,
// so up to eight take it one time. Measured with AVX2, one thread, 8 KV heads of 128, ms a call, this kernel and the
// other:
//   4,096 positions from memory   6 queries 5.1, 4.2    8: 5.0, 5.6   16: 7.6, 8.8    32: 11.5, 17.2
//   4,096 in the cache            6 queries 4.1, 4.1    8: 4.1, 5.0   16: 5.6, 10.3   64: 16.0, 41.6
//   256                           4 queries 0.27, 0.2   8: 0.26, 0.4  16: 0.36, 0.76  32: 0.58, 1.6
constexpr int64_t kPromptQueries = 10;

// Below this many multiplications a thread's start costs more than its help.
constexpr int64_t kMultiplicationsPerThread = int64_t{1} << 20;

// Items differ in their cost, so each thread takes the next one when it is done with the last.
void attend_prompt(const AttendParams& p) {
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
  for (int64_t b = 0; b < entries; ++b) {
    const SequenceState state = cpu::state_of(c, p.layer, p.sequences.sequence(b, c.batch));
    const AttendPlan plan = AttendPlan::make(p, b, state);
    const int64_t length = std::max(kLeastRun, (plan.count + most - 1) / most);
    for (int64_t row = 0; row < plan.count; row += length) {
      runs.push_back({b, row, std::min(plan.count, row + length)});
    }
    first_run[static_cast<size_t>(b) + 1] = static_cast<int64_t>(runs.size());
  }
  const int64_t state_floats = p.rows * p.query_heads * (c.head_dim + 2);
  const auto count = static_cast<int64_t>(runs.size());
  std::vector<float> states(static_cast<size_t>(count * state_floats));
  run_items(count, kLeastRun * c.heads * c.head_dim,
            [&](int64_t begin, int64_t end) { cpu::attend(p, runs.data(), begin, end, states.data()); });
  for (int64_t b = 0; b < entries; ++b) {
    const int64_t from = first_run[static_cast<size_t>(b)];
    cpu::finish_attend(p, b, first_run[static_cast<size_t>(b) + 1] - from, states.data() + from * state_floats);
  }
}

}  // namespace

void attend_cpu(const AttendParams& p) {
  if (loaded_ops.attend != nullptr) {
    check_loaded(loaded_ops.attend(&p));
    if (p.appends && p.rows > 1 && !p.many) append_cpu(p.append);
    return;
  }
  if (p.rows * (p.query_heads / p.cache.heads) >= kPromptQueries) {
    attend_prompt(p);
  } else {
    attend_few(p);
  }
  if (p.appends) append_cpu(p.append);
}

void copy_sequences_cpu(const CopySequencesParams& p) {
  if (loaded_ops.copy_sequences != nullptr) return check_loaded(loaded_ops.copy_sequences(&p));
  const std::vector<SequencePair> pairs = cpu::sequence_pairs(p);
  if (pairs.empty()) return;
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim * static_cast<int64_t>(pairs.size());
  run_items(cpu::copy_sequences_items(p), elements,
            [&](int64_t begin, int64_t end) { cpu::copy_sequences(p, pairs, begin, end); });
  cpu::move_states(p, pairs);
}

void copy_from_cpu(const CopyFromParams& p) {
  if (loaded_ops.copy_from != nullptr) return check_loaded(loaded_ops.copy_from(&p));
  const int64_t elements = 2 * p.cache.heads * p.cache.head_dim;
  run_items(cpu::copy_from_items(p), elements, [&](int64_t begin, int64_t end) { cpu::copy_from(p, begin, end); });
  cpu::copy_from_states(p);
}

void truncate_cpu(const TruncateParams& p) {
  if (loaded_ops.truncate != nullptr) return check_loaded(loaded_ops.truncate(&p));
  cpu::truncate(p);
}

void load_cpu_ops(const char* path) {
  loaded_ops = {};
  if (path[0] == '\0') return;
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  TORCH_CHECK(library != nullptr, "load_cpu_ops: ", dlerror());
  LoadedOps ops;
  ops.append = reinterpret_cast<decltype(ops.append)>(dlsym(library, "kvc_append"));
  ops.gather = reinterpret_cast<decltype(ops.gather)>(dlsym(library, "kvc_gather"));
  ops.attend = reinterpret_cast<decltype(ops.attend)>(dlsym(library, "kvc_attend"));
  ops.copy_sequences = reinterpret_cast<decltype(ops.copy_sequences)>(dlsym(library, "kvc_copy_sequences"));
  ops.copy_from = reinterpret_cast<decltype(ops.copy_from)>(dlsym(library, "kvc_copy_from"));
  ops.truncate = reinterpret_cast<decltype(ops.truncate)>(dlsym(library, "kvc_truncate"));
  TORCH_CHECK(ops.append != nullptr && ops.gather != nullptr && ops.attend != nullptr &&
                  ops.copy_sequences != nullptr && ops.copy_from != nullptr && ops.truncate != nullptr,
              "load_cpu_ops: ", path,
              " lacks kvc_append, kvc_gather, kvc_attend, kvc_copy_sequences, kvc_copy_from or kvc_truncate");
  loaded_ops = ops;
}

}  // namespace kvc
