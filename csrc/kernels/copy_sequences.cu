// copy_sequences: let sequences become copies of others in every layer, in place: beams change places, a prompt is
// forked. Only rows that are held move, each to the slot of the same number; then the state follows.
//
// What lies at one offset of a sequence depends on nothing but what lies there in the others. So a block takes a tile
// of offsets and, for all pairs of sequences at once, loads all of it, waits for all of its threads, and stores: nobody
// reads what has been overwritten, whatever the pairs are, and nothing is stored twice.
//
// Grid: for each layer, and in it keys and then values, the same number of blocks, which go through its tiles in turn.
// A block first makes a list of the pairs that move something in its layer; its threads stand side by side in as many
// columns of a tile, vectors of 16 bytes, as leave room for all pairs below each other.
//
// The state is changed by a second launch, as every block of the first reads it.
#include "launch.h"
#include "mma.cuh"
#include "ring.h"
#include "vec.cuh"

namespace kvc {
namespace {

constexpr int kThreads = 512;       // few, so that a multiprocessor has several blocks: one loads while another stores
constexpr int kMostThreads = 1024;  // for many pairs, so that a tile has columns enough then too
constexpr int kManyPairs = 9;
constexpr int kUnroll = 8;         // vectors a thread has under way
constexpr int kBlocksOfEach = 16;  // blocks for each multiprocessor
static_assert(kMostThreads * kUnroll >= kMostCopies, "a tile has at least one column");

struct Division {
  FastDivider parts;    // blocks that share the keys, or the values, of a layer
  Divider row_vectors;  // vectors of a row
  uint32_t log2_threads;
};

struct MovingPair {
  uint32_t source;
  uint32_t destination;
};

template <int kVector>
__global__ void __launch_bounds__(kMostThreads)
    copy_sequences_kernel(const CopySequencesParams p, const Division division) {
  using Packet = typename PacketOf<kVector>::Type;
  KVC_DYNAMIC_SHARED(shared);
  MovingPair* pairs = reinterpret_cast<MovingPair*>(shared);
  __shared__ uint32_t shared_pairs;
  __shared__ unsigned long long shared_end;  // no pair holds anything from this slot on
  const CacheView& c = p.cache;
  const uint32_t half = division.parts(blockIdx.x);
  const uint32_t part = blockIdx.x - half * division.parts.divisor;
  const int64_t layer = half >> 1;
  uint16_t* cache = half & 1 ? c.v_cache : c.k_cache;
  const int64_t* seqlen = c.state + layer * c.batch;
  const auto plan_of = [&](uint32_t sequence) {
    return ReadPlan::make(local_state({seqlen[sequence], seqlen[c.layers * c.batch + sequence]}, c.share), c);
  };

  if (threadIdx.x == 0) {
    shared_pairs = 0;
    shared_end = 0;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) {
    const SequencePair pair = sequence_pair(p, i);
    if (pair.source == pair.destination) continue;
    const ReadPlan plan = plan_of(static_cast<uint32_t>(pair.source));
    if (plan.held == 0) continue;
    pairs[atomicAdd(&shared_pairs, 1u)] = {static_cast<uint32_t>(pair.source), static_cast<uint32_t>(pair.destination)};
    atomicMax(&shared_end, static_cast<unsigned long long>(plan.slots_end()));
  }
  __syncthreads();
  const uint32_t count = shared_pairs;
  if (count == 0) return;

  // Side by side as many columns as leave each thread at most kUnroll pairs, then as many more of those as it has room.
  uint32_t log2_width = division.log2_threads;
  while (count > (static_cast<uint32_t>(kUnroll) << (division.log2_threads - log2_width))) --log2_width;
  const uint32_t log2_stride = division.log2_threads - log2_width;  // of threads below each other
  uint32_t log2_own = 0;                                            // of the pairs of a thread
  while (count > (1u << (log2_stride + log2_own))) ++log2_own;
  const uint32_t tile_vectors = static_cast<uint32_t>(kUnroll) >> log2_own << log2_width;
  const uint32_t column = threadIdx.x & ((1u << log2_width) - 1);
  const uint32_t first_pair = threadIdx.x >> log2_width;
  // The thread's places in a tile.
  const auto pair_of = [&](uint32_t u) { return first_pair + ((u & ((1u << log2_own) - 1)) << log2_stride); };
  const auto offset_of = [&](uint32_t u) { return column + (u >> log2_own << log2_width); };

  const int64_t end = static_cast<int64_t>(shared_end) * division.row_vectors.divisor;
  const int64_t sequence_elements = c.positions * c.heads * c.head_dim;
  cache += layer * c.batch * sequence_elements;
  for (int64_t tile = int64_t{part} * tile_vectors; tile < end;
       tile += int64_t{division.parts.divisor} * tile_vectors) {
    const auto vectors = static_cast<uint32_t>(imin(tile_vectors, end - tile));
    uint32_t moves = 0;  // bit u: something lies there
#pragma unroll 1
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (pair_of(u) < count && offset_of(u) < vectors &&
          plan_of(pairs[pair_of(u)].source).holds(division.row_vectors.div(tile + offset_of(u)))) {
        moves |= 1u << u;
      }
    }
    const auto for_each = [&](const auto& act) {
      uint16_t* tile_start = cache + tile * kVector;
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (moves >> u & 1) act(u, pairs[pair_of(u)], tile_start + offset_of(u) * kVector);
      }
    };
    Packet in[kUnroll];
    for_each([&](uint32_t u, const MovingPair& pair, uint16_t* at) {
      in[u] = *packet_at<Packet>(at + pair.source * sequence_elements);
    });
    __syncthreads();  // all of the tile has been read
    for_each([&](uint32_t u, const MovingPair& pair, uint16_t* at) {
      store_packet(packet_at<Packet>(at + pair.destination * sequence_elements), in[u]);
    });
  }
}

