// kvcache_ext._C: the object behind StreamingKVCacheFp16.
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/csrc/utils/pybind.h>

#include "../kernels/cpu/cpu.h"
#if defined(KVC_WITH_CUDA)
#include "../kernels/launch.h"
#endif
#include "arguments.h"
#include "backend.h"
#include "checks.h"
#include "merge.h"
#include "ops.h"

namespace kvc {
namespace {

class Cache {
 public:
  Cache(at::Tensor k_cache, at::Tensor v_cache, at::Tensor state, at::Tensor overflow_counts, at::Tensor workspace,
        int64_t sink_positions, bool saturate, int64_t ranks, int64_t rank)
      : cache_("StreamingKVCacheFp16", {.k_cache = std::move(k_cache),
                                        .v_cache = std::move(v_cache),
                                        .state = std::move(state),
                                        .overflow_counts = std::move(overflow_counts),
                                        .sink_positions = sink_positions,
                                        .saturate = saturate,
                                        .ranks = ranks,
                                        .rank = rank}),
        workspace_(std::move(workspace)) {
    cache_.host = HostRecord::make(cache_.tensors.state, cache_.view.all_sinks, cache_.view.all_ring);
  }

  void append(py::handle layer, py::handle key, py::handle value, py::handle new_lengths, py::handle sequences) {
    const char* op = "append";
    check_in_place(op);
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    kvc::append(cache_, integer_argument(op, "layer", layer),
                {.key = tensor_argument(op, "key", key),
                 .value = tensor_argument(op, "value", value),
                 .new_lengths = optional_tensor_argument(op, "new_lengths", new_lengths)},
                chosen);
  }

  void append_all(py::handle keys, py::handle values, py::handle new_lengths, py::handle sequences) {
    const char* op = "append_all";
    check_in_place(op);
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    kvc::append_all(cache_,
                    {.key = tensor_argument(op, "keys", keys),
                     .value = tensor_argument(op, "values", values),
                     .new_lengths = optional_tensor_argument(op, "new_lengths", new_lengths)},
                    chosen);
  }

  TensorPair gather(py::handle layer, py::handle indices, py::handle dtype, py::handle out, py::handle sequences) {
    const char* op = "gather";
    check_in_place(op);
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    const int64_t l = integer_argument(op, "layer", layer);
    const at::Tensor& i = tensor_argument(op, "indices", indices);
    const at::ScalarType type = dtype_argument(op, dtype);
    const auto to = out_argument(op, out);
    if (!to) return kvc::gather(cache_, l, i, type, chosen);
    gather_out(cache_, l, i, type, *to, chosen);
    return *to;
  }

  TensorPair get_range_f32(py::handle layer, py::handle start, py::handle end, py::handle out) {
    const char* op = "get_range_f32";
    check_in_place(op);
    const int64_t l = layer_argument(op, layer, cache_);
    const auto [from, to] = checked_range(op, l, start, end);
    const auto pair = out_argument(op, out);
    return gather_range(op, cache_, l, from, to, at::kFloat, pair ? &*pair : nullptr);
  }

  TensorPair get_valid_f32(py::handle layer, py::handle out) {
    const char* op = "get_valid_f32";
    check_in_place(op);
    const int64_t l = layer_argument(op, layer, cache_);
    lengths_on_host().refresh(op);
    const auto pair = out_argument(op, out);
    return gather_range(op, cache_, l, 0, lengths_on_host().longest(l), at::kFloat, pair ? &*pair : nullptr);
  }

  TensorPair get_range_raw(py::handle layer, py::handle start, py::handle end) {
    const char* op = "get_range_raw";
    check_in_place(op);
    const int64_t l = layer_argument(op, layer, cache_);
    const auto [from, to] = checked_range(op, l, start, end);
    const bool is_all = cache_.view.share.is_all();
    const int64_t slot = is_all ? lengths_on_host().contiguous_slot(l, from, to) : -1;
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
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    const int64_t l = integer_argument(op, "layer", layer);
    const at::Tensor& q = tensor_argument(op, "query", query);
    const AttendOptions options = attend_options(op, scale, window, softcap, rounds, cache_);
    const at::Tensor to = attend_output(op, q, out, chosen);
    const at::Tensor lse = flag_argument(op, "return_lse", return_lse) ? new_lse(q) : at::Tensor();
    kvc::attend(cache_, l, {.query = q, .workspace = workspace_, .out = to, .lse = lse}, options, chosen);
    return output_and_lse(to, lse);
  }

