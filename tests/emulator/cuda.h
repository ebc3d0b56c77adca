// As much of the driver's interface as the kernels use: tensor maps. The names, and the rules that a map is held to,
// are cuda.h's; only what kernels/tensor_map.cu asks for is there.
#pragma once

#include <cstddef>
#include <cstdint>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };

// A tensor of 16-bit elements in four dimensions, the innermost first, and the box that one copy takes of it.
struct CUtensorMap {
  const char* data;
  uint64_t sizes[4];
  uint64_t strides[4];  // in bytes
  uint32_t box[4];
};

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t dimensions, void* data,
                                       const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (dimensions != 4 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * 2 > 128) return CUDA_ERROR_INVALID_VALUE;  // the width of the swizzle
  *map = {static_cast<const char*>(data), {}, {2}, {}};
  for (unsigned i = 0; i < 4; ++i) {
    if (sizes[i] == 0 || sizes[i] > uint64_t{1} << 32) return CUDA_ERROR_INVALID_VALUE;
    if (box[i] == 0 || box[i] > 256 || element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    map->sizes[i] = sizes[i];
    map->box[i] = box[i];
    if (i == 0) continue;
    if (strides[i - 1] % 16 != 0 || strides[i - 1] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i] = strides[i - 1];
  }
  return CUDA_SUCCESS;
}