// One block for a layer. The third row of the state, which is zero between launches, holds what has been read.
__global__ void __launch_bounds__(kThreads) copy_states_kernel(const CopySequencesParams p) {
  const int64_t row = p.cache.layers * p.cache.batch;
  int64_t* seqlen = p.cache.state + blockIdx.x * p.cache.batch;
  int64_t* scratch = seqlen + 2 * row;
  const auto for_each = [&](const auto& act) {
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
      const SequencePair pair = sequence_pair(p, i);
      if (pair.source != pair.destination) act(pair);
    }
    __syncthreads();
  };
#pragma unroll
  for (int field = 0; field < 2; ++field) {
    int64_t* numbers = seqlen + field * row;
    for_each([&](SequencePair pair) { scratch[pair.destination] = numbers[pair.source]; });
    for_each([&](SequencePair pair) { numbers[pair.destination] = scratch[pair.destination]; });
  }
  for_each([&](SequencePair pair) { scratch[pair.destination] = 0; });
}

template <int kVector>
cudaError_t launch(const CopySequencesParams& p, cudaStream_t stream) {
  const CacheView& c = p.cache;
  int device = 0;
  int multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const int threads = p.count < kManyPairs ? kThreads : kMostThreads;
  const int64_t row_vectors = c.heads * c.head_dim / kVector;
  const int64_t halves = 2 * c.layers;
  // No more than there can be tiles: those of one pair for each place below each other are the largest.
  const int64_t tiles =
      (c.positions * row_vectors * imin(p.count, kUnroll) + threads * kUnroll - 1) / (threads * kUnroll);
  const int64_t wanted = (static_cast<int64_t>(multiprocessors) * kBlocksOfEach + halves - 1) / halves;
  const int64_t parts = imax(imin(wanted, tiles), 1);
  if (halves * parts >= (int64_t{1} << 31) || c.batch >= (int64_t{1} << 31)) return cudaErrorInvalidConfiguration;
  Division division{FastDivider::by(static_cast<uint32_t>(parts)), Divider::by(row_vectors), 0};
  while (1 << division.log2_threads < threads) ++division.log2_threads;

  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(halves * parts));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(p.count) * sizeof(MovingPair);
  config.stream = stream;
  error = cudaLaunchKernelEx(&config, copy_sequences_kernel<kVector>, p, division);
  if (error != cudaSuccess) return error;
  config.gridDim = dim3(static_cast<unsigned>(c.layers));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = 0;
  return cudaLaunchKernelEx(&config, copy_states_kernel, p);
}

}  // namespace

cudaError_t launch_copy_sequences(const CopySequencesParams& p, cudaStream_t stream) {
  if (p.count == 0) return cudaSuccess;
  if (p.count > kMostCopies) return cudaErrorInvalidValue;
  const bool vectors = p.cache.heads * p.cache.head_dim % 8 == 0 &&
                       reinterpret_cast<uintptr_t>(p.cache.k_cache) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(p.cache.v_cache) % 16 == 0;
  return vectors ? launch<8>(p, stream) : launch<1>(p, stream);
}

}  // namespace kvc
