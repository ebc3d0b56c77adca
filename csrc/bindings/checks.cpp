#include "checks.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <array>
#include <cmath>
#include <sstream>

namespace kvc {
namespace {

const char* dtype_name(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return "torch.float32";
    case at::kHalf: return "torch.float16";
    case at::kBFloat16: return "torch.bfloat16";
    case at::kDouble: return "torch.float64";
    case at::kLong: return "torch.int64";
    case at::kInt: return "torch.int32";
    case at::kBool: return "torch.bool";
    default: return c10::toString(dtype);
  }
}

// The elements lie in memory as they are.
void check_memory(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_neg(), op, ": ", name,
                    " must be a plain tensor, got a lazily negated view; call .resolve_neg()");
  TORCH_CHECK_VALUE(t.numel() == 0 || (t.has_storage() && t.const_data_ptr() != nullptr), op, ": ", name,
                    " must have memory of its own, got a tensor without any");
}

// One of the cache's own tensors.
void check_own(const char* op, const char* name, const at::Tensor& t) {
  check_dense(op, name, t);
  check_memory(op, name, t);
}

void check_storage(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache) {
  check_dense(op, name, t);
  const c10::Device device = cache.tensors.k_cache.device();
  TORCH_CHECK_VALUE(t.device() == device, op, ": ", name, " must be on the cache's device ", device, ", got ",
                    t.device());
  check_memory(op, name, t);
}

// Numbers that are still being read must not be what the call changes.
void check_not_state(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache) {
  const StridedMemory memory(t);
  TORCH_CHECK_VALUE(!memory.shares_with(cache.state) && !memory.shares_with(cache.overflow_counts), op, ": ", name,
                    " must not be a view of the cache's own state; pass a copy");
}

void check_no_grad(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!(t.requires_grad() && at::GradMode::is_enabled()), op, ": ", name,
                    " must not require grad, as a cache records no gradients, got requires_grad=True; call it under "
                    "torch.no_grad() or pass .detach()");
}

void check_unit_stride(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(t.size(-1) <= 1 || t.stride(-1) == 1 || t.numel() == 0, op, ": ", name,
                    " must have a stride of 1 in head_dim, its last dimension, got strides ", shape_text(t.strides()),
                    "; call .contiguous()");
}

std::string input_shapes(const CacheView& c, int64_t layers, int64_t batch) {
  const std::string lead = layers > 0 ? std::to_string(layers) + ", " : "";
  const std::string h = std::to_string(c.heads);
  const std::string d = std::to_string(c.head_dim);
  std::string text = "[" + lead + std::to_string(batch) + ", T, " + h + ", " + d + "]";
  if (batch == 1) {
    text += ", [" + lead + "T, " + h + ", " + d + "], [" + lead + h + ", " + d + "] or [" + lead +
            std::to_string(c.heads * c.head_dim) + "]";
  }
  return text;
}

}  // namespace

std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

void check_dense(const char* op, const char* name, const at::Tensor& t) {
  // The dispatcher makes a tensor of None.
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a torch.Tensor, got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ",
                   t.layout());
  TORCH_CHECK_TYPE(!t.is_nested(), op, ": ", name, " must be a dense (strided) tensor, got a nested one");
}

DType kernel_dtype(const char* op, const char* name, at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return DType::f32;
    case at::kHalf: return DType::f16;
    case at::kBFloat16: return DType::bf16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, op, ": ", name, " must be torch.float32, torch.float16 or torch.bfloat16, got ",
                   dtype_name(dtype));
}

