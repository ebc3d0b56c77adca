#include "ops.h"

#include <ATen/ops/empty.h>

#include "backend.h"
#include "checks.h"
#include "op_params.h"

namespace kvc {
namespace {

// Runs an op on the cache's device.
template <typename Params>
void run(const char* op, const Params& params, const CheckedCache& cache,
         void (*Backend::*function)(const Params&, c10::Device)) {
  (backend_of(op, cache.device()).*function)(params, cache.device());
}

// After any launch but one of attention: the lengths that it has changed; null if the host keeps none.
HostLengths* note_launch(const CheckedCache& cache) {
  if (cache.host == nullptr) return nullptr;
  cache.host->launch_order.other_launched();
  return &cache.host->lengths;
}

void run_append(const char* op, const CheckedCache& cache, std::optional<int64_t> layer, const AppendTensors& tensors,
                const IntegerList& sequences) {
  const AppendParams p = append_params(op, cache, layer, tensors, chosen_sequences(op, cache, sequences));
  run(op, p, cache, &Backend::append);
  if (HostLengths* lengths = note_launch(cache)) {
    lengths->appended(p.first_layer, p.layer_count, p.rows, tensors.new_lengths.defined(), sequences);
  }
}

TensorPair new_outputs(const CheckedCache& cache, int64_t entries, int64_t positions, at::ScalarType dtype) {
  const CacheView& c = cache.view;
  const auto options = cache.tensors.k_cache.options().dtype(dtype);
  if (entries == 1) {
    return {at::empty({positions, c.heads, c.head_dim}, options), at::empty({positions, c.heads, c.head_dim}, options)};
  }
  return {at::empty({entries, positions, c.heads, c.head_dim}, options),
          at::empty({entries, positions, c.heads, c.head_dim}, options)};
}

// `indices` and `sequences`: the tensors that are read, or undefined ones.
void run_gather(const char* op, GatherParams& p, const CheckedCache& cache, at::ScalarType dtype, const TensorPair& out,
                const at::Tensor& indices, const at::Tensor& sequences) {
  const auto& [keys, values] = out;
  const int64_t entries = p.sequences.entries(p.cache.batch);
  p.dtype = kernel_dtype(op, "dtype", dtype);
  p.key = checked_output(op, "out[0]", keys, cache, entries, p.rows, dtype);
  p.value = checked_output(op, "out[1]", values, cache, entries, p.rows, dtype);
  check_outputs_apart(op, cache, {{"indices", indices}, {"sequences", sequences}},
                      {{"out[0]", keys}, {"out[1]", values}});
  run(op, p, cache, &Backend::gather);
}

// False: attention has nothing to do and launches no kernel.
bool launches(const AttendParams& p) { return p.rows > 0 && p.sequences.entries(p.cache.batch) > 0; }

}  // namespace

void append(const CheckedCache& cache, int64_t layer, const AppendTensors& tensors, const IntegerList& sequences) {
  run_append("append", cache, layer, tensors, sequences);
}

void append_all(const CheckedCache& cache, const AppendTensors& tensors, const IntegerList& sequences) {
  run_append("append_all", cache, std::nullopt, tensors, sequences);
}

TensorPair gather(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                  const IntegerList& sequences) {
  const char* op = "gather";
  GatherParams p = gather_params(op, cache, layer, indices, chosen_sequences(op, cache, sequences));
  kernel_dtype(op, "dtype", dtype);  // before anything is allocated
  const TensorPair out = new_outputs(cache, p.sequences.entries(p.cache.batch), p.rows, dtype);
  run_gather(op, p, cache, dtype, out, indices, sequences.tensor);
  return out;
}

void gather_out(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                const TensorPair& out, const IntegerList& sequences) {
  const char* op = "gather";
  GatherParams p = gather_params(op, cache, layer, indices, chosen_sequences(op, cache, sequences));
  run_gather(op, p, cache, dtype, out, indices, sequences.tensor);
}

TensorPair gather_range(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end,
                        at::ScalarType dtype, const TensorPair* out) {
  GatherParams p = gather_range_params(op, cache, layer, start, end);
  const TensorPair to = out != nullptr ? *out : new_outputs(cache, p.cache.batch, p.rows, dtype);
  run_gather(op, p, cache, dtype, to, at::Tensor(), at::Tensor());
  return to;
}

void attend(const CheckedCache& cache, int64_t layer, const AttendTensors& tensors, const AttendOptions& options,
            const IntegerList& sequences) {
  const char* op = "attend";
  const ChosenSequences chosen = chosen_sequences(op, cache, sequences);
  AttendParams p = attend_params(op, cache, layer, tensors, options, nullptr, chosen);
  check_outputs_apart(op, cache, {{"query", tensors.query}, {"sequences", sequences.tensor}},
                      {{"workspace", tensors.workspace}, {"out", tensors.out}, {"lse", tensors.lse}});
  LaunchOrder* order = cache.host == nullptr ? nullptr : &cache.host->launch_order;
  // The previous launch may still be writing `sequences`.
  p.may_read_before_wait = !sequences.given() && order != nullptr && order->may_read_before_wait(layer);
  run(op, p, cache, &Backend::attend);
  if (order != nullptr && launches(p)) order->attention_launched(LaunchOrder::kNoLayer);
}

void append_attend(const CheckedCache& cache, int64_t layer, const AttendTensors& tensors,
                   const AppendTensors& appended, const AttendOptions& options, const IntegerList& sequences) {
  const char* op = "append_attend";
  const ChosenSequences chosen = chosen_sequences(op, cache, sequences);
  const AppendParams append = append_params(op, cache, layer, appended, chosen);
  AttendParams p = attend_params(op, cache, layer, tensors, options, &append, chosen);
  check_outputs_apart(op, cache,
                      {{"query", tensors.query},
                       {"key", appended.key},
                       {"value", appended.value},
                       {"new_lengths", appended.new_lengths},
                       {"sequences", sequences.tensor}},
                      {{"workspace", tensors.workspace}, {"out", tensors.out}, {"lse", tensors.lse}});
  LaunchOrder* order = cache.host == nullptr ? nullptr : &cache.host->launch_order;
  // The previous launch may still be writing `new_lengths` or `sequences`. With several positions, an append of its own
  // may follow attention: that is the last launch then.
  const bool one_position = append.rows == 1;
  p.may_read_before_wait = one_position && !appended.new_lengths.defined() && !sequences.given() && order != nullptr &&
                           order->may_read_before_wait(layer);
  run(op, p, cache, &Backend::attend);
  if (order == nullptr) return;
  one_position&& launches(p) ? order->attention_launched(layer) : order->other_launched();
  cache.host->lengths.appended(append.first_layer, append.layer_count, append.rows, appended.new_lengths.defined(),
                               sequences);
}

void truncate(const CheckedCache& cache, int64_t length, const IntegerList& lengths, const IntegerList& sequences,
              bool newest) {
  const char* op = newest ? "drop_newest" : "truncate";
  run(op, truncate_params(op, cache, length, lengths, sequences, newest), cache, &Backend::truncate);
  if (HostLengths* on_host = note_launch(cache)) on_host->truncated(length, lengths, sequences, newest);
}

void reset(const CheckedCache& cache, const IntegerList& sequences) {
  const char* op = "reset";
  run(op, reset_params(op, cache, sequences), cache, &Backend::truncate);
  if (HostLengths* lengths = note_launch(cache)) sequences.given() ? lengths->reset(sequences) : lengths->cleared();
}

void copy_sequences(const char* op, const CheckedCache& cache, const IntegerList& sources,
                    const IntegerList& destinations) {
  run(op, copy_sequences_params(op, cache, sources, destinations), cache, &Backend::copy_sequences);
  if (HostLengths* lengths = note_launch(cache)) lengths->copied(sources, destinations);
}

void copy_from(const CheckedCache& cache, const CheckedCache& source, const IntegerList& sources,
               const IntegerList& destinations) {
  const char* op = "copy_sequence";
  run(op, copy_from_params(op, cache, source, sources, destinations), cache, &Backend::copy_from);
  HostLengths* of_source = note_launch(source);
  if (HostLengths* lengths = note_launch(cache)) lengths->copied_from(of_source, sources, destinations);
}

void clear(const CheckedCache& cache) {
  cache.tensors.state.zero_();
  if (cache.view.all_sinks > 0) cache.tensors.state.select(0, 1).fill_(cache.view.all_sinks);
  cache.tensors.overflow_counts.zero_();
  if (HostLengths* lengths = note_launch(cache)) lengths->cleared();
}

}  // namespace kvc
