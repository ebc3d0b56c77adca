// kvcache_ext._C: the object behind StreamingKVCacheFp16. Arguments are taken as plain Python objects and parsed here,
// so that a wrong one gets a sentence of ours and not a listing of overloads.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>

#include "../kernels/cpu/cpu.h"
#if defined(KVC_WITH_CUDA)
#include "../kernels/launch.h"
#endif
#include "backend.h"
#include "ops.h"

namespace py = pybind11;

namespace kvc {
namespace {

const char* type_name(py::handle h) { return Py_TYPE(h.ptr())->tp_name; }

const at::Tensor& tensor_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(THPVariable_Check(h.ptr()), op, ": ", name, " must be a torch.Tensor, got ", type_name(h));
  return THPVariable_Unpack(h.ptr());
}

const at::Tensor* optional_tensor_argument(const char* op, const char* name, py::handle h) {
  return h.is_none() ? nullptr : &tensor_argument(op, name, h);
}

int64_t integer_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(PyIndex_Check(h.ptr()) && !PyBool_Check(h.ptr()), op, ": ", name, " must be an int, got ",
                   type_name(h));
  const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(h.ptr()));
  if (!number) PyErr_Clear();
  TORCH_CHECK_TYPE(number, op, ": ", name, " must be an int, got a ", type_name(h), " that is none");
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
  // Its text is not asked for, as that may be longer than Python makes it.
  TORCH_CHECK_INDEX(overflow == 0, op, ": ", name, " must fit in 64 bits, got an int of ",
                    py::int_(number.attr("bit_length")()).cast<int64_t>(), " bits");
  return value;
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

bool flag_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE(PyBool_Check(h.ptr()), op, ": ", name, " must be True or False, got ", type_name(h));
  return h.ptr() == Py_True;
}

// None: no such option, which the ops write as 0; else a positive number.
int64_t window_argument(const char* op, py::handle h) {
  if (h.is_none()) return 0;
  const int64_t window = integer_argument(op, "window", h);
  TORCH_CHECK_VALUE(window > 0, op, ": window must be positive or None, got ", window);
  return window;
}

double number_argument(const char* op, const char* name, py::handle h) {
  TORCH_CHECK_TYPE((PyFloat_Check(h.ptr()) || PyIndex_Check(h.ptr())) && !PyBool_Check(h.ptr()), op, ": ", name,
                   " must be a number or None, got ", type_name(h));
  const double value = PyFloat_AsDouble(h.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    TORCH_CHECK_TYPE(false, op, ": ", name, " must be a number or None, got a ", type_name(h), " that is none");
  }
  return value;
}

double softcap_argument(const char* op, py::handle h) {
  if (h.is_none()) return 0;
  const double softcap = number_argument(op, "softcap", h);
  TORCH_CHECK_VALUE(softcap > 0, op, ": softcap must be positive or None, got ", softcap);
  return softcap;
}

bool is_tensor(py::handle h) { return THPVariable_Check(h.ptr()); }

// A list, a tuple, a range: what holds numbers one after the other.
bool is_list(py::handle h) {
  return PySequence_Check(h.ptr()) && !is_tensor(h) && !PyUnicode_Check(h.ptr()) && !PyBytes_Check(h.ptr());
}

// How many items a list has. What only passes for one, and raises instead of answering, is none.
int64_t list_size(const char* op, const char* name, py::handle h) {
  const Py_ssize_t size = PySequence_Size(h.ptr());
  if (size < 0) PyErr_Clear();
  TORCH_CHECK_TYPE(size >= 0, op, ": ", name, " must be a list of ints, got a ", type_name(h), " that is none");
  return size;
}

int64_t integer_of_list(const char* op, const char* name, py::handle h, int64_t i) {
  const py::object item = py::reinterpret_steal<py::object>(PySequence_GetItem(h.ptr(), i));
  if (!item) PyErr_Clear();
  TORCH_CHECK_TYPE(item, op, ": ", name, " must be a list of ints, got a ", type_name(h), " that is none");
  return integer_argument(op, name, item);
}