CheckedCache::CheckedCache(const char* op, CacheTensors of) : tensors(std::move(of)) {
  const CacheTensors& t = tensors;
  check_own(op, "k_cache", t.k_cache);
  check_own(op, "v_cache", t.v_cache);
  check_own(op, "state", t.state);
  TORCH_CHECK_TYPE(t.k_cache.scalar_type() == at::kHalf && t.v_cache.scalar_type() == at::kHalf, op,
                   ": k_cache and v_cache must be torch.float16, got ", dtype_name(t.k_cache.scalar_type()), " and ",
                   dtype_name(t.v_cache.scalar_type()));
  TORCH_CHECK_VALUE(t.k_cache.dim() == 5 && t.k_cache.sizes() == t.v_cache.sizes() && t.k_cache.is_contiguous() &&
                        t.v_cache.is_contiguous(),
                    op,
                    ": k_cache and v_cache must be contiguous and of one shape [layers, batch_size, "
                    "max_positions, num_heads, head_dim], got ",
                    shape_text(t.k_cache.sizes()), " and ", shape_text(t.v_cache.sizes()));
  const int64_t layers = t.k_cache.size(0);
  const int64_t batch = t.k_cache.size(1);
  const int64_t positions = t.k_cache.size(2);
  TORCH_CHECK_VALUE(t.k_cache.numel() > 0, op, ": k_cache must not be empty, got ", shape_text(t.k_cache.sizes()));
  TORCH_CHECK_TYPE(t.state.scalar_type() == at::kLong, op, ": state must be torch.int64, got ",
                   dtype_name(t.state.scalar_type()));
  const std::array<int64_t, 3> state_sizes = {3, layers, batch};
  TORCH_CHECK_VALUE(t.state.sizes() == at::IntArrayRef(state_sizes) && t.state.is_contiguous(), op,
                    ": state must be contiguous and [3, ", layers, ", ", batch, "], got ", shape_text(t.state.sizes()));
  const c10::Device device = t.k_cache.device();
  TORCH_CHECK_VALUE(t.v_cache.device() == device && t.state.device() == device, op,
                    ": k_cache, v_cache and state must be on one device, got ", device, ", ", t.v_cache.device(),
                    " and ", t.state.device());
  if (t.overflow_counts.defined()) {
    check_own(op, "overflow_counts", t.overflow_counts);
    TORCH_CHECK_TYPE(t.overflow_counts.scalar_type() == at::kLong, op, ": overflow_counts must be torch.int64, got ",
                     dtype_name(t.overflow_counts.scalar_type()));
    TORCH_CHECK_VALUE(t.overflow_counts.dim() == 1 && t.overflow_counts.size(0) == layers &&
                          t.overflow_counts.is_contiguous() && t.overflow_counts.device() == device,
                      op, ": overflow_counts must be contiguous, [", layers, "] and on ", device, ", got ",
                      shape_text(t.overflow_counts.sizes()), " on ", t.overflow_counts.device());
  }
  TORCH_CHECK_VALUE(t.sink_positions >= 0 && t.sink_positions < positions, op,
                    ": sink_positions must be from 0 to max_positions - 1 = ", positions - 1, ", got ",
                    t.sink_positions);
  CacheView& c = view;
  c.k_cache = static_cast<uint16_t*>(t.k_cache.data_ptr());
  c.v_cache = static_cast<uint16_t*>(t.v_cache.data_ptr());
  c.state = t.state.data_ptr<int64_t>();
  c.layers = layers;
  c.batch = batch;
  c.positions = positions;
  c.heads = t.k_cache.size(3);
  c.head_dim = t.k_cache.size(4);
  c.sinks = t.sink_positions;
  c.ring = Divider::by(positions - t.sink_positions);
  keys = StridedMemory(t.k_cache);
  values = StridedMemory(t.v_cache);
  state = StridedMemory(t.state);
  if (t.overflow_counts.defined()) overflow_counts = StridedMemory(t.overflow_counts);
}

Integers checked_integers(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                          int64_t count) {
  check_dense(op, name, t);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong || t.scalar_type() == at::kInt, op, ": ", name,
                   " must be torch.int64 or torch.int32, got ", dtype_name(t.scalar_type()));
  check_storage(op, name, t, cache);
  TORCH_CHECK_VALUE(t.dim() == 1 && (count < 0 || t.size(0) == count) && t.is_contiguous(), op, ": ", name,
                    " must be contiguous and have shape [", count < 0 ? std::string("n") : std::to_string(count),
                    "], got ", shape_text(t.sizes()), " with strides ", shape_text(t.strides()));
  check_not_state(op, name, t, cache);
  // None at all are still not null, which would be all.
  return {t.numel() > 0 ? t.const_data_ptr() : cache.tensors.state.const_data_ptr(), t.scalar_type() == at::kInt};
}

