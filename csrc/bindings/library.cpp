// The ops in torch's dispatcher, over plain tensors: for torch.compile, opcheck, and callers that have no cache object.
#include <torch/library.h>

#include <optional>

#include "cache_tensors.h"
#include "checks.h"
#include "ops.h"

namespace kvc {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

// A list of integers that the host does not know.
IntegerList list_of(const at::Tensor& t) { return {t}; }
IntegerList list_of(const OptionalTensor& t) { return {t.value_or(at::Tensor())}; }

// Checks the tensors and finds what the host keeps of their cache.
CheckedCache checked(const char* op, CacheTensors tensors) {
  CheckedCache cache(op, std::move(tensors));
  cache.host = HostRecord::of(cache.tensors.state);
  return cache;
}

// The cache of an op that counts overflows.
CheckedCache counting_cache(const char* op, const at::Tensor& k_cache, const at::Tensor& v_cache,
                            const at::Tensor& state, const at::Tensor& overflow_counts, int64_t sink_positions,
                            bool saturate) {
  check_dense(op, "overflow_counts", overflow_counts);
  return checked(op, {.k_cache = k_cache,
                      .v_cache = v_cache,
                      .state = state,
                      .overflow_counts = overflow_counts,
                      .sink_positions = sink_positions,
                      .saturate = saturate});
}

// The cache of an op that appends nothing. Ops that touch no keys and values get no v_cache: k_cache stands in for it.
CheckedCache plain_cache(const char* op, const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state,
                         int64_t sink_positions) {
  return checked(op, {.k_cache = k_cache,
                      .v_cache = v_cache,
                      .state = state,
                      .overflow_counts = {},
                      .sink_positions = sink_positions,
                      .saturate = true});
}

void op_append(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts, int64_t layer,
               const at::Tensor& key, const at::Tensor& value, const OptionalTensor& new_lengths,
               int64_t sink_positions, bool saturate, const OptionalTensor& sequences) {
  append(counting_cache("append", k_cache, v_cache, state, overflow_counts, sink_positions, saturate), layer,
         {.key = key, .value = value, .new_lengths = new_lengths.value_or(at::Tensor())}, list_of(sequences));
}

void op_append_all(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts,
                   const at::Tensor& keys, const at::Tensor& values, const OptionalTensor& new_lengths,
                   int64_t sink_positions, bool saturate, const OptionalTensor& sequences) {
  append_all(counting_cache("append_all", k_cache, v_cache, state, overflow_counts, sink_positions, saturate),
             {.key = keys, .value = values, .new_lengths = new_lengths.value_or(at::Tensor())}, list_of(sequences));
}

TensorPair op_gather(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, int64_t layer,
                     const at::Tensor& indices, int64_t sink_positions, at::ScalarType dtype,
                     const OptionalTensor& sequences) {
  return gather(plain_cache("gather", k_cache, v_cache, state, sink_positions), layer, indices, dtype,
                list_of(sequences));
}

void op_gather_out(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, int64_t layer,
                   const at::Tensor& indices, int64_t sink_positions, at::Tensor& key_out, at::Tensor& value_out,
                   const OptionalTensor& sequences) {
  gather_out(plain_cache("gather", k_cache, v_cache, state, sink_positions), layer, indices, key_out.scalar_type(),
             {key_out, value_out}, list_of(sequences));
}

void op_attend(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, at::Tensor& workspace,
               int64_t layer, const at::Tensor& query, int64_t sink_positions, double scale, int64_t window,
               double softcap, at::Tensor& out, const OptionalTensor& lse, const OptionalTensor& sequences,
               bool rounds) {
  attend(plain_cache("attend", k_cache, v_cache, state, sink_positions), layer,
         {.query = query, .workspace = workspace, .out = out, .lse = lse.value_or(at::Tensor())},
         {.scale = scale, .window = window, .softcap = softcap, .rounds = rounds}, list_of(sequences));
}

void op_append_attend(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts,
                      at::Tensor& workspace, int64_t layer, const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const OptionalTensor& new_lengths, int64_t sink_positions, bool saturate,
                      double scale, int64_t window, double softcap, at::Tensor& out, const OptionalTensor& lse,
                      const OptionalTensor& sequences, bool rounds) {
  append_attend(counting_cache("append_attend", k_cache, v_cache, state, overflow_counts, sink_positions, saturate),
                layer, {.query = query, .workspace = workspace, .out = out, .lse = lse.value_or(at::Tensor())},
                {.key = key, .value = value, .new_lengths = new_lengths.value_or(at::Tensor())},
                {.scale = scale, .window = window, .softcap = softcap, .rounds = rounds}, list_of(sequences));
}

void op_truncate(const at::Tensor& k_cache, at::Tensor& state, int64_t length, int64_t sink_positions,
                 const OptionalTensor& lengths, const OptionalTensor& sequences, bool newest) {
  truncate(plain_cache(newest ? "drop_newest" : "truncate", k_cache, k_cache, state, sink_positions), length,
           list_of(lengths), list_of(sequences), newest);
}

void op_reset(const at::Tensor& k_cache, at::Tensor& state, const OptionalTensor& sequences, int64_t sink_positions) {
  reset(plain_cache("reset", k_cache, k_cache, state, sink_positions), list_of(sequences));
}

void op_copy_sequences(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, const at::Tensor& sources,
                       const OptionalTensor& destinations, int64_t sink_positions) {
  const char* op = destinations ? "copy_sequence" : "reorder";
  copy_sequences(op, plain_cache(op, k_cache, v_cache, state, sink_positions), list_of(sources), list_of(destinations));
}

void op_copy_from(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, const at::Tensor& source_k_cache,
                  const at::Tensor& source_v_cache, const at::Tensor& source_state, const at::Tensor& sources,
                  const at::Tensor& destinations, int64_t sink_positions) {
  copy_from(plain_cache("copy_sequence", k_cache, v_cache, state, sink_positions),
            plain_cache("copy_sequence: source", source_k_cache, source_v_cache, source_state, sink_positions),
            list_of(sources), list_of(destinations));
}

void op_clear(const at::Tensor& k_cache, at::Tensor& state, at::Tensor& overflow_counts, int64_t sink_positions) {
  clear(counting_cache("clear", k_cache, k_cache, state, overflow_counts, sink_positions, true));
}

// Calls register_op(name, function) for each op.
template <typename RegisterOp>
void for_each_op(const RegisterOp& register_op) {
  register_op("append", op_append);
  register_op("append_all", op_append_all);
  register_op("gather", op_gather);
  register_op("gather_out", op_gather_out);
  register_op("attend", op_attend);
  register_op("append_attend", op_append_attend);
  register_op("truncate", op_truncate);
  register_op("reset", op_reset);
  register_op("copy_sequences", op_copy_sequences);
  register_op("copy_from", op_copy_from);
  register_op("clear", op_clear);
}

void register_for_device(torch::Library& m) {
  for_each_op([&](const char* name, auto* function) { m.impl(name, function); });
}

// Lets tensors with such a dispatch key reach the device's functions unchanged; these refuse them (check_memory).
// PyTorch's own fallback hands the op a copy of a lazily negated, conjugated or zero tensor, then looks for the copies
// that the op has changed among what the op returns. These ops return nothing, so the fallback would read out of
// bounds.
void skip_dispatch_key(torch::Library& m) {
  for_each_op([&](const char* name, auto*) { m.impl(name, torch::CppFunction::makeFallthrough()); });
}

}  // namespace
}  // namespace kvc

