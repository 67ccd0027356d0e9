// What the vector kernels of point_sample take, and their table of functions; no Torch tensors here.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace rendseg {

template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulator<T>::type;

// How one map is addressed and sampled.
struct SampleGrid {
  int32_t height, width;
  int64_t stride_y, stride_x;
  bool nearest, border, align_corners;
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

template <typename T>
struct SampleKernels {
  using A = acc_t<T>;
  // Taps of coords[2 * count], with point = first, first + 1, ...
  void (*locate)(const A* coords, int64_t first, const SampleGrid& grid, const Taps<A>& taps);
  // out[c * out_stride + point]
  void (*planes)(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<A>& taps, int64_t channels, T* out,
                 int64_t out_stride);
  // The same from a map whose channels are adjacent; points must be consecutive.
  void (*vectors)(const T* map, const SampleGrid& grid, const Taps<A>& taps, int64_t channels, T* out,
                  int64_t out_stride);
  // rows[i * row_stride + c]
  void (*plane_rows)(const T* map, int64_t stride_c, const SampleGrid& grid, const Taps<A>& taps, int64_t channels,
                     A* rows, int64_t row_stride);
  void (*vector_rows)(const T* map, const SampleGrid& grid, const Taps<A>& taps, int64_t channels, A* rows,
                      int64_t row_stride);
  // plane[tap] += weight * grad[point]
  void (*add_plane)(const SampleGrid& grid, const Taps<A>& taps, const T* grad, int64_t grad_stride, A* plane);
  // chunk[p * width + c] = grad[c * stride_c + p * stride_p] for c < channels, zero up to width
  void (*transpose)(const T* grad, int64_t stride_c, int64_t stride_p, int64_t num_points, int64_t channels,
                    int64_t width, A* chunk);
  // map[offset + c * stride_c] = sum of weight * chunk[point]: kPlaneChunk planes, or kVectorChunk adjacent channels
  void (*write_planes)(const Runs<A>& runs, const A* chunk, int64_t channels, T* map, int64_t stride_c);
  void (*write_vectors)(const Runs<A>& runs, const A* chunk, int64_t channels, T* map);
  void (*narrow)(const A* source, T* target, int64_t count);
};

// One definition per instruction set, for float, double, c10::Half and c10::BFloat16.
template <typename T>
SampleKernels<T> sample_kernels_baseline();
template <typename T>
SampleKernels<T> sample_kernels_avx2();
template <typename T>
SampleKernels<T> sample_kernels_avx512();

}  // namespace rendseg
