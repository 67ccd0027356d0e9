// CUDA kernels of point_sample and point_labels, forward.
//
// Every value is the sum of four products in the order of the CPU kernels, each operation rounded: the same bits.
#pragma once

#include "device.cuh"

#include "../math/bilinear.h"

namespace rendseg {

struct SampleOptions {
  bool nearest, border, align_corners;
};

// map[N,C,H,W] of any strides, in elements.
template <typename T>
struct SampleMap {
  const T* data;
  int64_t channels;
  int32_t height, width;
  int64_t stride_n, stride_c, stride_y, stride_x;
};

// Where a point falls: cells (x, y), (x + 1, y), (x, y + 1), (x + 1, y + 1) and their weights. A tap that is off the
// map reads as zero but keeps its weight (0 * NaN is NaN). Nearest is the first tap with weight 1.
template <typename A>
struct PointTaps {
  int32_t x, y;
  unsigned inside;  // bit t set: tap t lies on the map
  A weight[4];
};

// `coord` points at (x, y).
template <typename A>
__device__ inline PointTaps<A> locate(const A* coord, int32_t height, int32_t width, const SampleOptions& options) {
  PointTaps<A> taps;
  const A cx = coord[0], cy = coord[1];
  if (options.nearest) {
    taps.x = nearest_cell(cx, width, options.border, options.align_corners);
    taps.y = nearest_cell(cy, height, options.border, options.align_corners);
    taps.inside = taps.x >= 0 && taps.y >= 0;
    taps.weight[0] = A(1);
    taps.weight[1] = taps.weight[2] = taps.weight[3] = A(0);
    return taps;
  }
  const AxisTaps<A> x = axis_taps(cx, width, options.border, options.align_corners);
  const AxisTaps<A> y = axis_taps(cy, height, options.border, options.align_corners);
  taps.x = x.cell;
  taps.y = y.cell;
  const unsigned columns = static_cast<unsigned>(x.has_near | x.has_far << 1);
  taps.inside = (y.has_near ? columns : 0u) | (y.has_far ? columns << 2 : 0u);
  taps.weight[0] = x.near * y.near;
  taps.weight[1] = x.far * y.near;
  taps.weight[2] = x.near * y.far;
  taps.weight[3] = x.far * y.far;
  return taps;
}

template <typename A>
__device__ inline A weighted(const A (&value)[4], const PointTaps<A>& taps) {
  const A* w = taps.weight;
  return value[0] * w[0] + value[1] * w[1] + value[2] * w[2] + value[3] * w[3];
}

template <typename T>
__device__ inline int64_t first_tap(const SampleMap<T>& map, int32_t x, int32_t y) {
  return y * map.stride_y + x * map.stride_x;
}

template <typename T>
__device__ inline int64_t tap_step(const SampleMap<T>& map, int t) {
  return (t & 1) * map.stride_x + (t >> 1) * map.stride_y;
}

// --- forward

constexpr int kSampleThreads = 256;
constexpr int kSampleMaps = 8;     // maps of one launch
constexpr int kPlaneChannels = 4;  // channels of one thread that reads planes
constexpr int kTilePoints = 32;    // points and channels of a block that reads vectors
constexpr int kTileChannels = 64;
constexpr int kVectorMinimum = 32;  // channels from which on vectors are read

// How a map is read: neighbouring threads take neighbouring points, or adjacent channels one by one or 16 bytes each.
enum class SampleReading : int { planes, scalars, vectors };

template <typename T>
SampleReading sample_reading(const SampleMap<T>& map) {
  if (map.stride_c != 1 || map.channels < kVectorMinimum) return SampleReading::planes;
  const int64_t sizes = map.channels | map.stride_n | map.stride_y | map.stride_x;
  return sizes % kVecWidth<T> == 0 && is_aligned(map.data, 16) ? SampleReading::vectors : SampleReading::scalars;
}

template <typename T>
struct SampleArgs {
  int maps;
  SampleMap<T> map[kSampleMaps];
  SampleReading reading[kSampleMaps];
  int64_t first_channel[kSampleMaps];    // in the output
  int64_t first_block[kSampleMaps + 1];  // filled in by run_point_sample
  const Acc<T>* coords;                  // [N,P,2]
  int64_t images, points;
  T* out;  // [N,out_channels,P]
  int64_t out_channels;
  SampleOptions options;
};

// The map that a block works on.
template <typename Args>
__device__ inline int map_of_block(const Args& args) {
  int i = 0;
  while (static_cast<int64_t>(blockIdx.x) >= args.first_block[i + 1]) ++i;
  return i;
}

// One thread per point and kPlaneChannels channels. Any strides; points that ascend share cache lines.
template <typename T>
__device__ inline void sample_planes(const SampleArgs<T>& args, const SampleMap<T>& map, int64_t first_channel,
                                     int64_t block) {
  using A = Acc<T>;
  const int64_t groups = (map.channels + kPlaneChannels - 1) / kPlaneChannels;
  const int64_t item = block * kSampleThreads + threadIdx.x;
  const int64_t p = item % args.points, rest = item / args.points;
  const int64_t c = rest % groups * kPlaneChannels, n = rest / groups;
  if (n >= args.images) return;
  const PointTaps<A> taps = locate(args.coords + (n * args.points + p) * 2, map.height, map.width, args.options);
  const T* from = map.data + n * map.stride_n + c * map.stride_c + first_tap(map, taps.x, taps.y);
  A value[kPlaneChannels][4];
  RENDSEG_UNROLL
  for (int k = 0; k < kPlaneChannels; ++k) {
    const bool present = c + k < map.channels;
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      value[k][t] = present && (taps.inside >> t & 1) ? widen(from[k * map.stride_c + tap_step(map, t)]) : A(0);
    }
  }
  T* to = args.out + (n * args.out_channels + first_channel + c) * args.points + p;
  RENDSEG_UNROLL
  for (int k = 0; k < kPlaneChannels; ++k) {
    if (c + k < map.channels) to[k * args.points] = narrow<T>(weighted(value[k], taps));
  }
}

