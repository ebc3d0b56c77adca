// The ops over a cache's tensors: what the Python class and the dispatcher both end in. Check, run on the device, note
// the new lengths on the host.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "host_lengths.h"

namespace kvc {

using TensorPair = std::tuple<at::Tensor, at::Tensor>;

// `lengths` may be null: tensors that belong to no cache object. `sequences`, null for all, are those that the call's
// tensors are about.
void append(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& key,
            const at::Tensor& value, const at::Tensor* new_lengths, const IntegerArgument* sequences);
void append_all(const CheckedCache& cache, HostLengths* lengths, const at::Tensor& keys, const at::Tensor& values,
                const at::Tensor* new_lengths, const IntegerArgument* sequences);

// Rows at `indices` ([n] or [B, n]) into new tensors or into `out`.
TensorPair gather(const CheckedCache& cache, int64_t layer, const at::Tensor& indices, at::ScalarType dtype,
                  const IntegerArgument* sequences);
void gather_out(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& indices,
                at::ScalarType dtype, const TensorPair& out, const IntegerArgument* sequences);

// Rows [start, end), which the caller has checked, into new tensors or into `out`.
TensorPair gather_range(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end,
                        at::ScalarType dtype, const TensorPair* out);

// Attention of `query`'s positions into `out` (and `lse`, if it is defined).
void attend(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& query,
            const AttendOptions& options, const IntegerArgument* sequences, const at::Tensor& workspace,
            const at::Tensor& out, const at::Tensor& lse);
// The same with `key` and `value` appended, each position before its query's turn.
void append_attend(const CheckedCache& cache, HostLengths* lengths, int64_t layer, const at::Tensor& query,
                   const at::Tensor& key, const at::Tensor& value, const at::Tensor* new_lengths,
                   const AttendOptions& options, const IntegerArgument* sequences, const at::Tensor& workspace,
                   const at::Tensor& out, const at::Tensor& lse);

// Keeps the `length` oldest positions of each sequence, or as many as `of_each` says, [n] of them; with `newest`, takes
// back that many of the newest. Null `sequences`: all.
void truncate(const CheckedCache& cache, HostLengths* lengths, int64_t length, const IntegerArgument* of_each,
              const IntegerArgument* sequences, bool newest);
void reset(const CheckedCache& cache, HostLengths* lengths, const IntegerArgument* sequences);
// Sequences become copies of others. Null `destinations`: 0, 1, ..., as many as there are sequences.
void copy_sequences(const char* op, const CheckedCache& cache, HostLengths* lengths, const IntegerArgument& sources,
                    const IntegerArgument* destinations);
// Sequences of `cache` become copies of those of another one, `source`, whose host lengths may be null as well.
void copy_from(const CheckedCache& cache, HostLengths* lengths, const CheckedCache& source, HostLengths* source_lengths,
               const IntegerArgument& sources, const IntegerArgument& destinations);
void clear(const CheckedCache& cache, HostLengths* lengths);

}  // namespace kvc
