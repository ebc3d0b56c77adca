// merge: what several ranks answer over their shares of a text becomes the answer over the whole text.
//
// Where the answers of all ranks lie in this GPU's memory (a collective has gathered them), a thread merges two
// elements of a row. Grid: as many threads as there are such pairs, up to a few blocks a multiprocessor.
//
// With an exchange the same launch also fetches the others' answers. Each rank has an inbox in its own memory, which
// the others write to. It holds, twice, a table of lines for every rank: a line is two numbers, each followed by the
// number of the call. A thread of the sender stores a line at once (16 bytes), and a thread of the receiver reads it
// until both numbers of the call are there; so data needs neither fences nor flags of its own (the LL protocol of
// NCCL). A row has D / 2 lines of its answer and one with its LSE and a check of the lengths.
//
// The table is there twice, for calls of even and of odd number. A rank sends call n + 2 when its launch of call n + 1
// has ended, for which the other's launch of n + 1 must have begun, and so its launch of n must have ended: what is
// overwritten has been read.
//
// A rank that waits too long, or finds that another has other lengths, notes what failed. From then on nothing is sent
// or waited for: answers are NaN, and the host raises when it looks (kvcache_ext/distributed).
#include "launch.h"
#include "merging.h"
#include "pdl.cuh"
#include "ring.h"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksEach = 4;  // of a multiprocessor, at most
constexpr int kPollsBetweenChecks = 64;

using Line = Vec<uint32_t, 4>;

#if defined(KVC_EMULATED)
inline void send_line(uint32_t* to, const Line& line) { *reinterpret_cast<Line*>(to) = line; }
inline Line poll_line(const uint32_t* from) { return *reinterpret_cast<const Line*>(from); }
inline int64_t nanoseconds() {
  static int64_t now = 0;
  return now += 1000000;
}
#else
__device__ __forceinline__ void send_line(uint32_t* to, const Line& line) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(to), "r"(line.x[0]), "r"(line.x[1]),
               "r"(line.x[2]), "r"(line.x[3])
               : "memory");
}
__device__ __forceinline__ Line poll_line(const uint32_t* from) {
  Line line;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(line.x[0]), "=r"(line.x[1]), "=r"(line.x[2]), "=r"(line.x[3])
               : "l"(from)
               : "memory");
  return line;
}
__device__ __forceinline__ int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %globaltimer;\n" : "=l"(now));
  return now;
}
#endif

__device__ __forceinline__ uint32_t read_anew(const uint32_t* word) {
  return *static_cast<const volatile uint32_t*>(word);
}

// A row's lengths and the tag in one number, which ranks compare. Entries of no sequence count as empty.
__device__ __forceinline__ uint32_t check_of_row(const MergeParams& p, int64_t row) {
  const uint32_t entry = p.positions(p.query_heads(static_cast<uint32_t>(row)));
  const int64_t sequence = p.sequences.sequence(entry, p.batch);
  const int64_t* seqlen = p.state + p.layer * p.batch + imax(sequence, 0);
  const int64_t numbers[3] = {*p.tag, sequence < 0 ? 0 : seqlen[0], sequence < 0 ? 0 : seqlen[p.layers * p.batch]};
  uint32_t check = p.call;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    check = (check ^ static_cast<uint32_t>(numbers[i])) * 0x9e3779b1u;  // golden ratio: neighbours lie far apart
    check = (check ^ static_cast<uint32_t>(numbers[i] >> 32)) * 0x9e3779b1u;
  }
  return check;
}

__device__ __forceinline__ void note_failure(const MergeParams& p, uint32_t kind, int64_t rank) {
  const uint32_t failure = merge_failure(kind, static_cast<uint32_t>(rank));
  if (p.exchange.control == nullptr || atomicMax(p.exchange.control + 2, failure) == 0) {
    *static_cast<volatile uint32_t*>(p.failure) = failure;
  }
}

// One call's lines in the inboxes.
struct Lines {
  const MergeParams& p;
  uint32_t call;  // its number
  int64_t pairs;  // of a row

  // Of a sender's table in a receiver's inbox. `row` is counted from the call's first.
  __device__ __forceinline__ uint32_t* at(int64_t receiver, int64_t sender, int64_t row, int64_t column) const {
    const int64_t table = (call & 1) * p.ranks + sender;
    return p.exchange.inboxes[receiver] + (table * p.exchange.lines + row * (pairs + 1) + column) * 4;
  }

  __device__ __forceinline__ void send(int64_t row, int64_t column) const {
    const int64_t of_all = p.first_row + row;
    const Vec<float, 2> pair = load<float, 2>(p.answers + of_all * p.head_dim + 2 * column);
    const Line line = {{float_bits(pair.x[0]), call, float_bits(pair.x[1]), call}};
    const bool first = column == 0;
    Line end = {};
    if (first) end = {{float_bits(p.lses[of_all]), call, check_of_row(p, of_all), call}};
#pragma unroll 1
    for (int64_t r = 0; r < p.ranks; ++r) {
      if (r == p.rank) continue;
      send_line(at(r, p.rank, row, column), line);
      if (first) send_line(at(r, p.rank, row, pairs), end);
    }
  }

