// What a block of each attention kernel consists of: queries, warps, key tiles, shared memory. The kernels are compiled
// for these shapes, and schedule.h chooses among them. Plain C++, for the host and the device.
#pragma once

#include <cstdint>

#include "../divide.h"
#include "../portable.h"
#include "../visibility.h"

namespace kvc {

// A running softmax of some rows for one query: weights 2^(score - max).
struct alignas(8) SoftmaxState {
  float max;
  float sum;
};

// The floats of the partial that a split leaves in the workspace: weighted sums [kQueries][kWidth], then states
// [kQueries].
template <int kWidth, int kQueries>
constexpr int kPartialFloats = kQueries * kWidth + (2 * kQueries + 3) / 4 * 4;

// one_query.cu. kLanes: lanes that load a row, 16 bytes each.
template <int kLanes>
struct OneQueryBlock {
  static constexpr int kLoads = 4;  // rows that a lane loads at a step
  static constexpr int kMostWarps = 8;
  // A multiprocessor has registers for two blocks of so many warps, no more. Where there was room for a third, the next
  // launch's blocks were placed there, on few multiprocessors (docs/performance.md).
  static constexpr int kBlocksAtATime = 2;
  static constexpr int kWarpsAtATime = kBlocksAtATime * kMostWarps;
  static constexpr int kRows = 32 / kLanes;       // that a warp loads by one instruction
  static constexpr int kWidth = 8 * kLanes;       // the largest head_dim
  static constexpr int kStep = kLoads * kRows;    // rows of a warp's step
  static constexpr int kSumsStride = kWidth + 4;  // floats from one row's sums to the next's; 4: in different banks

  struct Shared {
    alignas(16) uint16_t new_key[kWidth];
    alignas(16) uint16_t new_value[kWidth];
    SoftmaxState states[kMostWarps * kRows];
    bool last;
  };
  static constexpr int kSumsAt = (sizeof(Shared) + 15) / 16 * 16;
  static constexpr int64_t bytes(int warps) { return kSumsAt + int64_t{warps} * kRows * kSumsStride * 4; }
  static_assert(kSumsStride == kPartialFloats<kWidth, 1>, "two warps or more have room to merge two partials");
};

// Configurations of few_queries.cu: how a block's queries are shared out, and how far ahead it copies.
//   kWarpQueries: of a warp.
//   kWarps:  warps of a team, which work on the same key tiles, each with queries of its own.
//   kTileRows: of a key tile.
//   kStages: of a team. A stage has room for the keys, or the values, of a key tile.
//   kQueriesAsRows: of products, or keys are (few_queries_products.cuh).
enum class FewQueriesConfig { four_large, four_small, eight_large, eight_small, sixteen };
struct FourQueriesLarge {
  static constexpr int kWarpQueries = 4, kWarps = 1, kTileRows = 16, kStages = 4;
  static constexpr bool kQueriesAsRows = false;
  static constexpr FewQueriesConfig kConfig = FewQueriesConfig::four_large;
  static constexpr const char* kName = "FourQueriesLarge";
};
struct FourQueriesSmall {
  static constexpr int kWarpQueries = 4, kWarps = 1, kTileRows = 16, kStages = 2;
  static constexpr bool kQueriesAsRows = false;
  static constexpr FewQueriesConfig kConfig = FewQueriesConfig::four_small;
  static constexpr const char* kName = "FourQueriesSmall";
};
struct EightQueriesLarge {
  static constexpr int kWarpQueries = 4, kWarps = 2, kTileRows = 16, kStages = 4;
  static constexpr bool kQueriesAsRows = false;
  static constexpr FewQueriesConfig kConfig = FewQueriesConfig::eight_large;
  static constexpr const char* kName = "EightQueriesLarge";
};
struct EightQueriesSmall {
  static constexpr int kWarpQueries = 8, kWarps = 1, kTileRows = 16, kStages = 2;
  static constexpr bool kQueriesAsRows = false;
  static constexpr FewQueriesConfig kConfig = FewQueriesConfig::eight_small;
  static constexpr const char* kName = "EightQueriesSmall";
};
struct SixteenQueries {
  static constexpr int kWarpQueries = 8, kWarps = 2, kTileRows = 32, kStages = 2;
  static constexpr bool kQueriesAsRows = true;
  static constexpr FewQueriesConfig kConfig = FewQueriesConfig::sixteen;
  static constexpr const char* kName = "SixteenQueries";
};

// Key tiles [begin, end).
struct TileRange {
  uint32_t begin;
  uint32_t end;
};

// few_queries.cu. kDepth: head_dim in steps of 16 elements; 16 * kDepth is the largest head_dim of the instance.
template <int kDepth_, typename Config>
struct FewQueriesBlock : Config {
  using Config::kStages;
  using Config::kTileRows;
  using Config::kWarpQueries;
  using Config::kWarps;
  static constexpr int kDepth = kDepth_;
  // Of a turn of a block over its rows, one of the first two or a later one, in 0.1 us on an H200, roughly
  // (schedule.h).
  static constexpr int kTurnTime = kTileRows > 16 ? 25 : 10;
  static constexpr int kLaterTurnTime = kTileRows > 16 ? 25 : kWarpQueries * kWarps > 4 ? 13 : 10;
  static constexpr int kQueries = kWarpQueries * kWarps;
  static constexpr int kWidth = 16 * kDepth;
  static constexpr int kChunks = 2 * kDepth;  // 16-byte chunks of a row
  static constexpr int kStageBytes = kTileRows * kChunks * 16;
  static constexpr int kTeamBytes = kStages * kStageBytes;
  static constexpr bool kLarge = kStages * kTileRows >= 64;  // copies further ahead
  // Teams of warps, at most; a launch may have fewer. Large blocks of all head sizes over 64 have as many bytes.
  static constexpr int kTeams = kDepth > 8 ? 64 / kDepth : kLarge ? 8 : 4;
  static_assert(kTeams < 16, "each has a named barrier, beside the block's own");
  static constexpr int kQueryStride = kWidth + 8;  // floats from a query's sums to the next's, spread over the banks
  static_assert(kTeamBytes >= (kQueries * kQueryStride + 4) * 4, "a team's stages have room for its warps' sums");

