// Vector kernels of point_sample. Compiled once per instruction set, see compile_kernels.h.
#ifndef RENDSEG_ISA

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "point_spots.h"

namespace rendseg {

// How one map is addressed and sampled.
struct SampleGrid : MapView {
  bool nearest = false, border = false, align_corners = false;
};

// The taps of `count` points, one array per field. Taps are north-west, north-east, south-west, south-east; a tap that
// is off the map reads as zero but keeps its weight (0 * NaN is NaN). Nearest is one tap of weight 1.
template <typename A>
struct Taps {
  int64_t count;
  int64_t* offset;  // element offset of the north-west tap
  A* weight[4];
  uint8_t* inside;  // bit t set: tap t lies on the map
  int64_t* point;   // index in the output
  bool in_order;    // point[i] == point[0] + i
};

// The taps of one image gathered by cell: cell r is at element offset[r] and sums entries begin[r] <= e < begin[r + 1].
template <typename A>
struct Runs {
  int64_t count;
  const int64_t* offset;
  const int64_t* begin;
  const int64_t* point;
  const A* weight;
};

inline constexpr int64_t kPlaneChunk = 8;    // planes written together by the backward of an NCHW map
inline constexpr int64_t kVectorChunk = 64;  // channels in flight for one point of a channels_last map

}  // namespace rendseg

#else

#include "point_spots.h"

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

// `count` adjacent elements in the type of the arithmetic: the map itself, or widened into `buffer`.
template <typename T>
inline const Wide<T>* widened(const T* source, Wide<T>* buffer, int64_t count) {
  if constexpr (std::is_same_v<T, Wide<T>>) {
    return source;
  } else {
    widen_row(source, count, buffer);
    return buffer;
  }
}

// Taps of coords[2 * count], with point = first, first + 1, ...
template <typename A>
void locate(const A* coords, int64_t first, const SampleGrid& grid, const Taps<A>& taps) {
  const auto height = static_cast<int32_t>(grid.height), width = static_cast<int32_t>(grid.width);
  int32_t x[kLocate], y[kLocate], mask[kLocate] = {};
  for (int64_t start = 0; start < taps.count; start += kLocate) {
    const int64_t n = taps.count - start < kLocate ? taps.count - start : kLocate;
    A* const* w = taps.weight;
    find_spots<A>(coords + 2 * start, n, height, width, {grid.nearest, grid.border, grid.align_corners},
                  {x, y, {w[0] + start, w[1] + start, w[2] + start, w[3] + start}});
    int64_t* __restrict offset = taps.offset + start;
    for (int64_t i = 0; i < n; ++i) offset[i] = y[i] * grid.stride_y + x[i] * grid.stride_x;
    for (int64_t i = 0; i < n; ++i) {
      const int32_t west = (x[i] >= 0) & (x[i] < width), east = x[i] + 1 < width;
      const int32_t north = (y[i] >= 0) & (y[i] < height), south = y[i] + 1 < height;
      mask[i] = (west & north) | (east & north) << 1 | (west & south) << 2 | (east & south) << 3;
    }
    uint8_t* __restrict inside = taps.inside + start;
    for (int64_t i = 0; i < n; ++i) inside[i] = static_cast<uint8_t>(mask[i]);
    for (int64_t i = 0; i < n; ++i) taps.point[start + i] = first + start + i;
    if (!grid.nearest) continue;
    for (int64_t i = 0; i < n; ++i) {
      w[0][start + i] = A(1);
      w[1][start + i] = w[2][start + i] = w[3][start + i] = A(0);
      inside[i] &= 1;
    }
  }
}

inline int64_t tap_offset(int64_t offset, int t, const SampleGrid& grid) {
  return offset + (t & 1) * grid.stride_x + (t >> 1) * grid.stride_y;
}

// One channel at a point with taps off the map.
template <typename T>
Wide<T> edge_value(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t i) {
  using A = Wide<T>;
  A sum = 0;
  for (int t = 0; t < 4; ++t) {
    const A value = (taps.inside[i] >> t) & 1 ? widen(map[tap_offset(taps.offset[i], t, grid)]) : A(0);
    sum += value * taps.weight[t][i];
  }
  return sum;
}

