// What the host keeps of a cache beside its tensors, and how an op finds it.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "host_lengths.h"
#include "launch_order.h"

namespace kvc {

struct HostRecord {
  // Use make(). `state`: [3, L, B] on any device. `sinks` and `ring`: of all ranks.
  HostRecord(const at::Tensor& state, int64_t sinks, int64_t ring);
  ~HostRecord();
  HostRecord(const HostRecord&) = delete;
  HostRecord& operator=(const HostRecord&) = delete;

  // Makes the record of a new cache and registers it by the address of its state.
  static std::shared_ptr<HostRecord> make(const at::Tensor& state, int64_t sinks, int64_t ring);
  // The record of the cache that a state tensor belongs to, or null. Ops that are called through the dispatcher get
  // tensors only, and find the record this way.
  static std::shared_ptr<HostRecord> of(const at::Tensor& state);

  const void* key;
  HostLengths lengths;
  LaunchOrder launch_order;
};

}  // namespace kvc
