// The running two largest logits of a cell, and the margin between them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "host_device.h"

namespace rendseg {

// The larger and the smaller of two. A NaN is passed over by one or the other; which, does not matter here.
RENDSEG_HD float larger_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
RENDSEG_HD float smaller_of(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}
RENDSEG_HD double larger_of(double a, double b) { return a > b ? a : b; }
RENDSEG_HD double smaller_of(double a, double b) { return a < b ? a : b; }

// The larger of two, NaN where either is.
RENDSEG_HD float larger_or_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a > b || a != a ? a : b;
#endif
}
RENDSEG_HD double larger_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Distance from zero: the margin of a single channel.
RENDSEG_HD float magnitude(float value) { return fabsf(value); }
RENDSEG_HD double magnitude(double value) { return fabs(value); }

// `A` is float, or double for float64 logits. Once a NaN was seen `first` stays NaN, and so is the margin.
template <typename A>
struct TopTwo {
  A first = -std::numeric_limits<A>::infinity();
  A second = -std::numeric_limits<A>::infinity();

  RENDSEG_HD void add(A value) {
    second = larger_of(second, smaller_of(value, first));
    first = larger_or_nan(value, first);
  }
  // What another one has seen.
  RENDSEG_HD void add(const TopTwo& other) {
    second = larger_of(larger_of(second, other.second), smaller_of(first, other.first));
    first = larger_or_nan(first, other.first);
  }
  // >= 0, or NaN also where both are the same infinity. `single`: of one value, its magnitude.
  RENDSEG_HD float margin(bool single) const { return static_cast<float>(single ? magnitude(first) : first - second); }
};

// The same with the channel of the largest: the first of equals, the first NaN where there is one, as torch.argmax.
template <typename A>
struct TopTwoLabel {
  TopTwo<A> top;
  int32_t label = 0;

  RENDSEG_HD void add(A value, int32_t channel) {
    if (top.first == top.first && !(value <= top.first)) label = channel;
    top.add(value);
  }
};

}  // namespace rendseg
