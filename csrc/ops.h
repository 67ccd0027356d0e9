// Host functions of every op, one block per op file.
#pragma once

#include <ATen/core/Tensor.h>

namespace rendseg {

// Instruction sets of the CPU kernels, in rising order; see cpu/isa.h.
enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

}  // namespace rendseg
