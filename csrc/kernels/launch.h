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
cudaError_t launch_copy_sequences(const CopySequencesParams& params, cudaStream_t stream);
cudaError_t launch_copy_from(const CopyFromParams& params, cudaStream_t stream);
cudaError_t launch_truncate(const TruncateParams& params, cudaStream_t stream);

}  // namespace kvc
