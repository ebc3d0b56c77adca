// Checks the arguments of an op and fills in the struct that its kernel takes (kernels/params.h).
#pragma once

#include <cstdint>
#include <optional>

#include "../kernels/params.h"
#include "cache_tensors.h"
#include "call.h"

namespace kvc {

// Without `layer`: of all layers, and key and value have a leading dimension L.
AppendParams append_params(const char* op, const CheckedCache& cache, std::optional<int64_t> layer,
                           const AppendTensors& tensors, const ChosenSequences& sequences);

// `append`: of the same call and of one layer, or null. check_outputs_apart is left to the caller, who has all tensors.
AttendParams attend_params(const char* op, const CheckedCache& cache, int64_t layer, const AttendTensors& tensors,
                           const AttendOptions& options, const AppendParams* append, const ChosenSequences& sequences);

// The chronological `indices`. The caller sets the outputs and their dtype.
GatherParams gather_params(const char* op, const CheckedCache& cache, int64_t layer, const at::Tensor& indices,
                           const ChosenSequences& sequences);
// The same for the chronological indices [start, end), of all sequences.
GatherParams gather_range_params(const char* op, const CheckedCache& cache, int64_t layer, int64_t start, int64_t end);

// Sequences keep their `length` oldest positions, or as many as `lengths` says; with `newest` they lose so many of
// their newest instead.
TruncateParams truncate_params(const char* op, const CheckedCache& cache, int64_t length, const IntegerList& lengths,
                               const IntegerList& sequences, bool newest);
TruncateParams reset_params(const char* op, const CheckedCache& cache, const IntegerList& sequences);

// `destinations` that are not given stand for all sequences, in order.
CopySequencesParams copy_sequences_params(const char* op, const CheckedCache& cache, const IntegerList& sources,
                                          const IntegerList& destinations);
CopyFromParams copy_from_params(const char* op, const CheckedCache& cache, const CheckedCache& source,
                                const IntegerList& sources, const IntegerList& destinations);

}  // namespace kvc
