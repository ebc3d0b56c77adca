// Where tests/sanitize.cu runs: its buffers, and the ops on them. One of three, chosen by how it is compiled.
//
//   nvcc                       the GPU's kernels; buffers straight from cudaMalloc
//   g++ -I tests/emulator      the same kernels, emulated on a CPU
//   g++                        the CPU's kernels
//
// On a CPU half of the buffers, as chance has it, are malloc's, whose ends AddressSanitizer knows to the byte, and half
// end where a page begins that cannot be touched: streaming stores are instructions that AddressSanitizer does not see.
// All are filled with NaN, so that what is read before it was written shows in the answers.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

#include "../csrc/kernels/launch.h"
#else
#include <sys/mman.h>
#include <unistd.h>
#if defined(SANITIZE_EMULATED)
#include "../csrc/kernels/launch.h"
#else
#include "../csrc/kernels/cpu/cpu.h"
#endif
#endif

#include "../csrc/kernels/ring.h"
#include "../csrc/kernels/visibility.h"

#if defined(SANITIZE_EMULATED)
constexpr bool kEmulated = true;  // minutes for what takes others seconds: smaller shapes
#else
constexpr bool kEmulated = false;
#endif

inline uint32_t random_state = 1;
inline uint32_t random_below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<uint32_t>((static_cast<uint64_t>(random_state) * n) >> 32);
}

[[noreturn]] inline void fail(const char* what, const char* why) {
  std::printf("sanitize: %s: %s\n", what, why);
  std::exit(1);
}

#if defined(__CUDACC__)

constexpr bool kOnHost = false;

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, cudaGetErrorString(error));
}

inline void* allocate(size_t bytes) {
  void* data = nullptr;
  check(cudaMalloc(&data, bytes), "cudaMalloc");
  return data;
}
inline void release(void* data) { cudaFree(data); }
inline void copy_in(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}
inline void copy_out(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
}
inline void set_bytes(void* to, int value, size_t bytes) { check(cudaMemset(to, value, bytes), "cudaMemset"); }
inline void finish() { check(cudaDeviceSynchronize(), "the kernels"); }

#else

constexpr bool kOnHost = true;

struct Pages {
  void* data;
  void* start;
  size_t bytes;
};
inline std::vector<Pages> guarded;

