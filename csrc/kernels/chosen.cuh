// Which of the cache's sequences a block works for.
#pragma once

#include "overlap.cuh"
#include "params.h"

namespace kvc {

// The sequence of an entry of the call's tensors, or -1. The previous launch may be about to write the indices, so they
// are read when it is done: what a kernel does ahead of that it does for calls about all sequences.
__device__ __forceinline__ int64_t sequence_of_entry(const ChosenSequences& chosen, int64_t entry, int64_t batch) {
  if (chosen.indices.data == nullptr) return entry;
  wait_for_previous_launch();
  return chosen.sequence(entry, batch);
}

}  // namespace kvc
