// truncate, and copies of sequences, on a CPU.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../ring.h"
#include "cpu.h"

namespace kvc {
namespace cpu {

void truncate(const TruncateParams& p) {
  for (int64_t layer = 0; layer < p.layers; ++layer) {
    for (int64_t entry = 0; entry < p.sequences.entries(p.batch); ++entry) truncate_entry(p, layer, entry);
  }
}

std::vector<SequencePair> sequence_pairs(const CopySequencesParams& p) {
  std::vector<SequencePair> pairs;
  for (int64_t i = 0; i < p.count; ++i) {
    const SequencePair pair = sequence_pair(p, i);
    if (pair.source != pair.destination) pairs.push_back(pair);
  }
  return pairs;
}

int64_t copy_sequences_items(const CopySequencesParams& p) { return p.cache.layers * p.cache.positions; }

void copy_sequences(const CopySequencesParams& p, const std::vector<SequencePair>& pairs, int64_t begin, int64_t end) {
  const CacheView& c = p.cache;
  const int64_t row_elements = c.heads * c.head_dim;
  const auto count = static_cast<int64_t>(pairs.size());
  // Is nobody written to who is read? Then rows are copied at once, else a piece of all of them is read before it is
  // written.
  std::vector<bool> written(static_cast<size_t>(c.batch), false);
  for (const SequencePair& pair : pairs) written[static_cast<size_t>(pair.destination)] = true;
  const bool apart = std::none_of(pairs.begin(), pairs.end(),
                                  [&](const SequencePair& pair) { return written[static_cast<size_t>(pair.source)]; });
  constexpr int64_t kBufferElements = int64_t{1} << 14;  // what a first-level cache holds
  const int64_t most = apart ? row_elements : imin(row_elements, imax(kBufferElements / imax(count, 1), 32));
  std::vector<uint16_t> buffer(apart ? 0 : static_cast<size_t>(count * most));
  std::vector<ReadPlan> plans(static_cast<size_t>(count));
  while (begin < end) {  // a run of slots of one layer
    const int64_t layer = begin / c.positions;
    const int64_t first_slot = begin - layer * c.positions;
    const int64_t last_slot = imin(c.positions, first_slot + (end - begin));
    int64_t slots_end = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t state_row = layer * c.batch + pairs[static_cast<size_t>(i)].source;
      ReadPlan& plan = plans[static_cast<size_t>(i)];
      plan = ReadPlan::make(local_state({*seqlen_of(c, state_row), *first_of(c, state_row)}, c.share), c);
      slots_end = imax(slots_end, plan.slots_end());
    }
    for (int64_t slot = first_slot; slot < imin(last_slot, slots_end); ++slot) {
      for (uint16_t* cache : {c.k_cache, c.v_cache}) {
        for (int64_t column = 0; column < row_elements; column += most) {
          const int64_t n = imin(most, row_elements - column);
          const auto at = [&](int64_t sequence) {
            return cache + ((layer * c.batch + sequence) * c.positions + slot) * row_elements + column;
          };
          const auto each = [&](const auto& copy) {
            for (int64_t i = 0; i < count; ++i) {
              if (!plans[static_cast<size_t>(i)].holds(slot)) continue;
              const SequencePair& pair = pairs[static_cast<size_t>(i)];
              copy(at(pair.source), at(pair.destination), buffer.data() + (apart ? 0 : i * most));
            }
          };
          const size_t bytes = static_cast<size_t>(n) * 2;
          if (apart) {
            each([&](const uint16_t* from, uint16_t* to, uint16_t*) { std::memcpy(to, from, bytes); });
          } else {
            each([&](const uint16_t* from, uint16_t*, uint16_t* through) { std::memcpy(through, from, bytes); });
            each([&](const uint16_t*, uint16_t* to, uint16_t* through) { std::memcpy(to, through, bytes); });
          }
        }
      }
    }
    begin += last_slot - first_slot;
  }
}

void move_states(const CopySequencesParams& p, const std::vector<SequencePair>& pairs) {
  const CacheView& c = p.cache;
  std::vector<SequenceState> states(pairs.size());
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    for (size_t i = 0; i < pairs.size(); ++i) {
      const int64_t state_row = layer * c.batch + pairs[i].source;
      states[i] = {*seqlen_of(c, state_row), *first_of(c, state_row)};
    }
    for (size_t i = 0; i < pairs.size(); ++i) {
      const int64_t state_row = layer * c.batch + pairs[i].destination;
      *seqlen_of(c, state_row) = states[i].seqlen;
      *first_of(c, state_row) = states[i].first;
    }
  }
}

namespace {

int64_t copy_from_rows(const CopyFromParams& p) { return imin(p.cache.positions, p.source.positions); }

}  // namespace

int64_t copy_from_items(const CopyFromParams& p) { return p.cache.layers * p.count * copy_from_rows(p); }

void copy_from(const CopyFromParams& p, int64_t begin, int64_t end) {
  const int64_t row_elements = p.cache.heads * p.cache.head_dim;
  const int64_t rows = copy_from_rows(p);
  while (begin < end) {  // rows of one pair in one layer
    const int64_t matrix = begin / rows;
    const int64_t first_row = begin - matrix * rows;
    const int64_t last_row = imin(rows, first_row + (end - begin));
    begin += last_row - first_row;
    const int64_t layer = matrix / p.count;
    const SequencePair pair = sequence_pair(p, matrix - layer * p.count);
    if (pair.source < 0) continue;
    const CopyPlan plan = CopyPlan::make(state_of(p.source, layer, pair.source), p);
    const int64_t source_start = (layer * p.source.batch + pair.source) * p.source.positions;
    const int64_t destination_start = (layer * p.cache.batch + pair.destination) * p.cache.positions;
    const int64_t rows_end = imin(last_row, plan.rows());
    for (int64_t row = first_row; row < rows_end;) {
      const SlotRun run = plan.run(row);
      const int64_t count = imin(run.rows, rows_end - row);
      const int64_t from = (source_start + run.from) * row_elements;
      const int64_t to = (destination_start + run.to) * row_elements;
      const size_t bytes = static_cast<size_t>(count * row_elements) * sizeof(uint16_t);
      std::memcpy(p.cache.k_cache + to, p.source.k_cache + from, bytes);
      std::memcpy(p.cache.v_cache + to, p.source.v_cache + from, bytes);
      row += count;
    }
  }
}

void copy_from_states(const CopyFromParams& p) {
  for (int64_t layer = 0; layer < p.cache.layers; ++layer) {
    for (int64_t i = 0; i < p.count; ++i) {
      const SequencePair pair = sequence_pair(p, i);
      if (pair.source < 0) continue;
      const SequenceState after = CopyPlan::make(state_of(p.source, layer, pair.source), p).after;
      const int64_t state_row = layer * p.cache.batch + pair.destination;
      *seqlen_of(p.cache, state_row) = after.seqlen;
      *first_of(p.cache, state_row) = after.first;
    }
  }
}

}  // namespace cpu
}  // namespace kvc
