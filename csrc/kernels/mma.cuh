// Warp-wide building blocks of the attention kernels: asynchronous copies into shared memory, matrix fragments, tensor
// core products. Thin names over PTX; the tests' emulator (tests/emulator) has its own.
//
// Fragments are those of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). With g = lane / 4, i = lane % 4:
//   A, 16 x 16:  rows g and g + 8, columns 2i, 2i+1 and 2i+8, 2i+9, in the order (g, 2i), (g+8, 2i), (g, 2i+8), ...
//   B, 16 x 8:   column g, rows 2i, 2i+1 and 2i+8, 2i+9
//   C, 16 x 8:   row g columns 2i, 2i+1, then row g+8 columns 2i, 2i+1
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.h"
#include "vec.cuh"

namespace kvc {

struct FragmentA {
  uint32_t x[4];
};
struct FragmentB {
  uint32_t x[2];
};
struct FragmentC {
  float x[4];
};

}  // namespace kvc

#if defined(KVC_EMULATED)
#include "emulated_mma.h"
#else

namespace kvc {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory, past L1; zeros, and nothing read, when not `real`.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool real) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)), "l"(global),
               "r"(real ? 16 : 0)
               : "memory");
}
// Ends a group of this thread's copies.
__device__ __forceinline__ void end_copy_group() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// A barrier of this warp and its neighbours, kWarps in all, the first of them a multiple of that. A block has 15 beside
// its own.
template <int kWarps>
__device__ __forceinline__ void sync_warps() {
  if constexpr (kWarps == 1) {
    __syncwarp();
  } else {
    asm volatile("bar.sync %0, %1;\n" ::"r"(threadIdx.x / (32 * kWarps) + 1), "n"(32 * kWarps) : "memory");
  }
}

// Four 8 x 8 matrices of 16-bit elements: lane l brings the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ FragmentA load_matrices(const void* row) {
  FragmentA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
               : "r"(shared_address(row))
               : "memory");
  return a;
}
// The same, each matrix transposed.
__device__ __forceinline__ FragmentA load_matrices_transposed(const void* row) {
  FragmentA a;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(a.x[0]), "=r"(a.x[1]), "=r"(a.x[2]), "=r"(a.x[3])
               : "r"(shared_address(row))
               : "memory");
  return a;
}
// An 8 x 8 matrix whose row g lane 4g + i holds the elements 2i and 2i+1 of, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(pair));
  return out;
}
// c += a b, FP16 products in FP32.
__device__ __forceinline__ void multiply_add(FragmentC& c, const FragmentA& a, const FragmentB& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};\n"
      : "+f"(c.x[0]), "+f"(c.x[1]), "+f"(c.x[2]), "+f"(c.x[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

// Arrives with release: adds one to a counter in global memory, and returns what it was. What the block's threads wrote
// before a barrier ahead of this is visible to whoever then acquires a higher count.
__device__ __forceinline__ uint32_t arrive_release(uint32_t* counter) {
  uint32_t before;
  asm volatile("atom.add.release.gpu.global.u32 %0, [%1], 1;\n" : "=r"(before) : "l"(counter) : "memory");
  return before;
}
// The same without release: nothing was written that others read.
__device__ __forceinline__ unsigned long long arrive_relaxed(unsigned long long* counter) {
  unsigned long long before;
  asm volatile("atom.add.relaxed.gpu.global.u64 %0, [%1], 1;\n" : "=l"(before) : "l"(counter) : "memory");
  return before;
}
// After arrive_release: what the others wrote before they arrived is visible to this thread, and after a barrier to its
// block.
__device__ __forceinline__ void acquire_fence() { asm volatile("fence.acq_rel.gpu;\n" ::: "memory"); }

// A block's shared memory whose size the launch decides.
#define KVC_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

// x >= 0 toward zero.
__device__ __forceinline__ uint16_t float_to_half_down(float x) { return __half_as_ushort(__float2half_rz(x)); }

}  // namespace kvc
#endif
