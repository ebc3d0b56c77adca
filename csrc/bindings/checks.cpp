#include "checks.h"

#include <ATen/core/grad_mode.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <cmath>
#include <sstream>

namespace kvc {
namespace {

// A tensor of the call: dense, on the cache's device, with memory.
void check_call_tensor(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache) {
  check_dense(op, name, t);
  TORCH_CHECK_VALUE(t.device() == cache.device(), op, ": ", name, " must be on the cache's device ", cache.device(),
                    ", got ", t.device());
  check_memory(op, name, t);
}

// Raises if the tensor is what the call changes while it still reads the tensor.
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

// The shapes that a key or a value may have, for a sentence.
std::string input_shapes(const CacheView& c, int64_t layers, int64_t entries) {
  const std::string lead = layers > 0 ? std::to_string(layers) + ", " : "";
  const std::string h = std::to_string(c.heads);
  const std::string d = std::to_string(c.head_dim);
  std::string text = "[" + lead + std::to_string(entries) + ", T, " + h + ", " + d + "]";
  if (entries == 1) {
    text += ", [" + lead + "T, " + h + ", " + d + "], [" + lead + h + ", " + d + "] or [" + lead +
            std::to_string(c.heads * c.head_dim) + "]";
  }
  return text;
}

// Where the rows of a tensor lie. Dimensions that it may lack come first: layers (with `has_layers`), B, T, heads.
template <typename Pointer>
Rows<Pointer> rows_of(Pointer data, const at::Tensor& t, int64_t head_dim, bool has_layers = false) {
  const int64_t lead = has_layers ? 1 : 0;
  const int64_t dims = t.dim() - lead;
  return {
      .data = data,
      .layer_stride = has_layers ? t.stride(0) : 0,
      .batch_stride = dims == 4 ? t.stride(lead) : 0,
      .row_stride = dims >= 3 ? t.stride(-3) : 0,
      .head_stride = dims >= 2 ? t.stride(-2) : head_dim,
  };
}

}  // namespace

std::string shape_text(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << sizes;
  return text.str();
}

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

void check_dense(const char* op, const char* name, const at::Tensor& t) {
  // The dispatcher passes None as an undefined tensor.
  TORCH_CHECK_TYPE(t.defined(), op, ": ", name, " must be a torch.Tensor, got None");
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, op, ": ", name, " must be a dense (strided) tensor, got layout ",
                   t.layout());
  TORCH_CHECK_TYPE(!t.is_nested(), op, ": ", name, " must be a dense (strided) tensor, got a nested one");
}

void check_memory(const char* op, const char* name, const at::Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_neg(), op, ": ", name,
                    " must be a plain tensor, got a lazily negated view; call .resolve_neg()");
  TORCH_CHECK_VALUE(t.numel() == 0 || (t.has_storage() && t.const_data_ptr() != nullptr), op, ": ", name,
                    " must have memory of its own, got a tensor without any");
}

void check_layer(const char* op, int64_t layer, const CacheView& c) {
  TORCH_CHECK_INDEX(layer >= 0 && layer < c.layers, op, ": layer must be from 0 to ", c.layers - 1,
                    ", as the cache has ", c.layers, " layers, got ", layer);
}

Integers checked_integers(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                          int64_t count) {
  check_dense(op, name, t);
  TORCH_CHECK_TYPE(t.scalar_type() == at::kLong || t.scalar_type() == at::kInt, op, ": ", name,
                   " must be torch.int64 or torch.int32, got ", dtype_name(t.scalar_type()));
  check_call_tensor(op, name, t, cache);
  TORCH_CHECK_VALUE(t.dim() == 1 && (count < 0 || t.size(0) == count) && t.is_contiguous(), op, ": ", name,
                    " must be contiguous and have shape [", count < 0 ? std::string("n") : std::to_string(count),
                    "], got ", shape_text(t.sizes()), " with strides ", shape_text(t.strides()));
  check_not_state(op, name, t, cache);
  // An empty list must not be null, which stands for no list. Any address does, as nothing is read.
  return {t.numel() > 0 ? t.const_data_ptr() : cache.tensors.state.const_data_ptr(), t.scalar_type() == at::kInt};
}

