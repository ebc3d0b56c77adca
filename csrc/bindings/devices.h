// Running an op's struct on a device: its current stream on a GPU, torch's thread pool on a CPU.
#pragma once

#include <c10/core/Device.h>

#include "../kernels/params.h"

namespace kvc {

// ops_cpu.cpp
void append_cpu(const AppendParams& params);
void gather_cpu(const GatherParams& params);
void attend_cpu(const AttendParams& params);  // with the append, where there is one
void copy_sequences_cpu(const CopySequencesParams& params);
void copy_from_cpu(const CopyFromParams& params);
void truncate_cpu(const TruncateParams& params);

// Replaces the CPU's ops by those of a shared library, or by the built-in ones again (an empty path). The tests run the
// GPU kernels' source on a CPU this way (tests/emulator).
void load_cpu_ops(const char* path);

#if defined(KVC_WITH_CUDA)
// ops_cuda.cpp
void append_cuda(const AppendParams& params, c10::Device device);
void gather_cuda(const GatherParams& params, c10::Device device);
void attend_cuda(const AttendParams& params, c10::Device device);
void copy_sequences_cuda(const CopySequencesParams& params, c10::Device device);
void copy_from_cuda(const CopyFromParams& params, c10::Device device);
void truncate_cuda(const TruncateParams& params, c10::Device device);
// The number of the graph capture that the current stream is part of; 0: none.
uint64_t capture_cuda(c10::Device device);
#endif

}  // namespace kvc
