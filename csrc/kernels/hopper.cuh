// What sm_90a has beside the instructions of mma.cuh: bulk tensor copies, barriers in shared memory that they
// complete, and products of a warpgroup (four warps) whose right operand, and if need be left, lies in shared memory.
// Thin names over PTX; the tests' emulator (tests/emulator) has its own.
//
// Operands in shared memory lie as the 128-byte swizzle wants them: panels of 64 elements' width, a row 128 bytes, row
// r's 16-byte chunk c at chunk c ^ (r % 8). A panel begins at a multiple of 1,024 bytes.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "mma.cuh"

#if defined(KVC_EMULATED)
#include "emulated_hopper.h"
#else

namespace kvc {

// The first place from `shared` on where a panel can begin.
__device__ __forceinline__ char* align_for_panels(char* shared) {
  return shared + (1024 - shared_address(shared) % 1024) % 1024;
}

// Barriers: 8 bytes of shared memory each. A phase ends when so many arrivals, and all bytes that were announced, are
// there.
__device__ __forceinline__ void init_barrier(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After init_barrier, before others are told: bulk copies see the barriers.
__device__ __forceinline__ void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }
__device__ __forceinline__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that bulk copies will bring.
__device__ __forceinline__ void arrive_and_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: the first has parity 0.
__device__ __forceinline__ void wait_barrier(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// What this thread stored to shared memory is there for bulk copies and warpgroup products that follow (a barrier).
__device__ __forceinline__ void fence_for_products() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Copies a box of a tensor map (64 elements of one head, so many rows) to a panel in shared memory. Where it reaches
// past an end of the map, zeros.
__device__ __forceinline__ void copy_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int element, int head,
                                         int row, int sequence) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(element), "r"(head), "r"(row), "r"(sequence)
      : "memory");
}

// A barrier of some of a block's threads, a multiple of 32; numbers from 1 to 15.
__device__ __forceinline__ void sync_threads(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// Registers of a warpgroup's threads: a kernel begins with what its launch bounds give it.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// Products of a warpgroup run beside its threads: begin, multiply_add_..., end; wait before a sum is touched.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void end_products() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving what it does to the sums to before the wait.
template <int kBlocks>
__device__ __forceinline__ void hold_products(FragmentC (&c)[kBlocks]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(c[i].x[e])::"memory");
  }
}

