// Points on a grid whose cells of a row are adjacent: where they lie, and the bilinear samples of a plane, for the
// kernels of several ops. No include guard: their kernels files include it in both of their parts, see
// compile_kernels.h.
#ifndef RENDSEG_ISA

#include <cstdint>

#include "../math/bilinear.h"

namespace rendseg {

// Where `count` points lie on a grid: the cell of the north-west tap, from -1 on, and the weights of the four taps. A
// point without a tap on the grid is put below its last row. Nearest: the cell alone, (0, height + 1) off the grid.
template <typename A>
struct Spots {
  int32_t *x, *y;
  A* weight[4];

  Spots from(int64_t i) const { return {x + i, y + i, {weight[0] + i, weight[1] + i, weight[2] + i, weight[3] + i}}; }
};

struct SpotOptions {
  bool nearest, border, align_corners;
};

// One channel of a map, of any strides.
struct SpotPlane {
  int32_t height, width;
  int64_t stride_y, stride_x;
};

// Points in no order that will touch most of a block of memory which fits the cache of one core: the hardware is faster
// when it is read in order first.
inline bool worth_reading(int64_t bytes, int64_t points) {
  return bytes <= (int64_t{512} << 10) && points * 32 >= bytes;
}
inline void read_lines(const void* data, int64_t bytes) {
  const volatile char* p = static_cast<const volatile char*>(data);
  for (int64_t i = 0; i < bytes; i += 64) static_cast<void>(p[i]);
}

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

constexpr int64_t kLocate = 64;  // points looked at together

template <typename A>
struct SpotLanes {
  typedef int32_t Cells __attribute__((vector_size(4 * kLanes<A>)));
  Vec<A> floor, far;
  Ints<A> found;  // whether either neighbour lies on the grid
};

// axis_taps of math/bilinear.h for kLanes points, operation by operation.
template <typename A, bool kBorder, bool kAlign>
RENDSEG_INLINE SpotLanes<A> locate_axis(Vec<A> coord, int32_t size) {
  const Vec<A> from_corner = (A(2) * coord - A(1)) + A(1);
  Vec<A> position = kAlign ? from_corner * (A(size - 1) / A(2)) : from_corner * (A(size) / A(2)) - A(0.5);
  if constexpr (kBorder) {
    position = position > A(0) ? position : Vec<A>{};
    position = position < A(size - 1) ? position : splat(A(size - 1));
  }
  const Vec<A> floor = round_down<A>(position);
  return {floor, position - floor, (floor >= A(-1)) & (floor < A(size))};
}

template <typename A, bool kBorder, bool kAlign>
RENDSEG_INLINE void find_lanes(const A* xy, int32_t height, int32_t width, const Spots<A>& to) {
  using Cells = typename SpotLanes<A>::Cells;
  Vec<A> cx, cy;
  load_interleaved(xy, cx, cy, std::make_integer_sequence<int, kLanes<A>>{});
  const SpotLanes<A> x = locate_axis<A, kBorder, kAlign>(cx, width), y = locate_axis<A, kBorder, kAlign>(cy, height);
  const Vec<A> west = A(1) - x.far, north = A(1) - y.far;
  store(to.weight[0], west * north);
  store(to.weight[1], x.far * north);
  store(to.weight[2], west * y.far);
  store(to.weight[3], x.far * y.far);
  const Ints<A> both = x.found & y.found;
  const Cells found = __builtin_convertvector(both, Cells);
  // The conversion is only made of numbers that fit.
  store_bits(to.x, __builtin_convertvector(both ? x.floor : Vec<A>{}, Cells));
  const Cells row = __builtin_convertvector(both ? y.floor : Vec<A>{}, Cells);
  store_bits(to.y, found ? row : Cells{} + (height + 1));
}

template <typename A, bool kBorder, bool kAlign>
void find_bilinear(const A* xy, int64_t count, int32_t height, int32_t width, const Spots<A>& spots) {
  constexpr int n = kLanes<A>;
  int64_t i = 0;
  for (; i + n <= count; i += n) find_lanes<A, kBorder, kAlign>(xy + 2 * i, height, width, spots.from(i));
  if (i == count) return;
  A last[2 * n] = {}, weight[4][n];
  int32_t x[n], y[n];
  for (int64_t k = 0; k < 2 * (count - i); ++k) last[k] = xy[2 * i + k];
  find_lanes<A, kBorder, kAlign>(last, height, width, {x, y, {weight[0], weight[1], weight[2], weight[3]}});
  for (int64_t k = 0; i + k < count; ++k) {
    spots.x[i + k] = x[k];
    spots.y[i + k] = y[k];
    for (int t = 0; t < 4; ++t) spots.weight[t][i + k] = weight[t][k];
  }
}

// Points xy[count][2] on an H x W grid.
template <typename A>
void find_spots(const A* xy, int64_t count, int32_t height, int32_t width, SpotOptions o, Spots<A> spots) {
  if (o.nearest) {
    for (int64_t i = 0; i < count; ++i) {
      const int32_t x = nearest_cell(xy[2 * i], width, o.border, o.align_corners);
      const int32_t y = nearest_cell(xy[2 * i + 1], height, o.border, o.align_corners);
      spots.x[i] = x >= 0 && y >= 0 ? x : 0;
      spots.y[i] = x >= 0 && y >= 0 ? y : height + 1;
    }
  } else if (o.border) {
    (o.align_corners ? find_bilinear<A, true, true> : find_bilinear<A, true, false>)(xy, count, height, width, spots);
  } else {
    (o.align_corners ? find_bilinear<A, false, true> : find_bilinear<A, false, false>)(xy, count, height, width, spots);
  }
}

// The samples of kLanes points whose north-west taps are cells[at[i]].
template <typename T>
RENDSEG_INLINE Vec<Wide<T>> weighted_pairs(const T* cells, int64_t pitch, const int32_t* at,
                                           const Spots<Wide<T>>& spots) {
  Vec<Wide<T>> nw, ne, sw, se;
  gather_pairs(cells, at, nw, ne);
  gather_pairs(cells + pitch, at, sw, se);
  return nw * load(spots.weight[0]) + ne * load(spots.weight[1]) + sw * load(spots.weight[2]) +
         se * load(spots.weight[3]);
}

// At point i; a tap off the map reads as zero but keeps its weight (0 * NaN is NaN).
template <typename T>
Wide<T> spot_value(const T* cells, const SpotPlane& plane, const Spots<Wide<T>>& spots, int64_t i) {
  Wide<T> sum = 0;
  for (int t = 0; t < 4; ++t) {
    const int64_t x = spots.x[i] + (t & 1), y = spots.y[i] + (t >> 1);
    const bool inside = x >= 0 && y >= 0 && x < plane.width && y < plane.height;
    sum += (inside ? widen(cells[y * plane.stride_y + x * plane.stride_x]) : Wide<T>(0)) * spots.weight[t][i];
  }
  return sum;
}

// Where the taps of kLocate points begin; 0 where one is off the plane, which is marked. Whether any is.
inline int32_t place_taps(const SpotPlane& plane, const int32_t* __restrict x, const int32_t* __restrict y,
                          int32_t* __restrict at, int32_t* __restrict edge) {
  const int32_t last_x = plane.width - 2, last_y = plane.height - 2, pitch = static_cast<int32_t>(plane.stride_y);
  int32_t edges = 0;
  for (int64_t k = 0; k < kLocate; ++k) {
    edge[k] = (x[k] < 0) | (y[k] < 0) | (x[k] > last_x) | (y[k] > last_y);
    at[k] = edge[k] ? 0 : y[k] * pitch + x[k];
    edges |= edge[k];
  }
  return edges;
}

// Whether the cells of a row are adjacent, and place_taps can count them.
inline bool has_pairs(const SpotPlane& plane) {
  return plane.stride_x == 1 && plane.width > 1 && plane.height > 1 &&
         plane.stride_y * plane.height < (int64_t{1} << 31);
}

// out[count] at bilinear spots.
template <typename T>
void spot_values(const T* cells, const SpotPlane& plane, const Spots<Wide<T>>& spots, int64_t count, Wide<T>* out) {
  int64_t i = 0;
  if (has_pairs(plane)) {
    int32_t at[kLocate], edge[kLocate];
    for (; i + kLocate <= count; i += kLocate) {
      const int32_t edges = place_taps(plane, spots.x + i, spots.y + i, at, edge);
      for (int64_t k = 0; k < kLocate; k += kLanes<Wide<T>>) {
        store(out + i + k, weighted_pairs(cells, plane.stride_y, at + k, spots.from(i + k)));
      }
      if (edges == 0) continue;
      for (int64_t k = 0; k < kLocate; ++k) {
        if (edge[k]) out[i + k] = spot_value(cells, plane, spots, i + k);
      }
    }
  }
  for (; i < count; ++i) out[i] = spot_value(cells, plane, spots, i);
}

// cells[tap] += weight * g for the taps of point i on the plane.
template <typename A>
void add_at_spot(A* cells, const SpotPlane& plane, const Spots<A>& spots, int64_t i, A g) {
  for (int t = 0; t < 4; ++t) {
    const int64_t x = spots.x[i] + (t & 1), y = spots.y[i] + (t >> 1);
    if ((x >= 0) & (y >= 0) & (x < plane.width) & (y < plane.height)) {
      cells[y * plane.stride_y + x * plane.stride_x] += spots.weight[t][i] * g;
    }
  }
}

// The same for `count` points in order, with g = value(i).
template <typename A, typename Value>
RENDSEG_INLINE void add_at_spots(A* cells, const SpotPlane& plane, const Spots<A>& spots, int64_t count,
                                 const Value& value) {
  typedef A Pair __attribute__((vector_size(2 * sizeof(A))));
  const auto add_pair = [](A* p, A first, A second, A g) {
    store_bits(p, load_bits<Pair>(p) + Pair{first, second} * Pair{g, g});
  };
  int64_t i = 0;
  if (has_pairs(plane)) {
    int32_t at[kLocate], edge[kLocate];
    for (; i + kLocate <= count; i += kLocate) {
      place_taps(plane, spots.x + i, spots.y + i, at, edge);
      const Spots<A> part = spots.from(i);
      for (int64_t k = 0; k < kLocate; ++k) {
        const A g = value(i + k);
        if (edge[k]) {
          add_at_spot(cells, plane, part, k, g);
          continue;
        }
        add_pair(cells + at[k], part.weight[0][k], part.weight[1][k], g);
        add_pair(cells + at[k] + plane.stride_y, part.weight[2][k], part.weight[3][k], g);
      }
    }
  }
  for (; i < count; ++i) add_at_spot(cells, plane, spots, i, value(i));
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
