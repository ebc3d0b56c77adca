// copy_from: let sequences become copies of another cache's in every layer. Only rows that will be held move. The two
// caches may have rings of different sizes, so a row may go to a slot of another number; see CopyPlan in ring.h.
//
// Grid: for each layer, each pair of sequences in it, and of that pair keys and then values, the same number of blocks.
// They share the runs of rows that lie in consecutive slots of both caches: each run is one copy of memory, whose
// vectors of 16 bytes the threads of all these blocks take in turn.
//
// One launch does it all. No block reads the state of the cache that is written to, so the first of each pair's blocks
// in a layer writes that state meanwhile.
#include "launch.h"
#include "ring.h"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 8;         // vectors that a thread loads before it stores them
constexpr int kBlocksOfEach = 16;  // blocks for each multiprocessor
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;

struct Grid {
  FastDivider parts;  // blocks that share the keys, or the values, of one pair in one layer
  FastDivider pairs;
};

// The share of one thread of `count` packets that follow each other: number `first`, and then every `stride`-th.
template <int kVector>
__device__ __forceinline__ void copy_packets(uint16_t* from, uint16_t* to, int64_t count, int64_t first,
                                             int64_t stride) {
  using Packet = typename PacketOf<kVector>::Type;
  for (int64_t i = first; i < count; i += kUnroll * stride) {
    Packet in[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride < count) in[u] = *packet_at<Packet>(from + (i + u * stride) * kVector);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u * stride < count) store_packet(packet_at<Packet>(to + (i + u * stride) * kVector), in[u]);
    }
  }
}

template <int kVector>
__global__ void __launch_bounds__(kThreads) copy_from_kernel(const CopyFromParams p, const Grid grid) {
  const uint32_t matrix = grid.parts(blockIdx.x);  // the keys or the values of a pair in a layer
  const uint32_t part = blockIdx.x - matrix * grid.parts.divisor;
  const bool is_values = matrix & 1;
  const uint32_t layer = grid.pairs(matrix >> 1);
  const SequencePair pair = sequence_pair(p, (matrix >> 1) - layer * grid.pairs.divisor);
  if (pair.source < 0) return;

  const int64_t source_entry = int64_t{layer} * p.source.batch + pair.source;
  const int64_t entry = int64_t{layer} * p.cache.batch + pair.destination;
  const int64_t* source_seqlen = p.source.state + source_entry;
  const CopyPlan plan = CopyPlan::make({source_seqlen[0], source_seqlen[p.source.layers * p.source.batch]}, p);
  if (part == 0 && !is_values && threadIdx.x == 0) {
    p.cache.state[entry] = plan.after.seqlen;
    p.cache.state[p.cache.layers * p.cache.batch + entry] = plan.after.first;
  }

  const int64_t row_elements = p.cache.heads * p.cache.head_dim;
  uint16_t* from = (is_values ? p.source.v_cache : p.source.k_cache) + source_entry * p.source.positions * row_elements;
  uint16_t* to = (is_values ? p.cache.v_cache : p.cache.k_cache) + entry * p.cache.positions * row_elements;
  const int64_t thread = int64_t{part} * kThreads + threadIdx.x;
  const int64_t threads = int64_t{grid.parts.divisor} * kThreads;
#pragma unroll 1
  for (int64_t row = 0; row < plan.rows();) {
    const SlotRun run = plan.run(row);
    copy_packets<kVector>(from + run.from * row_elements, to + run.to * row_elements, run.rows * row_elements / kVector,
                          thread, threads);
    row += run.rows;
  }
}

template <int kVector>
cudaError_t launch(const CopyFromParams& p, cudaStream_t stream) {
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int64_t matrices = 2 * p.cache.layers * p.count;
  // No more blocks than have something to do, were each thread to take kUnroll packets of the longest sequence.
  const int64_t packets = imin(p.cache.positions, p.source.positions) * p.cache.heads * p.cache.head_dim / kVector;
  const int64_t useful = (packets + kThreads * kUnroll - 1) / (kThreads * kUnroll);
  const int64_t wanted = (int64_t{multiprocessors} * kBlocksOfEach + matrices - 1) / matrices;
  const int64_t parts = imax(imin(wanted, useful), 1);
  if (matrices > kMostBlocks / parts) return cudaErrorInvalidConfiguration;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(matrices * parts));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  const Grid grid{FastDivider::by(static_cast<uint32_t>(parts)), FastDivider::by(static_cast<uint32_t>(p.count))};
  return cudaLaunchKernelEx(&config, copy_from_kernel<kVector>, p, grid);
}

bool starts_aligned(const CacheView& c) {
  return reinterpret_cast<uintptr_t>(c.k_cache) % 16 == 0 && reinterpret_cast<uintptr_t>(c.v_cache) % 16 == 0;
}

}  // namespace

cudaError_t launch_copy_from(const CopyFromParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  if (p.count > kMostCopies) return cudaErrorInvalidValue;
  const bool vectors = p.cache.heads * p.cache.head_dim % 8 == 0 && starts_aligned(p.cache) && starts_aligned(p.source);
  return vectors ? launch<8>(p, stream) : launch<1>(p, stream);
}

}  // namespace kvc