class Cache {
 public:
  Cache(at::Tensor k_cache, at::Tensor v_cache, at::Tensor state, at::Tensor overflow_counts, at::Tensor workspace,
        int64_t sink_positions, bool saturate)
      : cache_("StreamingKVCacheFp16", {std::move(k_cache), std::move(v_cache), std::move(state),
                                        std::move(overflow_counts), sink_positions, saturate}),
        workspace_(std::move(workspace)),
        lengths_(HostLengths::make(cache_.tensors.state, sink_positions, cache_.view.positions)) {}

  void append(py::handle layer, py::handle key, py::handle value, py::handle new_lengths, py::handle sequences) {
    check_in_place("append");
    const SequencesArgument chosen(*this, "append", sequences);
    kvc::append(cache_, lengths_.get(), integer_argument("append", "layer", layer),
                tensor_argument("append", "key", key), tensor_argument("append", "value", value),
                optional_tensor_argument("append", "new_lengths", new_lengths), chosen.get());
  }

  void append_all(py::handle keys, py::handle values, py::handle new_lengths, py::handle sequences) {
    check_in_place("append_all");
    const SequencesArgument chosen(*this, "append_all", sequences);
    kvc::append_all(cache_, lengths_.get(), tensor_argument("append_all", "keys", keys),
                    tensor_argument("append_all", "values", values),
                    optional_tensor_argument("append_all", "new_lengths", new_lengths), chosen.get());
  }

  TensorPair gather(py::handle layer, py::handle indices, py::handle dtype, py::handle out, py::handle sequences) {
    check_in_place("gather");
    const SequencesArgument chosen(*this, "gather", sequences);
    const int64_t l = integer_argument("gather", "layer", layer);
    const at::Tensor& i = tensor_argument("gather", "indices", indices);
    const at::ScalarType type = dtype_argument("gather", dtype);
    const auto to = out_argument("gather", out);
    if (!to) return kvc::gather(cache_, l, i, type, chosen.get());
    gather_out("gather", cache_, l, i, type, *to, chosen.get());
    return *to;
  }

  TensorPair get_range_f32(py::handle layer, py::handle start, py::handle end, py::handle out) {
    const char* op = "get_range_f32";
    check_in_place(op);
    const int64_t l = checked_layer(op, layer);
    const auto [from, to] = checked_range(op, l, start, end);
    const auto pair = out_argument(op, out);
    return gather_range(op, cache_, l, from, to, at::kFloat, pair ? &*pair : nullptr);
  }

  TensorPair get_valid_f32(py::handle layer, py::handle out) {
    const char* op = "get_valid_f32";
    check_in_place(op);
    const int64_t l = checked_layer(op, layer);
    lengths_->refresh(op);
    const auto pair = out_argument(op, out);
    return gather_range(op, cache_, l, 0, lengths_->longest(l, lengths_->all()), at::kFloat, pair ? &*pair : nullptr);
  }

  TensorPair get_range_raw(py::handle layer, py::handle start, py::handle end) {
    const char* op = "get_range_raw";
    check_in_place(op);
    const int64_t l = checked_layer(op, layer);
    const auto [from, to] = checked_range(op, l, start, end);
    const int64_t slot = lengths_->contiguous_slot(l, lengths_->all(), from, to);
    if (slot < 0) return gather_range(op, cache_, l, from, to, at::kHalf, nullptr);
    const auto view = [&, from = from, to = to](const at::Tensor& storage) {
      const at::Tensor rows = storage.select(0, l).narrow(1, slot, to - from);
      return cache_.view.batch == 1 ? rows.select(0, 0) : rows;
    };
    return {view(cache_.tensors.k_cache), view(cache_.tensors.v_cache)};
  }

