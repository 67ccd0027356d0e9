// What every CUDA launch shares. Lean on purpose: no torch/extension.h and no ATen/cuda/CUDAContext.h, whose cuBLAS and
// cuSPARSE headers a small toolkit lacks.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <algorithm>
#include <cstdint>

namespace rendseg {

constexpr int kThreads = 256;

// Blocks of a grid-stride loop over `total` items: enough to fill any GPU, far from any grid limit.
inline unsigned blocks_for(int64_t total) {
  return static_cast<unsigned>(std::min<int64_t>((total + kThreads - 1) / kThreads, int64_t{1} << 16));
}

}  // namespace rendseg
