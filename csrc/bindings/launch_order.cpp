#include "launch_order.h"

#include "backend.h"

namespace kvc {

bool LaunchOrder::may_read_before_wait(int64_t layer) const {
  return attention_capture_ != 0 && appended_layer_ != layer && graph_capture(device_) == attention_capture_;
}

void LaunchOrder::attention_launched(int64_t appended_layer) {
  attention_capture_ = graph_capture(device_);
  appended_layer_ = appended_layer;
}

}  // namespace kvc