  py::object attend(py::handle layer, py::handle query, py::handle scale, py::handle window, py::handle softcap,
                    py::handle return_lse, py::handle out, bool rounds, py::handle sequences) {
    const char* op = "attend";
    check_in_place(op);
    const SequencesArgument chosen(*this, op, sequences);
    const int64_t l = integer_argument(op, "layer", layer);
    const at::Tensor& q = tensor_argument(op, "query", query);
    const AttendOptions options = attend_options(op, scale, window, softcap, rounds);
    const at::Tensor to = attend_output(op, q, out, chosen);
    const at::Tensor lse = flag_argument(op, "return_lse", return_lse) ? new_lse(q) : at::Tensor();
    kvc::attend(cache_, lengths_.get(), l, q, options, chosen.get(), workspace_, to, lse);
    return answer(to, lse);
  }

  py::object append_attend(py::handle layer, py::handle query, py::handle key, py::handle value, py::handle new_lengths,
                           py::handle scale, py::handle window, py::handle softcap, py::handle return_lse,
                           py::handle out, bool rounds, py::handle sequences) {
    const char* op = "append_attend";
    check_in_place(op);
    const SequencesArgument chosen(*this, op, sequences);
    const int64_t l = integer_argument(op, "layer", layer);
    const at::Tensor& q = tensor_argument(op, "query", query);
    const at::Tensor& k = tensor_argument(op, "key", key);
    const at::Tensor& v = tensor_argument(op, "value", value);
    const at::Tensor* n = optional_tensor_argument(op, "new_lengths", new_lengths);
    const AttendOptions options = attend_options(op, scale, window, softcap, rounds);
    const at::Tensor to = attend_output(op, q, out, chosen);
    const at::Tensor lse = flag_argument(op, "return_lse", return_lse) ? new_lse(q) : at::Tensor();
    kvc::append_attend(cache_, lengths_.get(), l, q, k, v, n, options, chosen.get(), workspace_, to, lse);
    return answer(to, lse);
  }

  int64_t shortest() {
    check_in_place("len");
    lengths_->refresh("len");
    return lengths_->shortest();
  }

  int64_t position() {
    check_in_place("position");
    lengths_->refresh("position");
    return lengths_->position();
  }

  std::vector<int64_t> lengths() {
    check_in_place("lengths");
    lengths_->refresh("lengths");
    std::vector<int64_t> held;
    for (int64_t b = 0; b < cache_.view.batch; ++b) held.push_back(lengths_->shortest_of(b));
    return held;
  }

  void truncate(py::handle n, py::handle sequences) { shorten("truncate", n, sequences, false); }
  void drop_newest(py::handle n, py::handle sequences) { shorten("drop_newest", n, sequences, true); }

  // Keeps the n oldest positions held or, with `newest`, takes back the n newest.
  void shorten(const char* op, py::handle n, py::handle sequences, bool newest) {
    check_in_place(op);
    const SequencesArgument chosen(*this, op, sequences);
    const IntegerArgument* of = chosen.get();
    const int64_t entries = chosen_sequences(op, cache_, of).entries(cache_.view.batch);
    if (is_tensor(n) && THPVariable_Unpack(n.ptr()).dim() > 0) {
      const IntegerArgument of_each{THPVariable_Unpack(n.ptr())};
      return kvc::truncate(cache_, lengths_.get(), 0, &of_each, of, newest);
    }
    // Sequences that the device alone knows hold what it alone knows.
    const bool known = of == nullptr || of->known;
    if (known) lengths_->refresh(op);
    const auto check_length = [&](int64_t i, int64_t length) {
      if (!known) {
        TORCH_CHECK_INDEX(length >= 0, op, ": n must be at least 0, got ", length);
        return;
      }
      const int64_t sequence = of == nullptr ? i : of->values[static_cast<size_t>(i)];
      const int64_t held = lengths_->shortest_of(sequence);
      TORCH_CHECK_INDEX(length >= 0 && length <= held, op, ": n must be from 0 to ", held,
                        ", the number of positions held by sequence ", sequence, ", got ", length);
    };
    if (is_list(n)) {
      const int64_t size = list_size(op, "n", n);
      TORCH_CHECK_VALUE(size == entries, op, ": n must have one number for each of the ", entries, " sequences, got ",
                        size);
      std::vector<int64_t> numbers;
      for (int64_t i = 0; i < entries; ++i) {
        numbers.push_back(integer_of_list(op, "n", n, i));
        check_length(i, numbers.back());
      }
      const IntegerArgument of_each = on_device(op, "n", numbers);
      return kvc::truncate(cache_, lengths_.get(), 0, &of_each, of, newest);
    }
    TORCH_CHECK_TYPE(PyIndex_Check(n.ptr()) && !PyBool_Check(n.ptr()), op,
                     ": n must be an int, a list of ints or a tensor of them, got ", type_name(n));
    const int64_t length = integer_argument(op, "n", n);
    if (of == nullptr) {
      const int64_t held = lengths_->shortest();
      TORCH_CHECK_INDEX(length >= 0 && length <= held, op, ": n must be from 0 to ", held,
                        ", the number of positions held, got ", length);
    } else {
      for (int64_t i = 0; i < entries; ++i) check_length(i, length);
    }
    kvc::truncate(cache_, lengths_.get(), length, nullptr, of, newest);
  }

