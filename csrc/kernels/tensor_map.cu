#include "launch.h"
#include "tensor_map.h"

namespace kvc {

#if defined(KVC_WITH_SM90A)
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or null. It is asked for at run time, so that nothing has to be linked with libcuda, which
// machines without a GPU do not have.
Encode find_encode() {
#if defined(KVC_EMULATED)
  return &cuTensorMapEncodeTiled;
#else
  constexpr char kName[] = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
  if (error == cudaSuccess && result == cudaDriverEntryPointSuccess) return reinterpret_cast<Encode>(found);
  (void)cudaGetLastError();  // it is no error of the launch that follows
  return nullptr;
#endif
}

Encode encode() {
  static const Encode found = find_encode();
  return found;
}

constexpr int64_t kMostSize = int64_t{1} << 32;         // of a dimension
constexpr int64_t kMostStrideBytes = int64_t{1} << 40;  // less than this

// In bytes. A product that is too large for 64 bits is none of a cache that is in memory.
struct Strides {
  int64_t head;
  int64_t position;
  int64_t sequence;

  explicit Strides(const CacheView& cache)
      : head(cache.head_dim * 2), position(cache.heads * head), sequence(cache.positions * position) {}
};

}  // namespace

bool tensor_maps_serve(const CacheView& cache) {
  if (encode() == nullptr) return false;
  for (const int64_t size : {cache.head_dim, cache.heads, cache.positions, cache.batch}) {
    if (size < 1 || size > kMostSize) return false;
  }
  const Strides strides(cache);
  for (const int64_t stride : {strides.head, strides.position, strides.sequence}) {
    if (stride % 16 != 0 || stride >= kMostStrideBytes) return false;
  }
  const uintptr_t begins = reinterpret_cast<uintptr_t>(cache.k_cache) | reinterpret_cast<uintptr_t>(cache.v_cache);
  return begins % 16 == 0;
}

cudaError_t make_tensor_map(CUtensorMap* map, const CacheView& cache, const uint16_t* data, int64_t layer, int rows) {
  if (!tensor_maps_serve(cache)) return cudaErrorNotSupported;
  const Strides strides(cache);
  const uint16_t* const begin = data + layer * cache.batch * (strides.sequence / 2);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(cache.head_dim), static_cast<cuuint64_t>(cache.heads),
                              static_cast<cuuint64_t>(cache.positions), static_cast<cuuint64_t>(cache.batch)};
  const cuuint64_t bytes[] = {static_cast<cuuint64_t>(strides.head), static_cast<cuuint64_t>(strides.position),
                              static_cast<cuuint64_t>(strides.sequence)};
  const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(rows), 1};
  const cuuint32_t every[] = {1, 1, 1, 1};
  const CUresult result = encode()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<uint16_t*>(begin), sizes, bytes,
                                   box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                   CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

#else  // a build without code that would use them

bool tensor_maps_serve(const CacheView&) { return false; }

cudaError_t make_tensor_map(CUtensorMap*, const CacheView&, const uint16_t*, int64_t, int) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace kvc
