// What each query of an attention call may see. Shared by the GPU and the CPU kernels.
//
// The positions that any query of a sequence sees are numbered 0, 1, ... in order of age: first the sinks, then a run
// that ends with the newest position. These numbers ("rows" below) are what the kernels loop over. Of a text that is
// dealt out to several ranks (Share, params.h), the rows are the positions that are stored here.
#pragma once

#include <cstdint>

#include "params.h"
#include "ring.h"

namespace kvc {

constexpr float kLog2e = 1.4426950408889634f;  // scores are kept as powers of two
constexpr float kLn2 = 0.6931471805599453f;

// The smallest weight of a finite score is 2^-100, which is nothing beside the largest, 1. It is never 0: that times an
// infinite value would be NaN.
constexpr float kLog2LeastWeight = -100.0f;

// The rows that a query sees: [begin, end), and the sinks before `end`.
struct VisibleRange {
  int32_t begin;
  int32_t end;
};

// Positions: Share, or AllPositions in a kernel that only serves caches of all positions.
template <typename Positions>
struct AttendPlanOf {
  int64_t seqlen;      // before the call
  int64_t total;       // seqlen after the call
  int64_t padding;     // queries before this one are left padding and see nothing
  int64_t queries;     // T
  int64_t sinks_held;  // rows that are sinks
  int64_t oldest;      // the local position of the first row that is not a sink
  int64_t count;       // rows
  int64_t cached;      // rows before this one lie in the cache, the others in the call's own keys and values
  int64_t base;        // the place of `oldest` in the ring
  int64_t sinks;
  int64_t ring;
  int64_t first;  // of the state before the call
  int64_t window;
  bool appends;
  Positions stored;

  // `is_stored`: what the call appends is in the cache already, and `s` the state after that. (Nothing was evicted
  // then.)
  KVC_HD static AttendPlanOf make(const AttendParams& p, int64_t entry, SequenceState s, bool is_stored = false) {
    AttendPlanOf a;
    p.cache.get(a.stored);
    const int64_t appended = p.appends ? appended_rows(p.append, entry) : 0;
    a.seqlen = is_stored ? s.seqlen - appended : s.seqlen;
    a.total = a.seqlen + appended;
    a.padding = p.appends ? p.rows - appended : 0;
    a.queries = p.rows;
    a.sinks = p.cache.sinks;
    a.ring = p.cache.ring.divisor;
    a.first = s.first;
    a.window = p.window;
    a.appends = p.appends;
    const int64_t before = a.stored.local(a.seqlen);
    const int64_t after = a.stored.local(a.total);
    a.sinks_held = imin(after, a.sinks);
    a.oldest = a.oldest_for(a.padding);
    a.count = a.padding < p.rows ? a.sinks_held + imax(after - a.oldest, 0) : 0;
    a.cached = before <= a.sinks_held ? before : a.sinks_held + imax(before - a.oldest, 0);
    a.cached = is_stored ? a.count : imin(a.cached, a.count);
    a.base = p.cache.ring.mod(a.oldest - a.sinks);
    return a;
  }

  KVC_HD int64_t query_position(int64_t query) const { return total - queries + query; }

  // The local position behind a query's own.
  KVC_HD int64_t past(int64_t query) const { return stored.local(query_position(query) + 1); }

  // The oldest local position that is not a sink and that a query may see, from its own position.
  KVC_HD int64_t oldest_for(int64_t query) const {
    const int64_t p = query_position(query);
    int64_t from = first;
    if (appends) from = imax(from, p + 1 - stored.of_all_ranks(ring));
    if (window > 0) from = imax(from, p + 1 - window);
    return stored.local(from);
  }

  KVC_HD int64_t local_position(int64_t row) const { return row < sinks_held ? row : oldest + (row - sinks_held); }

  KVC_HD int64_t slot(int64_t row) const {
    if (row < sinks_held) return row;
    int64_t place = base + (row - sinks_held);
    if (place >= ring) place -= ring;
    return sinks + place;
  }

