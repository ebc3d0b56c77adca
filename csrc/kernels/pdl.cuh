// Programmatic dependent launch (PDL; sm_90 and newer). A kernel's blocks may be placed on the GPU while the last
// blocks of the previous kernel are still at work, and wait there for its end. That saves the time between two kernels.
// Such a kernel waits for the previous one before it writes anything, or relies on what it reads. On older GPUs both
// calls do nothing.
//
// Appends let the next launch begin first of all. What they read before they wait is a guess, read past L1 and checked
// after the wait. Attention waits first and only then lets the next launch begin. So when a launch directly behind
// attention begins, all launches before that attention are done. If it is attention too, it may read, without
// guessing, what the launch ahead does not write (AttendParams::may_read_before_wait).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "params.h"

namespace kvc {

#if defined(KVC_EMULATED)
inline void let_next_launch_begin() {}
inline void wait_for_previous_launch() { ::emulator::end_previous_launch(); }
#else
// The next launch may begin once every block of this one has called this, or is done.
__device__ __forceinline__ void let_next_launch_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}
// Waits until the previous launch is done. Its writes are visible then.
__device__ __forceinline__ void wait_for_previous_launch() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
#endif

// The sequence of an entry of the call's tensors, or -1. The previous launch may still be writing the indices, so they
// are read after the wait. A kernel does work ahead of the wait only in calls about all sequences.
__device__ __forceinline__ int64_t sequence_of_entry(const ChosenSequences& chosen, int64_t entry, int64_t batch) {
  if (chosen.indices.data == nullptr) return entry;
  wait_for_previous_launch();
  return chosen.sequence(entry, batch);
}

// The configuration of a launch that may begin before the previous one is done, on GPUs that have PDL.
struct PdlLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  PdlLaunch(int64_t blocks, int64_t threads, int64_t shared_bytes, cudaStream_t stream)
      : PdlLaunch(blocks, threads, shared_bytes, stream, current_major()) {}
  // `major`: of the GPU's compute capability, where that is known.
  PdlLaunch(int64_t blocks, int64_t threads, int64_t shared_bytes, cudaStream_t stream, int major) {
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
    config.stream = stream;
    if (major < 9) return;
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  PdlLaunch(const PdlLaunch&) = delete;
  PdlLaunch& operator=(const PdlLaunch&) = delete;

  static int current_major() {
    int device = 0;
    int major = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return major;
  }
};

}  // namespace kvc
