// What lets a header be read by nvcc and by a plain C++ compiler.
#pragma once

#if defined(__CUDACC__)
#define KVC_HD __host__ __device__ __forceinline__
#define KVC_HD_CALL inline __host__ __device__ __noinline__  // a function of its own: rare code, out of the way
#else
#define KVC_HD inline
#define KVC_HD_CALL inline
#endif
