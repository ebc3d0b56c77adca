#include "arguments.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend.h"
#include "checks.h"

namespace kvc {
namespace {

const char* type_name(py::handle h) { return Py_TYPE(h.ptr())->tp_name; }

bool is_tensor(py::handle h) { return THPVariable_Check(h.ptr()); }

// A list, a tuple, a range and the like.
bool is_list(py::handle h) {
  return PySequence_Check(h.ptr()) && !is_tensor(h) && !PyUnicode_Check(h.ptr()) && !PyBytes_Check(h.ptr());
}

// The number of items of a list. An object may look like a list and still raise when it is asked.
int64_t list_size(const char* op, const char* name, py::handle h) {
  const Py_ssize_t size = PySequence_Size(h.ptr());
  if (size < 0) PyErr_Clear();
  TORCH_CHECK_TYPE(size >= 0, op, ": ", name, " must be a list of ints, got a ", type_name(h),
                   " that cannot be read as one");
  return size;
}

int64_t integer_of_list(const char* op, const char* name, py::handle h, int64_t i) {
  const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(h.ptr(), i));
  if (!item) PyErr_Clear();
  TORCH_CHECK_TYPE(item, op, ": ", name, " must be a list of ints, got a ", type_name(h),
                   " that cannot be read as one");
  return integer_argument(op, name, item);
}

double number_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE((PyFloat_Check(h.ptr()) || PyIndex_Check(h.ptr())) && !PyBool_Check(h.ptr()), op, ": ", name,
                   " must be a number or None, got ", type_name(h));
  const double value = PyFloat_AsDouble(h.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, op, ": ", name, " must be a number or None, got a ", type_name(h),
                     " that cannot be converted to one");
  }
  return value;
}

// A positive number. None becomes 0, which stands for no window.
int64_t window_argument(const char* op, py::handle h) {
  if (h.is_none()) return 0;
  const int64_t window = integer_argument(op, "window", h);
  TORCH_CHECK_VALUE(window > 0, op, ": window must be positive or None, got ", window);
  return window;
}

// A positive number. None becomes 0, which stands for no softcap.
double softcap_argument(const char* op, py::handle h) {
  if (h.is_none()) return 0;
  const double softcap = number_argument(op, "softcap", h);
  TORCH_CHECK_VALUE(softcap > 0, op, ": softcap must be positive or None, got ", softcap);
  return softcap;
}

// Integers of the host as a tensor on the cache's device, without waiting for the device.
IntegerList on_device(const char* op, const char* name, std::vector<int64_t> values, const CheckedCache& cache) {
  const c10::Device device = cache.device();
  TORCH_CHECK(graph_capture(device) == 0, op, ": ", name,
              " must be a tensor on the cache's device during CUDA graph capture, as a graph cannot record numbers of "
              "the host");
  const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(device.is_cuda());
  at::Tensor numbers = at::empty({static_cast<int64_t>(values.size())}, options);
  std::copy(values.begin(), values.end(), numbers.data_ptr<int64_t>());
  if (!device.is_cpu()) numbers = numbers.to(device, at::kLong, /*non_blocking=*/true);
  return {numbers, std::move(values)};
}

// Sequences as a tensor on the device or as a list of ints; with `or_one`, also as one int. `owner`: what an error
// calls the cache.
IntegerList sequence_list(const char* op, const char* name, py::handle h, const CheckedCache& cache, bool or_one,
                          const char* owner = "the cache") {
  if (is_tensor(h)) {
    const at::Tensor& t = THPVariable_Unpack(h.ptr());
    return {or_one && t.dim() == 0 ? t.unsqueeze(0) : t};
  }
  const bool is_one = or_one && PyIndex_Check(h.ptr()) && !PyBool_Check(h.ptr());
  TORCH_CHECK_TYPE(is_one || is_list(h), op, ": ", name, " must be ", or_one ? "an int, " : "",
                   "a list of ints or a tensor of them, got ", type_name(h));
  const int64_t size = is_one ? 1 : list_size(op, name, h);
  const int64_t batch = cache.view.batch;
  std::vector<int64_t> values;
  for (int64_t i = 0; i < size; ++i) {  // each is checked before the next is read: range(2**62) ends soon
    const int64_t value = is_one ? integer_argument(op, name, h) : integer_of_list(op, name, h, i);
    TORCH_CHECK_INDEX(value >= 0 && value < batch, op, ": ", name, " must be from 0 to ", batch - 1, ", as ", owner,
                      " has ", batch, " sequences, got ", value);
    values.push_back(value);
  }
  return on_device(op, name, std::move(values), cache);
}

