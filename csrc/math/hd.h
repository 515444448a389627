// Functions that compile for host and device alike.
#pragma once

#ifdef __CUDACC__
#define VITKD_HD __host__ __device__ __forceinline__
#else
#define VITKD_HD inline
#endif
