// The launch policy of the attention kernels: how many blocks of which size a launch is made of. Host code, plain C++;
// tests/test_schedule.py pins what is chosen. The measurements are an H200's, see docs/performance.md.
//
// A launch is `units * splits` pieces of work. A unit is a tile of the queries that share a KV head (with a head_dim
// above 256 of many queries: and some columns of the output). Its splits share its keys; each that gets some leaves a
// partial, and the partials are merged. Each piece has a block of its own, but in many_queries_sm90.cu: there one block
// for each multiprocessor takes them in turn. More splits put more of the GPU to work, and cost more merging.
//
// A launch is chosen from shapes and the GPU, never from lengths, which the host need not know. How many of the splits
// of one or few queries get keys follows from how many positions are held (block_shapes.h, useful_splits). So a call's
// output does not depend on how the cache came to its lengths.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../ring.h"
#include "block_shapes.h"

namespace kvc {

// The GPU that a launch is for.
struct Gpu {
  int64_t multiprocessors = 0;
  int64_t shared_bytes = 0;  // that a block can have, at most
  int major = 0;             // of the compute capability
};

// What is chosen by: the shape of a call.
struct AttendShape {
  int64_t entries;          // of the call's tensors
  int64_t kv_heads;         // H
  int64_t group;            // query heads to a KV head
  int64_t query_positions;  // T
  int64_t positions;        // N
  int64_t room_floats;      // of the workspace, for partials

  static AttendShape of(const AttendParams& p) {
    return {p.sequences.entries(p.cache.batch),
            p.cache.heads,
            p.query_heads / p.cache.heads,
            p.rows,
            p.cache.positions,
            p.partial_floats};
  }
  int64_t sequence_heads() const { return entries * kv_heads; }
  int64_t queries() const { return query_positions * group; }  // that share a KV head
};

// What was chosen.
struct Schedule {
  const char* kernel;
  const char* config;    // of block_shapes.h
  int64_t units;         // tiles of queries, of all KV heads and sequences
  int64_t splits;        // blocks that share the keys of a unit
  int64_t blocks;        // of the grid
  int64_t threads;       // of a block
  int64_t shared_bytes;  // that the launch asks for, for each block; 0 where the kernel alone decides

  bool exists() const { return units * splits < int64_t{1} << 31; }  // else the grid would be too large
};

// Prints a line to stderr for each attention launch if KVCACHE_EXT_PRINT_SCHEDULE is set, to anything but 0 or nothing.
inline void print_if_asked(const Schedule& s, const Gpu& gpu) {
  static const bool asked = [] {
    const char* const value = std::getenv("KVCACHE_EXT_PRINT_SCHEDULE");
    return value != nullptr && value[0] != '\0' && std::strcmp(value, "0") != 0;
  }();
  if (!asked) return;
  std::fprintf(stderr, "kvcache_ext: %s %s: %lld blocks of %lld threads (%lld units, %lld splits) on %lld SMs\n",
               s.kernel, s.config, static_cast<long long>(s.blocks), static_cast<long long>(s.threads),
               static_cast<long long>(s.units), static_cast<long long>(s.splits),
               static_cast<long long>(gpu.multiprocessors));
}

constexpr int64_t kReserved = 1024;  // what the GPU keeps of a block's shared memory

inline int64_t blocks_for(int64_t items, int64_t of_a_block) { return (items + of_a_block - 1) / of_a_block; }

// Blocks of one size that a launch could be made of.
struct Candidate {
  int64_t units;
  int64_t multiprocessors;
  int64_t at_a_time;       // blocks that a multiprocessor runs at a time
  int64_t most_splits;     // of a unit, at least 1
  int64_t partial_floats;  // that a split leaves
  int64_t turns;           // of one block over the rows of a unit

