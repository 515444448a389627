// Functions that compile for host and device alike.
#pragma once

#ifdef __CUDACC__
#define VITKD_HD __host__ __device__ __forceinline__
#define VITKD_HD_INLINE VITKD_HD
#else
#define VITKD_HD inline
// where a call would pass registers through memory
#define VITKD_HD_INLINE inline __attribute__((always_inline))
#endif
