// Plain Python objects to C++ arguments. A wrong object gets a sentence of ours instead of pybind11's listing of
// overloads. The sentence names the op and the argument.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "cache_tensors.h"
#include "call.h"
#include "ops.h"

namespace kvc {

namespace py = pybind11;

const at::Tensor& tensor_argument(const char* op, const char* name, py::handle h);
const at::Tensor& optional_tensor_argument(const char* op, const char* name, py::handle h);  // None: undefined
int64_t integer_argument(const char* op, const char* name, py::handle h);
bool flag_argument(const char* op, const char* name, py::handle h);
at::ScalarType dtype_argument(const char* op, py::handle h);
std::optional<TensorPair> out_argument(const char* op, py::handle h);
int64_t layer_argument(const char* op, py::handle h, const CheckedCache& cache);

// What each sequence of `truncate` and `drop_newest` keeps or loses: an int for all of them, or a list or a tensor with
// a number for each.
struct LengthsArgument {
  int64_t length = 0;  // of all, where `lengths` is not given
  IntegerList lengths = {};
};

LengthsArgument lengths_argument(const char* op, py::handle h, const CheckedCache& cache, const IntegerList& sequences);

AttendOptions attend_options(const char* op, py::handle scale, py::handle window, py::handle softcap, bool rounds,
                             const CheckedCache& cache);

// The argument `sequences`: None (not given), a list of ints or a tensor.
IntegerList sequences_argument(const char* op, py::handle h, const CheckedCache& cache);

// The argument `batch_indices`: a list of ints, one for each sequence, or a tensor.
IntegerList batch_indices_argument(const char* op, py::handle h, const CheckedCache& cache);

// `src`, sequences of `source`, and `dst`, as many of `cache`: each an int, a list of ints or a tensor.
std::pair<IntegerList, IntegerList> sequence_pairs(const char* op, py::handle src, const CheckedCache& source,
                                                   py::handle dst, const CheckedCache& cache);

}  // namespace kvc