  // How much of the GPU is at work until the end, 1 at most. Some multiprocessors may get one block less than others;
  // where not all blocks run at once, the last to run may be few.
  double filling(int64_t splits) const {
    const int64_t blocks = units * splits;
    const int64_t wave = multiprocessors * (blocks > multiprocessors * at_a_time ? at_a_time : 1);
    return static_cast<double>(blocks) / static_cast<double>(blocks_for(blocks, wave) * wave);
  }
  // As many splits as run at once.
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
};

// Whether small blocks fill the GPU better than large ones, by so much.
inline bool fill_better(const Candidate& small, const Candidate& large, double by) {
  return small.best_filling() >= large.filling(large.all_splits()) + by;
}

// More splits of smaller blocks pay only in caches of so many positions: at 256 positions, 9 sequences of 8 KV heads
// went from 6.2 to 10.0 us.
constexpr int64_t kWorthSplitting = 1024;

// Large blocks, of `splits` splits, all run at once. Are more splits of small ones worth the merging? It takes a long
// cache, too few multiprocessors for as many splits as there could be, and `by` more of the GPU.
inline bool worth_splitting(const Candidate& small, const Candidate& large, int64_t splits, int64_t positions,
                            double by) {
  if (positions < kWorthSplitting || splits == large.most_splits || splits < large.all_splits()) return false;
  return large.filling(splits) + by <= 1 && fill_better(small, large, by);
}

// one_query.cu ------------------------------------------------------------------------------------------------------

// Whether a call's queries are one to a KV head, which one_query.cu answers.
inline bool is_one_query(const AttendShape& shape, int64_t head_dim) {
  return shape.query_positions == 1 && shape.group == 1 && head_dim <= 256;
}

// Smaller blocks have to fill a quarter more of the GPU. With less, 6 sequences of 32 heads were 0 to 6% slower.
constexpr double kOneQueryGain = 0.25;

template <int kLanes>
Schedule schedule_one_query(const AttendShape& shape, const Gpu& gpu) {
  using Block = OneQueryBlock<kLanes>;
  constexpr int64_t kFloats = kPartialFloats<Block::kWidth, 1>;
  const int64_t units = shape.sequence_heads();
  const int64_t room = shape.room_floats / (units * kFloats);
  const int64_t turns = blocks_for(shape.positions, Block::kMostWarps * Block::kStep);
  const int64_t most_splits = units > kAttendTickets ? 1 : imax(imin(room, turns), 1);
  const auto of_warps = [&](int warps) {
    return Candidate{units, gpu.multiprocessors, Block::kWarpsAtATime / warps, most_splits, kFloats, turns};
  };
  const Candidate large = of_warps(Block::kMostWarps);
  const Candidate small = of_warps(Block::kMostWarps / 2);
  const Candidate smallest = of_warps(Block::kMostWarps / 4);
  int warps = Block::kMostWarps;
  int64_t splits = large.all_splits();
  // Where large blocks do not all run at once, it is enough that small ones do not fill the GPU worse: at different
  // stages of their work, they wait for memory at different times.
  const bool smaller = large.all_run() ? worth_splitting(small, large, splits, shape.positions, kOneQueryGain)
                                       : fill_better(small, large, 0);
  if (smaller) {
    const bool very_many = units >= Block::kMostWarps * gpu.multiprocessors && fill_better(smallest, small, 0);
    warps = Block::kMostWarps / (very_many ? 4 : 2);
    splits = (very_many ? smallest : small).best_splits();
  }
  const char* const config = warps == Block::kMostWarps ? "EightWarps" : warps == 4 ? "FourWarps" : "TwoWarps";
  return {"one_query", config, units, splits, units * splits, warps * 32, Block::bytes(warps)};
}

// few_queries.cu ----------------------------------------------------------------------------------------------------

// Small blocks have to fill so much more of the GPU than large ones that all run at once.
constexpr double kFewQueriesGain = 0.2;
// Blocks of half as many teams have to fill so much more of it than small ones. (At 4,096 positions 96 sequences of 64
// query heads on 8 then went from 388 to 368 us; 24 sequences, and 64 of any length, were slower.)
constexpr double kMediumGain = 0.1;
// Eight queries: up to so many positions small blocks are the faster ones where units are many. (64 sequences: 1.10 to
// 1.07 times a kernel that only reads at 4,096 positions, 1.04 to 1.05 at 16,384.)
constexpr int64_t kEightQueriesLongCache = 8192;

// A block's shared memory, at least `bytes`, so large that a multiprocessor has no room for more than its share of the
// launch's blocks. Else the next launch's blocks, which come early (PDL), would be placed where there is room, and
// leave other multiprocessors idle. (48 sequences of 1,024 positions: 1.21 to 1.12 times a kernel that only reads.)
inline int64_t shared_for_a_share(int64_t bytes, int64_t blocks, const Gpu& gpu) {
  return imax(bytes, gpu.shared_bytes / (blocks_for(blocks, gpu.multiprocessors) + 1) + kReserved);
}

struct FewQueriesSchedule : Schedule {
  FewQueriesConfig which;
  int teams;          // of warps, in a block
  int64_t most_each;  // turns of a block, in a full cache
};

// Blocks of few_queries.cu of one configuration and so many teams of warps, or fewer, if a block's shared memory has
// no room for them.
template <typename Block>
struct FewQueriesCandidate : Candidate {
  int teams;

