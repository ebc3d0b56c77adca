// Merging the answers of the ranks that a text is dealt out to.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "../kernels/params.h"
#include "cache_tensors.h"
#include "call.h"

namespace kvc {

// What ranks that reach each other's memory exchange answers through, for every call of theirs.
struct ExchangeMemory {
  // `inboxes`: the address of every rank's, as this rank reaches it; `lines` in each table of one. `control`: int32 [3]
  // on the device, zero. `failure`: int32 [1] in pinned memory of the host. `sends`, `receives`: for tests (Exchange).
  ExchangeMemory(const std::vector<uint64_t>& inboxes, int64_t lines, at::Tensor control, at::Tensor failure,
                 double timeout_s, bool sends, bool receives);

  Exchange exchange;
  at::Tensor control;
  at::Tensor failure;
};

struct MergeTensors {
  const at::Tensor& out;  // of a query's shape
  const at::Tensor& lse;  // its shape without head_dim, FP32; or undefined
  const at::Tensor& tag;  // int64 [1] on the device: a number that must be the same on all ranks
  int64_t call = 0;       // the same, known to the host
};

// `answers` [rows * D] and `lses` [rows]: this rank's, FP32. The others' come through the exchange.
void merge_exchanged(const CheckedCache& cache, int64_t layer, const at::Tensor& answers, const at::Tensor& lses,
                     const MergeTensors& to, const IntegerList& sequences, const ExchangeMemory& memory);

// `gathered` FP32 [ranks, floats]: of every rank the answers, the LSEs, and behind them at a multiple of two floats
// `state[:2, layer]` and the tag, int64. `failure`: int32 [1] in memory of the host, which the device reaches.
void merge_gathered(const CheckedCache& cache, int64_t layer, const at::Tensor& gathered, const MergeTensors& to,
                    const IntegerList& sequences, const at::Tensor& failure);

}  // namespace kvc