  void reset(py::handle sequences) {
    check_in_place("reset");
    const SequencesArgument chosen(*this, "reset", sequences);
    kvc::reset(cache_, lengths_.get(), chosen.get());
  }

  void reorder(py::handle batch_indices) {
    check_in_place("reorder");
    const IntegerArgument sources = slots_argument("reorder", "batch_indices", batch_indices, false);
    TORCH_CHECK_VALUE(!sources.known || static_cast<int64_t>(sources.values.size()) == cache_.view.batch,
                      "reorder: batch_indices must have one index for each of the ", cache_.view.batch,
                      " sequences, got ", sources.values.size());
    kvc::copy_sequences("reorder", cache_, lengths_.get(), sources, nullptr);
  }

  void copy_sequence(py::handle src, py::handle dst) {
    const char* op = "copy_sequence";
    check_in_place(op);
    const auto [from, to] = pairs_argument(op, *this, src, dst);
    kvc::copy_sequences(op, cache_, lengths_.get(), from, &to);
  }

  // copy_sequence from another cache.
  void copy_from(py::handle src, py::handle dst, const Cache& source) {
    const char* op = "copy_sequence";
    check_in_place(op);
    source.check_in_place("copy_sequence: source");
    const auto [from, to] = pairs_argument(op, source, src, dst);
    kvc::copy_from(cache_, lengths_.get(), source.cache_, source.lengths_.get(), from, to);
  }

  void clear() {
    check_in_place("clear");
    kvc::clear(cache_, lengths_.get());
  }

  // Addresses are taken once, and torch can move the memory of a tensor all the same.
  void check_in_place(const char* op) const {
    const CacheTensors& t = cache_.tensors;
    const CacheView& c = cache_.view;
    TORCH_CHECK(
        t.k_cache.const_data_ptr() == c.k_cache && t.v_cache.const_data_ptr() == c.v_cache &&
            t.state.const_data_ptr() == c.state,
        op,
        ": the cache's memory has been moved, by share_memory_(), set_() or resize_() of one of its tensors, and "
        "cannot be used where it was; copy.deepcopy makes a cache of what there is");
  }

 private:
  // Numbers of the host's, copied to the cache's device without waiting for it.
  IntegerArgument on_device(const char* op, const char* name, std::vector<int64_t> values) const {
    const c10::Device device = cache_.tensors.k_cache.device();
    TORCH_CHECK(
        !lengths_->capturing(), op, ": ", name,
        " must be a tensor on the cache's device during CUDA graph capture, as a graph cannot record numbers of "
        "the host");
    const auto options = at::TensorOptions().dtype(at::kLong).pinned_memory(device.is_cuda());
    at::Tensor numbers = at::empty({static_cast<int64_t>(values.size())}, options);
    std::copy(values.begin(), values.end(), numbers.data_ptr<int64_t>());
    if (!device.is_cpu()) numbers = numbers.to(device, at::kLong, /*non_blocking=*/true);
    return {numbers, true, std::move(values)};
  }