ChosenSequences chosen_sequences(const char* op, const CheckedCache& cache, const IntegerArgument* sequences) {
  if (sequences == nullptr) return {};
  const ChosenSequences chosen{checked_integers(op, "sequences", sequences->tensor, cache, -1),
                               sequences->tensor.size(0)};
  TORCH_CHECK_VALUE(chosen.count <= cache.view.batch, op, ": sequences must be distinct, so at most ", cache.view.batch,
                    ", got ", chosen.count);
  return chosen;
}

void check_source(const char* op, const CheckedCache& cache, const CheckedCache& source) {
  const c10::Device device = cache.tensors.k_cache.device();
  TORCH_CHECK_VALUE(source.tensors.k_cache.device() == device, op, ": source must be on the cache's device ", device,
                    ", got ", source.tensors.k_cache.device());
  const auto check_equal = [&](const char* name, int64_t wanted, int64_t got) {
    TORCH_CHECK_VALUE(got == wanted, op, ": source must have the cache's ", name, ", ", wanted, ", got ", got);
  };
  check_equal("num_layers", cache.view.layers, source.view.layers);
  check_equal("num_heads", cache.view.heads, source.view.heads);
  check_equal("head_dim", cache.view.head_dim, source.view.head_dim);
  check_equal("sink_positions", cache.view.sinks, source.view.sinks);
  const auto shared = [&](const StridedMemory& memory) {
    return cache.holds(memory) || memory.shares_with(cache.state);
  };
  TORCH_CHECK_VALUE(!shared(source.keys) && !shared(source.values) && !shared(source.state), op,
                    ": source must not share memory with the cache that is written to");
}

void check_layer(const char* op, int64_t layer, const CacheView& c) {
  TORCH_CHECK_INDEX(layer >= 0 && layer < c.layers, op, ": layer must be from 0 to ", c.layers - 1,
                    ", as the cache has ", c.layers, " layers, got ", layer);
}

Rows<const void*> checked_input(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                                int64_t layers, int64_t batch, int64_t& rows, DType& dtype) {
  const CacheView& c = cache.view;
  check_storage(op, name, t, cache);
  dtype = kernel_dtype(op, name, t.scalar_type());
  check_no_grad(op, name, t);

  const int64_t lead = layers > 0 ? 1 : 0;
  const int64_t dims = t.dim() - lead;
  bool fits = dims >= 1 && dims <= 4 && (dims == 4 || batch == 1) && (lead == 0 || t.size(0) == layers);
  int64_t positions = 1;
  if (fits) {
    if (dims == 1) {
      fits = t.size(lead) == c.heads * c.head_dim;
    } else {
      fits = t.size(-1) == c.head_dim && t.size(-2) == c.heads && (dims < 4 || t.size(lead) == batch);
      if (dims >= 3) positions = t.size(-3);
    }
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape ", input_shapes(c, layers, batch), ", got ",
                    shape_text(t.sizes()));
  if (rows < 0) rows = positions;
  TORCH_CHECK_VALUE(rows == positions, op, ": ", name, " must have as many positions as key, ", rows, ", got ",
                    positions);
  check_unit_stride(op, name, t);
  TORCH_CHECK_VALUE(!cache.holds(StridedMemory(t)), op, ": ", name,
                    " must not be a view of the cache that it is stored in; pass a copy");

  Rows<const void*> r;
  r.data = t.const_data_ptr();
  r.layer_stride = lead ? t.stride(0) : 0;
  r.batch_stride = dims == 4 ? t.stride(lead) : 0;
  r.row_stride = dims >= 3 ? t.stride(-3) : 0;
  r.head_stride = dims >= 2 ? t.stride(-2) : c.head_dim;
  return r;
}

