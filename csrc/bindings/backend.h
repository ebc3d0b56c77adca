// Where ops run: a table with one function an op for each device.
#pragma once

#include <c10/core/Device.h>

#include <cstdint>

#include "../kernels/params.h"

namespace kvc {

// Each op runs on the device's current stream (a GPU) or on torch's thread pool (a CPU).
struct Backend {
  void (*append)(const AppendParams& params, c10::Device device);
  void (*gather)(const GatherParams& params, c10::Device device);
  void (*attend)(const AttendParams& params, c10::Device device);  // with the append, where there is one
  void (*copy_sequences)(const CopySequencesParams& params, c10::Device device);
  void (*copy_from)(const CopyFromParams& params, c10::Device device);
  void (*truncate)(const TruncateParams& params, c10::Device device);
  void (*merge)(const MergeParams& params, c10::Device device);
  // The number of the graph capture that the current stream is part of; 0: none.
  uint64_t (*graph_capture)(c10::Device device);
};

extern const Backend kCpuBackend;  // backend_cpu.cpp
#if defined(KVC_WITH_CUDA)
extern const Backend kCudaBackend;  // backend_cuda.cpp
#endif

// Raises ValueError where this build has no backend for the device.
const Backend& backend_of(const char* op, c10::Device device);

// Backend::graph_capture; 0 on a device without a backend.
uint64_t graph_capture(c10::Device device);

// For tests: a shared library runs the CPU's ops from now on; with an empty path, kCpuBackend does again. The library
// is the GPU kernels' source compiled for a CPU (tests/emulator).
void load_cpu_ops(const char* path);

// Whether the GPU's attention kernels leave the append to a launch of its own. One new position is appended by the
// attention kernel, and the kernels for many queries store new positions themselves. A few positions have to wait until
// attention is done, as earlier queries still see what they overwrite.
inline bool appends_after_attention(const AttendParams& p) { return p.appends && p.rows > 1 && !p.many; }

}  // namespace kvc
