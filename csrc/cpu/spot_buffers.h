// Memory for point_spots.h. An op includes it after its kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <vector>

namespace rendseg {
namespace {

template <typename A>
class SpotBuffer {
 public:
  explicit SpotBuffer(int64_t capacity)
      : cell_(new int32_t[2 * capacity]), weight_(new A[4 * capacity]), capacity_(capacity) {}
  Spots<A> view() const {
    A* w = weight_.get();
    return {cell_.get(), cell_.get() + capacity_, {w, w + capacity_, w + 2 * capacity_, w + 3 * capacity_}};
  }

 private:
  std::unique_ptr<int32_t[]> cell_;
  std::unique_ptr<A[]> weight_;
  int64_t capacity_;
};

inline SpotPlane spot_plane(const MapView& map) {
  return {static_cast<int32_t>(map.height), static_cast<int32_t>(map.width), map.stride_y, map.stride_x};
}

// Sums for zeroed planes of a gradient, one after the other: in the plane itself, or in float for halves.
template <typename T>
class PlaneSums {
  using A = Wide<T>;
  static constexpr bool kInPlace = std::is_same_v<T, A>;

 public:
  explicit PlaneSums(const SpotPlane& plane)
      : plane_(plane), wide_(kInPlace ? 0 : int64_t{plane.height} * plane.width, A(0)) {}
  // Calls add(cells, their places).
  template <typename Add>
  void operator()(T* plane, const Add& add) {
    if constexpr (kInPlace) {
      add(plane, plane_);
    } else {
      std::fill(wide_.begin(), wide_.end(), A(0));
      add(wide_.data(), SpotPlane{plane_.height, plane_.width, plane_.width, 1});
      for (int64_t y = 0; y < plane_.height; ++y) {
        const A* from = wide_.data() + y * plane_.width;
        T* to = plane + y * plane_.stride_y;
        if (plane_.stride_x == 1) {
          RENDSEG_PICK(narrow_row<T>)(from, plane_.width, to);
        } else {
          for (int64_t x = 0; x < plane_.width; ++x) to[x * plane_.stride_x] = static_cast<T>(from[x]);
        }
      }
    }
  }

 private:
  SpotPlane plane_;
  std::vector<A> wide_;
};

}  // namespace
}  // namespace rendseg