// kBlock planes at a time: the taps are read once for all of them, and their loads overlap. `ahead` points further on,
// the cache lines of the lower row are asked for: the upper row was mostly read as a lower one before.
template <typename T, int kBlock>
void planes_block(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, T* out, int64_t out_stride) {
  using A = Wide<T>;
  constexpr int64_t kAhead = 24;
  const int64_t stride_c = grid.stride_c, stride_x = grid.stride_x, stride_y = grid.stride_y;
  const A* __restrict north_west = taps.weight[0];
  const A* __restrict north_east = taps.weight[1];
  const A* __restrict south_west = taps.weight[2];
  const A* __restrict south_east = taps.weight[3];
  for (int64_t i = 0; i < taps.count; ++i) {
    if (kBlock > 1) {
      const int64_t next = i + kAhead < taps.count ? i + kAhead : taps.count - 1;
#pragma GCC unroll 8
      for (int k = 0; k < kBlock; ++k) {
        // An address past the map is harmless here; it is formed as an integer.
        __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(map) +
                                                         (k * stride_c + taps.offset[next] + stride_y) * sizeof(T)));
      }
    }
    T* target = out + taps.point[i];
    if (taps.inside[i] == 15) {
      const A nw = north_west[i], ne = north_east[i], sw = south_west[i], se = south_east[i];
      const T* source = map + taps.offset[i];
#pragma GCC unroll 8
      for (int k = 0; k < kBlock; ++k) {
        const T* p = source + k * stride_c;
        target[k * out_stride] = narrow<T>(widen(p[0]) * nw + widen(p[stride_x]) * ne + widen(p[stride_y]) * sw +
                                           widen(p[stride_y + stride_x]) * se);
      }
    } else {
      for (int k = 0; k < kBlock; ++k)
        target[k * out_stride] = narrow<T>(edge_value(map + k * stride_c, grid, taps, i));
    }
  }
}

#if RENDSEG_ISA == 2
// A float plane of adjacent columns at points in the order of the output: sixteen points a turn, each row of taps
// fetched as one pair per point. Returns how many points were done.
inline int64_t plane_pairs(const float* map, const SampleGrid& grid, const Taps<float>& taps, float* out) {
  int64_t i = 0;
  for (; i + 16 <= taps.count; i += 16) {
    const uint32_t whole = equal_bytes(taps.inside + i, 15);
    Vec<float> nw, ne, sw, se;
    gather_pairs(map, taps.offset + i, whole, nw, ne);
    gather_pairs(map + grid.stride_y, taps.offset + i, whole, sw, se);
    store(out + i, nw * load(taps.weight[0] + i) + ne * load(taps.weight[1] + i) + sw * load(taps.weight[2] + i) +
                       se * load(taps.weight[3] + i));
    for (uint32_t edge = ~whole & 0xffffu; edge != 0; edge &= edge - 1) {
      const int64_t at = i + __builtin_ctz(edge);
      out[at] = edge_value(map, grid, taps, at);
    }
  }
  return i;
}
#endif

// out[c * out_stride + point]
template <typename T>
void planes(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t channels, T* out,
            int64_t out_stride) {
  const int64_t stride_c = grid.stride_c;
  int64_t c = 0;
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<T, float>) {
    if (taps.in_order && grid.stride_x == 1 && !grid.nearest && taps.count > 0) {
      for (; c < channels; ++c) {
        const int64_t done = plane_pairs(map + c * stride_c, grid, taps, out + c * out_stride + taps.point[0]);
        const Taps<float> rest{
            taps.count - done,
            taps.offset + done,
            {taps.weight[0] + done, taps.weight[1] + done, taps.weight[2] + done, taps.weight[3] + done},
            taps.inside + done,
            taps.point + done,
            true};
        planes_block<T, 1>(map + c * stride_c, grid, rest, out + c * out_stride, out_stride);
      }
      return;
    }
  }
#endif
  for (; c + 4 <= channels; c += 4) {
    planes_block<T, 4>(map + c * stride_c, grid, taps, out + c * out_stride, out_stride);
  }
  for (; c < channels; ++c) planes_block<T, 1>(map + c * stride_c, grid, taps, out + c * out_stride, out_stride);
}

// rows[i * row_stride + c]
template <typename T>
void plane_rows(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t channels, Wide<T>* rows,
                int64_t row_stride) {
  using A = Wide<T>;
  const int64_t stride_c = grid.stride_c, stride_x = grid.stride_x, stride_y = grid.stride_y;
  for (int64_t first = 0; first < channels; first += 16) {  // 16 planes are 32 streams when points ascend
    const int64_t n = channels - first < 16 ? channels - first : 16;
    for (int64_t i = 0; i < taps.count; ++i) {
      A* __restrict row = rows + i * row_stride + first;
      if (taps.inside[i] == 15) {
        const A nw = taps.weight[0][i], ne = taps.weight[1][i], sw = taps.weight[2][i], se = taps.weight[3][i];
        const T* p = map + first * stride_c + taps.offset[i];
        for (int64_t k = 0; k < n; ++k, p += stride_c) {
          row[k] =
              widen(p[0]) * nw + widen(p[stride_x]) * ne + widen(p[stride_y]) * sw + widen(p[stride_y + stride_x]) * se;
        }
      } else {
        for (int64_t k = 0; k < n; ++k) row[k] = edge_value(map + (first + k) * stride_c, grid, taps, i);
      }
    }
  }
}

