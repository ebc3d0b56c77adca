// Which of a call's new positions are stored before its queries are answered, and which after.
//
// Attention that finds new positions in the cache is the fastest. But where storing them evicts others, which earlier
// queries of the call still see, attention comes first. That is known on the device alone, for each sequence: so an
// append of first_lengths comes before attention, and one of last_lengths after it.
#include "../launch.h"
#include "../pdl.cuh"
#include "../ring.h"
#include "many_queries.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) append_order_kernel(const __grid_constant__ AttendParams p) {
  wait_for_previous_launch();
  let_next_launch_begin();
  const int64_t entry = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (entry >= p.sequences.entries(p.cache.batch)) return;
  const int64_t sequence = sequence_of_entry(p.sequences, entry, p.cache.batch);
  const int64_t appended = appended_rows(p.append, entry);
  bool evicts = false;
  if (sequence >= 0) {
    const volatile int64_t* seqlen = p.cache.state + p.layer * p.cache.batch + sequence;
    const SequenceState state = {seqlen[0], seqlen[p.cache.layers * p.cache.batch]};
    evicts = state_after_append(state, appended, p.cache.all_ring).first != state.first;
  }
  p.first_lengths[entry] = evicts ? 0 : appended;
  p.last_lengths[entry] = evicts ? appended : 0;
}

cudaError_t launch_order(const AttendParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.sequences.entries(p.cache.batch) + kThreads - 1) / kThreads;
  PdlLaunch launch(blocks, kThreads, 0, stream);
  return cudaLaunchKernelEx(&launch.config, append_order_kernel, p);
}

cudaError_t launch_append_of(const AttendParams& p, const int64_t* lengths, cudaStream_t stream) {
  AppendParams append = p.append;
  append.new_lengths = {lengths, false};
  return launch_append(append, stream);
}

}  // namespace

cudaError_t launch_attend_many(const AttendParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.sequences.entries(p.cache.batch) == 0) return cudaSuccess;
  // Before anything is stored: the kernel of the shortest tiles has to have blocks enough.
  constexpr int64_t kShortestTile = 8;
  if (query_tiles(AttendShape::of(p), kShortestTile) >= (int64_t{1} << 31)) return cudaErrorInvalidConfiguration;
  cudaError_t error = cudaSuccess;
  if (p.appends) error = launch_order(p, stream);
  if (p.appends && error == cudaSuccess) error = launch_append_of(p, p.first_lengths, stream);
  PartialsLayout layout;
  if (error == cudaSuccess) error = launch_many_queries(p, layout, stream);
  if (error == cudaSuccess) error = launch_many_queries_finish(p, layout, stream);
  if (p.appends && error == cudaSuccess) error = launch_append_of(p, p.last_lengths, stream);
  return error;
}

}  // namespace kvc
