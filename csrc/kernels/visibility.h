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

struct AttendPlan;
KVC_HD_CALL bool sees_of_share(const AttendPlan& plan, int64_t query, int64_t row);

struct AttendPlan {
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
  Share share;
  bool appends;

  // `stored`: what the call appends is in the cache already, and `s` the state after that. (Nothing was evicted then.)
  KVC_HD static AttendPlan make(const AttendParams& p, int64_t entry, SequenceState s, bool stored = false) {
    AttendPlan a = make_of_all(p, entry, s, stored);
    if (!p.cache.share.is_all()) a.take_share(p.cache, stored);
    return a;
  }

  // As if all positions were stored here.
  KVC_HD static AttendPlan make_of_all(const AttendParams& p, int64_t entry, SequenceState s, bool stored = false) {
    AttendPlan a;
    const int64_t appended = p.appends ? appended_rows(p.append, entry) : 0;
    a.seqlen = stored ? s.seqlen - appended : s.seqlen;
    a.total = a.seqlen + appended;
    a.padding = p.appends ? p.rows - appended : 0;
    a.queries = p.rows;
    a.sinks = p.cache.sinks;
    a.ring = p.cache.ring.divisor;
    a.first = s.first;
    a.window = p.window;
    a.share.ranks.divisor = 1;
    a.appends = p.appends;
    a.sinks_held = imin(a.total, a.sinks);
    a.oldest = a.oldest_for(a.padding);
    a.count = a.padding < p.rows ? a.sinks_held + imax(a.total - a.oldest, 0) : 0;
    a.cached = a.seqlen <= a.sinks_held ? a.seqlen : a.sinks_held + imax(a.seqlen - a.oldest, 0);
    a.cached = stored ? a.count : imin(a.cached, a.count);
    a.base = p.cache.ring.mod(a.oldest - a.sinks);
    return a;
  }

  // Makes of it the plan for the positions that are stored here.
  KVC_HD void take_share(const CacheView& cache, bool stored) {
    share = cache.share;
    const int64_t before = share.local(seqlen);
    const int64_t after = share.local(total);
    sinks_held = imin(after, sinks);
    oldest = oldest_for(padding);
    count = padding < queries ? sinks_held + imax(after - oldest, 0) : 0;
    cached = before <= sinks_held ? before : sinks_held + imax(before - oldest, 0);
    cached = stored ? count : imin(cached, count);
    base = cache.ring.mod(oldest - sinks);
  }

  KVC_HD int64_t query_position(int64_t query) const { return total - queries + query; }

  // The local position behind a query's own.
  KVC_HD int64_t past(int64_t query) const { return share.local(query_position(query) + 1); }

  // The oldest local position that is not a sink and that a query may see, from its own position.
  KVC_HD int64_t oldest_for(int64_t query) const {
    const int64_t p = query_position(query);
    int64_t from = first;
    if (appends) from = imax(from, p + 1 - (share.is_all() ? ring : ring * share.ranks.divisor));
    if (window > 0) from = imax(from, p + 1 - window);
    return share.local(from);
  }

  KVC_HD int64_t local_position(int64_t row) const { return row < sinks_held ? row : oldest + (row - sinks_held); }

  KVC_HD int64_t slot(int64_t row) const {
    if (row < sinks_held) return row;
    int64_t place = base + (row - sinks_held);
    if (place >= ring) place -= ring;
    return sinks + place;
  }

  // Where a row that is not cached lies in the call's keys and values.
  KVC_HD int64_t input_row(int64_t row) const { return share.position(local_position(row)) - seqlen + padding; }

  // Row numbers are at most max_positions + T, for which 32 bits do (checks.cpp).
  KVC_HD VisibleRange range_of(int64_t query) const {
    if (query < padding) return {0, 0};
    const int64_t end =
        past(query) <= sinks_held ? past(query) : sinks_held + imin(imax(past(query) - oldest, 0), count - sinks_held);
    const int64_t begin = sinks_held + imax(oldest_for(query) - oldest, 0);
    return {static_cast<int32_t>(begin), static_cast<int32_t>(imax(end, 0))};
  }

  // Do rows [begin, end) lie in the cache, in slots that follow each other?
  KVC_HD bool lie_in_a_row(int64_t begin, int64_t end) const {
    return end <= cached && slot(end - 1) - slot(begin) == end - 1 - begin;
  }

  KVC_HD bool sees(int64_t query, int64_t row) const {
    if (!share.is_all()) return sees_of_share(*this, query, row);
    const int64_t p = local_position(row);
    const int64_t position = query_position(query);
    int64_t from = first;
    if (appends) from = imax(from, position + 1 - ring);
    if (window > 0) from = imax(from, position + 1 - window);
    return query >= padding && p <= position && (row < sinks_held || p >= from);
  }
};

KVC_HD_CALL bool sees_of_share(const AttendPlan& plan, int64_t query, int64_t row) {
  const int64_t p = plan.local_position(row);
  return query >= plan.padding && p < plan.past(query) && (row < plan.sinks_held || p >= plan.oldest_for(query));
}

// What of a run of positions is stored here.
struct LocalRun {
  int64_t total;   // local position behind it
  int64_t oldest;  // local position of its first
  int64_t stored;  // positions behind `seqlen`

  KVC_HD static LocalRun of(const Share& share, int64_t seqlen, int64_t total, int64_t oldest) {
    return make(share.ranks, share.rank, seqlen, total, oldest);
  }

 private:
  static KVC_HD_CALL LocalRun make(Divider ranks, int64_t rank, int64_t seqlen, int64_t total, int64_t oldest) {
    const Share share = {ranks, rank};
    return {share.local(total), share.local(oldest), share.local(total) - share.local(seqlen)};
  }
};

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

  KVC_HD static DecodePlan make(const AttendParams& p, int64_t entry, SequenceState s) {
    DecodePlan a;
    a.state = s;
    a.appended = p.appends ? appended_rows(p.append, entry) : 0;
    const Share& share = p.cache.share;
    const int64_t ring = p.cache.ring.divisor;
    int64_t total = s.seqlen + a.appended;
    int64_t oldest = s.first;
    if (p.appends) oldest = imax(oldest, total - p.cache.all_ring);
    if (p.window > 0) oldest = imax(oldest, total - p.window);
    int64_t stored = a.appended;  // of the appended
    if (!share.is_all()) {
      const LocalRun local = LocalRun::of(share, s.seqlen, total, oldest);
      total = local.total;
      oldest = local.oldest;
      stored = local.stored;
    }
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
