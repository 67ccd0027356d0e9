// RENDSEG_HD marks arithmetic shared by the CPU and the CUDA kernels. No Torch headers in csrc/math.
#pragma once

#if defined(__CUDACC__)
#define RENDSEG_HD __host__ __device__ inline
#else
#define RENDSEG_HD inline
#endif