// The taps of kTilePoints points, and their samples on the way from rows of channels to rows of points.
template <typename T>
struct SampleTile {
  static constexpr int kPitch = kTilePoints + (sizeof(T) == 2 ? 2 : 1);  // spreads a column over the banks
  Acc<T> weight[4][kTilePoints];
  int64_t offset[kTilePoints];
  unsigned inside[kTilePoints];
  alignas(sizeof(T) == 2 ? 4 : sizeof(T)) T value[kTileChannels][kPitch];
};

// A block takes kTilePoints points and kTileChannels adjacent channels; a thread V channels of a point at a time.
template <int V, typename T>
__device__ inline void sample_vectors(const SampleArgs<T>& args, const SampleMap<T>& map, int64_t first_channel,
                                      int64_t block, SampleTile<T>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = kTileChannels / V, kAtOnce = kSampleThreads / kLanes;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t channel_tiles = (map.channels + kTileChannels - 1) / kTileChannels;
  const int64_t point_tiles = (args.points + kTilePoints - 1) / kTilePoints;
  const int64_t c0 = block % channel_tiles * kTileChannels, rest = block / channel_tiles;
  const int64_t p0 = rest % point_tiles * kTilePoints, n = rest / point_tiles;
  const int points = static_cast<int>(min(args.points - p0, int64_t{kTilePoints}));
  if (tid < kTilePoints) {
    const int64_t p = p0 + min(tid, points - 1);
    const PointTaps<A> taps = locate(args.coords + (n * args.points + p) * 2, map.height, map.width, args.options);
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) tile.weight[t][tid] = taps.weight[t];
    tile.offset[tid] = first_tap(map, taps.x, taps.y);
    tile.inside[tid] = tid < points ? taps.inside : 0u;
  }
  __syncthreads();
  const int lane_channel = tid % kLanes * V;
  const bool present = c0 + lane_channel < map.channels;
  const T* from = map.data + n * map.stride_n + c0 + lane_channel;
  RENDSEG_UNROLL
  for (int first = 0; first < kTilePoints; first += kAtOnce) {
    const int i = first + tid / kLanes;
    const unsigned inside = present ? tile.inside[i] : 0u;
    const T* at = from + tile.offset[i];
    Vec<T, V> value[4];
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) value[t] = inside >> t & 1 ? load_vec<V>(at + tap_step(map, t)) : Vec<T, V>{};
    RENDSEG_UNROLL
    for (int k = 0; k < V; ++k) {
      tile.value[lane_channel + k][i] =
          narrow<T>(widen(value[0][k]) * tile.weight[0][i] + widen(value[1][k]) * tile.weight[1][i] +
                    widen(value[2][k]) * tile.weight[2][i] + widen(value[3][k]) * tile.weight[3][i]);
    }
  }
  __syncthreads();
  // Rows of points: four bytes at least per thread.
  constexpr int kUnit = sizeof(T) == 2 ? 2 : 1, kUnits = kTilePoints / kUnit;
  const bool pairs = args.points % kUnit == 0;
  T* to = args.out + (n * args.out_channels + first_channel + c0) * args.points + p0;
  RENDSEG_UNROLL
  for (int unit = 0; unit < kTileChannels * kUnits; unit += kSampleThreads) {
    const int row = (unit + tid) / kUnits, col = (unit + tid) % kUnits * kUnit;
    if (c0 + row >= map.channels || col >= points) continue;
    const Vec<T, kUnit> value = load_vec<kUnit>(&tile.value[row][col]);
    if (pairs) {
      store_vec(to + row * args.points + col, value);
    } else {
      to[row * args.points + col] = value[0];
      if (kUnit > 1 && col + 1 < points) to[row * args.points + col + 1] = value[kUnit - 1];
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads) point_sample_kernel(SampleArgs<T> args) {
  RENDSEG_SHARED(SampleTile<T>, tile);
  const int i = map_of_block(args);
  const SampleMap<T> map = args.map[i];
  const int64_t block = blockIdx.x - args.first_block[i], first_channel = args.first_channel[i];
  switch (args.reading[i]) {
    case SampleReading::planes:
      return sample_planes(args, map, first_channel, block);
    case SampleReading::scalars:
      return sample_vectors<1>(args, map, first_channel, block, tile);
    case SampleReading::vectors:
      return sample_vectors<kVecWidth<T>>(args, map, first_channel, block, tile);
  }
}

// `first_block` and `reading` are made here.
template <typename Launch, typename T>
void run_point_sample(Launch& launch, SampleArgs<T>& args) {
  const auto tiles = [](int64_t size, int64_t tile) { return (size + tile - 1) / tile; };
  args.first_block[0] = 0;
  for (int i = 0; i < args.maps; ++i) {
    const SampleMap<T>& map = args.map[i];
    args.reading[i] = sample_reading(map);
    const int64_t blocks = args.reading[i] == SampleReading::planes
                               ? tiles(args.images * tiles(map.channels, kPlaneChannels) * args.points, kSampleThreads)
                               : args.images * tiles(map.channels, kTileChannels) * tiles(args.points, kTilePoints);
    args.first_block[i + 1] = args.first_block[i] + blocks;
  }
  launch({args.first_block[args.maps], kSampleThreads}, point_sample_kernel<T>, args);
}

// --- point_labels

// out[N,P] = labels[n, y, x] of the cell that holds coords[n, p], or ignore_index; labels[N,H,W] of any strides.
template <typename L, typename A>
__global__ void __launch_bounds__(256)
    point_labels_kernel(const L* labels, int64_t height, int64_t width, int64_t stride_n, int64_t stride_y,
                        int64_t stride_x, const A* coords, int64_t points, int64_t total, int64_t ignore_index,
                        int64_t* out) {
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const int64_t x = holding_cell(coords[2 * i], width), y = holding_cell(coords[2 * i + 1], height);
    const bool inside = x >= 0 && y >= 0;
    out[i] = inside ? static_cast<int64_t>(labels[i / points * stride_n + y * stride_y + x * stride_x]) : ignore_index;
  }
}

}  // namespace rendseg
