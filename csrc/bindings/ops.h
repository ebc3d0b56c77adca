// The ops over a cache's tensors: the Python class and the dispatcher both end here. Each op checks its arguments, runs
// on the cache's device and notes the new lengths on the host.
//
// `sequences` are those that the entries of the call's tensors belong to, or that the op changes; not given: all.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "cache_tensors.h"
#include "call.h"

namespace kvc {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;  // keys, values

void append(const CheckedCache& cache, int64_t layer, const AppendTensors& tensors, const IntegerList& sequences);
void append_all(const CheckedCache& cache, const AppendTensors& tensors, const IntegerList& sequences);

// The positions of these chronological `indices`, [n] or [B, n], into new tensors or into `out`.
TensorPair gather(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                  const IntegerList& sequences);
void gather_out(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                const TensorPair& out, const IntegerList& sequences);

// The chronological indices [start, end), which the caller has checked, into new tensors or, unless it is null, into
// `out`.
TensorPair gather_range(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end,
                        at::ScalarType dtype, const TensorPair* out);

void attend(const CheckedCache& cache, int64_t layer, const AttendTensors& tensors, const AttendOptions& options,
            const IntegerList& sequences);
// Appends as well: each new position just before its query's turn.
void append_attend(const CheckedCache& cache, int64_t layer, const AttendTensors& tensors,
                   const AppendTensors& appended, const AttendOptions& options, const IntegerList& sequences);

// Sequences keep their `length` oldest positions, or as many as `lengths` [n] says, if it is given. With `newest` they
// lose so many of their newest instead.
void truncate(const CheckedCache& cache, int64_t length, const IntegerList& lengths, const IntegerList& sequences,
              bool newest);
void reset(const CheckedCache& cache, const IntegerList& sequences);

// Sequences become copies of others. `destinations` that are not given stand for all sequences, in order.
void copy_sequences(const char* op, const CheckedCache& cache, const IntegerList& sources,
                    const IntegerList& destinations);
// Sequences of `cache` become copies of those of another cache.
void copy_from(const CheckedCache& cache, const CheckedCache& source, const IntegerList& sources,
               const IntegerList& destinations);

void clear(const CheckedCache& cache);

}  // namespace kvc
