// Where a position lies: the ring, the sinks, and how appending and truncating move the state.
//
// A sequence of a layer has N slots. Its state is two numbers:
//   seqlen  the positions ever appended (so the next position's number),
//   first   the oldest position still readable that is not a sink; never below `sinks`.
// Position p lies in slot p if p < sinks, else in slot sinks + (p - sinks) mod ring, ring = N - sinks.
// Held are the positions [0, min(seqlen, sinks)) and [first, seqlen). Chronological index 0 is the oldest of them.
//
// A cache that is one of several, each with a share of the text (Share, params.h), has the same state as the others.
// The slots are of its local positions, by the same rules: N, `sinks` and `ring` are then those of the share, and the
// plans below turn positions of the text into local ones.
//
// The GPU kernels and the CPU kernels share these functions, so that what is tested on a CPU is what runs on a GPU.
#pragma once

#include <cstdint>

#include "divide.h"
#include "params.h"
#include "portable.h"

namespace kvc {

constexpr int64_t kNoSlot = -1;   // an index that is not held, or a row that a later row of the call overwrites
constexpr int64_t kPadding = -2;  // a row that is not appended here at all: left padding, or another rank's

KVC_HD int64_t imin(int64_t a, int64_t b) { return a < b ? a : b; }
KVC_HD int64_t imax(int64_t a, int64_t b) { return a > b ? a : b; }

struct SequenceState {
  int64_t seqlen;
  int64_t first;
};

KVC_HD SequenceState state_after_append(SequenceState s, int64_t appended, int64_t ring) {
  const int64_t seqlen = s.seqlen + appended;
  return {seqlen, imax(s.first, seqlen - ring)};
}

// The same of the positions that are stored here.
KVC_HD SequenceState local_state(SequenceState s, const Share& share) {
  return {share.local(s.seqlen), share.local(s.first)};
}

KVC_HD int64_t held_sinks(SequenceState s, int64_t sinks) { return imin(s.seqlen, sinks); }

KVC_HD int64_t held_positions(SequenceState s, int64_t sinks) {
  return held_sinks(s, sinks) + imax(s.seqlen - s.first, 0);
}

// Keeps the `length` oldest held positions. Evicted ones do not come back: `first` stays, unless sinks go too, and
// then nothing that is not a sink is left and numbering goes on from there.
KVC_HD SequenceState state_after_truncate(SequenceState s, int64_t length, int64_t sinks) {
  if (length >= held_positions(s, sinks)) return s;
  if (length < sinks) return {length, sinks};
  return {s.first + (length - sinks), s.first};
}

// Forgets everything: numbering begins at 0 again.
KVC_HD SequenceState empty_state(int64_t sinks) { return {0, sinks}; }

// What is left in a ring of that many slots: the sinks and the newest.
KVC_HD SequenceState state_in_ring(SequenceState s, int64_t ring) { return {s.seqlen, imax(s.first, s.seqlen - ring)}; }

// How many of the oldest `held` positions stay when the newest `n` go. A negative `n` counts as 0.
KVC_HD int64_t length_without_newest(int64_t held, int64_t n) { return imax(held - imax(n, 0), 0); }

// Truncates the sequence of an entry, in one layer.
KVC_HD void truncate_entry(const TruncateParams& p, int64_t layer, int64_t entry) {
  const int64_t sequence = p.sequences.sequence(entry, p.batch);
  if (sequence < 0) return;
  int64_t* seqlen = p.state + layer * p.batch + sequence;
  int64_t* first = seqlen + p.layers * p.batch;
  SequenceState s = empty_state(p.sinks);
  if (!p.resets) {
    s = {*seqlen, *first};
    const int64_t n = p.lengths.data == nullptr ? p.length : imax(p.lengths[entry], 0);
    const int64_t length = p.newest ? length_without_newest(held_positions(s, p.sinks), n) : n;
    s = state_after_truncate(s, length, p.sinks);
  }
  *seqlen = s.seqlen;
  *first = s.first;
}

// How many of T rows of entry b are appended: the last new_lengths[b], clamped to 0..T.
KVC_HD int64_t appended_rows(const AppendParams& p, int64_t b) {
  if (p.sequences.indices.data != nullptr && p.sequences.sequence(b, p.cache.batch) < 0) return 0;
  if (p.new_lengths.data == nullptr) return p.rows;
  return imin(imax(p.new_lengths[b], 0), p.rows);
}

// The slots of the rows of one append to one sequence. kShares: of a cache that may store a share of the text.
template <bool kShares>
struct AppendPlanOf {
  int64_t padding;  // rows before this one are left padding, or stored by other ranks
  int64_t base;     // place of the first stored row: counted from 0 behind the sinks, so in [-sinks, ring)
  int64_t lost;     // stored rows before this one are overwritten by later ones of the same call (sinks excepted)
  int64_t sinks;
  Divider ring;
  Divider ranks;  // of the rows from `padding` on, each W-th is stored here