  // Batch slots, as a tensor on the device or as a list of ints; with `or_one`, also as one int. `owner`: what an error
  // calls this cache.
  IntegerArgument slots_argument(const char* op, const char* name, py::handle h, bool or_one,
                                 const char* owner = "the cache") const {
    if (is_tensor(h)) {
      const at::Tensor& t = THPVariable_Unpack(h.ptr());
      return {or_one && t.dim() == 0 ? t.unsqueeze(0) : t};
    }
    const bool is_one = or_one && PyIndex_Check(h.ptr()) && !PyBool_Check(h.ptr());
    TORCH_CHECK_TYPE(is_one || is_list(h), op, ": ", name, " must be ", or_one ? "an int, " : "",
                     "a list of ints or a tensor of them, got ", type_name(h));
    const int64_t size = is_one ? 1 : list_size(op, name, h);
    std::vector<int64_t> values;
    for (int64_t i = 0; i < size; ++i) {  // each is looked at as it comes: range(2**62) ends soon
      const int64_t value = is_one ? integer_argument(op, name, h) : integer_of_list(op, name, h, i);
      TORCH_CHECK_INDEX(value >= 0 && value < cache_.view.batch, op, ": ", name, " must be from 0 to ",
                        cache_.view.batch - 1, ", as ", owner, " has ", cache_.view.batch, " sequences, got ", value);
      values.push_back(value);
    }
    return on_device(op, name, std::move(values));
  }

  // Sequences of `source`, and as many of this cache's.
  std::pair<IntegerArgument, IntegerArgument> pairs_argument(const char* op, const Cache& source, py::handle src,
                                                             py::handle dst) const {
    IntegerArgument from = source.slots_argument(op, "src", src, true, &source == this ? "the cache" : "source");
    IntegerArgument to = slots_argument(op, "dst", dst, true);
    check_distinct(op, "dst", to);
    check_dense(op, "src", from.tensor);
    check_dense(op, "dst", to.tensor);
    TORCH_CHECK_VALUE(from.tensor.numel() == to.tensor.numel(), op,
                      ": src and dst must be equally many sequences, got ", from.tensor.numel(), " and ",
                      to.tensor.numel());
    return {std::move(from), std::move(to)};
  }

  static void check_distinct(const char* op, const char* name, const IntegerArgument& slots) {
    std::vector<int64_t> sorted = slots.values;
    std::sort(sorted.begin(), sorted.end());
    const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
    TORCH_CHECK_VALUE(twice == sorted.end(), op, ": ", name, " must name each sequence once, got ", *twice, " twice");
  }

  // None, or the sequences that a call is about.
  class SequencesArgument {
   public:
    SequencesArgument(const Cache& cache, const char* op, py::handle h) {
      if (h.is_none()) return;
      numbers_ = cache.slots_argument(op, "sequences", h, false);
      check_distinct(op, "sequences", *numbers_);
    }
    const IntegerArgument* get() const { return numbers_ ? &*numbers_ : nullptr; }
    int64_t entries(const CacheView& cache) const { return numbers_ ? numbers_->tensor.numel() : cache.batch; }

   private:
    std::optional<IntegerArgument> numbers_;
  };

  AttendOptions attend_options(const char* op, py::handle scale, py::handle window, py::handle softcap,
                               bool rounds) const {
    return {scale.is_none() ? 1.0 / std::sqrt(static_cast<double>(cache_.view.head_dim))
                            : number_argument(op, "scale", scale),
            window_argument(op, window), softcap_argument(op, softcap), rounds};
  }

  // A wrong query is reported as such by the checks, not by the allocation of an answer for it.
  at::Tensor attend_output(const char* op, const at::Tensor& query, py::handle out,
                           const SequencesArgument& sequences) const {
    if (!out.is_none()) return tensor_argument(op, "out", out);
    chosen_sequences(op, cache_, sequences.get());
    check_dense(op, "query", query);
    kernel_dtype(op, "query", query.scalar_type());
    check_query_shape(op, query, cache_.view, sequences.entries(cache_.view));
    return at::empty(query.sizes(), query.options().requires_grad(false));
  }

