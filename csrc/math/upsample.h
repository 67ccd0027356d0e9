// Taps of bilinear upsampling by an integer factor along one axis: those of F.interpolate, with the position in exact
// integer arithmetic (for a factor of two the weights are 1/4 and 3/4) and rounded once.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace rendseg {

template <typename T>
struct UpsampleTap {
  int64_t lower;
  int64_t upper;
  T lower_weight;
  T upper_weight;
};

// Output cell `out_index` of `in_size * scale`. Cell centres lie at (2*out + 1) / (2*scale) - 1/2, clamped at the lower
// border; with align_corners the outer centres coincide. The upper neighbour is clamped at the upper border; at a
// factor of one a cell has no other neighbour than itself, which matters where the next one is infinite (0 * inf is
// NaN).
template <typename T>
RENDSEG_HD UpsampleTap<T> upsample_tap(int64_t out_index, int64_t in_size, int64_t scale, bool align_corners) {
  const int64_t out_size = in_size * scale;
  int64_t numerator, denominator;
  if (align_corners) {
    numerator = out_size > 1 ? out_index * (in_size - 1) : 0;
    denominator = out_size > 1 ? out_size - 1 : 1;
  } else {
    numerator = 2 * out_index + 1 - scale;
    if (numerator < 0) numerator = 0;
    denominator = 2 * scale;
  }
  const int64_t lower = numerator / denominator;
  const T fraction = static_cast<T>(numerator - lower * denominator) / static_cast<T>(denominator);
  return {lower, lower < in_size - 1 && scale > 1 ? lower + 1 : lower, T(1) - fraction, fraction};
}

}  // namespace rendseg
