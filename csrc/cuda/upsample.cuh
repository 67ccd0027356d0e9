// Bilinear upsampling by a whole factor: what subdivide, its labels and refine share.
//
// All kernels interpolate with the same few operations in the same order (along x, then along y, then one rounding to
// the stored dtype; mix() or mix_quarter(), by the factor), so logits, labels and keys agree bit for bit whichever
// kernel made them.
#pragma once

#include "device.cuh"

#include "../math/bilinear.h"
#include "../math/upsample.h"

namespace rendseg::subdivision {

// Weighted mean of the nearer and the farther neighbour, every operation rounded, as on the CPU.
template <typename A>
__device__ inline A mix(A near, A far, A near_weight, A far_weight) {
  return rounded_product(near, near_weight) + rounded_product(far, far_weight);
}

// The same where the far weight is 1/4 (or 0, or both neighbours are the same): that product is exact, so it need not
// be rounded. (Except numbers below 2^-124, of which it drops bits.)
__device__ inline float mix_quarter(float near, float far, float near_weight, float far_weight) {
  return fmaf(far, far_weight, near * near_weight);
}
__device__ inline double mix_quarter(double near, double far, double near_weight, double far_weight) {
  return fma(far, far_weight, near * near_weight);
}

// The value as it is stored, in the type of arithmetic.
template <typename T>
__device__ inline Acc<T> as_stored(Acc<T> value) {
  return widen(narrow<T>(value));
}

// The two source cells of an output cell along one axis.
template <typename A>
struct Neighbours {
  int32_t near, far;
  A near_weight, far_weight;
};

// The value between four source cells (near and far in x of the nearer row, then of the farther row), not yet rounded
// to the stored dtype. `quarters`: the factor is two, without aligned corners.
template <typename A>
__device__ inline A interpolate(const A (&corner)[4], const Neighbours<A>& y, const Neighbours<A>& x, bool quarters) {
  const auto mixed = [&](A near, A far, const Neighbours<A>& at) {
    return quarters ? mix_quarter(near, far, at.near_weight, at.far_weight)
                    : mix(near, far, at.near_weight, at.far_weight);
  };
  return mixed(mixed(corner[0], corner[1], x), mixed(corner[2], corner[3], x), y);
}

template <typename A>
__device__ inline Neighbours<A> neighbours(int64_t output, int64_t size, int64_t scale, bool align_corners) {
  const UpsampleTap<A> tap = upsample_tap<A>(output, size, scale, align_corners);
  const int32_t lower = static_cast<int32_t>(tap.lower), upper = static_cast<int32_t>(tap.upper);
  return tap.upper_weight > tap.lower_weight ? Neighbours<A>{upper, lower, tap.upper_weight, tap.lower_weight}
                                             : Neighbours<A>{lower, upper, tap.lower_weight, tap.upper_weight};
}

// The common case, a factor of two without aligned corners, goes by gaps. Along one axis of 3 source cells and 6
// outputs,
//
//   source cell              0               1               2
//   output               0       1       2       3       4       5
//   gap      |----- -1 ------|------ 0 ------|------ 1 ------|------ 2 ------|
//
// a gap lies between the source cells `low` = gap and `high` = gap + 1. Its outputs, the first 2 gap + 1 and the second
// 2 gap + 2, take 3/4 of the nearer cell and 1/4 of the farther one. Gaps run from -1 to size - 1, so there is
// one more of them than source cells: gap -1 has the second output alone, gap size - 1 the first alone. Those are the
// taps of upsample_tap(), borders included: the first output of all has the weights 1 and 0, the last one twice the
// same neighbour. In two dimensions a gap holds 2 x 2 outputs, which share their four source cells.
template <typename A>
struct Gap {
  int32_t low, high;          // source cells
  A near_weight, far_weight;  // of the second output; the first has kNear and kFar
  bool has_first, has_second;
  static constexpr A kNear = A(0.75), kFar = A(0.25);

