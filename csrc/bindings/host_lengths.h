// What the host knows of lengths that live on a device.
//
// `len(cache)` and the like need numbers on the host. Each append moves a copy kept here, so that no synchronisation is
// needed as long as the copy is exact. A device-side `new_lengths`, or a choice of sequences that the device alone
// knows, makes it inexact until the device is read again, and so does whatever writes to the state tensor past the ops
// (a compiler that works on clones and copies them back); an op captured into a CUDA graph makes it inexact for good,
// as replays are not seen from here.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <utility>
#include <vector>

#include "../kernels/params.h"
#include "../kernels/ring.h"
#include "checks.h"

namespace kvc {

class HostLengths {
 public:
  // The sequences from `begin` to before `end`.
  struct Sequences {
    int64_t begin;
    int64_t end;
  };
  Sequences all() const { return {0, batch_}; }

  // `state` [3, L, B] on any device.
  HostLengths(at::Tensor state, int64_t sinks, int64_t positions);
  ~HostLengths();
  HostLengths(const HostLengths&) = delete;
  HostLengths& operator=(const HostLengths&) = delete;

  // The copy that belongs to a state tensor, or null. An op that reached its tensors through the dispatcher finds the
  // lengths of the cache that they belong to this way.
  static std::shared_ptr<HostLengths> of(const at::Tensor& state);
  static std::shared_ptr<HostLengths> make(at::Tensor state, int64_t sinks, int64_t positions);

  // After an op has been launched on the device.
  void appended(int64_t first_layer, int64_t layer_count, int64_t rows, bool ragged, const IntegerArgument* sequences);
  // `newest`: the numbers are how many of the newest positions went, not how many of the oldest stayed.
  void truncated(int64_t length, const IntegerArgument* of_each, const IntegerArgument* sequences, bool newest);
  void reset(const IntegerArgument& sequences);
  void copied(const IntegerArgument& sources, const IntegerArgument* destinations);
  // `source`: the lengths of the cache that was copied from, or null, where nobody knows them.
  void copied_from(HostLengths* source, const IntegerArgument& sources, const IntegerArgument& destinations);
  void cleared();

  // Launches into a graph, whose order is that of their capture. May an attention launch look at a layer before the
  // launch ahead of it is done? If that was an attention launch of this cache on another layer (or none that appends),
  // and so let this one begin only when all before it was done. Outside of a capture nobody knows what was launched in
  // between: a graph, perhaps.
  bool settled(int64_t layer) const;
  void attention_launched(int64_t appended_layer);  // -1: it appended nothing
  void other_launched() { last_attention_capture_ = 0; }

  // Reads the device where the copy is not exact; raises RuntimeError during capture.
  void refresh(const char* op);
  int64_t held(int64_t layer, int64_t sequence) const;
  // The largest number held by one of these sequences of the layer.
  int64_t longest(int64_t layer, Sequences of) const;
  int64_t shortest() const;                     // the smallest number held by any
  int64_t shortest_of(int64_t sequence) const;  // over layers
  int64_t position() const;                     // the largest number seen by any
  // The slot of chronological index `start` when [start, end) lies in consecutive slots, the same ones in each of them;
  // else -1.
  int64_t contiguous_slot(int64_t layer, Sequences of, int64_t start, int64_t end) const;

  bool capturing() const { return capture() != 0; }  // is the current stream being captured into a graph?

 private:
  bool on_host() const { return state_.is_cpu(); }
  uint64_t capture() const;  // the number of the graph capture under way, or 0
  bool known_without_looking();
  // After a launch: the state of entry i's sequence becomes change(i, state) in each of the layers.
  template <typename Change>
  void changed(int64_t first_layer, int64_t layer_count, const IntegerArgument* sequences, const Change& change);
  void note_launch();    // notices capture
  void notice_copies();  // notices that torch itself has written to the state, as compilers that copy tensors do

  at::Tensor state_;
  int64_t layers_;
  int64_t batch_;
  int64_t sinks_;
  Divider ring_;
  std::vector<int64_t> copy_;  // [2, L, B]: seen, first; unused where the state itself is on the host
  int64_t* seen_;              // the copy's, or the state's own memory on a CPU
  int64_t* first_;
  bool exact_ = true;
  uint32_t version_ = 0;  // of the state tensor, when last looked at
  bool captured_ = false;
  uint64_t last_attention_capture_ = 0;  // the capture that the last launch was part of, if it was attention
  int64_t last_appended_layer_ = -1;     // what it appended to
};

}  // namespace kvc