  // What lies in a block's shared memory, with the stages of all teams behind it.
  template <typename Positions>
  struct SharedOf {
    alignas(16) uint32_t operand[kQueries * kWidth];  // the queries: two FP16 numbers for each FP32 one
    SoftmaxState states[kTeams][kQueries];
    float factor[kQueries];  // from a query's products to scores
    AttendPlanOf<Positions> plan;
    TileRange fully_visible;  // by all queries
    uint32_t splits;          // that have rows
    bool last;
  };
  static constexpr int kStagesAt = (sizeof(SharedOf<Share>) + 127) / 128 * 128;
  static constexpr int64_t bytes(int teams) { return kStagesAt + int64_t{teams} * kTeamBytes; }

  static constexpr int kThreads = kTeams * kWarps * 32;
  // How many blocks of so many threads a multiprocessor has registers for. From sm_100 on the compiler needs more.
  KVC_HD static constexpr int by_registers(bool from_sm_100) {
    if (kLarge) return kDepth <= 8 && kQueries == 4 && !from_sm_100 ? 2 : 1;
    if (kWarpQueries == 8 && (kDepth > 8 || (kDepth == 8 && from_sm_100))) return 2;
    return kDepth > 8 || from_sm_100 || (kDepth == 4 && kWarpQueries == 4) ? 3 : 4;
  }

  // Where a chunk of a row lies in a stage. Rows are spread over the banks, so that eight of them are read at a time.
  KVC_HD static int place(int row, int chunk) { return (row * kChunks + (chunk ^ (row & 7))) * 16; }
};

// How many blocks share the rows of a unit in few_queries.cu, of the `splits` that a launch has for it, where its rows
// are `turns` turns of one block. (How many rows there are only the device knows. A launch is for as many as the cache
// has room for.) More blocks read faster, but leave more to be merged: so each takes that many turns in which reading
// and merging take the least time together, but no more than if the cache were full, `most_each`. One thread computes
// it while all others wait, so it is short, and in 32 bits.
template <typename Block>
KVC_HD uint32_t useful_splits(uint32_t turns, const FastDivider& splits, uint32_t most_each) {
  constexpr uint32_t kMergeTime = kPartialFloats<Block::kWidth, Block::kQueries> / 256;  // four times that of a partial
  uint32_t each = turns <= 2 ? 2 : 1;  // a second turn takes less time than merging does
  // The root of turns * kMergeTime / 4 / kTurnTime, rounded.
  while (each < most_each && (2 * each + 1) * (2 * each + 1) * Block::kTurnTime < turns * kMergeTime) ++each;
  if (each > most_each) each = most_each;
  const uint32_t least = splits(turns + splits.divisor - 1);
  if (each < least) each = least;
  return turns == 0 ? 1 : (turns + each - 1) / each;
}

// How many of a unit's partials, of so many floats each, one block merges: all of them, or if they are much to read,
// groups of so many, whose results another block merges then. (16 queries of 128, 33 splits: one block reads 270 KB, or
// two one after the other 50 KB each.)
KVC_HD uint32_t merged_together(uint32_t splits, uint32_t units, uint32_t partial_floats) {
#if defined(KVC_EMULATED)
  const uint32_t much = 3 * partial_floats;  // so that small tests come to it
#else
  const uint32_t much = 24 * 1024;  // floats
#endif
  if (splits * partial_floats < much) return splits;
  uint32_t each = 2;
  while (each * each < splits) ++each;
  const uint32_t groups = (splits + each - 1) / each;
  return units * (1 + groups) <= kAttendTickets ? each : splits;
}

// The ticket of a group of a unit's splits. Those of the units themselves come first. Units whose sequences differ in
// length have different numbers of groups.
KVC_HD uint32_t ticket_of_group(uint32_t units, uint32_t unit, uint32_t group) { return units * (1 + group) + unit; }

// The key tiles that a team of warps takes in few_queries.cu: `first`, and every `stride`-th from there on.
struct TileTurns {
  uint32_t first;
  uint32_t stride;