  __device__ Gap(int32_t gap, int32_t size)
      : low(gap >= 0 ? gap : (size > 1 ? 1 : 0)),
        high(gap + 1 < size ? gap + 1 : size - 1),
        near_weight(gap >= 0 ? kNear : A(1)),
        far_weight(gap >= 0 ? kFar : A(0)),
        has_first(gap >= 0),
        has_second(gap + 1 < size) {}

  __device__ A first(A at_low, A at_high) const { return mix_quarter(at_low, at_high, kNear, kFar); }
  __device__ A second(A at_low, A at_high) const { return mix_quarter(at_high, at_low, near_weight, far_weight); }
};

template <typename Args>
__host__ __device__ bool by_gaps(const Args& a) {
  return a.scale == 2 && !a.align_corners;
}

// Outputs that share their four source cells: the 2x2 in a gap, or else a single one.
template <typename A, bool kGaps>
struct Unit;

template <typename A>
struct Unit<A, true> {
  static constexpr int kOutputs = 4;
  int32_t row, column;  // of the first output, which may lie outside the map
  Gap<A> y, x;

  template <typename Args>
  __device__ Unit(const Args& a, int64_t unit_row, int64_t unit_column)
      : row(static_cast<int32_t>(2 * unit_row - 1)),
        column(static_cast<int32_t>(2 * unit_column - 1)),
        y(static_cast<int32_t>(unit_row - 1), static_cast<int32_t>(a.h)),
        x(static_cast<int32_t>(unit_column - 1), static_cast<int32_t>(a.w)) {}

  // Source cell of corner i = 0 .. 3, as an offset in cells; like that of an output, below 2^32.
  __device__ uint32_t corner(int i, int64_t w) const {
    return static_cast<uint32_t>(i < 2 ? y.low : y.high) * static_cast<uint32_t>(w) +
           static_cast<uint32_t>(i % 2 == 0 ? x.low : x.high);
  }
  __device__ void values(const A (&corner)[4], A (&out)[4]) const {
    const A left_low = x.first(corner[0], corner[1]), left_high = x.first(corner[2], corner[3]);
    const A right_low = x.second(corner[0], corner[1]), right_high = x.second(corner[2], corner[3]);
    out[0] = y.first(left_low, left_high), out[1] = y.first(right_low, right_high);
    out[2] = y.second(left_low, left_high), out[3] = y.second(right_low, right_high);
  }
  __device__ bool has(int i) const {
    return (i < 2 ? y.has_first : y.has_second) && (i % 2 == 0 ? x.has_first : x.has_second);
  }
  __device__ uint32_t output(int i, int64_t width) const {
    return static_cast<uint32_t>(row + i / 2) * static_cast<uint32_t>(width) + static_cast<uint32_t>(column + i % 2);
  }
};

template <typename A, bool kQuarters>
struct SingleUnit {
  static constexpr int kOutputs = 1;
  uint32_t row, column;
  Neighbours<A> y, x;

  template <typename Args>
  __device__ SingleUnit(const Args& a, int64_t unit_row, int64_t unit_column)
      : row(static_cast<uint32_t>(unit_row)),
        column(static_cast<uint32_t>(unit_column)),
        y(neighbours<A>(unit_row, a.h, a.scale, a.align_corners)),
        x(neighbours<A>(unit_column, a.w, a.scale, a.align_corners)) {}

  __device__ uint32_t corner(int i, int64_t w) const {
    return static_cast<uint32_t>(i < 2 ? y.near : y.far) * static_cast<uint32_t>(w) +
           static_cast<uint32_t>(i % 2 == 0 ? x.near : x.far);
  }
  __device__ void values(const A (&corner)[4], A (&out)[1]) const { out[0] = interpolate(corner, y, x, kQuarters); }
  __device__ bool has(int) const { return true; }
  __device__ uint32_t output(int, int64_t width) const { return row * static_cast<uint32_t>(width) + column; }
};

template <typename A>
struct Unit<A, false> : SingleUnit<A, false> {
  using SingleUnit<A, false>::SingleUnit;
};

// Units along an axis of `size` source cells.
template <typename Args>
int64_t units_along(const Args& a, int64_t size) {
  return by_gaps(a) ? size + 1 : size * a.scale;
}

}  // namespace rendseg::subdivision
