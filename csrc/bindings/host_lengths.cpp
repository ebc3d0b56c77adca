#include "host_lengths.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

#include "devices.h"

namespace kvc {
namespace {

std::mutex registry_mutex;

std::unordered_map<const void*, std::weak_ptr<HostLengths>>& registry() {
  static auto* lengths = new std::unordered_map<const void*, std::weak_ptr<HostLengths>>();
  return *lengths;
}

}  // namespace

HostLengths::HostLengths(at::Tensor state, int64_t sinks, int64_t positions)
    : state_(std::move(state)),
      layers_(state_.size(1)),
      batch_(state_.size(2)),
      sinks_(sinks),
      ring_(Divider::by(positions - sinks)) {
  if (on_host()) {
    seen_ = state_.data_ptr<int64_t>();
  } else {
    copy_.resize(static_cast<size_t>(2 * layers_ * batch_));
    seen_ = copy_.data();
    exact_ = false;
  }
  first_ = seen_ + layers_ * batch_;
}

std::shared_ptr<HostLengths> HostLengths::make(at::Tensor state, int64_t sinks, int64_t positions) {
  auto lengths = std::make_shared<HostLengths>(std::move(state), sinks, positions);
  const std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[lengths->state_.const_data_ptr()] = lengths;
  return lengths;
}

HostLengths::~HostLengths() {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(state_.const_data_ptr());
  if (found != registry().end() && found->second.expired()) registry().erase(found);
}

std::shared_ptr<HostLengths> HostLengths::of(const at::Tensor& state) {
  if (!state.defined() || !state.has_storage()) return nullptr;  // the checks of whoever asks will say so
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(state.const_data_ptr());
  return found == registry().end() ? nullptr : found->second.lock();
}

uint64_t HostLengths::capture() const {
#if defined(KVC_WITH_CUDA)
  if (state_.is_cuda()) return capture_cuda(state_.device());
#endif
  return 0;
}

bool HostLengths::settled(int64_t layer) const {
  return last_attention_capture_ != 0 && last_appended_layer_ != layer && capture() == last_attention_capture_;
}

void HostLengths::attention_launched(int64_t appended_layer) {
  last_attention_capture_ = capture();
  last_appended_layer_ = appended_layer;
}

void HostLengths::notice_copies() {
  if (state_.is_inference()) return;  // has no version
  const auto version = static_cast<uint32_t>(state_._version());
  if (version != version_) exact_ = false;
  version_ = version;
}

void HostLengths::note_launch() {
  notice_copies();
  if (!captured_ && capture() != 0) captured_ = true;
  if (captured_) exact_ = false;
}

template <typename Change>
void HostLengths::changed(int64_t first_layer, int64_t layer_count, const IntegerArgument* sequences,
                          const Change& change) {
  note_launch();
  if (sequences != nullptr && !sequences->known) exact_ = false;
  if (!exact_) return;
  const int64_t entries = sequences == nullptr ? batch_ : static_cast<int64_t>(sequences->values.size());
  for (int64_t layer = first_layer; layer < first_layer + layer_count; ++layer) {
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t b = layer * batch_ + (sequences == nullptr ? i : sequences->values[static_cast<size_t>(i)]);
      const SequenceState next = change(i, SequenceState{seen_[b], first_[b]});
      seen_[b] = next.seqlen;
      first_[b] = next.first;
    }
  }
}

void HostLengths::appended(int64_t first_layer, int64_t layer_count, int64_t rows, bool ragged,
                           const IntegerArgument* sequences) {
  if (on_host()) return;
  if (ragged) exact_ = false;
  changed(first_layer, layer_count, sequences,
          [&](int64_t, SequenceState s) { return state_after_append(s, rows, ring_.divisor); });
}

void HostLengths::truncated(int64_t length, const IntegerArgument* of_each, const IntegerArgument* sequences,
                            bool newest) {
  if (on_host()) return;
  if (of_each != nullptr && !of_each->known) exact_ = false;
  changed(0, layers_, sequences, [&](int64_t i, SequenceState s) {
    const int64_t n = of_each == nullptr ? length : of_each->values[static_cast<size_t>(i)];
    return state_after_truncate(s, newest ? length_without_newest(held_positions(s, sinks_), n) : n, sinks_);
  });
}

void HostLengths::reset(const IntegerArgument& sequences) {
  if (on_host()) return;
  changed(0, layers_, &sequences, [&](int64_t, SequenceState) { return empty_state(sinks_); });
}