  FewQueriesCandidate(const AttendShape& shape, const Gpu& gpu, int most_teams) : teams(most_teams) {
    while (Block::bytes(teams) > gpu.shared_bytes && teams > 1) teams /= 2;
    turns = blocks_for(shape.positions, teams * Block::kTileRows);
    units = shape.sequence_heads() * blocks_for(shape.queries(), Block::kQueries);
    multiprocessors = gpu.multiprocessors;
    const int64_t by_shared = (gpu.shared_bytes + kReserved) / (Block::bytes(teams) + kReserved);
    const int64_t by_registers = Block::by_registers(gpu.major >= 10) * Block::kTeams / teams;
    at_a_time = imax(imin(by_shared, by_registers), 1);
    partial_floats = kPartialFloats<Block::kWidth, Block::kQueries>;
    const int64_t room = shape.room_floats / (units * partial_floats);
    // Partials are merged in the shared memory of the stages, two at a time at least.
    const bool can_merge = teams * Block::kTeamBytes >= 2 * 4 * partial_floats;
    most_splits = units <= kAttendTickets && can_merge ? imax(imin(room, turns), 1) : 1;
  }

  // What merging the partials of so many splits takes, in 0.1 us on an H200, roughly.
  int64_t merge_time(int64_t splits) const {
    constexpr int64_t kFirstRound = 10;  // of partials that fit into shared memory
    constexpr int64_t kOtherRound = 8;
    constexpr int64_t kFloats = 1024;  // that are merged in a unit of time
    if (splits == 1) return 0;
    if (Block::kQueries > 8) {  // many are merged in groups, by several blocks: what is past the 32nd counts half
      return kFirstRound + (imin(splits, 32) + imax(splits - 32, 0) / 2) * partial_floats / kFloats;
    }
    const int64_t fit = teams * Block::kTeamBytes / 4 / partial_floats;
    const int64_t rounds = blocks_for(splits - 1, imax(fit - 1, 1));
    return kFirstRound + (rounds - 1) * kOtherRound + splits * partial_floats / kFloats;
  }
  struct Quickest {
    int64_t splits;
    int64_t time;
  };
  // As many splits as run at once, or fewer: those that take the least time, by a model that is fitted to measurements
  // (docs/performance.md). A block has the rows of two turns in flight, so from the third turn on it waits once more.
  Quickest quickest() const {
    constexpr int64_t kWait = 10;
    Quickest best = {1, INT64_MAX};
    for (int64_t splits = all_splits(); splits > 0; --splits) {
      const int64_t each = imax(blocks_for(turns, splits), 1);
      if (Block::kTurnTime * each >= best.time) break;
      splits = imax(blocks_for(turns, each), 1);
      const int64_t reading = each <= 2 ? Block::kTurnTime * each : Block::kLaterTurnTime * each + kWait;
      const int64_t time = reading * blocks_for(units * splits, multiprocessors) + merge_time(splits);
      if (time <= best.time) best = {splits, time};
    }
    return best;
  }