// Where an operand begins in shared memory, as wgmma takes it: an address inside a panel, the bytes from one panel to
// the next (for an operand whose rows are the product's depth), and 1,024 from eight rows to the next eight.
__device__ __forceinline__ uint64_t operand_at(const void* shared, int panel_bytes) {
  return static_cast<uint64_t>((shared_address(shared) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(panel_bytes >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | uint64_t{1} << 62;
}
// That operand, so many bytes on.
__device__ __forceinline__ uint64_t operand_after(uint64_t operand, int bytes) {
  return operand + static_cast<uint64_t>(bytes >> 4);
}

// Products: c (64 x 8 kBlocks) = a b, or c += a b. Depth 16. In `rows` a's and b's rows are the product's rows and
// columns (queries, keys). In `columns` a is in registers, and b's rows are the depth (keys of values).
//
// What replaces c has an instruction of its own: else c would be alive, and take registers, before it begins to be. PTX
// names each register of c, so macros spell the lists.

#define KVC_REGISTERS_32                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KVC_REGISTERS_64                                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, " \
  "%21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, " \
  "%59, %60, %61, %62, %63"
#define KVC_BLOCK(access, i) access(c[i].x[0]), access(c[i].x[1]), access(c[i].x[2]), access(c[i].x[3])
#define KVC_BLOCKS_8(access, i)                                                                       \
  KVC_BLOCK(access, i), KVC_BLOCK(access, i + 1), KVC_BLOCK(access, i + 2), KVC_BLOCK(access, i + 3), \
      KVC_BLOCK(access, i + 4), KVC_BLOCK(access, i + 5), KVC_BLOCK(access, i + 6), KVC_BLOCK(access, i + 7)
#define KVC_BLOCKS_16(access, i) KVC_BLOCKS_8(access, i), KVC_BLOCKS_8(access, i + 8)

// `adds`: 0 or 1. `operands`: of a, b and what follows them, by their numbers.
#define KVC_WGMMA(columns, adds, registers, operands)                                      \
  "{\n"                                                                                    \
  ".reg .pred adds;\n"                                                                     \
  "setp.ne.b32 adds, " adds                                                                \
  ", 0;\n"                                                                                 \
  "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.f16.f16 {" registers "}, " operands \
  ";\n"                                                                                    \
  "}\n"

__device__ __forceinline__ void multiply_rows(FragmentC (&c)[8], uint64_t a, uint64_t b) {
  asm volatile(KVC_WGMMA("64", "0", KVC_REGISTERS_32, "%32, %33, adds, 1, 1, 0, 0")
               : KVC_BLOCKS_8("=f", 0)
               : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_add_rows(FragmentC (&c)[8], uint64_t a, uint64_t b) {
  asm volatile(KVC_WGMMA("64", "1", KVC_REGISTERS_32, "%32, %33, adds, 1, 1, 0, 0")
               : KVC_BLOCKS_8("+f", 0)
               : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_columns(FragmentC (&c)[8], const FragmentA& a, uint64_t b) {
  asm volatile(KVC_WGMMA("64", "0", KVC_REGISTERS_32, "{%32, %33, %34, %35}, %36, adds, 1, 1, 1")
               : KVC_BLOCKS_8("=f", 0)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}
__device__ __forceinline__ void multiply_add_columns(FragmentC (&c)[8], const FragmentA& a, uint64_t b) {
  asm volatile(KVC_WGMMA("64", "1", KVC_REGISTERS_32, "{%32, %33, %34, %35}, %36, adds, 1, 1, 1")
               : KVC_BLOCKS_8("+f", 0)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}
__device__ __forceinline__ void multiply_rows(FragmentC (&c)[16], uint64_t a, uint64_t b) {
  asm volatile(KVC_WGMMA("128", "0", KVC_REGISTERS_64, "%64, %65, adds, 1, 1, 0, 0")
               : KVC_BLOCKS_16("=f", 0)
               : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_add_rows(FragmentC (&c)[16], uint64_t a, uint64_t b) {
  asm volatile(KVC_WGMMA("128", "1", KVC_REGISTERS_64, "%64, %65, adds, 1, 1, 0, 0")
               : KVC_BLOCKS_16("+f", 0)
               : "l"(a), "l"(b));
}
__device__ __forceinline__ void multiply_columns(FragmentC (&c)[16], const FragmentA& a, uint64_t b) {
  asm volatile(KVC_WGMMA("128", "0", KVC_REGISTERS_64, "{%64, %65, %66, %67}, %68, adds, 1, 1, 1")
               : KVC_BLOCKS_16("=f", 0)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}
__device__ __forceinline__ void multiply_add_columns(FragmentC (&c)[16], const FragmentA& a, uint64_t b) {
  asm volatile(KVC_WGMMA("128", "1", KVC_REGISTERS_64, "{%64, %65, %66, %67}, %68, adds, 1, 1, 1")
               : KVC_BLOCKS_16("+f", 0)
               : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "l"(b));
}

#undef KVC_REGISTERS_32
#undef KVC_REGISTERS_64
#undef KVC_BLOCK
#undef KVC_BLOCKS_8
#undef KVC_BLOCKS_16
#undef KVC_WGMMA

template <int kBlocks>
__device__ __forceinline__ void multiply_add_rows(FragmentC (&c)[kBlocks], uint64_t a, uint64_t b, bool adds) {
  adds ? multiply_add_rows(c, a, b) : multiply_rows(c, a, b);
}
template <int kBlocks>
__device__ __forceinline__ void multiply_add_columns(FragmentC (&c)[kBlocks], const FragmentA& a, uint64_t b,
                                                     bool adds) {
  adds ? multiply_add_columns(c, a, b) : multiply_columns(c, a, b);
}

}  // namespace kvc
#endif