ChosenSequences chosen_sequences(const char* op, const CheckedCache& cache, const IntegerList& sequences) {
  if (!sequences.given()) return {};
  const ChosenSequences chosen{
      .indices = checked_integers(op, "sequences", sequences.tensor, cache, -1),
      .count = sequences.tensor.size(0),
  };
  TORCH_CHECK_VALUE(chosen.count <= cache.view.batch, op, ": sequences must be distinct, so at most ", cache.view.batch,
                    ", got ", chosen.count);
  return chosen;
}

void check_source(const char* op, const CheckedCache& cache, const CheckedCache& source) {
  TORCH_CHECK_VALUE(source.device() == cache.device(), op, ": source must be on the cache's device ", cache.device(),
                    ", got ", source.device());
  const auto check_equal = [&](const char* name, int64_t wanted, int64_t got) {
    TORCH_CHECK_VALUE(got == wanted, op, ": source must have the cache's ", name, ", ", wanted, ", got ", got);
  };
  check_equal("num_layers", cache.view.layers, source.view.layers);
  check_equal("num_heads", cache.view.heads, source.view.heads);
  check_equal("head_dim", cache.view.head_dim, source.view.head_dim);
  check_equal("sink_positions", cache.view.all_sinks, source.view.all_sinks);
  check_equal("number of ranks", cache.view.share.ranks.divisor, source.view.share.ranks.divisor);
  check_equal("rank", cache.view.share.rank, source.view.share.rank);
  const auto shared = [&](const StridedMemory& memory) {
    return cache.holds(memory) || memory.shares_with(cache.state);
  };
  TORCH_CHECK_VALUE(!shared(source.keys) && !shared(source.values) && !shared(source.state), op,
                    ": source must not share memory with the cache that is written to");
}

CheckedInput checked_input(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t layers, int64_t entries) {
  const CacheView& c = cache.view;
  check_call_tensor(op, name, t, cache);
  const DType dtype = kernel_dtype(op, name, t.scalar_type());
  check_no_grad(op, name, t);

  const int64_t lead = layers > 0 ? 1 : 0;
  const int64_t dims = t.dim() - lead;
  bool fits = dims >= 1 && dims <= 4 && (dims == 4 || entries == 1) && (lead == 0 || t.size(0) == layers);
  int64_t positions = 1;
  if (fits) {
    if (dims == 1) {
      fits = t.size(lead) == c.heads * c.head_dim;
    } else {
      fits = t.size(-1) == c.head_dim && t.size(-2) == c.heads && (dims < 4 || t.size(lead) == entries);
      if (dims >= 3) positions = t.size(-3);
    }
  }
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape ", input_shapes(c, layers, entries), ", got ",
                    shape_text(t.sizes()));
  check_unit_stride(op, name, t);
  TORCH_CHECK_VALUE(!cache.holds(StridedMemory(t)), op, ": ", name,
                    " must not be a view of the cache that it is stored in; pass a copy");
  return {rows_of<const void*>(t.const_data_ptr(), t, c.head_dim, lead > 0), positions, dtype};
}

Rows<void*> checked_output(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t entries, int64_t positions, at::ScalarType dtype) {
  const CacheView& c = cache.view;
  check_call_tensor(op, name, t, cache);
  check_no_grad(op, name, t);
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, op, ": ", name, " must have the dtype asked for, ", dtype_name(dtype),
                   ", got ", dtype_name(t.scalar_type()));
  const bool fits = (t.dim() == 4 ? t.size(0) == entries : t.dim() == 3 && entries == 1) && t.size(-3) == positions &&
                    t.size(-2) == c.heads && t.size(-1) == c.head_dim;
  TORCH_CHECK_VALUE(fits, op, ": ", name, " must have shape [", entries, ", ", positions, ", ", c.heads, ", ",
                    c.head_dim, "]", entries == 1 ? ", with or without the 1," : "", " got ", shape_text(t.sizes()));
  check_unit_stride(op, name, t);
  return rows_of<void*>(t.data_ptr(), t, c.head_dim);
}