// Raises if a sequence is named twice, as far as the host knows.
void check_distinct(const char* op, const char* name, const IntegerList& sequences) {
  if (!sequences.host_values) return;
  std::vector<int64_t> sorted = *sequences.host_values;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  TORCH_CHECK_VALUE(twice == sorted.end(), op, ": ", name, " must name each sequence once, got ", *twice, " twice");
}

}  // namespace

const at::Tensor& tensor_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(THPVariable_Check(h.ptr()), op, ": ", name, " must be a torch.Tensor, got ", type_name(h));
  return THPVariable_Unpack(h.ptr());
}

const at::Tensor& optional_tensor_argument(const char* op, const char* name, py::handle h) {
  static const at::Tensor undefined;
  return h.is_none() ? undefined : tensor_argument(op, name, h);
}

int64_t integer_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(PyIndex_Check(h.ptr()) && !PyBool_Check(h.ptr()), op, ": ", name, " must be an int, got ",
                   type_name(h));
  const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(h.ptr()));
  if (!number) PyErr_Clear();
  TORCH_CHECK_TYPE(number, op, ": ", name, " must be an int, got a ", type_name(h), " that cannot be converted to one");
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  // The sentence gives its size, as Python refuses to print an int of too many digits.
  TORCH_CHECK_INDEX(overflow == 0, op, ": ", name, " must fit in 64 bits, got an int of ",
                    py::int_(number.attr("bit_length")()).cast<int64_t>(), " bits");
  return value;
}

bool flag_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(PyBool_Check(h.ptr()), op, ": ", name, " must be True or False, got ", type_name(h));
  return h.ptr() == Py_True;
}

at::ScalarType dtype_argument(const char* op, py::handle h) {
  TORCH_CHECK_TYPE(THPDtype_Check(h.ptr()), op, ": dtype must be a torch.dtype, got ", type_name(h));
  return reinterpret_cast<THPDtype*>(h.ptr())->scalar_type;
}

std::optional<TensorPair> out_argument(const char* op, py::handle h) {
  if (h.is_none()) return std::nullopt;
  TORCH_CHECK_TYPE((PyTuple_Check(h.ptr()) || PyList_Check(h.ptr())) && PySequence_Size(h.ptr()) == 2, op,
                   ": out must be a pair (keys, values) of tensors, got ", type_name(h));
  const auto pair = py::reinterpret_borrow<py::sequence>(h);
  return TensorPair{tensor_argument(op, "out[0]", py::object(pair[0])),
                    tensor_argument(op, "out[1]", py::object(pair[1]))};
}

int64_t layer_argument(const char* op, py::handle h, const CheckedCache& cache) {
  const int64_t layer = integer_argument(op, "layer", h);
  check_layer(op, layer, cache.view);
  return layer;
}

