// Targets of masks as plain views, without Torch headers: the element types they have, and one value at a point.
#pragma once

#include <cstdint>

#include "math/bilinear.h"
#include "math/host_device.h"

namespace rendseg {

enum class MaskDtype : int32_t { kUint8, kInt8, kInt16, kInt32, kInt64, kHalf, kBFloat16, kFloat, kDouble };

// targets[T,h,w] of one image; bool is read as uint8. Coordinates refer to the canvas, whose cells beyond the target
// are zero.
struct MaskView {
  const void* data = nullptr;
  MaskDtype dtype = MaskDtype::kUint8;
  int32_t height = 0, width = 0, canvas_height = 0, canvas_width = 0;
  int64_t count = 0, stride_t = 0, stride_y = 0, stride_x = 0;

  template <typename T>
  RENDSEG_HD const T* mask(int64_t t) const {
    return static_cast<const T*>(data) + t * stride_t;
  }
};

struct MaskOptions {
  bool nearest;  // of targets; logits are bilinear
  bool border;
};

// f.operator()<T>() with the C++ type of the elements.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <typename Half, typename BFloat16, typename F>
RENDSEG_HD void with_mask_dtype(MaskDtype dtype, F&& f) {
  switch (dtype) {
    case MaskDtype::kUint8:
      return f.template operator()<uint8_t>();
    case MaskDtype::kInt8:
      return f.template operator()<int8_t>();
    case MaskDtype::kInt16:
      return f.template operator()<int16_t>();
    case MaskDtype::kInt32:
      return f.template operator()<int32_t>();
    case MaskDtype::kInt64:
      return f.template operator()<int64_t>();
    case MaskDtype::kHalf:
      return f.template operator()<Half>();
    case MaskDtype::kBFloat16:
      return f.template operator()<BFloat16>();
    case MaskDtype::kFloat:
      return f.template operator()<float>();
    case MaskDtype::kDouble:
      return f.template operator()<double>();
  }
}

// What the losses of a pair are made of.
template <typename A>
struct MaskSums {
  A entropy = 0;  // of softplus(x) - x y
  A overlap = 0;  // of s y, with s = sigmoid(x)
  A sigmoid = 0;  // of s
  A target = 0;   // of y

  RENDSEG_HD A cross_entropy(int64_t points) const { return points > 0 ? entropy / static_cast<A>(points) : A(0); }
  RENDSEG_HD A dice() const { return A(1) - (A(2) * overlap + A(1)) / (sigmoid + target + A(1)); }
};

// d loss / dx of a point is sure * (s - y) + s (1 - s) (flat - steep * y).
template <typename A>
struct MaskSlope {
  A sure, flat, steep;

  RENDSEG_HD A operator()(A s, A y) const { return sure * (s - y) + s * (A(1) - s) * (flat - steep * y); }
};

template <typename A>
RENDSEG_HD MaskSlope<A> mask_slope(const MaskSums<A>& sums, int64_t points, A cross_entropy_grad, A dice_grad) {
  const A size = sums.sigmoid + sums.target + A(1);
  const A steep = A(2) * dice_grad / size;
  return {cross_entropy_grad / static_cast<A>(points), steep * (sums.overlap + A(0.5)) / size, steep};
}

}  // namespace rendseg
