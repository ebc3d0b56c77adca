// From tensors to the kernels' structs, with every check on the way. A wrong argument becomes one sentence that names
// the op, the argument, what it got and what it wants; nothing has been written by then.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "../kernels/params.h"
#include "strided_memory.h"

namespace kvc {

// The tensors and settings that make up a cache.
struct CacheTensors {
  at::Tensor k_cache;          // [L, B, N, H, D] FP16
  at::Tensor v_cache;          // [L, B, N, H, D] FP16
  at::Tensor state;            // [3, L, B] int64
  at::Tensor overflow_counts;  // [L] int64; undefined for ops that count nothing
  int64_t sink_positions;
  bool saturate;
};

// A cache whose tensors have been found to fit each other, and what the kernels see of them.
struct CheckedCache {
  CheckedCache(const char* op, CacheTensors tensors);
  bool holds(const StridedMemory& memory) const { return memory.shares_with(keys) || memory.shares_with(values); }

  CacheTensors tensors;
  CacheView view;
  StridedMemory keys;
  StridedMemory values;
  StridedMemory state;
  StridedMemory overflow_counts;  // none where those are undefined
};

// Integers that an op reads on the device: a tensor there; or, `known`, numbers of the host's that were copied to one.
struct IntegerArgument {
  at::Tensor tensor;
  bool known = false;
  std::vector<int64_t> values = {};
};

// What a kernel sees of them. `count`: how many there must be, or -1.
Integers checked_integers(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                          int64_t count);

// The sequences that a call is about; null: all. As many entries the call's tensors have.
ChosenSequences chosen_sequences(const char* op, const CheckedCache& cache, const IntegerArgument* sequences);

// Raises unless sequences of `source` can be copied into `cache`: one device, one model's sizes, no shared memory.
void check_source(const char* op, const CheckedCache& cache, const CheckedCache& source);

void check_layer(const char* op, int64_t layer, const CacheView& cache);

// A new key or value of one layer (`layers` 0) or of all (`layers` = L, a leading dimension). Fills in T and the dtype;
// `rows` holds T or, where it is negative, receives it. `batch`: B, the cache's or the number of chosen sequences.
Rows<const void*> checked_input(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                                int64_t layers, int64_t batch, int64_t& rows, DType& dtype);

// A tensor to gather into: [B, rows, H, D], or [rows, H, D] when B is 1.
Rows<void*> checked_output(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t batch, int64_t rows, at::ScalarType dtype);

// A tensor of a call and what sentences call it. Null or undefined: the call has none.
struct NamedTensor {
  const char* name;
  const at::Tensor* tensor;
};

// Raises unless each output has memory of its own: no element of it may share memory with another of its elements, with
// the cache, with an input or with another output.
void check_outputs_apart(const char* op, const CheckedCache& cache, std::initializer_list<NamedTensor> inputs,
                         std::initializer_list<NamedTensor> outputs);

// The op's structs, whole.
AppendParams append_params(const char* op, const CheckedCache& cache, int64_t first_layer, bool all_layers,
                           const at::Tensor& key, const at::Tensor& value, const at::Tensor* new_lengths,
                           const ChosenSequences& sequences);

// What an attention call is told besides its tensors.
struct AttendOptions {
  double scale;
  int64_t window;  // 0: none
  double softcap;  // 0: none
  bool rounds;     // precision="fp16"
};

// The largest magnitude of a scale, 2^86: times 512 products of FP16's largest numbers and log2(e) it is within FP32.
constexpr double kLargestScale = 0x1p86;

// Raises unless `query` has one of the shapes that attention takes: before an answer is allocated for it.
void check_query_shape(const char* op, const at::Tensor& query, const CacheView& cache, int64_t batch);

// Attention of one layer, with an append in the same call where `append` is given. `lse` may be undefined; so may
// `out`, where all that is wanted is the checks. (check_outputs_apart is the caller's affair: it has all tensors.)
AttendParams attend_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& query,
                           const AttendOptions& options, const AppendParams* append, const ChosenSequences& sequences,
                           const at::Tensor& workspace, const at::Tensor& out, const at::Tensor& lse);

// `indices` is null for a range. The number of rows of the answer is left in `rows`; the outputs are set later.
GatherParams gather_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor* indices,
                           const ChosenSequences& sequences);

// A tensor with sizes and strides that can be asked for.
void check_dense(const char* op, const char* name, const at::Tensor& t);

DType kernel_dtype(const char* op, const char* name, at::ScalarType dtype);

std::string shape_text(at::IntArrayRef sizes);

}  // namespace kvc
