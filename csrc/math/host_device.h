// Functions compiled for the host and, under nvcc, for the device as well.
#pragma once

#if defined(__CUDACC__)
#define RENDSEG_HD __host__ __device__ inline
#else
#define RENDSEG_HD inline
#endif
