// The arguments of the ops that travel together.
//
// An argument that may be left out is a tensor that may be undefined.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace kvc {

// A list of integers that a call is given: which sequences, or a number for each of them.
struct IntegerList {
  at::Tensor tensor;                                     // where the op reads it; undefined: not given
  std::optional<std::vector<int64_t>> host_values = {};  // the same integers, if the host knows them

  bool given() const { return tensor.defined(); }
};

// What is appended. (B is the cache's, or the number of sequences that the call names.)
struct AppendTensors {
  const at::Tensor& key;          // [B, T, H, D]; [L, B, T, H, D] for append_all
  const at::Tensor& value;        // the same
  const at::Tensor& new_lengths;  // [B], or undefined: all T positions of each sequence
};

// What attention reads, besides the cache, and what it writes.
struct AttendTensors {
  const at::Tensor& query;      // [B, T, Hq, D]
  const at::Tensor& workspace;  // FP32
  const at::Tensor& out;        // the query's shape and dtype
  const at::Tensor& lse;        // [B, T, Hq] FP32, or undefined: not asked for
};

struct AttendOptions {
  double scale;
  int64_t window;  // 0: none
  double softcap;  // 0: none
  bool rounds;     // precision="fp16"
};

}  // namespace kvc
