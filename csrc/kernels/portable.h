// What lets a header be read by nvcc and by a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define KVC_HD __host__ __device__ __forceinline__
#else
#define KVC_HD inline
#endif