  at::Tensor new_lse(const at::Tensor& query) const {
    const auto options = query.options().dtype(at::kFloat).requires_grad(false);
    if (query.dim() == 1) return at::empty({query.size(0) / cache_.view.head_dim}, options);
    return at::empty(query.sizes().slice(0, query.dim() > 0 ? query.dim() - 1 : 0), options);
  }

  static py::object answer(const at::Tensor& out, const at::Tensor& lse) {
    if (!lse.defined()) return py::cast(out);
    return py::make_tuple(out, lse);
  }

  int64_t checked_layer(const char* op, py::handle h) const {
    const int64_t layer = integer_argument(op, "layer", h);
    check_layer(op, layer, cache_.view);
    return layer;
  }

  std::pair<int64_t, int64_t> checked_range(const char* op, int64_t layer, py::handle start, py::handle end) {
    const int64_t from = integer_argument(op, "start", start);
    const int64_t to = integer_argument(op, "end", end);
    lengths_->refresh(op);
    const int64_t held = lengths_->longest(layer, lengths_->all());
    TORCH_CHECK_INDEX(0 <= from && from <= to && to <= held, op,
                      ": start and end must satisfy 0 <= start <= end <= ", held,
                      ", the number of positions that layer ", layer, " holds, got ", from, " and ", to);
    return {from, to};
  }

  CheckedCache cache_;
  at::Tensor workspace_;
  std::shared_ptr<HostLengths> lengths_;
};

#define KVC_TRANSLATE(Type, PythonType)                      \
  catch (const c10::Type& e) {                               \
    PyErr_SetString(PythonType, e.what_without_backtrace()); \
  }

void translate(std::exception_ptr raised) {
  try {
    if (raised) std::rethrow_exception(raised);
  } catch (const c10::OutOfMemoryError& e) {
    const py::object type = py::module_::import("torch").attr("OutOfMemoryError");
    PyErr_SetString(type.ptr(), e.what_without_backtrace());
  }
  KVC_TRANSLATE(TypeError, PyExc_TypeError)
  KVC_TRANSLATE(ValueError, PyExc_ValueError)
  KVC_TRANSLATE(IndexError, PyExc_IndexError)
  KVC_TRANSLATE(Error, PyExc_RuntimeError)
}

#undef KVC_TRANSLATE

}  // namespace
}  // namespace kvc

PYBIND11_MODULE(_C, m) {
  using kvc::Cache;
  py::register_local_exception_translator(kvc::translate);
  py::class_<Cache>(m, "Cache")
      .def(py::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, int64_t, bool>())
      .def("append", &Cache::append)
      .def("append_all", &Cache::append_all)
      .def("gather", &Cache::gather)
      .def("get_range_f32", &Cache::get_range_f32)
      .def("get_valid_f32", &Cache::get_valid_f32)
      .def("get_range_raw", &Cache::get_range_raw)
      .def("attend", &Cache::attend)
      .def("append_attend", &Cache::append_attend)
      .def("check_in_place", &Cache::check_in_place)
      .def("shortest", &Cache::shortest)
      .def("position", &Cache::position)
      .def("lengths", &Cache::lengths)
      .def("truncate", &Cache::truncate)
      .def("drop_newest", &Cache::drop_newest)
      .def("reset", &Cache::reset)
      .def("reorder", &Cache::reorder)
      .def("copy_sequence", &Cache::copy_sequence)
      .def("copy_from", &Cache::copy_from)
      .def("clear", &Cache::clear);
  m.def("cpu_instruction_set", [] { return kvc::cpu::instruction_set().name; });
  m.def("select_cpu_instruction_set", [](const char* name) { return kvc::cpu::select_instruction_set(name); });
  m.def("load_cpu_ops", [](const char* path) { kvc::load_cpu_ops(path); });
#if defined(KVC_WITH_CUDA)
  m.attr("with_cuda") = true;
  m.def("prefer_portable_prompts", [](bool portable) { kvc::prefer_portable_prompts(portable); });
#else
  m.attr("with_cuda") = false;
#endif
}
