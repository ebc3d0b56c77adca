// What the host knows of lengths that live on a device.
//
// `len(cache)` and the like need numbers on the host. The host keeps a copy of the state and moves it with each op, so
// that nothing has to wait for the device while the copy is exact. The copy becomes inexact, until the device is read
// again, when
// - an op depends on numbers that only the device knows, such as `new_lengths`, or sequences in a tensor;
// - something other than these ops writes to the state tensor, as a compiler does that works on clones and copies them
//   back.
// It is inexact for good once an op has been captured into a CUDA graph, as the host does not see replays.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "../kernels/params.h"
#include "../kernels/ring.h"
#include "call.h"

namespace kvc {

class HostLengths {
 public:
  // `state` [3, L, B] on any device.
  HostLengths(at::Tensor state, int64_t sinks, int64_t ring);
  HostLengths(const HostLengths&) = delete;
  HostLengths& operator=(const HostLengths&) = delete;

  // Each of these is called after its op has been launched on the device.
  // `has_new_lengths`: the op was given new_lengths.
  void appended(int64_t first_layer, int64_t layer_count, int64_t rows, bool has_new_lengths,
                const IntegerList& sequences);
  // Each sequence keeps its `length` oldest positions, or as many as `lengths` says; with `newest` it loses that many
  // of its newest instead.
  void truncated(int64_t length, const IntegerList& lengths, const IntegerList& sequences, bool newest);
  void reset(const IntegerList& sequences);
  void copied(const IntegerList& sources, const IntegerList& destinations);
  // `source`: the lengths of the cache that was copied from, or null, where nobody knows them.
  void copied_from(HostLengths* source, const IntegerList& sources, const IntegerList& destinations);
  void cleared();

  // Reads the device if the copy is not exact. Raises RuntimeError during capture.
  void refresh(const char* op);

  // All below need an exact copy.
  int64_t held(int64_t layer, int64_t sequence) const;
  int64_t longest(int64_t layer) const;                  // the largest number held by a sequence of the layer
  int64_t shortest() const;                              // the smallest number held by a sequence of any layer
  int64_t shortest_of_sequence(int64_t sequence) const;  // the smallest number held by it in any layer
  int64_t position() const;                              // the largest seqlen
  // The slot of chronological index `start`, if [start, end) lies in consecutive slots and in the same ones in each
  // sequence of the layer; else -1.
  int64_t contiguous_slot(int64_t layer, int64_t start, int64_t end) const;

 private:
  bool on_host() const { return state_.is_cpu(); }
  SequenceState state_of(int64_t layer, int64_t sequence) const;
  void set_state(int64_t layer, int64_t sequence, SequenceState state);
  bool is_exact();
  // After a launch: the state of entry i's sequence becomes change(i, state) in each of the layers.
  template <typename Change>
  void change_states(int64_t first_layer, int64_t layer_count, const IntegerList& sequences, const Change& change);
  void note_capture();        // the copy is inexact from now on if the launch was captured
  void note_other_writers();  // the copy is inexact if the state tensor's version is not the one last seen

  at::Tensor state_;
  int64_t layers_;
  int64_t batch_;
  int64_t sinks_;
  Divider ring_;
  std::vector<int64_t> copy_;  // [2, L, B]: seqlens, firsts; empty where the state itself is on the host
  int64_t* seqlens_;           // [L, B], in the copy, or in the state itself where that is on the host
  int64_t* firsts_;            // [L, B], behind them
  bool exact_ = true;
  bool captured_ = false;  // an op was captured into a graph
  uint32_t version_ = 0;   // of the state tensor, when last looked at
};

}  // namespace kvc