Rows<void*> checked_output(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t batch, int64_t rows, at::ScalarType dtype) {
  const CacheView& c = cache.view;
  check_storage(op, name, t, cache);
  check_no_grad(op, name, t);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must have the dtype asked for, ", dtype_name(dtype),
                   ", got ", dtype_name(t.scalar_type()));
  const bool fits = (t.dim() == 4 ? t.size(0) == batch : t.dim() == 3 && batch == 1) && t.size(-3) == rows &&
                    t.size(-2) == c.heads && t.size(-1) == c.head_dim;
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape [", batch, ", ", rows, ", ", c.heads, ", ", c.head_dim, "]",
                    batch == 1 ? ", with or without the 1," : "", " got ", shape_text(t.sizes()));
  check_unit_stride(op, name, t);
  Rows<void*> r;
  r.data = t.data_ptr();
  r.layer_stride = 0;
  r.batch_stride = t.dim() == 4 ? t.stride(0) : 0;
  r.row_stride = t.stride(-3);
  r.head_stride = t.stride(-2);
  return r;
}

void check_outputs_apart(const char* op, const CheckedCache& cache, std::initializer_list<NamedTensor> inputs,
                         std::initializer_list<NamedTensor> outputs) {
  struct NamedMemory {
    const char* name;
    StridedMemory memory;
  };
  c10::SmallVector<NamedMemory, 12> of_call;
  const auto add = [&](const char* name, const StridedMemory& memory) { of_call.push_back({name, memory}); };
  add("k_cache", cache.keys);
  add("v_cache", cache.values);
  add("state", cache.state);
  add("overflow_counts", cache.overflow_counts);
  for (const NamedTensor& input : inputs) {
    if (input.tensor != nullptr && input.tensor->defined()) add(input.name, StridedMemory(*input.tensor));
  }
  for (const NamedTensor& output : outputs) {
    if (output.tensor == nullptr || !output.tensor->defined()) continue;
    const StridedMemory memory(*output.tensor);
    TORCH_CHECK_VALUE(!memory.shares_within(), op, ": ", output.name,
                      " must not have elements that share memory, as an expanded tensor has, got strides ",
                      shape_text(output.tensor->strides()));
    for (const NamedMemory& other : of_call) {
      TORCH_CHECK_VALUE(!memory.shares_with(other.memory), op, ": ", output.name, " must not share memory with ",
                        other.name, ", which the call uses as well");
    }
    add(output.name, memory);
  }
}

AppendParams append_params(const char* op, const CheckedCache& cache, int64_t first_layer, bool all_layers,
                           const at::Tensor& key, const at::Tensor& value, const at::Tensor* new_lengths,
                           const ChosenSequences& sequences) {
  AppendParams p;
  p.cache = cache.view;
  p.sequences = sequences;
  const int64_t batch = sequences.entries(p.cache.batch);
  if (!all_layers) check_layer(op, first_layer, p.cache);
  p.first_layer = first_layer;
  p.layer_count = all_layers ? p.cache.layers : 1;
  p.overflow_counts = cache.tensors.overflow_counts.data_ptr<int64_t>();
  p.saturate = cache.tensors.saturate;
  const int64_t lead = all_layers ? p.cache.layers : 0;
  p.rows = -1;
  p.key = checked_input(op, all_layers ? "keys" : "key", key, cache, lead, batch, p.rows, p.dtype);
  DType value_dtype;
  p.value = checked_input(op, all_layers ? "values" : "value", value, cache, lead, batch, p.rows, value_dtype);
  TORCH_CHECK_TYPE(value_dtype == p.dtype, op, ": ", all_layers ? "values" : "value", " must have the dtype of ",
                   all_layers ? "keys, " : "key, ", dtype_name(key.scalar_type()), ", got ",
                   dtype_name(value.scalar_type()));
  p.new_lengths = {};
  if (new_lengths != nullptr) {
    const at::Tensor& n = *new_lengths;
    check_dense(op, "new_lengths", n);
    TORCH_CHECK_TYPE(n.scalar_type() == at::kLong || n.scalar_type() == at::kInt, op,
                     ": new_lengths must be torch.int64 or torch.int32, got ", dtype_name(n.scalar_type()));
    check_storage(op, "new_lengths", n, cache);
    TORCH_CHECK_VALUE(n.dim() == 1 && n.size(0) == batch && n.is_contiguous(), op,
                      ": new_lengths must be contiguous and have shape [", batch, "], one length a sequence, got ",
                      shape_text(n.sizes()), " with strides ", shape_text(n.strides()));
    check_not_state(op, "new_lengths", n, cache);
    p.new_lengths = {n.const_data_ptr(), n.scalar_type() == at::kInt};
  }
  return p;
}

