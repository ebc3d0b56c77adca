#include "ops.h"

#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include "devices.h"

namespace kvc {
namespace {

template <typename Params>
void run(const char* op, const Params& params, const at::Tensor& on, void (*on_cpu)(const Params&),
         [[maybe_unused]] void (*on_cuda)(const Params&, c10::Device)) {
  if (on.is_cpu()) return on_cpu(params);
#if defined(KVC_WITH_CUDA)
  if (on.is_cuda()) return on_cuda(params, on.device());
#endif
  TORCH_CHECK_VALUE(false, op, ": the cache must be on a device that this build supports, got ", on.device());
}

#if defined(KVC_WITH_CUDA)
constexpr auto kAppendCuda = append_cuda;
constexpr auto kGatherCuda = gather_cuda;
constexpr auto kAttendCuda = attend_cuda;
constexpr auto kCopySequencesCuda = copy_sequences_cuda;
constexpr auto kCopyFromCuda = copy_from_cuda;
constexpr auto kTruncateCuda = truncate_cuda;
#else
constexpr void (*kAppendCuda)(const AppendParams&, c10::Device) = nullptr;
constexpr void (*kGatherCuda)(const GatherParams&, c10::Device) = nullptr;
constexpr void (*kAttendCuda)(const AttendParams&, c10::Device) = nullptr;
constexpr void (*kCopySequencesCuda)(const CopySequencesParams&, c10::Device) = nullptr;
constexpr void (*kCopyFromCuda)(const CopyFromParams&, c10::Device) = nullptr;
constexpr void (*kTruncateCuda)(const TruncateParams&, c10::Device) = nullptr;
#endif

void run_append(const char* op, const CheckedCache& cache, HostLengths* lengths, int64_t layer, bool all_layers,
                const at::Tensor& key, const at::Tensor& value, const at::Tensor* new_lengths,
                const IntegerArgument* sequences) {
  const AppendParams p =
      append_params(op, cache, layer, all_layers, key, value, new_lengths, chosen_sequences(op, cache, sequences));
  run(op, p, cache.tensors.k_cache, append_cpu, kAppendCuda);
  if (lengths == nullptr) return;
  lengths->other_launched();
  lengths->appended(p.first_layer, p.layer_count, p.rows, new_lengths != nullptr, sequences);
}

TensorPair new_outputs(const CheckedCache& cache, int64_t batch, int64_t rows, at::ScalarType dtype) {
  const CacheView& c = cache.view;
  const auto options = cache.tensors.k_cache.options().dtype(dtype);
  if (batch == 1) {
    return {at::empty({rows, c.heads, c.head_dim}, options), at::empty({rows, c.heads, c.head_dim}, options)};
  }
  return {at::empty({batch, rows, c.heads, c.head_dim}, options),
          at::empty({batch, rows, c.heads, c.head_dim}, options)};
}

const at::Tensor* tensor_of(const IntegerArgument* numbers) { return numbers == nullptr ? nullptr : &numbers->tensor; }

void run_gather(const char* op, GatherParams& p, const CheckedCache& cache, at::ScalarType dtype, const TensorPair& out,
                const at::Tensor* indices, const IntegerArgument* sequences) {
  p.dtype = kernel_dtype(op, "dtype", dtype);
  const int64_t batch = p.sequences.entries(p.cache.batch);
  p.key = checked_output(op, "out[0]", std::get<0>(out), cache, batch, p.rows, dtype);
  p.value = checked_output(op, "out[1]", std::get<1>(out), cache, batch, p.rows, dtype);
  check_outputs_apart(op, cache, {{"indices", indices}, {"sequences", tensor_of(sequences)}},
                      {{"out[0]", &std::get<0>(out)}, {"out[1]", &std::get<1>(out)}});
  run(op, p, cache.tensors.k_cache, gather_cpu, kGatherCuda);
}

}  // namespace

void append(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& key,
            const at::Tensor& value, const at::Tensor* new_lengths, const IntegerArgument* sequences) {
  run_append("append", cache, lengths, layer, false, key, value, new_lengths, sequences);
}

void append_all(const CheckedCache& cache, HostLengths* lengths, const at::Tensor& keys, const at::Tensor& values,
                const at::Tensor* new_lengths, const IntegerArgument* sequences) {
  run_append("append_all", cache, lengths, 0, true, keys, values, new_lengths, sequences);
}

TensorPair gather(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                  const IntegerArgument* sequences) {
  GatherParams p = gather_params("gather", cache, layer, &indices, chosen_sequences("gather", cache, sequences));
  kernel_dtype("gather", "dtype", dtype);
  const TensorPair out = new_outputs(cache, p.sequences.entries(p.cache.batch), p.rows, dtype);
  run_gather("gather", p, cache, dtype, out, &indices, sequences);
  return out;
}

void gather_out(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& indices,
                at::ScalarType dtype, const TensorPair& out, const IntegerArgument* sequences) {
  GatherParams p = gather_params(op, cache, layer, &indices, chosen_sequences(op, cache, sequences));
  run_gather(op, p, cache, dtype, out, &indices, sequences);
}

TensorPair gather_range(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end,
                        at::ScalarType dtype, const TensorPair* out) {
  GatherParams p = gather_params(op, cache, layer, nullptr, {});
  p.start = start;
  p.rows = end - start;
  const TensorPair to = out != nullptr ? *out : new_outputs(cache, p.cache.batch, p.rows, dtype);
  run_gather(op, p, cache, dtype, to, nullptr, nullptr);
  return to;
}

namespace {

// Whether attention has anything to do: else no kernel stands behind the one before.
bool launches(const AttendParams& p) { return p.rows > 0 && p.sequences.entries(p.cache.batch) > 0; }

}  // namespace

void attend(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& query,
            const AttendOptions& options, const IntegerArgument* sequences, const at::Tensor& workspace,
            const at::Tensor& out, const at::Tensor& lse) {
  const ChosenSequences chosen = chosen_sequences("attend", cache, sequences);
  AttendParams p = attend_params("attend", cache, layer, query, options, nullptr, chosen, workspace, out, lse);
  check_outputs_apart("attend", cache, {{"query", &query}, {"sequences", tensor_of(sequences)}},
                      {{"workspace", &workspace}, {"out", &out}, {"lse", &lse}});
  p.may_read_before_wait = sequences == nullptr && lengths != nullptr && lengths->settled(layer);
  run("attend", p, cache.tensors.k_cache, attend_cpu, kAttendCuda);
  if (lengths != nullptr && launches(p)) lengths->attention_launched(-1);
}

void append_attend(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& query,
                   const at::Tensor& key, const at::Tensor& value, const at::Tensor* new_lengths,
                   const AttendOptions& options, const IntegerArgument* sequences, const at::Tensor& workspace,
                   const at::Tensor& out, const at::Tensor& lse) {
  const char* op = "append_attend";
  const ChosenSequences chosen = chosen_sequences(op, cache, sequences);
  const AppendParams append = append_params(op, cache, layer, false, key, value, new_lengths, chosen);
  AttendParams p = attend_params(op, cache, layer, query, options, &append, chosen, workspace, out, lse);
  check_outputs_apart(op, cache,
                      {{"query", &query},
                       {"key", &key},
                       {"value", &value},
                       {"new_lengths", new_lengths},
                       {"sequences", tensor_of(sequences)}},
                      {{"workspace", &workspace}, {"out", &out}, {"lse", &lse}});
  // For one position without new_lengths or sequences, which the launch ahead may be about to write. (For several an
  // append follows.)
  const bool one = append.rows == 1 && new_lengths == nullptr && sequences == nullptr;
  p.may_read_before_wait = one && lengths != nullptr && lengths->settled(layer);
  run(op, p, cache.tensors.k_cache, attend_cpu, kAttendCuda);
  if (lengths == nullptr) return;
  append.rows == 1 && launches(p) ? lengths->attention_launched(layer) : lengths->other_launched();
  lengths->appended(append.first_layer, append.layer_count, append.rows, new_lengths != nullptr, sequences);
}

namespace {

TruncateParams truncate_params(const char* op, const CheckedCache& cache, const IntegerArgument* sequences) {
  const CacheView& c = cache.view;
  return {c.state, c.layers, c.batch, c.sinks, false, false, 0, {}, chosen_sequences(op, cache, sequences)};
}

}  // namespace

void truncate(const CheckedCache& cache, HostLengths* lengths, int64_t length, const IntegerArgument* of_each,
              const IntegerArgument* sequences, bool newest) {
  const char* op = newest ? "drop_newest" : "truncate";
  TORCH_CHECK_VALUE(length >= 0, op, ": n must not be negative, got ", length);
  TruncateParams p = truncate_params(op, cache, sequences);
  p.newest = newest;
  p.length = length;
  if (of_each != nullptr) p.lengths = checked_integers(op, "n", of_each->tensor, cache, p.sequences.entries(p.batch));
  run(op, p, cache.tensors.k_cache, truncate_cpu, kTruncateCuda);
  if (lengths == nullptr) return;
  lengths->other_launched();
  lengths->truncated(length, of_each, sequences, newest);
}

void reset(const CheckedCache& cache, HostLengths* lengths, const IntegerArgument* sequences) {
  TruncateParams p = truncate_params("reset", cache, sequences);
  p.resets = true;
  run("reset", p, cache.tensors.k_cache, truncate_cpu, kTruncateCuda);
  if (lengths == nullptr) return;
  lengths->other_launched();
  if (sequences == nullptr) {
    lengths->cleared();
  } else {
    lengths->reset(*sequences);
  }
}

void copy_sequences(const char* op, const CheckedCache& cache, HostLengths* lengths, const IntegerArgument& sources,
                    const IntegerArgument* destinations) {
  const bool reorders = destinations == nullptr;
  CopySequencesParams p;
  p.cache = cache.view;
  p.sources =
      checked_integers(op, reorders ? "batch_indices" : "src", sources.tensor, cache, reorders ? p.cache.batch : -1);
  p.count = sources.tensor.size(0);
  if (!reorders) p.destinations = checked_integers(op, "dst", destinations->tensor, cache, p.count);
  TORCH_CHECK_VALUE(p.count <= kMostCopies, op, ": at most ", kMostCopies, " sequences can move in one call, got ",
                    p.count);
  run(op, p, cache.tensors.k_cache, copy_sequences_cpu, kCopySequencesCuda);
  if (lengths == nullptr) return;
  lengths->other_launched();
  lengths->copied(sources, destinations);
}

void copy_from(const CheckedCache& cache, HostLengths* lengths, const CheckedCache& source, HostLengths* source_lengths,
               const IntegerArgument& sources, const IntegerArgument& destinations) {
  const char* op = "copy_sequence";
  check_source(op, cache, source);
  CopyFromParams p;
  p.cache = cache.view;
  p.source = source.view;
  p.sources = checked_integers(op, "src", sources.tensor, cache, -1);
  p.count = sources.tensor.size(0);
  p.destinations = checked_integers(op, "dst", destinations.tensor, cache, p.count);
  TORCH_CHECK_VALUE(p.count <= kMostCopies, op, ": at most ", kMostCopies, " sequences can be copied in one call, got ",
                    p.count);
  run(op, p, cache.tensors.k_cache, copy_from_cpu, kCopyFromCuda);
  if (source_lengths != nullptr) source_lengths->other_launched();
  if (lengths == nullptr) return;
  lengths->other_launched();
  lengths->copied_from(source_lengths, sources, destinations);
}

void clear(const CheckedCache& cache, HostLengths* lengths) {
  cache.tensors.state.zero_();
  if (cache.view.sinks > 0) cache.tensors.state.select(0, 1).fill_(cache.view.sinks);
  cache.tensors.overflow_counts.zero_();
  if (lengths == nullptr) return;
  lengths->other_launched();
  lengths->cleared();
}

namespace {

// The same ops for the dispatcher, over plain tensors: torch.compile, opcheck, whoever has no cache object.

// An argument of the dispatcher's, whose numbers the host does not know.
class OptionalIntegers {
 public:
  explicit OptionalIntegers(const std::optional<at::Tensor>& t) : given_(t.has_value()) {
    if (given_) numbers_.tensor = *t;
  }
  const IntegerArgument* get() const { return given_ ? &numbers_ : nullptr; }

