// What the host knows of the launch before the next one.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

namespace kvc {

// The launches of one cache. A GPU runs those of a graph capture in the order in which they were captured. Outside of a
// capture nobody knows what was launched in between: a graph, perhaps.
class LaunchOrder {
 public:
  static constexpr int64_t kNoLayer = -1;

  explicit LaunchOrder(c10::Device device) : device_(device) {}

  // True if attention on `layer` may read it before the previous launch ends. Known only within one capture: this
  // cache's previous launch was attention that did not append to `layer`. That launch has waited for all before it.
  bool may_read_before_wait(int64_t layer) const;

  // After a launch. `appended_layer`: the layer that the attention launch has appended to, or kNoLayer.
  void attention_launched(int64_t appended_layer);
  void other_launched() { attention_capture_ = 0; }

 private:
  c10::Device device_;
  uint64_t attention_capture_ = 0;  // the capture of the last launch, if that was attention in a capture; else 0
  int64_t appended_layer_ = kNoLayer;
};

}  // namespace kvc
