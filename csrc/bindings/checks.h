// Every check of a call's tensors and numbers, and the sentences that its errors say. A sentence names the op, the
// argument, what it must be and what it is. Checks come before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string>

#include "../kernels/params.h"
#include "cache_tensors.h"
#include "call.h"

namespace kvc {

std::string shape_text(at::IntArrayRef sizes);
const char* dtype_name(at::ScalarType dtype);

// Raises unless kernels convert from and to this dtype.
DType kernel_dtype(const char* op, const char* name, at::ScalarType dtype);

// Raises unless the tensor has sizes and strides.
void check_dense(const char* op, const char* name, const at::Tensor& t);

// Raises unless the elements lie in memory as they are.
void check_memory(const char* op, const char* name, const at::Tensor& t);

void check_layer(const char* op, int64_t layer, const CacheView& cache);

// A contiguous list of `count` integers; -1: of any length.
Integers checked_integers(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                          int64_t count);

// The sequences that the entries of a call belong to; a list that is not given stands for all.
ChosenSequences chosen_sequences(const char* op, const CheckedCache& cache, const IntegerList& sequences);

// Raises unless sequences of `source` can be copied into `cache`: one device, one model's sizes, no shared memory.
void check_source(const char* op, const CheckedCache& cache, const CheckedCache& source);

// A key or a value to append.
struct CheckedInput {
  Rows<const void*> rows;
  int64_t positions;  // T
  DType dtype;
};

// `layers`: L where the tensor has a leading dimension of layers, else 0. `entries`: B.
CheckedInput checked_input(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t layers, int64_t entries);

// A tensor to gather into: [B, positions, H, D], or [positions, H, D] when B is 1.
Rows<void*> checked_output(const char* op, const char* name, const at::Tensor& t, const CheckedCache& cache,
                           int64_t entries, int64_t positions, at::ScalarType dtype);

// Raises unless attention kernels can read this cache.
void check_attention_cache(const char* op, const CacheView& cache);

void check_attend_options(const char* op, const AttendOptions& options);

struct QueryShape {
  int64_t positions;  // T
  int64_t heads;      // Hq
};

QueryShape checked_query_shape(const char* op, const at::Tensor& query, const CacheView& cache, int64_t entries);

struct CheckedQuery {
  Rows<const void*> rows;
  QueryShape shape;
  DType dtype;
};

CheckedQuery checked_query(const char* op, const at::Tensor& query, const CheckedCache& cache, int64_t entries);

// Raises unless `query` and the new positions of an append fit each other.
void check_query_of_append(const char* op, const at::Tensor& query, int64_t positions, const AppendParams& append,
                           const CheckedCache& cache);

// The output of attention: the query's shape and dtype.
// A tensor of a query's shape, to write to.
Rows<void*> checked_rows(const char* op, const char* name, const at::Tensor& t, int64_t head_dim);

// `wanted`: its dtype.
Rows<void*> checked_attend_output(const char* op, const at::Tensor& out, const at::Tensor& query, at::ScalarType wanted,
                                  const CheckedCache& cache);

// Null where the tensor is undefined.
float* checked_lse(const char* op, const at::Tensor& lse, const at::Tensor& query, const CheckedCache& cache);

void check_workspace(const char* op, const at::Tensor& workspace, const CheckedCache& cache, int64_t entries);

// A list of chronological indices: [n], or [B, n].
void check_indices(const char* op, const at::Tensor& indices, const CheckedCache& cache, int64_t entries);

// A tensor of a call, which may be undefined, and its name in sentences.
struct NamedTensor {
  const char* name;
  const at::Tensor& tensor;
};

// Raises unless each output has memory of its own: no element of it may share memory with another of its elements, with
// the cache, with an input or with another output.
void check_outputs_apart(const char* op, const CheckedCache& cache, std::initializer_list<NamedTensor> inputs,
                         std::initializer_list<NamedTensor> outputs);

}  // namespace kvc
