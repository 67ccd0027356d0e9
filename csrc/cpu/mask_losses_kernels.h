// Kernels of mask_losses and mask_costs. Compiled once per instruction set, see compile_kernels.h.
//
// `A` is the type of the arithmetic: float, or double for float64 logits.
#ifndef RENDSEG_ISA

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../mask_views.h"
#include "point_spots.h"

namespace rendseg {

constexpr int64_t kMaskBlock = 512;  // points whose values are made together, a multiple of every vector

// The sums over the points of one pair or one query, in double whatever the arithmetic.
struct QuerySums {
  double softplus = 0, sigmoid = 0;
};

}  // namespace rendseg

#else

#include "point_spots.h"

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

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

// cells[tap] += weight * slope of the point
template <typename A>
void add_slopes(A* cells, const SpotPlane& plane, const Spots<A>& spots, int64_t count, const A* s, const A* y,
                MaskSlope<A> slope) {
  add_at_spots(cells, plane, spots, count, [&](int64_t i) { return slope(s[i], y[i]); });
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
