#include "op_params.h"

#include <c10/util/Exception.h>

#include "checks.h"

namespace kvc {

AppendParams append_params(const char* op, const CheckedCache& cache, std::optional<int64_t> layer,
                           const AppendTensors& tensors, const ChosenSequences& sequences) {
  const CacheView& c = cache.view;
  const char* key_name = layer ? "key" : "keys";
  const char* value_name = layer ? "value" : "values";
  if (layer) check_layer(op, *layer, c);
  const int64_t leading_layers = layer ? 0 : c.layers;
  const int64_t entries = sequences.entries(c.batch);
  const CheckedInput key = checked_input(op, key_name, tensors.key, cache, leading_layers, entries);
  const CheckedInput value = checked_input(op, value_name, tensors.value, cache, leading_layers, entries);
  TORCH_CHECK_VALUE(value.positions == key.positions, op, ": ", value_name, " must have as many positions as ",
                    key_name, ", ", key.positions, ", got ", value.positions);
  TORCH_CHECK_TYPE(value.dtype == key.dtype, op, ": ", value_name, " must have the dtype of ", key_name, ", ",
                   dtype_name(tensors.key.scalar_type()), ", got ", dtype_name(tensors.value.scalar_type()));
  AppendParams p = {};
  p.cache = c;
  p.overflow_counts = cache.tensors.overflow_counts.data_ptr<int64_t>();
  p.first_layer = layer.value_or(0);
  p.layer_count = layer ? 1 : c.layers;
  p.rows = key.positions;
  p.key = key.rows;
  p.value = value.rows;
  p.dtype = key.dtype;
  if (tensors.new_lengths.defined()) {
    p.new_lengths = checked_integers(op, "new_lengths", tensors.new_lengths, cache, entries);
  }
  p.saturate = cache.tensors.saturate;
  p.sequences = sequences;
  return p;
}

AttendParams attend_params(const char* op, const CheckedCache& cache, int64_t layer, const AttendTensors& tensors,
                           const AttendOptions& options, const AppendParams* append, const ChosenSequences& sequences) {
  const CacheView& c = cache.view;
  const int64_t entries = sequences.entries(c.batch);
  check_layer(op, layer, c);
  check_attention_cache(op, c);
  const CheckedQuery query = checked_query(op, tensors.query, cache, entries);
  check_attend_options(op, options);
  AttendParams p = {};
  p.cache = c;
  p.layer = layer;
  p.rows = query.shape.positions;
  p.query_heads = query.shape.heads;
  p.query = query.rows;
  // Other ranks' answers are merged with a share's.
  const at::ScalarType out_dtype = c.share.is_all() ? tensors.query.scalar_type() : at::kFloat;
  p.out = checked_attend_output(op, tensors.out, tensors.query, out_dtype, cache);
  p.lse = checked_lse(op, tensors.lse, tensors.query, cache);
  p.dtype = query.dtype;
  p.out_dtype = kernel_dtype(op, "out", out_dtype);
  p.scale = static_cast<float>(options.scale);
  p.softcap = static_cast<float>(options.softcap);
  p.window = options.window;
  p.rounds = options.rounds;
  p.appends = append != nullptr;
  if (append != nullptr) {
    check_query_of_append(op, tensors.query, p.rows, *append, cache);
    p.append = *append;
  }
  p.sequences = sequences;
  check_workspace(op, tensors.workspace, cache, entries);
  p.use_workspace(tensors.workspace.data_ptr<float>(), tensors.workspace.numel());
  return p;
}

GatherParams gather_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& indices,
                           const ChosenSequences& sequences) {
  check_layer(op, layer, cache.view);
  check_indices(op, indices, cache, sequences.entries(cache.view.batch));
  GatherParams p = {};
  p.cache = cache.view;
  p.layer = layer;
  p.rows = indices.size(-1);
  p.indices = static_cast<const int64_t*>(indices.const_data_ptr());
  p.indices_batch_stride = indices.dim() == 2 ? indices.stride(0) : 0;
  p.indices_stride = indices.stride(-1);
  p.sequences = sequences;
  return p;
}

GatherParams gather_range_params(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end) {
  check_layer(op, layer, cache.view);
  GatherParams p = {};
  p.cache = cache.view;
  p.layer = layer;
  p.rows = end - start;
  p.start = start;
  return p;
}

TruncateParams truncate_params(const char* op, const CheckedCache& cache, int64_t length, const IntegerList& lengths,
                               const IntegerList& sequences, bool newest) {
  TORCH_CHECK_VALUE(length >= 0, op, ": n must not be negative, got ", length);
  TruncateParams p = reset_params(op, cache, sequences);
  p.resets = false;
  p.newest = newest;
  p.length = length;
  if (lengths.given()) p.lengths = checked_integers(op, "n", lengths.tensor, cache, p.sequences.entries(p.batch));
  return p;
}

TruncateParams reset_params(const char* op, const CheckedCache& cache, const IntegerList& sequences) {
  TruncateParams p = {};
  p.state = cache.view.state;
  p.layers = cache.view.layers;
  p.batch = cache.view.batch;
  p.sinks = cache.view.all_sinks;
  p.resets = true;
  p.sequences = chosen_sequences(op, cache, sequences);
  return p;
}

CopySequencesParams copy_sequences_params(const char* op, const CheckedCache& cache, const IntegerList& sources,
                                          const IntegerList& destinations) {
  const bool reorders = !destinations.given();
  CopySequencesParams p = {};
  p.cache = cache.view;
  p.sources =
      checked_integers(op, reorders ? "batch_indices" : "src", sources.tensor, cache, reorders ? p.cache.batch : -1);
  p.count = sources.tensor.size(0);
  if (!reorders) p.destinations = checked_integers(op, "dst", destinations.tensor, cache, p.count);
  TORCH_CHECK_VALUE(p.count <= kMostCopies, op, ": at most ", kMostCopies, " sequences can move in one call, got ",
                    p.count);
  return p;
}

CopyFromParams copy_from_params(const char* op, const CheckedCache& cache, const CheckedCache& source,
                                const IntegerList& sources, const IntegerList& destinations) {
  check_source(op, cache, source);
  CopyFromParams p = {};
  p.cache = cache.view;
  p.source = source.view;
  p.sources = checked_integers(op, "src", sources.tensor, cache, -1);
  p.count = sources.tensor.size(0);
  p.destinations = checked_integers(op, "dst", destinations.tensor, cache, p.count);
  TORCH_CHECK_VALUE(p.count <= kMostCopies, op, ": at most ", kMostCopies, " sequences can be copied in one call, got ",
                    p.count);
  return p;
}

}  // namespace kvc
