// The GPU kernels' launchers. Each takes memory of the current device and returns what the launch said; none
// synchronises or allocates.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace kvc {

cudaError_t launch_append(const AppendParams& params, cudaStream_t stream);
cudaError_t launch_gather(const GatherParams& params, cudaStream_t stream);
cudaError_t launch_attend(const AttendParams& params, cudaStream_t stream);
cudaError_t launch_attend_single(const AttendParams& params, cudaStream_t stream);  // which the former calls
// Attention of many queries (AttendParams::many), with the append of new positions; launch_attend calls it. It launches
// these: the answers, whole or in parts as `parts` then says, and what remains to be done to them.
struct PromptParts;
cudaError_t launch_attend_many(const AttendParams& params, cudaStream_t stream);
cudaError_t launch_prompt(const AttendParams& params, PromptParts& parts, cudaStream_t stream);
void prefer_portable_prompts(bool portable);   // for tests and benchmarks: the kernel for every GPU, wherever it runs
bool serves_sm90(const AttendParams& params);  // then launch_prompt calls this
cudaError_t launch_prompt_sm90(const AttendParams& params, PromptParts& parts, cudaStream_t stream);
cudaError_t launch_prompt_finish(const AttendParams& params, const PromptParts& parts, cudaStream_t stream);
cudaError_t launch_copy_sequences(const CopySequencesParams& params, cudaStream_t stream);
cudaError_t launch_copy_from(const CopyFromParams& params, cudaStream_t stream);
cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream);

}  // namespace kvc
