// A cache as the ops get it: tensors, found to fit each other.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>

#include "../kernels/params.h"
#include "host_record.h"
#include "strided_memory.h"

namespace kvc {

// The tensors and settings that make up a cache.
struct CacheTensors {
  at::Tensor k_cache;          // [L, B, N, H, D] FP16
  at::Tensor v_cache;          // [L, B, N, H, D] FP16
  at::Tensor state;            // [3, L, B] int64
  at::Tensor overflow_counts;  // [L] int64; undefined for ops that count nothing
  int64_t sink_positions;
  bool saturate;
  int64_t ranks = 1;  // of the group that a text is dealt out to; N and sink_positions are then this rank's share
  int64_t rank = 0;
};

struct CheckedCache {
  // Raises unless the tensors fit each other.
  CheckedCache(const char* op, CacheTensors tensors);

  c10::Device device() const { return tensors.k_cache.device(); }
  // Does this memory share a byte with the keys or the values?
  bool holds(const StridedMemory& memory) const { return memory.shares_with(keys) || memory.shares_with(values); }

  CacheTensors tensors;
  CacheView view;  // what the kernels see
  StridedMemory keys;
  StridedMemory values;
  StridedMemory state;
  StridedMemory overflow_counts;     // none where the tensor is undefined
  std::shared_ptr<HostRecord> host;  // null: the tensors belong to no cache object. Set by whoever makes this
};

}  // namespace kvc
