// Tensor maps: what bulk copies (copy_box of hopper.cuh) know of the cache in memory. Host code.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "params.h"

namespace kvc {

// Whether the driver makes tensor maps (CUDA 12 and newer do), and this cache keeps within their limits.
bool tensor_maps_serve(const CacheView& cache);

// The keys or values (`data`: cache.k_cache or cache.v_cache) of one layer in four dimensions, [B, N, H, D]. A box has
// 64 elements of one head, `rows` positions and one sequence, swizzled over 128 bytes. `rows` is at most 256.
//
// Gives an error where tensor_maps_serve says no. Takes some 100 ns, and no memory but `map`.
cudaError_t make_tensor_map(CUtensorMap* map, const CacheView& cache, const uint16_t* data, int64_t layer, int rows);

}  // namespace kvc