  py::object append_attend(py::handle layer, py::handle query, py::handle key, py::handle value, py::handle new_lengths,
                           py::handle scale, py::handle window, py::handle softcap, py::handle return_lse,
                           py::handle out, bool rounds, py::handle sequences) {
    const char* op = "append_attend";
    check_in_place(op);
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    const int64_t l = integer_argument(op, "layer", layer);
    const at::Tensor& q = tensor_argument(op, "query", query);
    const at::Tensor& k = tensor_argument(op, "key", key);
    const at::Tensor& v = tensor_argument(op, "value", value);
    const at::Tensor& n = optional_tensor_argument(op, "new_lengths", new_lengths);
    const AttendOptions options = attend_options(op, scale, window, softcap, rounds, cache_);
    const at::Tensor to = attend_output(op, q, out, chosen);
    const at::Tensor lse = flag_argument(op, "return_lse", return_lse) ? new_lse(q) : at::Tensor();
    kvc::append_attend(cache_, l, {.query = q, .workspace = workspace_, .out = to, .lse = lse},
                       {.key = k, .value = v, .new_lengths = n}, options, chosen);
    return output_and_lse(to, lse);
  }

  int64_t shortest() {
    check_in_place("len");
    lengths_on_host().refresh("len");
    return lengths_on_host().shortest();
  }

  int64_t position() {
    check_in_place("position");
    lengths_on_host().refresh("position");
    return lengths_on_host().position();
  }

  std::vector<int64_t> lengths() {
    check_in_place("lengths");
    lengths_on_host().refresh("lengths");
    std::vector<int64_t> held;
    for (int64_t b = 0; b < cache_.view.batch; ++b) held.push_back(lengths_on_host().shortest_of_sequence(b));
    return held;
  }

  void truncate(py::handle n, py::handle sequences) { shorten("truncate", n, sequences, false); }
  void drop_newest(py::handle n, py::handle sequences) { shorten("drop_newest", n, sequences, true); }

  void reset(py::handle sequences) {
    check_in_place("reset");
    kvc::reset(cache_, sequences_argument("reset", sequences, cache_));
  }

  void reorder(py::handle batch_indices) {
    check_in_place("reorder");
    kvc::copy_sequences("reorder", cache_, batch_indices_argument("reorder", batch_indices, cache_), IntegerList());
  }

  void copy_sequence(py::handle src, py::handle dst) {
    const char* op = "copy_sequence";
    check_in_place(op);
    const auto [from, to] = sequence_pairs(op, src, cache_, dst, cache_);
    kvc::copy_sequences(op, cache_, from, to);
  }

  // copy_sequence from another cache.
  void copy_from(py::handle src, py::handle dst, const Cache& source) {
    const char* op = "copy_sequence";
    check_in_place(op);
    source.check_in_place("copy_sequence: source");
    const auto [from, to] = sequence_pairs(op, src, source.cache_, dst, cache_);
    kvc::copy_from(cache_, source.cache_, from, to);
  }

  void clear() {
    check_in_place("clear");
    kvc::clear(cache_);
  }

  // For a share of a text: raises unless the merged answers can be written to `out`, before anything else is.
  void check_output(const std::string& name, py::handle given_query, py::handle out, py::handle key, py::handle value,
                    py::handle new_lengths) const {
    const char* op = name.c_str();
    const at::Tensor& query = tensor_argument(op, "query", given_query);
    const at::Tensor& to = tensor_argument(op, "out", out);
    check_dense(op, "query", query);
    checked_attend_output(op, to, query, query.scalar_type(), cache_);
    check_outputs_apart(op, cache_,
                        {{"query", query},
                         {"key", optional_tensor_argument(op, "key", key)},
                         {"value", optional_tensor_argument(op, "value", value)},
                         {"new_lengths", optional_tensor_argument(op, "new_lengths", new_lengths)}},
                        {{"out", to}});
  }

  // int64 [2, B]: the seqlens of a layer, and the oldest positions held that are no sinks. A view.
  at::Tensor lengths_of_layer(int64_t layer) const {
    check_layer("merge", layer, cache_.view);
    return cache_.tensors.state.narrow(0, 0, 2).select(1, layer);
  }

  void merge_exchanged(int64_t layer, const at::Tensor& answers, const at::Tensor& lses, const at::Tensor& out,
                       py::handle lse, const at::Tensor& tag, int64_t call, py::handle sequences,
                       const ExchangeMemory& memory) {
    kvc::merge_exchanged(cache_, layer, answers, lses,
                         {.out = out, .lse = optional_tensor_argument("merge", "lse", lse), .tag = tag, .call = call},
                         sequences_argument("merge", sequences, cache_), memory);
  }