 private:
  IntegerArgument numbers_;
  bool given_;
};

// What an op counts overflows in must be there.
CheckedCache with_counters(const char* op, CacheTensors tensors) {
  check_dense(op, "overflow_counts", tensors.overflow_counts);
  return {op, std::move(tensors)};
}

void op_append(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts, int64_t layer,
               const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& new_lengths,
               int64_t sink_positions, bool saturate, const std::optional<at::Tensor>& sequences) {
  append(with_counters("append", {k_cache, v_cache, state, overflow_counts, sink_positions, saturate}),
         HostLengths::of(state).get(), layer, key, value, new_lengths ? &*new_lengths : nullptr,
         OptionalIntegers(sequences).get());
}

void op_append_all(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts,
                   const at::Tensor& keys, const at::Tensor& values, const std::optional<at::Tensor>& new_lengths,
                   int64_t sink_positions, bool saturate, const std::optional<at::Tensor>& sequences) {
  append_all(with_counters("append_all", {k_cache, v_cache, state, overflow_counts, sink_positions, saturate}),
             HostLengths::of(state).get(), keys, values, new_lengths ? &*new_lengths : nullptr,
             OptionalIntegers(sequences).get());
}

// Ops that touch no overflow counters.
CheckedCache without_counters(const char* op, const at::Tensor& k_cache, const at::Tensor& v_cache,
                              const at::Tensor& state, int64_t sink_positions) {
  return {op, {k_cache, v_cache, state, at::Tensor(), sink_positions, true}};
}

TensorPair op_gather(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, int64_t layer,
                     const at::Tensor& indices, int64_t sink_positions, at::ScalarType dtype,
                     const std::optional<at::Tensor>& sequences) {
  return gather(without_counters("gather", k_cache, v_cache, state, sink_positions), layer, indices, dtype,
                OptionalIntegers(sequences).get());
}

void op_gather_out(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, int64_t layer,
                   const at::Tensor& indices, int64_t sink_positions, at::Tensor& key_out, at::Tensor& value_out,
                   const std::optional<at::Tensor>& sequences) {
  gather_out("gather", without_counters("gather", k_cache, v_cache, state, sink_positions), layer, indices,
             key_out.scalar_type(), {key_out, value_out}, OptionalIntegers(sequences).get());
}

void op_attend(const at::Tensor& k_cache, const at::Tensor& v_cache, const at::Tensor& state, at::Tensor& workspace,
               int64_t layer, const at::Tensor& query, int64_t sink_positions, double scale, int64_t window,
               double softcap, at::Tensor& out, const std::optional<at::Tensor>& lse,
               const std::optional<at::Tensor>& sequences, bool rounds) {
  check_dense("attend", "out", out);
  attend(without_counters("attend", k_cache, v_cache, state, sink_positions), HostLengths::of(state).get(), layer,
         query, {scale, window, softcap, rounds}, OptionalIntegers(sequences).get(), workspace, out,
         lse.value_or(at::Tensor()));
}

void op_append_attend(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, at::Tensor& overflow_counts,
                      at::Tensor& workspace, int64_t layer, const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const std::optional<at::Tensor>& new_lengths, int64_t sink_positions,
                      bool saturate, double scale, int64_t window, double softcap, at::Tensor& out,
                      const std::optional<at::Tensor>& lse, const std::optional<at::Tensor>& sequences, bool rounds) {
  check_dense("append_attend", "out", out);
  append_attend(with_counters("append_attend", {k_cache, v_cache, state, overflow_counts, sink_positions, saturate}),
                HostLengths::of(state).get(), layer, query, key, value, new_lengths ? &*new_lengths : nullptr,
                {scale, window, softcap, rounds}, OptionalIntegers(sequences).get(), workspace, out,
                lse.value_or(at::Tensor()));
}

void op_truncate(const at::Tensor& k_cache, at::Tensor& state, int64_t length, int64_t sink_positions,
                 const std::optional<at::Tensor>& lengths, const std::optional<at::Tensor>& sequences, bool newest) {
  const char* op = newest ? "drop_newest" : "truncate";
  truncate(without_counters(op, k_cache, k_cache, state, sink_positions), HostLengths::of(state).get(), length,
           OptionalIntegers(lengths).get(), OptionalIntegers(sequences).get(), newest);
}

void op_reset(const at::Tensor& k_cache, at::Tensor& state, const std::optional<at::Tensor>& sequences,
              int64_t sink_positions) {
  reset(without_counters("reset", k_cache, k_cache, state, sink_positions), HostLengths::of(state).get(),
        OptionalIntegers(sequences).get());
}

void op_copy_sequences(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, const at::Tensor& sources,
                       const std::optional<at::Tensor>& destinations, int64_t sink_positions) {
  const char* op = destinations ? "copy_sequence" : "reorder";
  copy_sequences(op, without_counters(op, k_cache, v_cache, state, sink_positions), HostLengths::of(state).get(),
                 {sources}, OptionalIntegers(destinations).get());
}

void op_copy_from(at::Tensor& k_cache, at::Tensor& v_cache, at::Tensor& state, const at::Tensor& source_k_cache,
                  const at::Tensor& source_v_cache, const at::Tensor& source_state, const at::Tensor& sources,
                  const at::Tensor& destinations, int64_t sink_positions) {
  copy_from(without_counters("copy_sequence", k_cache, v_cache, state, sink_positions), HostLengths::of(state).get(),
            without_counters("copy_sequence: source", source_k_cache, source_v_cache, source_state, sink_positions),
            HostLengths::of(source_state).get(), {sources}, {destinations});
}

void op_clear(const at::Tensor& k_cache, at::Tensor& state, at::Tensor& overflow_counts, int64_t sink_positions) {
  clear(with_counters("clear", {k_cache, k_cache, state, overflow_counts, sink_positions, true}),
        HostLengths::of(state).get());
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

namespace {

void register_for_device(torch::Library& m) {
  m.impl("append", kvc::op_append);
  m.impl("append_all", kvc::op_append_all);
  m.impl("gather", kvc::op_gather);
  m.impl("gather_out", kvc::op_gather_out);
  m.impl("attend", kvc::op_attend);
  m.impl("append_attend", kvc::op_append_attend);
  m.impl("truncate", kvc::op_truncate);
  m.impl("reset", kvc::op_reset);
  m.impl("copy_sequences", kvc::op_copy_sequences);
  m.impl("copy_from", kvc::op_copy_from);
  m.impl("clear", kvc::op_clear);
}

}  // namespace

// PyTorch's own way with lazily negated, conjugated and zero tensors is to hand an op copies, and to look for the
// copies of those that it changes among what it returns. These ops return nothing: it reads past the end. They get such
// a tensor as it is, and refuse it.
namespace {

void take_as_it_is(torch::Library& m) {
  for (const char* name : {"append", "append_all", "gather", "gather_out", "attend", "append_attend", "truncate",
                           "reset", "copy_sequences", "copy_from", "clear"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(kvcache_ext, Negative, m) { take_as_it_is(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, Conjugate, m) { take_as_it_is(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, ZeroTensor, m) { take_as_it_is(m); }
TORCH_LIBRARY_IMPL(kvcache_ext, CPU, m) { register_for_device(m); }
#if defined(KVC_WITH_CUDA)
TORCH_LIBRARY_IMPL(kvcache_ext, CUDA, m) { register_for_device(m); }
#endif
