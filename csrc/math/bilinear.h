// Where a point of [0, 1]^2 falls on an H x W grid: the arithmetic of F.grid_sample(map, 2 * coords - 1), operation by
// operation. Every operation is rounded (PyTorch may fuse the last product and difference, a difference of one ulp).
#pragma once

#include <cmath>
#include <cstdint>

#include "host_device.h"

namespace rendseg {

// A product that is rounded before it is added to: nvcc would otherwise contract it.
RENDSEG_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
RENDSEG_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// Position along one axis in cells; the centre of cell i is at i.
template <typename A>
RENDSEG_HD A cell_position(A coord, int32_t size, bool align_corners) {
  const A from_corner = (A(2) * coord - A(1)) + A(1);
  return align_corners ? from_corner * (A(size - 1) / A(2)) : rounded_product(from_corner, A(size) / A(2)) - A(0.5);
}

// Border padding: into [0, size - 1]; NaN goes to 0.
template <typename A>
RENDSEG_HD A clip_position(A position, int32_t size) {
  const A low = position > A(0) ? position : A(0);
  return low < A(size - 1) ? low : A(size - 1);
}

// The two neighbours of a position along one axis: cells `cell` and `cell + 1`.
template <typename A>
struct AxisTaps {
  int32_t cell;      // -2 when neither neighbour lies on the map, as for NaN and far positions
  A near, far;       // weights of `cell` and `cell + 1`
  int32_t has_near;  // whether each neighbour lies on the map
  int32_t has_far;
};

template <typename A>
RENDSEG_HD AxisTaps<A> axis_taps(A coord, int32_t size, bool border, bool align_corners) {
  A position = cell_position(coord, size, align_corners);
  if (border) position = clip_position(position, size);
  const A floor = std::floor(position);
  AxisTaps<A> taps;
  taps.far = position - floor;
  taps.near = A(1) - taps.far;
  taps.has_near = (floor >= A(0)) & (floor < A(size));
  taps.has_far = (floor >= A(-1)) & (floor < A(size - 1));
  // The conversion is only made of numbers that fit: a wild coordinate has no neighbour.
  taps.cell = static_cast<int32_t>((taps.has_near | taps.has_far) ? floor : A(-2));
  return taps;
}

// Nearest cell along one axis, halves to even; -2 when it is off the map.
template <typename A>
RENDSEG_HD int32_t nearest_cell(A coord, int32_t size, bool border, bool align_corners) {
  A position = cell_position(coord, size, align_corners);
  if (border) position = clip_position(position, size);
  const A nearest = std::nearbyint(position);
  return static_cast<int32_t>(((nearest >= A(0)) & (nearest < A(size))) ? nearest : A(-2));
}

// d position / d coord, zero where border padding clipped.
template <typename A>
RENDSEG_HD A position_slope(A coord, int32_t size, bool border, bool align_corners) {
  const A slope = align_corners ? A(size - 1) : A(size);
  if (!border) return slope;
  const A position = cell_position(coord, size, align_corners);
  return (position > A(0) && position < A(size - 1)) ? slope : A(0);
}

// The cell along one axis that holds a coordinate: [i / size, (i + 1) / size), the last one closed; -1 outside [0, 1]
// and for NaN. The product is exact in double for float coordinates.
template <typename A>
RENDSEG_HD int64_t holding_cell(A coord, int64_t size) {
  if (!(coord >= A(0) && coord <= A(1))) return -1;
  const int64_t cell = static_cast<int64_t>(static_cast<double>(coord) * static_cast<double>(size));
  return cell < size ? cell : size - 1;
}

}  // namespace rendseg