  void merge_gathered(int64_t layer, const at::Tensor& gathered, const at::Tensor& out, py::handle lse,
                      const at::Tensor& tag, py::handle sequences, const at::Tensor& failure) {
    kvc::merge_gathered(cache_, layer, gathered,
                        {.out = out, .lse = optional_tensor_argument("merge", "lse", lse), .tag = tag},
                        sequences_argument("merge", sequences, cache_), failure);
  }

  // Raises if torch has moved the memory of a tensor: the addresses in `view` are taken once.
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
  // Keeps the n oldest positions held or, with `newest`, takes back the n newest.
  void shorten(const char* op, py::handle n, py::handle sequences, bool newest) {
    check_in_place(op);
    const IntegerList chosen = sequences_argument(op, sequences, cache_);
    const auto [length, lengths] = lengths_argument(op, n, cache_, chosen);
    kvc::truncate(cache_, length, lengths, chosen, newest);
  }

  // `out`, or a new tensor. The query is checked before memory is allocated for it.
  at::Tensor attend_output(const char* op, const at::Tensor& query, py::handle out,
                           const IntegerList& sequences) const {
    if (!out.is_none()) return tensor_argument(op, "out", out);
    const int64_t entries = chosen_sequences(op, cache_, sequences).entries(cache_.view.batch);
    check_dense(op, "query", query);
    kernel_dtype(op, "query", query.scalar_type());
    checked_query_shape(op, query, cache_.view, entries);
    const auto options = query.options().requires_grad(false);
    return at::empty(query.sizes(), cache_.view.share.is_all() ? options : options.dtype(at::kFloat));
  }

  at::Tensor new_lse(const at::Tensor& query) const {
    const auto options = query.options().dtype(at::kFloat).requires_grad(false);
    if (query.dim() == 1) return at::empty({query.size(0) / cache_.view.head_dim}, options);
    return at::empty(query.sizes().slice(0, query.dim() > 0 ? query.dim() - 1 : 0), options);
  }

  static py::object output_and_lse(const at::Tensor& out, const at::Tensor& lse) {
    if (!lse.defined()) return py::cast(out);
    return py::make_tuple(out, lse);
  }

  std::pair<int64_t, int64_t> checked_range(const char* op, int64_t layer, py::handle start, py::handle end) {
    const int64_t from = integer_argument(op, "start", start);
    const int64_t to = integer_argument(op, "end", end);
    lengths_on_host().refresh(op);
    const int64_t held = lengths_on_host().longest(layer);
    TORCH_CHECK_INDEX(0 <= from && from <= to && to <= held, op,
                      ": start and end must satisfy 0 <= start <= end <= ", held,
                      ", the number of positions that layer ", layer, " holds, got ", from, " and ", to);
    return {from, to};
  }

  HostLengths& lengths_on_host() const { return cache_.host->lengths; }

  CheckedCache cache_;
  at::Tensor workspace_;
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
      .def(py::init<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, int64_t, bool, int64_t, int64_t>(),
           py::arg("k_cache"), py::arg("v_cache"), py::arg("state"), py::arg("overflow_counts"), py::arg("workspace"),
           py::arg("sink_positions"), py::arg("saturate"), py::arg("ranks") = 1, py::arg("rank") = 0)
      .def("append", &Cache::append)
      .def("append_all", &Cache::append_all)
      .def("gather", &Cache::gather)
      .def("get_range_f32", &Cache::get_range_f32)
      .def("get_valid_f32", &Cache::get_valid_f32)
      .def("get_range_raw", &Cache::get_range_raw)
      .def("attend", &Cache::attend)
      .def("append_attend", &Cache::append_attend)
      .def("check_in_place", &Cache::check_in_place)
      .def("check_output", &Cache::check_output)
      .def("lengths_of_layer", &Cache::lengths_of_layer)
      .def("merge_exchanged", &Cache::merge_exchanged)
      .def("merge_gathered", &Cache::merge_gathered)
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
  py::class_<kvc::ExchangeMemory>(m, "ExchangeMemory")
      .def(py::init<const std::vector<uint64_t>&, int64_t, at::Tensor, at::Tensor, double, bool, bool>(),
           py::arg("inboxes"), py::arg("lines"), py::arg("control"), py::arg("failure"), py::arg("timeout_s"),
           py::arg("sends") = true, py::arg("receives") = true);
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