inline void* allocate(size_t bytes) {
  void* data;
  if (random_below(2) == 0) {
    data = std::malloc(bytes);
  } else {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t whole = (bytes + page - 1) / page * page;
    void* start = mmap(nullptr, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + whole, page, PROT_NONE) != 0) {
      fail("mmap", "no memory");
    }
    data = static_cast<char*>(start) + (whole - bytes);
    guarded.push_back({data, start, whole + page});
  }
  std::memset(data, 0xff, bytes);
  return data;
}
inline void release(void* data) {
  for (size_t i = 0; i < guarded.size(); ++i) {
    if (guarded[i].data != data) continue;
    munmap(guarded[i].start, guarded[i].bytes);
    guarded.erase(guarded.begin() + static_cast<int64_t>(i));
    return;
  }
  std::free(data);
}
inline void copy_in(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void copy_out(void* to, const void* from, size_t bytes) { std::memcpy(to, from, bytes); }
inline void set_bytes(void* to, int value, size_t bytes) { std::memset(to, value, bytes); }
inline void finish() {}

#endif

template <typename T>
struct Buffer {
  T* data;
  size_t size;
  explicit Buffer(int64_t n) : data(nullptr), size(static_cast<size_t>(n)) {
    data = static_cast<T*>(allocate(size * sizeof(T)));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(data); }
  // Into the last elements: whoever reads past their end reads past the buffer's.
  T* set(const std::vector<T>& from) {
    if (from.size() > size) fail("Buffer::set", "too many elements");
    T* to = data + (size - from.size());
    copy_in(to, from.data(), from.size() * sizeof(T));
    return to;
  }
};

#if defined(__CUDACC__) || defined(SANITIZE_EMULATED)

inline void check_launch(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail(what, "the launch was refused");
}
inline void run_op(const kvc::AppendParams& p) { check_launch(kvc::launch_append(p, nullptr), "append"); }
inline void run_op(const kvc::GatherParams& p) { check_launch(kvc::launch_gather(p, nullptr), "gather"); }
inline void run_op(const kvc::AttendParams& p) {
  static int calls = 0;
  kvc::prefer_portable_prompts(++calls % 2 == 0);  // either kernel for many queries, in turns
  check_launch(kvc::launch_attend(p, nullptr), "attend");
  if (p.appends && p.rows > 1 && !p.many) run_op(p.append);
}
inline void run_op(const kvc::CopySequencesParams& p) {
  check_launch(kvc::launch_copy_sequences(p, nullptr), "copy_sequences");
}
inline void run_op(const kvc::CopyFromParams& p) { check_launch(kvc::launch_copy_from(p, nullptr), "copy_from"); }
inline void run_op(const kvc::TruncateParams& p) { check_launch(kvc::launch_truncate(p, nullptr), "truncate"); }
inline void run_op(const kvc::MergeParams& p) { check_launch(kvc::launch_merge(p, nullptr), "merge"); }
constexpr bool kExchanges = true;

#else

// Items are cut at random, as a thread pool might cut them.
template <typename Run>
inline void in_pieces(int64_t items, const Run& run) {
  for (int64_t begin = 0; begin < items;) {
    const int64_t end = random_below(3) == 0 ? items : begin + 1 + random_below(static_cast<uint32_t>(items - begin));
    run(begin, end);
    begin = end;
  }
}

inline void run_op(const kvc::AppendParams& p) {
  const bool stream = random_below(2) == 0;
  in_pieces(kvc::cpu::append_items(p), [&](int64_t begin, int64_t end) { kvc::cpu::append(p, begin, end, stream); });
  kvc::cpu::advance_state(p);
}

inline void run_op(const kvc::GatherParams& p) {
  const bool stream = random_below(2) == 0;
  in_pieces(kvc::cpu::gather_items(p), [&](int64_t begin, int64_t end) { kvc::cpu::gather(p, begin, end, stream); });
}

inline void run_op(const kvc::AttendParams& p) {
  const kvc::CacheView& c = p.cache;
  std::vector<kvc::cpu::AttendRun> runs;
  std::vector<int64_t> first_run{0};
  for (int64_t b = 0; b < p.sequences.entries(c.batch); ++b) {
    const kvc::SequenceState state = kvc::cpu::state_of(c, p.layer, p.sequences.sequence(b, c.batch));
    const kvc::AttendPlan plan = kvc::AttendPlan::make(p, b, state);
    in_pieces(plan.count, [&](int64_t begin, int64_t end) { runs.push_back({b, begin, end}); });
    first_run.push_back(static_cast<int64_t>(runs.size()));
  }
  const int64_t of_run = p.rows * p.query_heads * (c.head_dim + 2);
  const int64_t count = static_cast<int64_t>(runs.size());
  Buffer<float> states(count * of_run);
  in_pieces(count, [&](int64_t begin, int64_t end) { kvc::cpu::attend(p, runs.data(), begin, end, states.data); });
  for (size_t b = 0; b + 1 < first_run.size(); ++b) {
    kvc::cpu::finish_attend(p, static_cast<int64_t>(b), first_run[b + 1] - first_run[b],
                            states.data + first_run[b] * of_run);
  }
  if (p.appends) run_op(p.append);
}

inline void run_op(const kvc::CopySequencesParams& p) {
  const std::vector<kvc::SequencePair> pairs = kvc::cpu::sequence_pairs(p);
  if (pairs.empty()) return;
  in_pieces(kvc::cpu::copy_sequences_items(p),
            [&](int64_t begin, int64_t end) { kvc::cpu::copy_sequences(p, pairs, begin, end); });
  kvc::cpu::move_states(p, pairs);
}

inline void run_op(const kvc::CopyFromParams& p) {
  in_pieces(kvc::cpu::copy_from_items(p), [&](int64_t begin, int64_t end) { kvc::cpu::copy_from(p, begin, end); });
  kvc::cpu::copy_from_states(p);
}

inline void run_op(const kvc::TruncateParams& p) { kvc::cpu::truncate(p); }

inline void run_op(const kvc::MergeParams& p) {
  kvc::cpu::compare_lengths(p);
  in_pieces(p.rows, [&](int64_t begin, int64_t end) { kvc::cpu::merge(p, begin, end); });
}
constexpr bool kExchanges = false;  // GPUs reach each other's memory

#endif