void check_attention_cache(const char* op, const CacheView& c) {
  TORCH_CHECK_VALUE(c.head_dim % 8 == 0 && c.head_dim <= 512, op,
                    ": head_dim must be a multiple of 8 up to 512 for attention, and the cache's is ", c.head_dim);
  TORCH_CHECK_VALUE(c.positions <= (int64_t{1} << 30), op,
                    ": max_positions must be at most 2^30 for attention, and the cache's is ", c.positions);
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(c.k_cache) % 16 == 0 && reinterpret_cast<uintptr_t>(c.v_cache) % 16 == 0, op,
      ": k_cache and v_cache must start at a multiple of 16 bytes");
}

void check_attend_options(const char* op, const AttendOptions& options) {
  // The largest magnitude of a scale: times 512 products of FP16's largest numbers and log2(e), it is within FP32.
  constexpr double kLargestScale = 0x1p86;
  TORCH_CHECK_VALUE(options.window >= 0, op, ": window must be positive, got ", options.window);
  const auto softcap = static_cast<float>(options.softcap);
  TORCH_CHECK_VALUE(std::isfinite(softcap) && (options.softcap == 0 || softcap > 0), op,
                    ": softcap must be positive, finite and within FP32, got ", options.softcap);
  TORCH_CHECK_VALUE(std::abs(options.scale) <= kLargestScale, op, ": scale must be finite and at most 2^86 in ",
                    "magnitude, so that scores of FP16 numbers stay within FP32, got ", options.scale);
}

QueryShape checked_query_shape(const char* op, const at::Tensor& query, const CacheView& c, int64_t entries) {
  const int64_t dims = query.dim();
  QueryShape shape{.positions = 1, .heads = 0};
  bool fits = dims >= 1 && dims <= 4 && (dims == 4 || entries == 1);
  if (fits && dims == 1) {
    fits = query.size(0) % c.head_dim == 0;
    shape.heads = query.size(0) / c.head_dim;
  } else if (fits) {
    fits = query.size(-1) == c.head_dim && (dims < 4 || query.size(0) == entries);
    shape.heads = query.size(-2);
    if (dims >= 3) shape.positions = query.size(-3);
  }
  const std::string d = std::to_string(c.head_dim);
  TORCH_CHECK_VALUE(fits, op, ": query must have shape [", entries, ", T, query heads, ", d, "]",
                    entries == 1
                        ? ", [T, query heads, " + d + "], [query heads, " + d + "] or [query heads * " + d + "]"
                        : std::string(),
                    ", got ", shape_text(query.sizes()));
  TORCH_CHECK_VALUE(shape.heads > 0 && shape.heads % c.heads == 0, op, ": query must have a multiple of the cache's ",
                    c.heads, " heads, got ", shape.heads);
  return shape;
}

CheckedQuery checked_query(const char* op, const at::Tensor& query, const CheckedCache& cache, int64_t entries) {
  const CacheView& c = cache.view;
  check_call_tensor(op, "query", query, cache);
  const DType dtype = kernel_dtype(op, "query", query.scalar_type());
  check_no_grad(op, "query", query);
  const QueryShape shape = checked_query_shape(op, query, c, entries);
  check_unit_stride(op, "query", query);
  // Kernels number rows, and the queries of a KV head, with 32 bits.
  constexpr int64_t kMostRows = int64_t{1} << 31;
  TORCH_CHECK_VALUE(
      c.positions + shape.positions < kMostRows && shape.positions * (shape.heads / c.heads) < kMostRows, op,
      ": query must have fewer than 2^31 positions, together with max_positions and times the heads that ",
      "share a KV head, got ", shape.positions);
  return {rows_of<const void*>(query.const_data_ptr(), query, c.head_dim), shape, dtype};
}