LengthsArgument lengths_argument(const char* op, py::handle h, const CheckedCache& cache,
                                 const IntegerList& sequences) {
  const int64_t entries = chosen_sequences(op, cache, sequences).entries(cache.view.batch);
  if (is_tensor(h) && THPVariable_Unpack(h.ptr()).dim() > 0) return {.lengths = {THPVariable_Unpack(h.ptr())}};
  // The host does not know the lengths of sequences that only the device knows.
  const bool known = !sequences.given() || sequences.host_values;
  HostLengths& lengths = cache.host->lengths;
  if (known) lengths.refresh(op);
  const auto check_length = [&](int64_t entry, int64_t length) {
    if (!known) {
      TORCH_CHECK_INDEX(length >= 0, op, ": n must be at least 0, got ", length);
      return;
    }
    const int64_t sequence = sequences.given() ? (*sequences.host_values)[static_cast<size_t>(entry)] : entry;
    const int64_t held = lengths.shortest_of_sequence(sequence);
    TORCH_CHECK_INDEX(length >= 0 && length <= held, op, ": n must be from 0 to ", held,
                      ", the number of positions held by sequence ", sequence, ", got ", length);
  };
  if (is_list(h)) {
    const int64_t size = list_size(op, "n", h);
    TORCH_CHECK_VALUE(size == entries, op, ": n must have one number for each of the ", entries, " sequences, got ",
                      size);
    std::vector<int64_t> numbers;
    for (int64_t i = 0; i < entries; ++i) {
      numbers.push_back(integer_of_list(op, "n", h, i));
      check_length(i, numbers.back());
    }
    return {.lengths = on_device(op, "n", std::move(numbers), cache)};
  }
  TORCH_CHECK_TYPE(PyIndex_Check(h.ptr()) && !PyBool_Check(h.ptr()), op,
                   ": n must be an int, a list of ints or a tensor of them, got ", type_name(h));
  const int64_t length = integer_argument(op, "n", h);
  if (sequences.given()) {
    for (int64_t i = 0; i < entries; ++i) check_length(i, length);
  } else {
    const int64_t held = lengths.shortest();
    TORCH_CHECK_INDEX(length >= 0 && length <= held, op, ": n must be from 0 to ", held,
                      ", the number of positions held, got ", length);
  }
  return {.length = length};
}

AttendOptions attend_options(const char* op, py::handle scale, py::handle window, py::handle softcap, bool rounds,
                             const CheckedCache& cache) {
  return {
      .scale = scale.is_none() ? 1.0 / std::sqrt(static_cast<double>(cache.view.head_dim))
                               : number_argument(op, "scale", scale),
      .window = window_argument(op, window),
      .softcap = softcap_argument(op, softcap),
      .rounds = rounds,
  };
}

IntegerList sequences_argument(const char* op, py::handle h, const CheckedCache& cache) {
  if (h.is_none()) return {};
  IntegerList sequences = sequence_list(op, "sequences", h, cache, false);
  check_distinct(op, "sequences", sequences);
  return sequences;
}

IntegerList batch_indices_argument(const char* op, py::handle h, const CheckedCache& cache) {
  IntegerList sources = sequence_list(op, "batch_indices", h, cache, false);
  if (sources.host_values) {
    const auto count = static_cast<int64_t>(sources.host_values->size());
    TORCH_CHECK_VALUE(count == cache.view.batch, op, ": batch_indices must have one index for each of the ",
                      cache.view.batch, " sequences, got ", count);
  }
  return sources;
}

std::pair<IntegerList, IntegerList> sequence_pairs(const char* op, py::handle src, const CheckedCache& source,
                                                   py::handle dst, const CheckedCache& cache) {
  IntegerList from = sequence_list(op, "src", src, source, true, &source == &cache ? "the cache" : "source");
  IntegerList to = sequence_list(op, "dst", dst, cache, true);
  check_distinct(op, "dst", to);
  check_dense(op, "src", from.tensor);
  check_dense(op, "dst", to.tensor);
  TORCH_CHECK_VALUE(from.tensor.numel() == to.tensor.numel(), op, ": src and dst must be equally many sequences, got ",
                    from.tensor.numel(), " and ", to.tensor.numel());
  return {std::move(from), std::move(to)};
}

}  // namespace kvc
