// As much of the CUDA language as the kernels use, in plain C++: put this folder first on the include path and a kernel
// file compiles with g++ and runs on a CPU, thread by thread. Slow, and no substitute for a GPU (memory ordering and
// speed do not show), but the arithmetic, the indexing, the alignment, the barriers and the tickets are the kernel's
// own.
//
// Blocks run one after the other in a shuffled order. The threads of a block are fibers that run in a shuffled order
// until each has reached the barrier or the warp operation that it waits for; a barrier that some thread of the block
// never reaches, while others wait there, ends the program with a message (a thread that has returned counts as there,
// as on a GPU).
//
// Until the first thread of a block waits for the previous launch, the state of the sequences is not what it will be:
// what a kernel reads of it by then must be no more than a guess.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>

#define KVC_EMULATED  // kernels/mma.cuh then takes emulated_mma.h from this folder, hopper.cuh emulated_hopper.h
#define KVC_WITH_SM90A
#define __CUDA_ARCH_FEAT_SM90_ALL

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorNotSupported = 801
};
using cudaStream_t = void*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace emulator {
// The GPU that a call runs on (see kvc_emulate_sm90 in emulator.cpp).
struct Gpu {
  int major;
  int minor;
  int shared_bytes;  // that a block can have
  int multiprocessors;
};
extern Gpu gpu;
}  // namespace emulator

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = emulator::gpu.multiprocessors; break;
    case cudaDevAttrComputeCapabilityMajor: *value = emulator::gpu.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = emulator::gpu.minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emulator::gpu.shared_bytes; break;
  }
  return cudaSuccess;
}
template <typename Kernel>
inline cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= emulator::gpu.shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}

enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel);
void block_barrier();
void warps_barrier(unsigned warps);  // of so many neighbouring warps
void check_alignment(const void* address, size_t bytes);
// Waits for the warp, then returns the 32 values that its lanes brought.
const uint64_t* warp_exchange(uint64_t value);
char* dynamic_shared();  // of the block that runs: poisoned when it begins
size_t dynamic_shared_bytes();
void set_dynamic_shared(size_t bytes);
char* shared_base();  // address 0 of shared memory: a multiple of 1,024 here as there
// Waits, while other threads run, until this is so.
void wait_until(const std::function<bool()>& ready);
void give_way();  // lets another warp run first, as chance has it
// Does this some time later in this block: at the latest when no thread of it can go on.
void do_later(const std::function<void()>& action);
[[noreturn]] void stop(const char* message);
uint32_t random_below(uint32_t n);
void end_previous_launch();

}  // namespace emulator

#define KVC_CHECK_ALIGNMENT(address, bytes) (::emulator::check_alignment(address, bytes))

inline void __syncthreads() { emulator::block_barrier(); }
inline void __threadfence() {}

template <typename T>
inline T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}

template <typename T>
inline T atomicMax(T* address, T value) {
  const T before = *address;
  if (value > before) *address = value;
  return before;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  const uint64_t* lanes = emulator::warp_exchange(value);
  unsigned sum = 0;
  for (int i = 0; i < 32; ++i) sum += static_cast<unsigned>(lanes[i]);
  return sum;
}

template <typename T>
inline T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t* lanes = emulator::warp_exchange(bits);
  T other;
  std::memcpy(&other, &lanes[lane], sizeof other);
  return other;
}
inline float __shfl_xor_sync(unsigned mask, float value, int distance) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ distance);
}

inline int __any_sync(unsigned, int value) {
  const uint64_t* lanes = emulator::warp_exchange(value != 0);
  uint64_t any = 0;
  for (int i = 0; i < 32; ++i) any |= lanes[i];
  return any != 0;
}

inline void __syncwarp() { emulator::warp_exchange(0); }

template <typename... Parameters, typename... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                                      Arguments&&... arguments) {
  if (config->gridDim.x == 0 || config->blockDim.x == 0 || config->blockDim.x % 32 != 0) {
    return cudaErrorInvalidConfiguration;
  }
  if (config->dynamicSmemBytes > static_cast<size_t>(emulator::gpu.shared_bytes)) return cudaErrorInvalidValue;
  emulator::set_dynamic_shared(config->dynamicSmemBytes);
  emulator::run_grid(config->gridDim, config->blockDim, [&] { kernel(arguments...); });
  return cudaSuccess;
}