  // Waits for a line of a rank. False: it did not come in time, or something else has failed.
  __device__ __forceinline__ bool receive(int64_t sender, int64_t row, int64_t column, uint32_t (&data)[2]) const {
    const uint32_t* const from = at(p.rank, sender, row, column);
    int64_t since = 0;
#pragma unroll 1
    for (int polls = 0;; ++polls) {
      const Line line = poll_line(from);
      data[0] = line.x[0];
      data[1] = line.x[2];
      if (line.x[1] == call && line.x[3] == call) return true;
      if (polls % kPollsBetweenChecks != kPollsBetweenChecks - 1) continue;
      if (read_anew(p.exchange.control + 2) != 0) return false;
      const int64_t now = nanoseconds();
      if (since == 0) since = now;
      if (now - since > p.exchange.timeout_ns) {
        note_failure(p, kMergeTimedOut, sender);
        return false;
      }
    }
  }
};

__device__ __forceinline__ bool has_other_lengths(const MergeParams& p, int64_t rank) {
  const auto* theirs =
      reinterpret_cast<const int64_t*>(reinterpret_cast<const float*>(p.lengths) + rank * p.part_stride);
  const int64_t* mine = p.state + p.layer * p.batch;
  bool differs = theirs[2 * p.batch] != *p.tag;
#pragma unroll 1
  for (int64_t b = 0; b < p.batch; ++b) {
    differs = differs || mine[b] != theirs[b] || mine[p.layers * p.batch + b] != theirs[p.batch + b];
  }
  return differs;
}

// Ranks that have gathered answers compare their lengths, each block for itself. True: a rank has others.
__device__ __forceinline__ bool lengths_differ(const MergeParams& p) {
  __shared__ uint32_t differ;
  if (threadIdx.x == 0) differ = 0;
  __syncthreads();
#pragma unroll 1
  for (int64_t rank = threadIdx.x; rank < p.ranks; rank += kThreads) {
    if (!has_other_lengths(p, rank)) continue;
    note_failure(p, kMergeOtherCall, rank);
    differ = 1;
  }
  __syncthreads();
  return differ != 0;
}

// When all blocks have read the number of the call, the last to arrive counts it.
__device__ __forceinline__ void end_call(const MergeParams& p, uint32_t call) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(p.exchange.control + 1, 1u) + 1 != gridDim.x) return;
  p.exchange.control[1] = 0;
  p.exchange.control[0] = call;
}

template <bool kExchanges>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const __grid_constant__ MergeParams p, const FastDivider pairs) {
  wait_for_previous_launch();
  let_next_launch_begin();
  const uint32_t items = static_cast<uint32_t>(p.rows) * pairs.divisor;
  const uint32_t threads = gridDim.x * kThreads;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  uint32_t call = 0;
  bool failed = false;
  if constexpr (kExchanges) {
    call = read_anew(p.exchange.control) + 1;
    failed = read_anew(p.exchange.control + 2) != 0;
  } else {
    failed = lengths_differ(p);
  }
  const Lines lines{p, call, pairs.divisor};
  // All is sent before anything is waited for, so that no rank waits for a block that has yet to begin.
  if (kExchanges && p.exchange.sends && !failed) {
#pragma unroll 1
    for (uint32_t item = thread; item < items; item += threads) {
      const uint32_t row = pairs(item);
      lines.send(row, item - row * pairs.divisor);
    }
  }
  if (kExchanges && !p.exchange.receives) {
    end_call(p, call);
    return;
  }
#pragma unroll 1
  for (uint32_t item = thread; item < items; item += threads) {
    const uint32_t row = pairs(item);
    const uint32_t column = item - row * pairs.divisor;
    const int64_t of_all = p.first_row + row;
    Merging merging;
    float sums[2] = {};
#pragma unroll 1
    for (int64_t r = 0; r < p.ranks; ++r) {
      float lse;
      float x[2];
      if (!kExchanges || r == p.rank) {
        const int64_t part = kExchanges ? 0 : r * p.part_stride;
        const Vec<float, 2> pair = load<float, 2>(p.answers + part + of_all * p.head_dim + 2 * column);
        x[0] = pair.x[0];
        x[1] = pair.x[1];
        lse = p.lses[part + of_all];
      } else {
        uint32_t answer[2], end[2];
        if (failed || !lines.receive(r, row, column, answer) || !lines.receive(r, row, pairs.divisor, end)) {
          failed = true;
          break;
        }
        if (end[1] != check_of_row(p, of_all)) {
          note_failure(p, kMergeOtherCall, r);
          failed = true;
          break;
        }
        x[0] = bits_float(answer[0]);
        x[1] = bits_float(answer[1]);
        lse = bits_float(end[0]);
      }
      if (!merging.add(lse)) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i) sums[i] = sums[i] * merging.keep + x[i] * merging.weight;
    }
    const float nan = bits_float(0x7fc00000u);
    const float factor = merging.factor();
    const int64_t offset = out_offset(p, of_all) + 2 * column;
#pragma unroll
    for (int i = 0; i < 2; ++i) store_answer(p, offset + i, failed ? nan : sums[i] * factor);
    if (p.lse != nullptr && column == 0) p.lse[of_all] = failed ? nan : merging.lse();
  }
  if constexpr (kExchanges) end_call(p, call);
}

}  // namespace

cudaError_t launch_merge(const MergeParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  const int64_t items = p.rows * (p.head_dim / 2);
  if (items >= (int64_t{1} << 31) - kThreads) return cudaErrorInvalidConfiguration;
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t blocks = imin((items + kThreads - 1) / kThreads, int64_t{kBlocksEach} * multiprocessors);
  const FastDivider pairs = FastDivider::by(static_cast<uint32_t>(p.head_dim / 2));
  PdlLaunch launch(blocks, kThreads, 0, stream);
  const auto kernel = p.exchange.control == nullptr ? merge_kernel<false> : merge_kernel<true>;
  return cudaLaunchKernelEx(&launch.config, kernel, p, pairs);
}

}  // namespace kvc
