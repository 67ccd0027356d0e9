// Kernels of mask_losses and mask_costs. Compiled once per instruction set, see compile_kernels.h.
//
// A mask of logits is copied into a plane of the type of the arithmetic with a frame of zeros, which stays in the
// second-level cache; every point then reads two pairs of neighbours and needs no test. Where a mask has many more
// cells than there are points, the points are read from where they lie. `A` is float, or double for float64 logits.
#ifndef RENDSEG_ISA

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../mask_views.h"
#include "../math/bilinear.h"

namespace rendseg {

constexpr int64_t kMaskBlock = 512;  // points whose values are made together, a multiple of every vector

// Where `count` points lie on a grid: the cell of the north-west tap, from -1 on, and the weights of the four taps. A
// point without a tap on the grid is put below its last row. Nearest: the cell alone, (0, height + 1) off the grid.
template <typename A>
struct MaskSpots {
  int32_t *x, *y;
  A* weight[4];

  MaskSpots from(int64_t i) const {
    return {x + i, y + i, {weight[0] + i, weight[1] + i, weight[2] + i, weight[3] + i}};
  }
};

// A plane of logits with a frame of zeros: cell (y, x) is at (y + 1) * pitch + x + 1.
struct MaskFrame {
  int64_t height = 0, width = 0;
  int64_t pitch() const { return width + 2; }
  int64_t size() const { return (height + 4) * pitch(); }  // with the rows of points that are off the map
};

// The sums over the points of one pair or one query, in double whatever the arithmetic.
struct QuerySums {
  double softplus = 0, sigmoid = 0;
};

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

template <typename A, bool kBorder>
void mask_spots_of(const A* xy, int64_t count, int32_t height, int32_t width, const MaskSpots<A>& spots) {
  constexpr int64_t kPart = 64;
  A cx[kPart], cy[kPart];
  for (int64_t start = 0; start < count; start += kPart) {
    const int64_t n = count - start < kPart ? count - start : kPart;
    for (int64_t i = 0; i < n; ++i) {
      cx[i] = xy[2 * (start + i)];
      cy[i] = xy[2 * (start + i) + 1];
    }
    const MaskSpots<A> to = spots.from(start);
    int32_t* __restrict to_x = to.x;
    int32_t* __restrict to_y = to.y;
    A* __restrict nw = to.weight[0], * __restrict ne = to.weight[1];
    A* __restrict sw = to.weight[2], * __restrict se = to.weight[3];
    for (int64_t i = 0; i < n; ++i) {
      const AxisTaps<A> x = axis_taps(cx[i], width, kBorder, false);
      const AxisTaps<A> y = axis_taps(cy[i], height, kBorder, false);
      const int32_t found = (x.has_near | x.has_far) & (y.has_near | y.has_far);
      to_x[i] = found ? x.cell : 0;
      to_y[i] = found ? y.cell : height + 1;
      nw[i] = x.near * y.near;
      ne[i] = x.far * y.near;
      sw[i] = x.near * y.far;
      se[i] = x.far * y.far;
    }
  }
}

// Points xy[count][2] on an H x W grid.
template <typename A>
void mask_spots(const A* xy, int64_t count, int32_t height, int32_t width, MaskOptions options, bool nearest,
                MaskSpots<A> spots) {
  if (!nearest) {
    return options.border ? mask_spots_of<A, true>(xy, count, height, width, spots)
                          : mask_spots_of<A, false>(xy, count, height, width, spots);
  }
  for (int64_t i = 0; i < count; ++i) {
    const int32_t x = nearest_cell(xy[2 * i], width, options.border, false);
    const int32_t y = nearest_cell(xy[2 * i + 1], height, options.border, false);
    spots.x[i] = x >= 0 && y >= 0 ? x : 0;
    spots.y[i] = x >= 0 && y >= 0 ? y : height + 1;
  }
}

// A plane of any strides into the frame, whose zeros are there.
template <typename T>
void fill_frame(const T* plane, int64_t stride_y, int64_t stride_x, MaskFrame frame, Wide<T>* cells) {
  for (int64_t y = 0; y < frame.height; ++y) {
    const T* from = plane + y * stride_y;
    Wide<T>* to = cells + (y + 1) * frame.pitch() + 1;
    if (stride_x == 1) {
      widen_row(from, frame.width, to);
    } else {
      for (int64_t x = 0; x < frame.width; ++x) to[x] = widen(from[x * stride_x]);
    }
  }
}

// The frame of sums into a zeroed plane. Cells far apart are written only where there is something.
template <typename T>
void empty_frame(const Wide<T>* cells, MaskFrame frame, T* plane, int64_t stride_y, int64_t stride_x) {
  for (int64_t y = 0; y < frame.height; ++y) {
    const Wide<T>* from = cells + (y + 1) * frame.pitch() + 1;
    T* to = plane + y * stride_y;
    if (stride_x == 1) {
      narrow_row(from, frame.width, to);
    } else {
      for (int64_t x = 0; x < frame.width; ++x) {
        if (from[x] != 0) to[x * stride_x] = narrow<T>(from[x]);
      }
    }
  }
}

// out[count] at bilinear spots, up to whole vectors of which the rest is zero. A vector of spots may be read past them.
template <typename A>
void values_in_frame(const A* cells, MaskFrame frame, const MaskSpots<A>& spots, int64_t count, A* out) {
  const int32_t pitch = static_cast<int32_t>(frame.pitch());
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    int32_t at[kLanes<A>];
    for (int k = 0; k < kLanes<A>; ++k) at[k] = (spots.y[i + k] + 1) * pitch + spots.x[i + k] + 1;
    Vec<A> nw, ne, sw, se;
    gather_pairs(cells, at, nw, ne);
    gather_pairs(cells + pitch, at, sw, se);
    store(out + i, nw * load(spots.weight[0] + i) + ne * load(spots.weight[1] + i) + sw * load(spots.weight[2] + i) +
                       se * load(spots.weight[3] + i));
  }
  for (; i < count; ++i) {
    const A* p = cells + (spots.y[i] + 1) * pitch + spots.x[i] + 1;
    out[i] = p[0] * spots.weight[0][i] + p[1] * spots.weight[1][i] + p[pitch] * spots.weight[2][i] +
             p[pitch + 1] * spots.weight[3][i];
  }
  for (; i % kLanes<A> != 0; ++i) out[i] = 0;
}