// One point, `n` <= kVectorChunk adjacent channels.
template <typename T>
void vector_point(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t i, int64_t n,
                  Wide<T>* __restrict row) {
  using A = Wide<T>;
  A buffer[4][kVectorChunk];
  const int64_t at = taps.offset[i];
  if (taps.inside[i] == 15) {
    const A nw = taps.weight[0][i], ne = taps.weight[1][i], sw = taps.weight[2][i], se = taps.weight[3][i];
    const A* __restrict a = widened(map + at, buffer[0], n);
    const A* __restrict b = widened(map + at + grid.stride_x, buffer[1], n);
    const A* __restrict c = widened(map + at + grid.stride_y, buffer[2], n);
    const A* __restrict d = widened(map + at + grid.stride_y + grid.stride_x, buffer[3], n);
    for (int64_t k = 0; k < n; ++k) row[k] = a[k] * nw + b[k] * ne + c[k] * sw + d[k] * se;
    return;
  }
  for (int64_t k = 0; k < n; ++k) row[k] = 0;
  for (int t = 0; t < 4; ++t) {
    const A weight = taps.weight[t][i];
    if ((taps.inside[i] >> t) & 1) {
      const A* __restrict value = widened(map + tap_offset(at, t, grid), buffer[0], n);
      for (int64_t k = 0; k < n; ++k) row[k] += value[k] * weight;
    } else {
      const A nothing = A(0) * weight;
      for (int64_t k = 0; k < n; ++k) row[k] += nothing;
    }
  }
}

// The same from a map whose channels are adjacent.
template <typename T>
void vector_rows(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t channels, Wide<T>* rows,
                 int64_t row_stride) {
  for (int64_t i = 0; i < taps.count; ++i) {
    for (int64_t c = 0; c < channels; c += kVectorChunk) {
      const int64_t n = channels - c < kVectorChunk ? channels - c : kVectorChunk;
      vector_point(map + c, grid, taps, i, n, rows + i * row_stride + c);
    }
  }
}

// Asks for the taps of a point that is to come: they lie anywhere.
template <typename T>
inline void prefetch_vectors(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t i, int64_t n) {
  if (i >= taps.count || taps.inside[i] != 15) return;
  const T* p = map + taps.offset[i];
  for (int64_t k = 0; k < n; k += static_cast<int64_t>(64 / sizeof(T))) {
    __builtin_prefetch(p + k);
    __builtin_prefetch(p + grid.stride_x + k);
    __builtin_prefetch(p + grid.stride_y + k);
    __builtin_prefetch(p + grid.stride_y + grid.stride_x + k);
  }
}

// As planes, from a map whose channels are adjacent; points must be consecutive. Sixteen points are sampled into a
// tile, which is then written channel by channel.
template <typename T>
void vectors(const T* map, const SampleGrid& grid, const Taps<Wide<T>>& taps, int64_t channels, T* out,
             int64_t out_stride) {
  using A = Wide<T>;
  constexpr int64_t kPoints = 16, kAhead = 4;
  A tile[kPoints][kVectorChunk + 1];  // the odd pitch spreads a column over cache sets
  for (int64_t first = 0; first < taps.count; first += kPoints) {
    const int64_t points = taps.count - first < kPoints ? taps.count - first : kPoints;
    for (int64_t c = 0; c < channels; c += kVectorChunk) {
      const int64_t n = channels - c < kVectorChunk ? channels - c : kVectorChunk;
      for (int64_t i = 0; i < points; ++i) {
        prefetch_vectors(map + c, grid, taps, first + i + kAhead, n);
        vector_point(map + c, grid, taps, first + i, n, tile[i]);
      }
      T* __restrict target = out + c * out_stride + taps.point[first];
      if (points == kPoints) {
        for (int64_t k = 0; k < n; ++k, target += out_stride) {
          A column[kPoints];
          for (int64_t i = 0; i < kPoints; ++i) column[i] = tile[i][k];
          narrow_row(column, kPoints, target);
        }
      } else {
        for (int64_t k = 0; k < n; ++k, target += out_stride) {
          for (int64_t i = 0; i < points; ++i) target[i] = narrow<T>(tile[i][k]);
        }
      }
    }
  }
}