  KVC_HD static AppendPlanOf make(int64_t seqlen, int64_t rows, int64_t appended, const CacheView& c) {
    int64_t padding = rows - appended;
    int64_t before = seqlen;
    int64_t stored = appended;
    if (kShares && !c.share.is_all()) {
      before = c.share.local(seqlen);
      stored = c.share.local(seqlen + appended) - before;
      padding += c.share.position(before) - seqlen;
    }
    const int64_t past_sinks = before - c.sinks;
    return {
        padding,      past_sinks < 0 ? past_sinks : c.ring.mod(past_sinks), stored - c.ring.divisor, c.sinks, c.ring,
        c.share.ranks};
  }

  KVC_HD int64_t slot(int64_t row) const {
    int64_t j = row - padding;
    if (j < 0) return kPadding;
    if (kShares && ranks.divisor != 1) {
      const int64_t stored = ranks.div(j);
      if (stored * ranks.divisor != j) return kPadding;
      j = stored;
    }
    int64_t place = base + j;
    if (place >= 0) {
      if (j < lost) return kNoSlot;
      if (place >= ring.divisor) place = ring.mod(place);
    }
    return sinks + place;
  }

  // The slot of row `begin` if the rows [begin, end) lie in slots that follow each other, else -1.
  KVC_HD int64_t run(int64_t begin, int64_t end) const {
    if (kShares && ranks.divisor != 1) return kNoSlot;  // neighbours are other ranks'
    const int64_t slot0 = slot(begin);
    const bool none_lost = begin - padding >= lost;
    return slot0 >= 0 && none_lost && slot(end - 1) - slot0 == end - 1 - begin ? slot0 : -1;
  }
};

using AppendPlan = AppendPlanOf<true>;

// The slots of chronological indices of one sequence.
struct ReadPlan {
  int64_t held;
  int64_t held_sinks;
  int64_t base;  // the place of the oldest position in the ring
  int64_t sinks;
  int64_t ring;

  // Of a share: `stored` is c.share.local(the state), and indices count the positions that are stored here.
  KVC_HD static ReadPlan make(SequenceState stored, const CacheView& c) {
    return {held_positions(stored, c.sinks), kvc::held_sinks(stored, c.sinks), c.ring.mod(stored.first - c.sinks),
            c.sinks, c.ring.divisor};
  }

  KVC_HD int64_t slot(int64_t index) const {
    if (index < 0 || index >= held) return kNoSlot;
    if (index < held_sinks) return index;
    int64_t place = base + (index - held_sinks);
    if (place >= ring) place -= ring;
    return sinks + place;
  }

  // Does some index lie in this slot?
  KVC_HD bool holds(int64_t slot) const {
    if (slot < sinks) return slot < held_sinks;
    int64_t age = slot - sinks - base;  // the index, counted from the oldest in the ring
    if (age < 0) age += ring;
    return age < held - held_sinks;
  }

  // All slots from this one on hold nothing.
  KVC_HD int64_t slots_end() const {
    const int64_t in_ring = held - held_sinks;
    return in_ring == 0 ? held_sinks : sinks + imin(base + in_ring, ring);
  }

