// Element types and strided views, the same for every op on the CPU and on the GPU: plain data without Torch headers,
// which kernels take by value. Strides are in elements. strided_tensors.h makes them from tensors.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace rendseg {

enum class Dtype : int32_t { kFloat, kDouble, kHalf, kBFloat16 };

RENDSEG_HD constexpr int64_t element_size(Dtype dtype) {
  return dtype == Dtype::kDouble ? 8 : dtype == Dtype::kFloat ? 4 : 2;
}

// The switch over dtypes: f.operator()<T>() with the C++ type of `dtype`. Host and device have types of their own for
// the two halves.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename Half, typename BFloat16, typename F>
RENDSEG_HD decltype(auto) with_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kDouble:
      return f.template operator()<double>();
    case Dtype::kHalf:
      return f.template operator()<Half>();
    case Dtype::kBFloat16:
      return f.template operator()<BFloat16>();
    default:
      return f.template operator()<float>();
  }
}

// map[N,C,H,W]. What only reads it takes `at<const T>`.
struct MapView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t images = 0, channels = 0, height = 0, width = 0;
  int64_t stride_n = 0, stride_c = 0, stride_y = 0, stride_x = 0;

  template <typename T>
  RENDSEG_HD T* at(int64_t n, int64_t c = 0, int64_t y = 0, int64_t x = 0) const {
    return static_cast<T*>(data) + n * stride_n + c * stride_c + y * stride_y + x * stride_x;
  }
  RENDSEG_HD MapView image(int64_t n) const {
    MapView one = *this;
    one.data = static_cast<char*>(data) + n * stride_n * element_size(dtype);
    one.images = 1;
    return one;
  }
  RENDSEG_HD int64_t cells() const { return height * width; }
  // Whether an index of a cell in row order, times stride_x, is its offset.
  RENDSEG_HD bool flat() const { return stride_y == width * stride_x; }
};

// values[N,C,P]: of points, or of the cells of a map in row order.
struct PointsView {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat;
  int64_t images = 0, channels = 0, points = 0;
  int64_t stride_n = 0, stride_c = 0, stride_p = 0;

  template <typename T>
  RENDSEG_HD T* at(int64_t n, int64_t c = 0, int64_t p = 0) const {
    return static_cast<T*>(data) + n * stride_n + c * stride_c + p * stride_p;
  }
};

}  // namespace rendseg
