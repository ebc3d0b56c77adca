// The GPU kernels' launchers. Each takes memory of the current device and returns what the launch said; none
// synchronises or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace kvc {

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);
cudaError_t launch_gather(const GatherParams& params, cudaStream_t stream);

// Attention. launch_attend (few_queries.cu) chooses the kernel by the number of queries.
cudaError_t launch_attend(const AttendParams& params, cudaStream_t stream);
cudaError_t launch_one_query(const AttendParams& params, cudaStream_t stream);
// Many queries (AttendParams::many), and the append of the call's new positions. Up to five launches: which positions
// are stored before attention (append_order.cu), their append, attention, its end (many_queries_finish.cu), the other
// append.
cudaError_t launch_attend_many(const AttendParams& params, cudaStream_t stream);
// launch_attend_many calls these. The first leaves whole answers or partials, as `layout` then says; the last ends it.
struct PartialsLayout;
cudaError_t launch_many_queries(const AttendParams& params, PartialsLayout& layout, cudaStream_t stream);
bool serves_sm90(const AttendParams& params);  // whether launch_many_queries takes the kernel for sm_90a
cudaError_t launch_many_queries_sm90(const AttendParams& params, PartialsLayout& layout, cudaStream_t stream);
cudaError_t launch_many_queries_finish(const AttendParams& params, const PartialsLayout& layout, cudaStream_t stream);
// For tests and benchmarks: always take the kernel for every GPU, never that for sm_90a.
void prefer_portable_prompts(bool portable);

cudaError_t launch_copy_sequences(const CopySequencesParams& params, cudaStream_t stream);
cudaError_t launch_copy_from(const CopyFromParams& params, cudaStream_t stream);
cudaError_t launch_merge(const MergeParams& params, cudaStream_t stream);
cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream);

}  // namespace kvc