void check_query_of_append(const char* op, const at::Tensor& query, int64_t positions, const AppendParams& append,
                           const CheckedCache& cache) {
  TORCH_CHECK_VALUE(append.rows == positions, op, ": query must have as many positions as key, ", append.rows, ", got ",
                    positions);
  TORCH_CHECK_VALUE(!cache.holds(StridedMemory(query)), op,
                    ": query must not be a view of the cache that is appended to; pass a copy");
}

Rows<void*> checked_attend_output(const char* op, const at::Tensor& out, const at::Tensor& query, at::ScalarType wanted,
                                  const CheckedCache& cache) {
  check_call_tensor(op, "out", out, cache);
  check_no_grad(op, "out", out);
  TORCH_CHECK_TYPE(out.scalar_type() == wanted, op, ": out must have the dtype of query, ", dtype_name(wanted),
                   ", got ", dtype_name(out.scalar_type()));
  TORCH_CHECK_VALUE(out.sizes() == query.sizes(), op, ": out must have the shape of query, ", shape_text(query.sizes()),
                    ", got ", shape_text(out.sizes()));
  return checked_rows(op, "out", out, cache.view.head_dim);
}

Rows<void*> checked_rows(const char* op, const char* name, const at::Tensor& t, int64_t head_dim) {
  check_unit_stride(op, name, t);
  return rows_of<void*>(t.data_ptr(), t, head_dim);
}

float* checked_lse(const char* op, const at::Tensor& lse, const at::Tensor& query, const CheckedCache& cache) {
  if (!lse.defined()) return nullptr;
  check_call_tensor(op, "lse", lse, cache);
  TORCH_CHECK_VALUE(
      lse.scalar_type() == at::kFloat && lse.is_contiguous() && lse.numel() * cache.view.head_dim == query.numel(), op,
      ": lse must be contiguous torch.float32, one number a query, got ", shape_text(lse.sizes()));
  return lse.data_ptr<float>();
}

void check_workspace(const char* op, const at::Tensor& workspace, const CheckedCache& cache, int64_t entries) {
  check_call_tensor(op, "workspace", workspace, cache);
  const int64_t words = AttendParams::least_workspace(entries);
  TORCH_CHECK_VALUE(workspace.scalar_type() == at::kFloat && workspace.is_contiguous() && workspace.numel() >= words,
                    op, ": workspace must be contiguous torch.float32 of at least ", words, " elements");
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(workspace.const_data_ptr()) % 16 == 0, op,
                    ": workspace must begin at a multiple of 16 bytes");
}

void check_indices(const char* op, const at::Tensor& indices, const CheckedCache& cache, int64_t entries) {
  check_dense(op, "indices", indices);
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, op, ": indices must be torch.int64, got ",
                   dtype_name(indices.scalar_type()));
  check_call_tensor(op, "indices", indices, cache);
  TORCH_CHECK_VALUE(indices.dim() == 1 || (indices.dim() == 2 && indices.size(0) == entries), op,
                    ": indices must have shape [n], the same for every sequence, or [", entries, ", n], got ",
                    shape_text(indices.sizes()));
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
    if (input.tensor.defined()) add(input.name, StridedMemory(input.tensor));
  }
  for (const NamedTensor& output : outputs) {
    if (!output.tensor.defined()) continue;
    const StridedMemory memory(output.tensor);
    TORCH_CHECK_VALUE(!memory.shares_within(), op, ": ", output.name,
                      " must not have elements that share memory, as an expanded tensor has, got strides ",
                      shape_text(output.tensor.strides()));
    for (const NamedMemory& other : of_call) {
      TORCH_CHECK_VALUE(!memory.shares_with(other.memory), op, ": ", output.name, " must not share memory with ",
                        other.name, ", which the call uses as well");
    }
    add(output.name, memory);
  }
}

}  // namespace kvc
