// Tensors as the plain views of strided.h, and questions about their layout.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <cstdint>

#include "strided.h"

namespace rendseg {

inline Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return Dtype::kDouble;
    case at::kHalf:
      return Dtype::kHalf;
    case at::kBFloat16:
      return Dtype::kBFloat16;
    default:
      return Dtype::kFloat;
  }
}

inline MapView map_view(const at::Tensor& map /*[N,C,H,W]*/) {
  return {const_cast<void*>(map.const_data_ptr()),
          dtype_of(map.scalar_type()),
          map.size(0),
          map.size(1),
          map.size(2),
          map.size(3),
          map.stride(0),
          map.stride(1),
          map.stride(2),
          map.stride(3)};
}

// To write into: a tensor that shares its memory until it is written gets memory of its own.
inline MapView mutable_map_view(const at::Tensor& map) {
  map.mutable_data_ptr();
  return map_view(map);
}

inline PointsView points_view(const at::Tensor& values /*[N,C,P]*/) {
  return {const_cast<void*>(values.const_data_ptr()),
          dtype_of(values.scalar_type()),
          values.size(0),
          values.size(1),
          values.size(2),
          values.stride(0),
          values.stride(1),
          values.stride(2)};
}

// From one cell to the next in row order, in a map[N,C,H,W] whose cells are equally spaced.
inline int64_t cell_stride(const at::Tensor& map) {
  return map.size(3) > 1 ? map.stride(3) : map.size(2) > 1 ? map.stride(2) : 1;
}

}  // namespace rendseg
