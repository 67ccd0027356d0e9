// Qualifier of the arithmetic that the CPU and the CUDA kernels share. Headers of csrc/math/ include no Torch header.
#pragma once

#if defined(__CUDACC__)
#define RENDSEG_HD __host__ __device__ inline
#else
#define RENDSEG_HD inline
#endif