  // Where a row that is not cached lies in the call's keys and values.
  KVC_HD int64_t input_row(int64_t row) const { return stored.position(local_position(row)) - seqlen + padding; }

  // Row numbers are at most max_positions + T, for which 32 bits do (checks.cpp).
  KVC_HD VisibleRange range_of(int64_t query) const {
    if (query < padding) return {0, 0};
    const int64_t behind = past(query);
    const int64_t end = behind <= sinks_held ? behind : sinks_held + imin(imax(behind - oldest, 0), count - sinks_held);
    const int64_t begin = sinks_held + imax(oldest_for(query) - oldest, 0);
    return {static_cast<int32_t>(begin), static_cast<int32_t>(imax(end, 0))};
  }

  // Do rows [begin, end) lie in the cache, in slots that follow each other?
  KVC_HD bool lie_in_a_row(int64_t begin, int64_t end) const {
    return end <= cached && slot(end - 1) - slot(begin) == end - 1 - begin;
  }

  KVC_HD bool sees(int64_t query, int64_t row) const {
    const int64_t p = local_position(row);
    return query >= padding && p < past(query) && (row < sinks_held || p >= oldest_for(query));
  }
};

using AttendPlan = AttendPlanOf<Share>;

// The plan for one query of a sequence: it sees all rows, and all but the newest lie in the cache. Numbers of 32 bits
// do, as a cache has at most 2^30 positions.
struct DecodePlan {
  SequenceState state;  // before the call
  int64_t appended;     // 0 or 1, to the text
  int32_t count;        // rows
  int32_t cached;       // rows before this one lie in the cache; if there is one more, it is the new position, which
                        // is then stored here
  int32_t sinks_held;   // rows that are sinks: row r lies in slot r
  int32_t wrap;         // the first row past the end of the ring
  int32_t offset;       // slot = row + offset from sinks_held to `wrap`, row + offset - ring from there on
  int32_t ring;

  template <typename Positions>
  KVC_HD static DecodePlan make(const AttendParams& p, int64_t entry, SequenceState s) {
    DecodePlan a;
    a.state = s;
    a.appended = p.appends ? appended_rows(p.append, entry) : 0;
    Positions here;
    p.cache.get(here);
    const int64_t ring = p.cache.ring.divisor;
    int64_t total = s.seqlen + a.appended;
    int64_t oldest = s.first;
    if (p.appends) oldest = imax(oldest, total - here.of_all_ranks(ring));
    if (p.window > 0) oldest = imax(oldest, total - p.window);
    const int64_t stored = here.local(total) - here.local(s.seqlen);  // of the appended
    total = here.local(total);
    oldest = here.local(oldest);
    const int64_t sinks_held = imin(total, p.cache.sinks);
    int64_t count = sinks_held + imax(total - oldest, 0);
    if (p.appends && a.appended == 0) count = 0;  // the query is left padding
    const int64_t base = p.cache.ring.mod(oldest - p.cache.sinks);
    a.count = static_cast<int32_t>(count);
    a.cached = static_cast<int32_t>(imax(count - stored, 0));
    a.sinks_held = static_cast<int32_t>(sinks_held);
    a.wrap = static_cast<int32_t>(sinks_held + (ring - base));
    a.offset = static_cast<int32_t>(p.cache.sinks + base - sinks_held);
    a.ring = static_cast<int32_t>(ring);
    return a;
  }

  KVC_HD int32_t slot(int32_t row) const {
    return row < sinks_held ? row : row < wrap ? row + offset : row + offset - ring;
  }

  // Do rows [row, end) lie in the cache, in slots that follow each other?
  KVC_HD bool run(int32_t row, int32_t end) const {
    return end <= cached && (row >= wrap || end <= (row < sinks_held ? sinks_held : wrap));
  }
};

}  // namespace kvc
