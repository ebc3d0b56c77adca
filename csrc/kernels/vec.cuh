// Several elements moved by one memory instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "convert.h"
#include "params.h"

// A GPU faults on a misaligned access. The tests' emulator of one (tests/emulator) puts its own check here.
#if !defined(KVC_CHECK_ALIGNMENT)
#define KVC_CHECK_ALIGNMENT(address, bytes)
#endif

namespace kvc {

// N elements moved as packets of at most 16 bytes (2, 4, 8 or 16); the address must be a multiple of a packet's size.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T x[N];
};

template <typename T, int N>
__device__ __forceinline__ Vec<T, N> load(const T* address) {
  KVC_CHECK_ALIGNMENT(address, alignof(Vec<T, N>));
  return *reinterpret_cast<const Vec<T, N>*>(address);
}

template <typename T, int N>
__device__ __forceinline__ void store(T* address, const Vec<T, N>& v) {
  KVC_CHECK_ALIGNMENT(address, alignof(Vec<T, N>));
  *reinterpret_cast<Vec<T, N>*>(address) = v;
}

// 16 bytes that are read once: the first to make room in the caches.
__device__ __forceinline__ Vec<uint32_t, 4> load_streaming(const void* address) {
  KVC_CHECK_ALIGNMENT(address, 16);
#if defined(KVC_EMULATED)
  return *static_cast<const Vec<uint32_t, 4>*>(address);
#else
  const uint4 x = __ldcs(static_cast<const uint4*>(address));
  return {x.x, x.y, x.z, x.w};
#endif
}

// What a thread that copies moves at a time: 8 elements, or 1 where nothing is aligned. It is one number, as a compiler
// takes a struct that waits in registers apart and stores it in pieces.
template <int kVector>
struct PacketOf {
  using Type = unsigned __int128;
};
template <>
struct PacketOf<1> {
  using Type = uint16_t;
};

template <typename Packet>
__device__ __forceinline__ Packet* packet_at(uint16_t* address) {
  KVC_CHECK_ALIGNMENT(address, sizeof(Packet));
  return reinterpret_cast<Packet*>(address);
}

// What is stored is not read again: the first to leave the caches.
__device__ __forceinline__ void store_packet(uint16_t* address, uint16_t x) { *address = x; }
__device__ __forceinline__ void store_packet(unsigned __int128* address, unsigned __int128 x) {
#if defined(KVC_EMULATED)
  *address = x;
#else
  const auto high = static_cast<uint64_t>(x >> 64);
  const auto low = static_cast<uint64_t>(x);
  asm volatile("st.global.cs.v2.b64 [%0], {%1, %2};" ::"l"(address), "l"(low), "l"(high) : "memory");
#endif
}

// Element types as the kernels see them. FP16 and BF16 are both 16 bits, so each is a type of its own.
template <DType>
struct Element;
template <>
struct Element<DType::f32> {
  using Type = float;
  static __device__ __forceinline__ float to_float(float x) { return x; }
  static __device__ __forceinline__ float from_half(uint16_t h) { return half_to_float(h); }
};
template <>
struct Element<DType::bf16> {
  using Type = uint16_t;
  static __device__ __forceinline__ float to_float(uint16_t b) { return bf16_to_float(b); }
  static __device__ __forceinline__ uint16_t from_half(uint16_t h) { return float_to_bf16(half_to_float(h)); }
};
template <>
struct Element<DType::f16> {
  using Type = uint16_t;
  static __device__ __forceinline__ uint16_t from_half(uint16_t h) { return h; }
};

// The vector for gathering: 16 bytes on the wider side, whose stores want to be whole sectors. (Appending, whose wider
// side is loaded, takes eight elements: two 16-byte loads and one store, faster on an H200.)
template <DType T>
constexpr int kVectorOf = 16 / (dtype_size(T) > 2 ? dtype_size(T) : 2);

}  // namespace kvc
