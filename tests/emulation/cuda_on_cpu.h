// Enough of CUDA to compile a kernel of csrc/cuda/*.cuh with g++ and run its threads one after the other. For kernels
// whose threads do not talk to each other (no shared memory, no barriers).
#pragma once

#include <cstdint>

#define __global__
#define __device__
#define __host__

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline Dim3 gridDim, blockDim, blockIdx, threadIdx;

// Runs `kernel()` for every thread of a 1-D grid; backwards, so that a result that depends on the order differs.
template <typename F>
void launch(unsigned blocks, unsigned threads, F kernel) {
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned b = blocks; b-- > 0;) {
    for (unsigned t = threads; t-- > 0;) {
      blockIdx.x = b;
      threadIdx.x = t;
      kernel();
    }
  }
}