  // The slot of index `begin` if the indices [begin, end) lie in slots that follow each other, else -1.
  KVC_HD int64_t run(int64_t begin, int64_t end) const {
    const int64_t slot0 = slot(begin);
    return slot0 >= 0 && slot(end - 1) - slot0 == end - 1 - begin ? slot0 : -1;
  }
};

// The slots of chronological indices among the positions of all ranks, as far as they are stored here.
struct ReadShare {
  ReadPlan stored;
  SequenceState state;  // of the text
  int64_t all_sinks;
  Share share;

  KVC_HD static ReadShare make(SequenceState s, const CacheView& c) {
    return {ReadPlan::make(local_state(s, c.share), c), s, c.all_sinks, c.share};
  }

  KVC_HD int64_t slot(int64_t index) const {
    if (index < 0 || index >= held_positions(state, all_sinks)) return kNoSlot;
    const int64_t sinks = kvc::held_sinks(state, all_sinks);
    const int64_t position = index < sinks ? index : state.first + (index - sinks);
    const int64_t local = share.local(position);
    if (share.position(local) != position) return kNoSlot;
    return stored.slot(index < sinks ? local : stored.held_sinks + local - share.local(state.first));
  }

  KVC_HD int64_t run(int64_t, int64_t) const { return kNoSlot; }  // neighbours are other ranks'
};

// Pair i of copy_sequences; one with a number that is out of range is a sequence and itself.
struct SequencePair {
  int64_t source;
  int64_t destination;
};

KVC_HD SequencePair sequence_pair(const CopySequencesParams& p, int64_t i) {
  const int64_t source = p.sources[i];
  const int64_t destination = p.destinations.data == nullptr ? i : p.destinations[i];
  const bool there = source >= 0 && source < p.cache.batch && destination >= 0 && destination < p.cache.batch;
  return there ? SequencePair{source, destination} : SequencePair{0, 0};
}

// Pair i of copy_from; one with a number that is out of range has none but a source of -1.
KVC_HD SequencePair sequence_pair(const CopyFromParams& p, int64_t i) {
  const int64_t source = p.sources[i];
  const int64_t destination = p.destinations[i];
  const bool there = source >= 0 && source < p.source.batch && destination >= 0 && destination < p.cache.batch;
  return there ? SequencePair{source, destination} : SequencePair{-1, -1};
}

// Rows that lie in slots which follow each other in both of copy_from's caches.
struct SlotRun {
  int64_t from;  // the first slot, in the source
  int64_t to;    // the first slot, in the destination
  int64_t rows;
};

// What copy_from moves of one sequence of one layer. The destination will hold what the source holds, or the sinks and
// the newest of it; so the rows are counted by the chronological index that they will have.
struct CopyPlan {
  SequenceState after;  // of the destination
  ReadPlan from;        // where the rows lie in the source: what will be lost is left out
  ReadPlan to;          // where they will lie

  KVC_HD static CopyPlan make(SequenceState s, const CopyFromParams& p) {
    const SequenceState after = state_in_ring(s, p.cache.all_ring);
    const SequenceState stored = local_state(after, p.cache.share);
    return {after, ReadPlan::make(stored, p.source), ReadPlan::make(stored, p.cache)};
  }

  KVC_HD int64_t rows() const { return to.held; }

  // The longest run that begins with row `index`, which is below rows(). A sequence has at most four runs: its sinks,
  // and its ring, cut where either cache's ring ends.
  KVC_HD SlotRun run(int64_t index) const {
    if (index < to.held_sinks) return {index, index, to.held_sinks - index};
    const int64_t in_source = from.slot(index);
    const int64_t in_destination = to.slot(index);
    const int64_t until_end = imin(from.sinks + from.ring - in_source, to.sinks + to.ring - in_destination);
    return {in_source, in_destination, imin(to.held - index, until_end)};
  }
};

}  // namespace kvc