void HostLengths::copied(const IntegerArgument& sources, const IntegerArgument* destinations) {
  if (on_host()) return;
  note_launch();
  if (!sources.known || (destinations != nullptr && !destinations->known)) exact_ = false;
  if (!exact_) return;
  const std::vector<int64_t> before = copy_;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (size_t i = 0; i < sources.values.size(); ++i) {
      const auto source = static_cast<size_t>(layer * batch_ + sources.values[i]);
      const int64_t destination =
          layer * batch_ + (destinations == nullptr ? static_cast<int64_t>(i) : destinations->values[i]);
      seen_[destination] = before[source];
      first_[destination] = before[static_cast<size_t>(layers_ * batch_) + source];
    }
  }
}

void HostLengths::copied_from(HostLengths* source, const IntegerArgument& sources,
                              const IntegerArgument& destinations) {
  if (on_host()) return;
  note_launch();
  const bool source_known = source != nullptr && source->known_without_looking();
  if (!sources.known || !destinations.known || !source_known) exact_ = false;
  if (!exact_) return;
  for (int64_t layer = 0; layer < layers_; ++layer) {
    for (size_t i = 0; i < sources.values.size(); ++i) {
      const int64_t from = layer * source->batch_ + sources.values[i];
      const int64_t to = layer * batch_ + destinations.values[i];
      const SequenceState after = state_in_ring({source->seen_[from], source->first_[from]}, ring_.divisor);
      seen_[to] = after.seqlen;
      first_[to] = after.first;
    }
  }
}

void HostLengths::cleared() {
  if (on_host()) return;
  note_launch();
  if (captured_) return;
  if (!state_.is_inference()) version_ = static_cast<uint32_t>(state_._version());  // clearing is torch's own work
  std::fill(seen_, seen_ + layers_ * batch_, 0);
  std::fill(first_, first_ + layers_ * batch_, sinks_);
  exact_ = true;
}

void HostLengths::refresh(const char* op) {
  if (on_host()) return;
  TORCH_CHECK(capture() == 0, op,
              " needs the cache's lengths on the host, which a CUDA graph capture cannot give: lengths change with "
              "every replay; use gather with an index tensor, or cache_seqlens, inside the graph");
  notice_copies();
  if (exact_) return;
  const at::Tensor now = state_.to(at::kCPU);
  std::copy_n(now.const_data_ptr<int64_t>(), copy_.size(), copy_.begin());
  exact_ = !captured_;
}

int64_t HostLengths::held(int64_t layer, int64_t sequence) const {
  const int64_t i = layer * batch_ + sequence;
  return held_positions({seen_[i], first_[i]}, sinks_);
}

int64_t HostLengths::longest(int64_t layer, Sequences of) const {
  int64_t n = 0;
  for (int64_t b = of.begin; b < of.end; ++b) n = std::max(n, held(layer, b));
  return n;
}

bool HostLengths::known_without_looking() {
  if (!on_host()) notice_copies();
  return on_host() || (exact_ && capture() == 0);
}

int64_t HostLengths::shortest() const {
  int64_t n = held(0, 0);
  for (int64_t i = 1; i < layers_ * batch_; ++i) n = std::min(n, held_positions({seen_[i], first_[i]}, sinks_));
  return n;
}

int64_t HostLengths::shortest_of(int64_t sequence) const {
  int64_t n = held(0, sequence);
  for (int64_t layer = 1; layer < layers_; ++layer) n = std::min(n, held(layer, sequence));
  return n;
}

int64_t HostLengths::position() const { return *std::max_element(seen_, seen_ + layers_ * batch_); }

int64_t HostLengths::contiguous_slot(int64_t layer, Sequences of, int64_t start, int64_t end) const {
  if (start == end) return 0;
  CacheView c{};
  c.sinks = sinks_;
  c.ring = ring_;
  int64_t slot = -1;
  for (int64_t b = of.begin; b < of.end; ++b) {
    const int64_t i = layer * batch_ + b;
    const ReadPlan plan = ReadPlan::make({seen_[i], first_[i]}, c);
    const int64_t from = plan.slot(start);
    if (from < 0 || plan.slot(end - 1) != from + (end - 1 - start) || (b > of.begin && from != slot)) return -1;
    slot = from;
  }
  return slot;
}

}  // namespace kvc