namespace {

// The forms of a query and of an answer, which has the query's own.
struct QueryForm {
  int64_t rows;
  int64_t heads;
};

QueryForm query_form(const char* op, const at::Tensor& t, const CacheView& c, int64_t batch) {
  const int64_t dims = t.dim();
  QueryForm form{1, 0};
  bool fits = dims >= 1 && dims <= 4 && (dims == 4 || batch == 1);
  if (fits && dims == 1) {
    fits = t.size(0) % c.head_dim == 0;
    form.heads = t.size(0) / c.head_dim;
  } else if (fits) {
    fits = t.size(-1) == c.head_dim && (dims < 4 || t.size(0) == batch);
    form.heads = t.size(-2);
    if (dims >= 3) form.rows = t.size(-3);
  }
  const std::string d = std::to_string(c.head_dim);
  TORCH_CHECK_VALUE(fits, op, ": query must have shape [", batch, ", T, query heads, ", d, "]",
                    batch == 1 ? ", [T, query heads, " + d + "], [query heads, " + d + "] or [query heads * " + d + "]"
                               : std::string(),
                    ", got ", shape_text(t.sizes()));
  TORCH_CHECK_VALUE(form.heads > 0 && form.heads % c.heads == 0, op, ": query must have a multiple of the cache's ",
                    c.heads, " heads, got ", form.heads);
  return form;
}

// A tensor for attention's answer: the query's shape and dtype.
void check_answer(const char* op, const at::Tensor& out, const at::Tensor& query, const CheckedCache& cache) {
  check_storage(op, "out", out, cache);
  check_no_grad(op, "out", out);
  TORCH_CHECK_TYPE(out.scalar_type() == query.scalar_type(), op, ": out must have the dtype of query, ",
                   dtype_name(query.scalar_type()), ", got ", dtype_name(out.scalar_type()));
  TORCH_CHECK_VALUE(out.sizes() == query.sizes(), op, ": out must have the shape of query, ", shape_text(query.sizes()),
                    ", got ", shape_text(out.sizes()));
  check_unit_stride(op, "out", out);
}

template <typename Pointer>
Rows<Pointer> query_rows(Pointer data, const at::Tensor& t, const CacheView& c) {
  const int64_t dims = t.dim();
  Rows<Pointer> r;
  r.data = data;
  r.layer_stride = 0;
  r.batch_stride = dims == 4 ? t.stride(0) : 0;
  r.row_stride = dims >= 3 ? t.stride(-3) : 0;
  r.head_stride = dims >= 2 ? t.stride(-2) : c.head_dim;
  return r;
}

}  // namespace

void check_query_shape(const char* op, const at::Tensor& query, const CacheView& cache, int64_t batch) {
  query_form(op, query, cache, batch);
}