  FewQueriesSchedule with(int64_t splits, const Gpu& gpu) const {
    const int64_t blocks = units * splits;
    const int64_t bytes = shared_for_a_share(Block::bytes(teams), blocks, gpu);
    const int64_t threads = teams * Block::kWarps * 32;
    return {{"few_queries", Block::kName, units, splits, blocks, threads, bytes},
            Block::kConfig,
            teams,
            blocks_for(turns, splits)};
  }
};

// 4 or 8 queries a block. `Large` blocks have stages for two key tiles; `Small` ones for one, and up to a head_dim of
// 128 half as many teams: they fill the GPU better where there are many.
template <typename Large, typename Small>
FewQueriesSchedule schedule_large_or_small(const AttendShape& shape, const Gpu& gpu, int64_t long_cache) {
  const int64_t positions = shape.positions;
  const FewQueriesCandidate<Large> large(shape, gpu, Large::kTeams);
  const FewQueriesCandidate<Small> small(shape, gpu, Small::kTeams);
  const int64_t splits = large.quickest().splits;
  // Where large blocks do not all run at once, it is enough that small ones do not fill the GPU worse: at different
  // stages of their work, they wait for memory at different times. With many units not even that is asked for, up to
  // caches so long that more stages pay.
  const bool many = large.units >= 2 * gpu.multiprocessors;
  const bool smaller = large.all_run() ? worth_splitting(small, large, splits, positions, kFewQueriesGain)
                       : many          ? positions < long_cache
                                       : fill_better(small, large, 0);
  if (!smaller) return large.with(splits, gpu);
  // In between: large blocks of half as many teams. For short caches if they all run at once, for longer ones if they
  // fill the GPU better.
  const FewQueriesCandidate<Large> medium(shape, gpu, Large::kTeams / 2);
  const bool fits = (positions <= 2 * kWorthSplitting && medium.all_run()) ||
                    (positions >= kWorthSplitting && medium.best_filling() >= small.best_filling() + kMediumGain);
  if (Large::kWidth <= 128 && fits) return medium.with(medium.best_splits(), gpu);
  return small.with(small.best_splits(), gpu);
}

// kDepth: as in FewQueriesBlock.
template <int kDepth>
FewQueriesSchedule schedule_few_queries(const AttendShape& shape, const Gpu& gpu) {
  if constexpr (kDepth <= 16) {  // larger blocks of longer rows have no room in shared memory
    using Eight = FewQueriesBlock<kDepth, EightQueriesLarge>;
    using Sixteen = FewQueriesBlock<kDepth, SixteenQueries>;
    if (shape.queries() > 8) {
      // Where blocks of 16 are few, what they leave to be merged is the larger part of the time.
      const FewQueriesCandidate<Sixteen> large(shape, gpu, Sixteen::kTeams);
      const FewQueriesCandidate<Eight> of_8(shape, gpu, Eight::kTeams);
      const auto choice = large.quickest();
      if (choice.time <= of_8.quickest().time) {
        const FewQueriesCandidate<Sixteen> small(shape, gpu, Sixteen::kTeams / 2);
        const bool smaller = large.all_run()
                                 ? worth_splitting(small, large, choice.splits, shape.positions, kFewQueriesGain)
                                 : fill_better(small, large, 0);
        return smaller ? small.with(small.best_splits(), gpu) : large.with(choice.splits, gpu);
      }
    }
    if (shape.queries() > 4) {
      return schedule_large_or_small<Eight, FewQueriesBlock<kDepth, EightQueriesSmall>>(shape, gpu,
                                                                                        kEightQueriesLongCache);
    }
  }
  return schedule_large_or_small<FewQueriesBlock<kDepth, FourQueriesLarge>, FewQueriesBlock<kDepth, FourQueriesSmall>>(
      shape, gpu, INT64_MAX);
}

// many_queries.cu and many_queries_sm90.cu ----------------------------------------------------------------------------

// Tiles of `queries` queries that a call has.
inline int64_t query_tiles(const AttendShape& shape, int64_t queries) {
  return shape.sequence_heads() * blocks_for(shape.queries(), queries);
}

// KV heads (of all sequences) whose tiles of queries are walked together, so that blocks which run at the same time
// share keys in L2. So many that there are at least four tiles for each multiprocessor: the last tiles to be taken are
// the short ones. They divide the number of KV heads.
inline int64_t heads_together(const AttendShape& shape, int64_t queries, const Gpu& gpu) {
  const int64_t all = shape.sequence_heads();
  int64_t together = imin(imax(8, blocks_for(4 * gpu.multiprocessors, blocks_for(shape.queries(), queries))), all);
  const int64_t most = imin(2 * together, all);
  while (all % together != 0 && together < most) ++together;
  while (all % together != 0) --together;
  return together;
}

// `Shape`: ManyQueriesShape or Sm90Shape. `persistent`: blocks take units in turn, and there is one for each
// multiprocessor. As many splits as run at once, if the workspace has room for their partials and each has a key tile.
template <typename Shape>
Schedule schedule_many_queries(const AttendShape& shape, const Gpu& gpu, const char* kernel, bool persistent) {
  const int64_t units = query_tiles(shape, Shape::kQueries) * Shape::kPieces;
  const int64_t room = shape.room_floats / (units * Shape::kQueries * (Shape::kWidth + 2));
  const int64_t key_tiles = (shape.positions + shape.query_positions) / Shape::kKeys;
  const int64_t at_once = gpu.multiprocessors * Shape::kBlocksAtATime;
  const int64_t splits = imax(imin(imin(at_once / units, room), key_tiles), 1);
  const int64_t blocks = persistent ? imin(units * splits, gpu.multiprocessors) : units * splits;
  return {kernel, Shape::kName, units, splits, blocks, Shape::kThreads, 0};
}

}  // namespace kvc