  KVC_HD static TileTurns of(uint32_t split, uint32_t splits, uint32_t team, uint32_t teams) {
    return {split * teams + team, splits * teams};
  }
};

// The first of the key tiles that a split takes in the kernels for many queries. It ends where the next split begins.
KVC_HD int32_t first_tile_of(int32_t tiles, int64_t split, int64_t splits) {
  return static_cast<int32_t>(tiles * split / splits);
}

// Configurations of many_queries.cu, by the largest head_dim.
//   kDepth:  head_dim in steps of 16 elements.
//   kWarps:  each has 16 queries.
//   kKeys:   rows of a key tile.
//   kStages: key tiles, with their values, that there is room for.
//   kHighInRegisters: the queries' high FP16 parts are kept in registers.
struct ManyQueries64 {
  static constexpr int kDepth = 4, kWarps = 4, kKeys = 64, kStages = 2;
  static constexpr bool kHighInRegisters = true;
  static constexpr const char* kName = "ManyQueries64";
};
struct ManyQueries128 {
  static constexpr int kDepth = 8, kWarps = 4, kKeys = 64, kStages = 2;
  static constexpr bool kHighInRegisters = true;
  static constexpr const char* kName = "ManyQueries128";
};
struct ManyQueries256 {
  static constexpr int kDepth = 16, kWarps = 4, kKeys = 32, kStages = 2;
  static constexpr bool kHighInRegisters = true;
  static constexpr const char* kName = "ManyQueries256";
};
struct ManyQueries512 {
  static constexpr int kDepth = 32, kWarps = 2, kKeys = 16, kStages = 1;
  static constexpr bool kHighInRegisters = false;
  static constexpr const char* kName = "ManyQueries512";
};

template <typename Config>
struct ManyQueriesShape : Config {
  static constexpr int kThreads = 32 * Config::kWarps;
  static constexpr int kQueries = 16 * Config::kWarps;
  static constexpr int kPieces = Config::kDepth > 16 ? Config::kDepth / 8 : 1;  // that an output's columns are cut into
  static constexpr int kWidth = 16 * Config::kDepth / kPieces;                  // columns of a piece
  static constexpr int kBlocksAtATime = Config::kDepth <= 8 ? 2 : 1;            // on a multiprocessor
};

// Configurations of many_queries_sm90.cu, by the largest head_dim. kStages: key tiles, and as many of values, that
// there is room for; with one FP16 part of a query there is more.
template <int kParts>
struct Sm90Queries64 {
  static constexpr int kDepth = 4, kKeys = 128, kStages = 2;
  static constexpr const char* kName = "Sm90Queries64";
};
template <int kParts>
struct Sm90Queries128 {
  static constexpr int kDepth = 8, kKeys = 128, kStages = 2;
  static constexpr const char* kName = "Sm90Queries128";
};
template <int kParts>
struct Sm90Queries256 {
  static constexpr int kDepth = 16, kKeys = 64, kStages = 3 - kParts;
  static constexpr const char* kName = "Sm90Queries256";
};

template <typename Config>
struct Sm90Shape : Config {
  static constexpr int kGroupThreads = 128;           // of a warpgroup
  static constexpr int kGroupQueries = 64;            // of a warpgroup that multiplies
  static constexpr int kThreads = 3 * kGroupThreads;  // one warpgroup loads, two multiply
  static constexpr int kQueries = 2 * kGroupQueries;
  static constexpr int kPieces = 1;  // an output's columns are not cut
  static constexpr int kWidth = 16 * Config::kDepth;
  static constexpr int kBlocksAtATime = 1;
};

}  // namespace kvc