// The same from the plane itself.
template <typename T>
void values_in_place(const T* plane, int64_t stride_y, int64_t stride_x, MaskFrame frame,
                     const MaskSpots<Wide<T>>& spots, int64_t count, Wide<T>* out) {
  using A = Wide<T>;
  int64_t i = 0;
  for (; i < count; ++i) {
    A sum = 0;
    for (int t = 0; t < 4; ++t) {
      const int64_t x = spots.x[i] + (t & 1), y = spots.y[i] + (t >> 1);
      const bool inside = x >= 0 && y >= 0 && x < frame.width && y < frame.height;
      sum += (inside ? widen(plane[y * stride_y + x * stride_x]) : A(0)) * spots.weight[t][i];
    }
    out[i] = sum;
  }
  for (; i % kLanes<A> != 0; ++i) out[i] = 0;
}

// sigmoid(x) and softplus(x).
template <typename A>
struct Logistic {
  Vec<A> sigmoid, softplus;
};
template <typename A>
RENDSEG_INLINE Logistic<A> logistic(Vec<A> x) {
  const Vec<A> zero{}, one = splat(A(1));
  const Vec<A> small = exp_nonpositive(x < zero ? x : -x);  // in [0, 1], or NaN
  const Vec<A> ratio = one / (one + small);
  Logistic<A> out;
  out.sigmoid = x < zero ? small * ratio : ratio;
  Vec<A> log;
  if constexpr (std::is_same_v<A, float>) {
    // log(1 + e) = 2 atanh(z) with z = e / (2 + e) <= 1/3: the rest of the series is below 2e-9.
    const Vec<float> z = small / (splat(2.0f) + small), square = z * z;
    Vec<float> p = splat(2.0f / 15);
    p = fused(p, square, splat(2.0f / 13));
    p = fused(p, square, splat(2.0f / 11));
    p = fused(p, square, splat(2.0f / 9));
    p = fused(p, square, splat(2.0f / 7));
    p = fused(p, square, splat(2.0f / 5));
    p = fused(p, square, splat(2.0f / 3));
    log = fused(p * square, z, z + z);
  } else {
    for (int i = 0; i < kLanes<A>; ++i) log[i] = std::log1p(small[i]);
  }
  out.softplus = (x < zero ? zero : x) + log;
  return out;
}