// out[c * out_stride + i], bilinear, for planes whose cells of a row are adjacent
template <typename T>
void spot_planes(const T* map, int64_t stride_c, const SpotPlane& plane, const Spots<Wide<T>>& spots, int64_t count,
                 int64_t channels, T* out, int64_t out_stride) {
  constexpr int64_t kPart = 256;
  for (int64_t c = 0; c < channels; ++c) {
    const T* cells = map + c * stride_c;
    T* to = out + c * out_stride;
    if constexpr (std::is_same_v<T, Wide<T>>) {
      spot_values(cells, plane, spots, count, to);
    } else {
      for (int64_t first = 0; first < count; first += kPart) {
        const int64_t n = count - first < kPart ? count - first : kPart;
        Wide<T> values[kPart];
        spot_values(cells, plane, spots.from(first), n, values);
        narrow_row(values, n, to + first);
      }
    }
  }
}

// cells[tap] += weight * grad[point]
template <typename T>
void add_plane(Wide<T>* cells, const SpotPlane& plane, const Spots<Wide<T>>& spots, int64_t count, bool nearest,
               const T* grad, int64_t grad_stride) {
  if (!nearest) {
    return add_at_spots(cells, plane, spots, count, [&](int64_t i) { return widen(grad[i * grad_stride]); });
  }
  for (int64_t i = 0; i < count; ++i) {
    if (spots.y[i] >= plane.height) continue;
    cells[spots.y[i] * plane.stride_y + spots.x[i] * plane.stride_x] += widen(grad[i * grad_stride]);
  }
}

// chunk[p * width + c] = grad[c * stride_c + p * stride_p] for c < channels, zero up to width
template <typename T>
void transpose_grad(const T* grad, int64_t stride_c, int64_t stride_p, int64_t num_points, int64_t channels,
                    int64_t width, Wide<T>* chunk) {
  for (int64_t p = 0; p < num_points; ++p) {
    for (int64_t c = 0; c < channels; ++c) chunk[p * width + c] = widen(grad[c * stride_c + p * stride_p]);
    for (int64_t c = channels; c < width; ++c) chunk[p * width + c] = 0;
  }
}

template <typename A, int64_t kWidth>
inline void sum_run(const Runs<A>& runs, int64_t r, const A* __restrict chunk, A* __restrict sum) {
  for (int64_t k = 0; k < kWidth; ++k) sum[k] = 0;
  for (int64_t e = runs.begin[r]; e < runs.begin[r + 1]; ++e) {
    const A weight = runs.weight[e];
    const A* __restrict row = chunk + runs.point[e] * kWidth;
    for (int64_t k = 0; k < kWidth; ++k) sum[k] += weight * row[k];
  }
}

// map[offset + c * stride_c] = sum of weight * chunk[point]: kPlaneChunk planes, or kVectorChunk adjacent channels
template <typename T>
void write_planes(const Runs<Wide<T>>& runs, const Wide<T>* chunk, int64_t channels, T* map, int64_t stride_c) {
  Wide<T> sum[kPlaneChunk];
  if (channels == kPlaneChunk) {
    for (int64_t r = 0; r < runs.count; ++r) {
      sum_run<Wide<T>, kPlaneChunk>(runs, r, chunk, sum);
      T* target = map + runs.offset[r];
      for (int64_t k = 0; k < kPlaneChunk; ++k) target[k * stride_c] = narrow<T>(sum[k]);
    }
    return;
  }
  for (int64_t r = 0; r < runs.count; ++r) {
    sum_run<Wide<T>, kPlaneChunk>(runs, r, chunk, sum);
    for (int64_t k = 0; k < channels; ++k) map[runs.offset[r] + k * stride_c] = narrow<T>(sum[k]);
  }
}

template <typename T>
void write_vectors(const Runs<Wide<T>>& runs, const Wide<T>* chunk, int64_t channels, T* map) {
  Wide<T> sum[kVectorChunk];
  for (int64_t r = 0; r < runs.count; ++r) {
    sum_run<Wide<T>, kVectorChunk>(runs, r, chunk, sum);
    if (channels == kVectorChunk) {
      narrow_row(sum, kVectorChunk, map + runs.offset[r]);
    } else {
      narrow_row(sum, channels, map + runs.offset[r]);
    }
  }
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