AttendParams attend_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& query,
                           const AttendOptions& options, const AppendParams* append, const ChosenSequences& sequences,
                           const at::Tensor& workspace, const at::Tensor& out, const at::Tensor& lse) {
  AttendParams p;
  p.cache = cache.view;
  p.sequences = sequences;
  const CacheView& c = p.cache;
  check_layer(op, layer, c);
  TORCH_CHECK_VALUE(c.head_dim % 8 == 0 && c.head_dim <= 512, op,
                    ": head_dim must be a multiple of 8 up to 512 for attention, and the cache's is ", c.head_dim);
  TORCH_CHECK_VALUE(c.positions <= (int64_t{1} << 30), op,
                    ": max_positions must be at most 2^30 for attention, and the cache's is ", c.positions);
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(c.k_cache) % 16 == 0 && reinterpret_cast<uintptr_t>(c.v_cache) % 16 == 0, op,
      ": k_cache and v_cache must start at a multiple of 16 bytes");
  check_storage(op, "query", query, cache);
  p.dtype = kernel_dtype(op, "query", query.scalar_type());
  check_no_grad(op, "query", query);
  const QueryForm form = query_form(op, query, c, sequences.entries(c.batch));
  check_unit_stride(op, "query", query);
  TORCH_CHECK_VALUE(options.window >= 0, op, ": window must be positive, got ", options.window);
  p.scale = static_cast<float>(options.scale);
  p.softcap = static_cast<float>(options.softcap);
  TORCH_CHECK_VALUE(std::isfinite(p.softcap) && (options.softcap == 0 || p.softcap > 0), op,
                    ": softcap must be positive, finite and within FP32, got ", options.softcap);
  TORCH_CHECK_VALUE(std::abs(options.scale) <= kLargestScale, op, ": scale must be finite and at most 2^86 in ",
                    "magnitude, so that scores of FP16 numbers stay within FP32, got ", options.scale);
  if (out.defined()) check_answer(op, out, query, cache);
  p.lse = nullptr;
  if (lse.defined()) {
    check_storage(op, "lse", lse, cache);
    TORCH_CHECK_VALUE(
        lse.scalar_type() == at::kFloat && lse.is_contiguous() && lse.numel() * c.head_dim == query.numel(), op,
        ": lse must be contiguous torch.float32, one number a query, got ", shape_text(lse.sizes()));
    p.lse = lse.data_ptr<float>();
  }
  check_storage(op, "workspace", workspace, cache);
  const int64_t words = AttendParams::least_workspace(sequences.entries(c.batch));
  TORCH_CHECK_VALUE(workspace.scalar_type() == at::kFloat && workspace.is_contiguous() && workspace.numel() >= words,
                    op, ": workspace must be contiguous torch.float32 of at least ", words, " elements");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % 16 == 0, op,
                    ": workspace must begin at a multiple of 16 bytes");

  // Kernels number rows, and the queries of a KV head, with 32 bits.
  constexpr int64_t kMostRows = int64_t{1} << 31;
  TORCH_CHECK_VALUE(
      c.positions + form.rows < kMostRows && form.rows * (form.heads / c.heads) < kMostRows, op,
      ": query must have fewer than 2^31 positions, together with max_positions and times the heads that ",
      "share a KV head, got ", form.rows);
  p.layer = layer;
  p.rows = form.rows;
  p.query_heads = form.heads;
  p.query = query_rows<const void*>(query.const_data_ptr(), query, c);
  if (out.defined()) p.out = query_rows<void*>(out.data_ptr(), out, c);
  p.window = options.window;
  p.rounds = options.rounds;
  p.may_read_before_wait = false;
  p.appends = append != nullptr;
  if (append != nullptr) {
    TORCH_CHECK_VALUE(append->rows == form.rows, op, ": query must have as many positions as key, ", append->rows,
                      ", got ", form.rows);
    TORCH_CHECK_VALUE(!cache.holds(StridedMemory(query)), op,
                      ": query must not be a view of the cache that is appended to; pass a copy");
    p.append = *append;
  } else {
    p.append = AppendParams{};
  }
  p.use_workspace(workspace.data_ptr<float>(), workspace.numel());
  return p;
}

GatherParams gather_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor* indices,
                           const ChosenSequences& sequences) {
  GatherParams p;
  p.cache = cache.view;
  p.sequences = sequences;
  const int64_t batch = sequences.entries(p.cache.batch);
  check_layer(op, layer, p.cache);
  p.layer = layer;
  p.start = 0;
  p.rows = 0;
  p.indices = nullptr;
  p.indices_batch_stride = 0;
  p.indices_stride = 0;
  if (indices != nullptr) {
    const at::Tensor& i = *indices;
    check_dense(op, "indices", i);
    TORCH_CHECK_TYPE(i.scalar_type() == at::kLong, op, ": indices must be torch.int64, got ",
                     dtype_name(i.scalar_type()));
    check_storage(op, "indices", i, cache);
    TORCH_CHECK_VALUE(i.dim() == 1 || (i.dim() == 2 && i.size(0) == batch), op,
                      ": indices must have shape [n], the same for every sequence, or [", batch, ", n], got ",
                      shape_text(i.sizes()));
    p.rows = i.size(-1);
    p.indices = static_cast<const int64_t*>(i.const_data_ptr());
    p.indices_stride = i.stride(-1);
    p.indices_batch_stride = i.dim() == 2 ? i.stride(0) : 0;
  }
  return p;
}

}  // namespace kvc
