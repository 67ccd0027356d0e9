// What the host side of refine hands to the kernels of each instruction set.
#pragma once

#include <c10/core/ScalarType.h>

#include <cstdint>

namespace rendseg {

// y = x W^T + b, then a ReLU; `panels` as in refine_kernels.h, padded with zeros, `bias` padded likewise.
struct MlpLayer {
  const void* panels;
  const void* bias;
  int64_t in, out;
  bool relu;
  c10::ScalarType rounding;  // the dtype of the head: halves are rounded after each layer
};

// Points of one block: a multiple of the rows of every instruction set.
constexpr int64_t kMlpPoints = 96;

}  // namespace rendseg