TORCH_LIBRARY(kvcache_ext, m) {
  m.set_python_module("kvcache_ext.ops");
  m.def(
      "append(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) state, Tensor(d!) overflow_counts, int layer, "
      "Tensor key, Tensor value, Tensor? new_lengths, int sink_positions, bool saturate, Tensor? sequences=None) -> "
      "()");
  m.def(
      "append_all(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) state, Tensor(d!) overflow_counts, Tensor keys, "
      "Tensor values, Tensor? new_lengths, int sink_positions, bool saturate, Tensor? sequences=None) -> ()");
  m.def(
      "gather(Tensor k_cache, Tensor v_cache, Tensor state, int layer, Tensor indices, int sink_positions, "
      "ScalarType dtype, Tensor? sequences=None) -> (Tensor, Tensor)");
  m.def(
      "gather_out(Tensor k_cache, Tensor v_cache, Tensor state, int layer, Tensor indices, int sink_positions, "
      "Tensor(a!) key_out, Tensor(b!) value_out, Tensor? sequences=None) -> ()");
  m.def(
      "attend(Tensor k_cache, Tensor v_cache, Tensor state, Tensor(a!) workspace, int layer, Tensor query, "
      "int sink_positions, float scale, int window, float softcap, Tensor(b!) out, Tensor(c!)? lse, "
      "Tensor? sequences=None, bool rounds=False) -> ()");
  m.def(
      "append_attend(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) state, Tensor(d!) overflow_counts, "
      "Tensor(e!) workspace, int layer, Tensor query, Tensor key, Tensor value, Tensor? new_lengths, "
      "int sink_positions, bool saturate, float scale, int window, float softcap, Tensor(f!) out, Tensor(g!)? lse, "
      "Tensor? sequences=None, bool rounds=False) -> ()");
  m.def(
      "truncate(Tensor k_cache, Tensor(a!) state, int length, int sink_positions, Tensor? lengths=None, "
      "Tensor? sequences=None, bool newest=False) -> ()");
  m.def("reset(Tensor k_cache, Tensor(a!) state, Tensor? sequences, int sink_positions) -> ()");
  m.def(
      "copy_sequences(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) state, Tensor sources, Tensor? destinations, "
      "int sink_positions) -> ()");
  m.def(
      "copy_from(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) state, Tensor source_k_cache, "
      "Tensor source_v_cache, Tensor source_state, Tensor sources, Tensor destinations, int sink_positions) -> ()");
  m.def("clear(Tensor k_cache, Tensor(a!) state, Tensor(b!) overflow_counts, int sink_positions) -> ()");
}

TORCH_LIBRARY_IMPL(kvcache_ext, Negative, m) { kvc::skip_dispatch_key(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, Conjugate, m) { kvc::skip_dispatch_key(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, ZeroTensor, m) { kvc::skip_dispatch_key(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, CPU, m) { kvc::register_for_device(m); }
#if defined(KVC_WITH_CUDA)
TORCH_LIBRARY_IMPL(kvcache_ext, CUDA, m) { kvc::register_for_device(m); }
#endif