// s[count] from x[count], both up to whole vectors with zeros, and the sums; of softplus as it is.
template <typename A>
void logistic_block(const A* x, int64_t count, A* s, QuerySums& sums) {
  Vec<A> softplus{}, sigmoid{};
  int64_t i = 0;
  for (; i + kLanes<A> <= count; i += kLanes<A>) {
    const Logistic<A> at = logistic<A>(load(x + i));
    store(s + i, at.sigmoid);
    softplus += at.softplus;
    sigmoid += at.sigmoid;
  }
  sums.softplus += static_cast<double>(sum_lanes<A>(softplus));
  sums.sigmoid += static_cast<double>(sum_lanes<A>(sigmoid));
  if (i == count) return;
  const Logistic<A> at = logistic<A>(load(x + i));
  for (int k = 0; k < kLanes<A>; ++k) {
    const bool inside = i + k < count;
    s[i + k] = inside ? at.sigmoid[k] : A(0);
    if (inside) {
      sums.softplus += static_cast<double>(at.softplus[k]);
      sums.sigmoid += static_cast<double>(at.sigmoid[k]);
    }
  }
}

// xy[t] += sum of x y_t and sy[t] += sum of s y_t over `count` points, for `targets` rows of y.
template <typename A, int kTargets>
RENDSEG_INLINE void add_products(const A* x, const A* s, int64_t count, const A* y, int64_t pitch, double* xy,
                                 double* sy) {
  Vec<A> with_x[kTargets] = {}, with_s[kTargets] = {};
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    const Vec<A> at_x = load(x + i), at_s = load(s + i);
#pragma GCC unroll 4
    for (int t = 0; t < kTargets; ++t) {
      const Vec<A> at_y = load(y + t * pitch + i);
      with_x[t] = fused(at_x, at_y, with_x[t]);
      with_s[t] = fused(at_s, at_y, with_s[t]);
    }
  }
  for (int t = 0; t < kTargets; ++t) {
    xy[t] += static_cast<double>(sum_lanes<A>(with_x[t]));
    sy[t] += static_cast<double>(sum_lanes<A>(with_s[t]));
  }
}
template <typename A>
void mask_products(const A* x, const A* s, int64_t count, const A* y, int64_t pitch, int64_t targets, double* xy,
                   double* sy) {
  int64_t t = 0;
  for (; t + 4 <= targets; t += 4) add_products<A, 4>(x, s, count, y + t * pitch, pitch, xy + t, sy + t);
  for (; t < targets; ++t) add_products<A, 1>(x, s, count, y + t * pitch, pitch, xy + t, sy + t);
}

// cells[tap] += weight * slope of the point, for points in the frame.
template <typename A>
void add_slopes(const MaskSpots<A>& spots, int64_t count, MaskFrame frame, const A* s, const A* y, MaskSlope<A> slope,
                A* cells) {
  const int64_t pitch = frame.pitch();
  for (int64_t i = 0; i < count; ++i) {
    const A g = slope(s[i], y[i]);
    A* p = cells + (spots.y[i] + 1) * pitch + spots.x[i] + 1;
    p[0] += spots.weight[0][i] * g;
    p[1] += spots.weight[1][i] * g;
    p[pitch] += spots.weight[2][i] * g;
    p[pitch + 1] += spots.weight[3][i] * g;
  }
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
