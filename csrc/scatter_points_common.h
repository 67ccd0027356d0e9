// What the CPU and the CUDA scatter_points share: argument checks, and dispatch on the width of an element (values are
// moved as bits, never computed with).
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>

#include "checks.h"

namespace rendseg {

// indices[N,P] of map[N,C,H,W]. Whether they lie in [0, H*W) is looked at on the CPU and asserted on the device.
inline void check_indices(const at::Tensor& indices, const at::Tensor& map, const char* map_name) {
  check_strided(indices, "indices");
  TORCH_CHECK_TYPE(indices.scalar_type() == at::kLong, "indices must be int64, got ", indices.scalar_type());
  TORCH_CHECK_VALUE(indices.dim() == 2 && indices.size(0) == map.size(0),
                    "indices must have shape [N, P] with N = ", map.size(0), " as in ", map_name, ", got ",
                    indices.sizes());
  check_same_device(indices, "indices", map, map_name);
}

// logits[N,C,H,W], indices[N,P], values[N,C,P].
inline void check_scatter(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  check_logits(logits);
  check_indices(indices, logits, "logits");
  check_strided(values, "values");
  TORCH_CHECK_VALUE(values.dim() == 3 && values.size(0) == logits.size(0) && values.size(1) == logits.size(1) &&
                        values.size(2) == indices.size(1),
                    "values must have shape [N, C, P] = [", logits.size(0), ", ", logits.size(1), ", ", indices.size(1),
                    "] as in logits and indices, got ", values.sizes());
  TORCH_CHECK_TYPE(values.scalar_type() == logits.scalar_type(), "values must have the dtype of logits (",
                   logits.scalar_type(), "), got ", values.scalar_type());
  check_same_device(values, "values", logits, "logits");
}

// f(zero of the unsigned type as wide as an element).
template <typename F>
void with_bits(int64_t element_size, F&& f) {
  switch (element_size) {
    case 2:
      return f(uint16_t{});
    case 8:
      return f(uint64_t{});
    default:
      return f(uint32_t{});
  }
}

}  // namespace rendseg
