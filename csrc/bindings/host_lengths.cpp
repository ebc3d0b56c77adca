#include "host_lengths.h"

#include <c10/util/Exception.h>

#include <algorithm>

#include "backend.h"

namespace kvc {

HostLengths::HostLengths(at::Tensor state, int64_t sinks, int64_t ring)
    : state_(std::move(state)),
      layers_(state_.size(1)),
      batch_(state_.size(2)),
      sinks_(sinks),
      ring_(Divider::by(ring)) {
  if (on_host()) {
    seqlens_ = state_.data_ptr<int64_t>();
  } else {
    copy_.resize(static_cast<size_t>(2 * layers_ * batch_));
    seqlens_ = copy_.data();
    exact_ = false;
  }
  firsts_ = seqlens_ + layers_ * batch_;
}

SequenceState HostLengths::state_of(int64_t layer, int64_t sequence) const {
  const int64_t i = layer * batch_ + sequence;
  return {seqlens_[i], firsts_[i]};
}

void HostLengths::set_state(int64_t layer, int64_t sequence, SequenceState state) {
  const int64_t i = layer * batch_ + sequence;
  seqlens_[i] = state.seqlen;
  firsts_[i] = state.first;
}

void HostLengths::note_other_writers() {
  if (state_.is_inference()) return;  // an inference tensor has no version
  const auto version = static_cast<uint32_t>(state_._version());
  if (version != version_) exact_ = false;
  version_ = version;
}

void HostLengths::note_capture() {
  note_other_writers();
  if (!captured_ && graph_capture(state_.device()) != 0) captured_ = true;
  if (captured_) exact_ = false;
}

template <typename Change>
void HostLengths::change_states(int64_t first_layer, int64_t layer_count, const IntegerList& sequences,
                                const Change& change) {
  note_capture();
  if (sequences.given() && !sequences.host_values) exact_ = false;
  if (!exact_) return;
  const int64_t entries = sequences.given() ? static_cast<int64_t>(sequences.host_values->size()) : batch_;
  for (int64_t layer = first_layer; layer < first_layer + layer_count; ++layer) {
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t sequence = sequences.given() ? (*sequences.host_values)[static_cast<size_t>(i)] : i;
      set_state(layer, sequence, change(i, state_of(layer, sequence)));
    }
  }
}

void HostLengths::appended(int64_t first_layer, int64_t layer_count, int64_t rows, bool has_new_lengths,
                           const IntegerList& sequences) {
  if (on_host()) return;
  if (has_new_lengths) exact_ = false;
  change_states(first_layer, layer_count, sequences,
                [&](int64_t, SequenceState s) { return state_after_append(s, rows, ring_.divisor); });
}

void HostLengths::truncated(int64_t length, const IntegerList& lengths, const IntegerList& sequences, bool newest) {
  if (on_host()) return;
  if (lengths.given() && !lengths.host_values) exact_ = false;
  change_states(0, layers_, sequences, [&](int64_t i, SequenceState s) {
    const int64_t n = lengths.given() ? (*lengths.host_values)[static_cast<size_t>(i)] : length;
    return state_after_truncate(s, newest ? length_without_newest(held_positions(s, sinks_), n) : n, sinks_);
  });
}

void HostLengths::reset(const IntegerList& sequences) {
  if (on_host()) return;
  change_states(0, layers_, sequences, [&](int64_t, SequenceState) { return empty_state(sinks_); });
}

void HostLengths::copied(const IntegerList& sources, const IntegerList& destinations) {
  if (on_host()) return;
  note_capture();
  if (!sources.host_values || (destinations.given() && !destinations.host_values)) exact_ = false;
  if (!exact_) return;
  const size_t count = sources.host_values->size();
  std::vector<SequenceState> states(count);  // all are read before any is written
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (size_t i = 0; i < count; ++i) states[i] = state_of(layer, (*sources.host_values)[i]);
    for (size_t i = 0; i < count; ++i) {
      set_state(layer, destinations.given() ? (*destinations.host_values)[i] : static_cast<int64_t>(i), states[i]);
    }
  }
}

void HostLengths::copied_from(HostLengths* source, const IntegerList& sources, const IntegerList& destinations) {
  if (on_host()) return;
  note_capture();
  const bool source_is_exact = source != nullptr && source->is_exact();
  if (!sources.host_values || !destinations.host_values || !source_is_exact) exact_ = false;
  if (!exact_) return;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (size_t i = 0; i < sources.host_values->size(); ++i) {
      const SequenceState from = source->state_of(layer, (*sources.host_values)[i]);
      set_state(layer, (*destinations.host_values)[i], state_in_ring(from, ring_.divisor));
    }
  }
}

void HostLengths::cleared() {
  if (on_host()) return;
  note_capture();
  if (captured_) return;  // a replay may change the state unseen: what is known on the host stays inexact
  // torch has just cleared the state tensor, which raised its version.
  if (!state_.is_inference()) version_ = static_cast<uint32_t>(state_._version());
  std::fill(seqlens_, seqlens_ + layers_ * batch_, 0);
  std::fill(firsts_, firsts_ + layers_ * batch_, sinks_);
  exact_ = true;
}

void HostLengths::refresh(const char* op) {
  if (on_host()) return;
  TORCH_CHECK(graph_capture(state_.device()) == 0, op,
              " needs the cache's lengths on the host, which a CUDA graph capture cannot give: lengths change with "
              "every replay; use gather with an index tensor, or cache_seqlens, inside the graph");
  note_other_writers();
  if (exact_) return;
  const at::Tensor now = state_.to(at::kCPU);
  std::copy_n(now.const_data_ptr<int64_t>(), copy_.size(), copy_.begin());
  exact_ = !captured_;
}

int64_t HostLengths::held(int64_t layer, int64_t sequence) const {
  return held_positions(state_of(layer, sequence), sinks_);
}

int64_t HostLengths::longest(int64_t layer) const {
  int64_t n = 0;
  for (int64_t b = 0; b < batch_; ++b) n = std::max(n, held(layer, b));
  return n;
}

bool HostLengths::is_exact() {
  if (!on_host()) note_other_writers();
  return on_host() || (exact_ && graph_capture(state_.device()) == 0);
}

int64_t HostLengths::shortest() const {
  int64_t n = shortest_of_sequence(0);
  for (int64_t b = 1; b < batch_; ++b) n = std::min(n, shortest_of_sequence(b));
  return n;
}

int64_t HostLengths::shortest_of_sequence(int64_t sequence) const {
  int64_t n = held(0, sequence);
  for (int64_t layer = 1; layer < layers_; ++layer) n = std::min(n, held(layer, sequence));
  return n;
}

int64_t HostLengths::position() const { return *std::max_element(seqlens_, seqlens_ + layers_ * batch_); }

int64_t HostLengths::contiguous_slot(int64_t layer, int64_t start, int64_t end) const {
  if (start == end) return 0;
  CacheView c{};
  c.sinks = sinks_;
  c.ring = ring_;
  int64_t slot = -1;
  for (int64_t b = 0; b < batch_; ++b) {
    const ReadPlan plan = ReadPlan::make(state_of(layer, b), c);
    const int64_t from = plan.slot(start);
    if (from < 0 || plan.slot(end - 1) != from + (end - 1 - start) || (b > 0 && from != slot)) return -1;
    slot = from;
  }
  return slot;
}

}  // namespace kvc
