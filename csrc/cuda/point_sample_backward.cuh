// CUDA kernels of the gradient of point_sample, the same bits from run to run.
//
//   grad[N,C,P], coords[N,P,2] -> the gradient of each map[N,C,H,W], of coords[N,P,2]
//
// Into the maps: every cell of the dense gradient is written once, zero or the sum of its taps in the order of points
// (the order of the CPU kernels, so the same bits). No floating-point atomics, and no pass that fills with zeros.
//
//   tile    1,024 adjacent cells of a map in row-major order, four to a thread of a block. A tap is one of the four
//           cells around a point; a point belongs to each tile that one of its taps touches
//   window  up to 512 points of a tile, whose taps are listed at once in shared memory: 2,048 taps with their cell and
//           weight, and for each cell the taps on it, in the order of points (26 KB, 34 KB in float64)
//
//   point_sample_prepare_kernel  Files each point under its tiles, in any order and only as many as a window holds:
//                                4 bytes for each of 512 places, and a count, for each tile. Transposes the upstream
//                                gradient to [N,P,C], so that a tap reads adjacent channels. Where one window holds
//                                all points, or a map has few channels, the one or the other is not needed
//   point_sample_gather_kernel   A block lists the taps of its tile and sums those of each cell, for 128 bytes of
//                                channels. A tile with more points than a window (crowded) goes through all points of
//                                the image in order, window by window
//   point_sample_slope_kernel    Into the coordinates: four dot products over channels per point, summed in a fixed
//                                order. A block takes 32 points
#pragma once

#include "point_sample.cuh"

namespace rendseg {

constexpr int kTileCells = 1024;  // adjacent cells of a map in row-major order, four to a thread
constexpr int kWindow = 512;      // points whose taps are listed at once
constexpr int kCellsPerThread = kTileCells / kSampleThreads;
static_assert(kCellsPerThread == 4 && kWindow >= 2 * kSampleThreads);

// Channels that a thread sums at a time where rows of channels are at hand: 16 bytes. Fewer channels are read where
// they are.
template <typename T>
constexpr int kGroup = kVecWidth<T>;
// Channels of a block that gathers: a cache line.
template <typename T>
constexpr int kChunk = 128 / static_cast<int>(sizeof(T));

template <typename T>
struct GradMap {
  SampleMap<T> map;
  const T* grad;     // [N,C,P] of the strides in GradArgs
  T* rows;           // [N,P,pitch], scratch; null where the map has few channels
  int64_t pitch;     // of rows: channels rounded up to kGroup
  T* result;         // [N,C,H,W], null when not wanted
  bool adjacent;     // whether the result is channels_last, else contiguous
  unsigned* counts;  // [N,tiles], zero, scratch; null where one window holds all points
  unsigned* filed;   // [N,tiles,kWindow], scratch
};

template <typename T>
struct GradArgs {
  int maps;
  GradMap<T> map[kSampleMaps];
  int64_t first_block[kSampleMaps + 1];  // filled in by the launch
  const Acc<T>* coords;                  // [N,P,2]
  int64_t images, points;                // points below 2^31
  int64_t grad_n, grad_c, grad_p;        // strides
  Acc<T>* slope;                         // [N,P,2], the gradient of coords; null when not wanted
  bool add_slope;                        // whether to add to what is there
  SampleOptions options;
};

template <typename T>
RENDSEG_HD int64_t cells_of(const SampleMap<T>& map) {
  return int64_t{map.height} * map.width;
}
template <typename T>
RENDSEG_HD int64_t tiles_of(const SampleMap<T>& map) {
  return (cells_of(map) + kTileCells - 1) / kTileCells;
}
template <typename T>
RENDSEG_HD int64_t chunks_of(const SampleMap<T>& map) {
  return (map.channels + kChunk<T> - 1) / kChunk<T>;
}

// Row-major index of tap t.
template <typename A>
__device__ inline int64_t tap_cell(const PointTaps<A>& taps, int t, int32_t width) {
  return (int64_t{taps.y} + (t >> 1)) * width + taps.x + (t & 1);
}

// --- prepare

// Files point `item` of all images under each tile that one of its taps touches.
template <typename T>
__device__ inline void file_point(const GradArgs<T>& args, const GradMap<T>& map, int64_t item) {
  if (item >= args.images * args.points) return;
  const int64_t n = item / args.points, tiles = tiles_of(map.map);
  const PointTaps<Acc<T>> taps = locate(args.coords + item * 2, map.map.height, map.map.width, args.options);
  int64_t tile[4];
  RENDSEG_UNROLL
  for (int t = 0; t < 4; ++t) {
    tile[t] = taps.inside >> t & 1 ? tap_cell(taps, t, map.map.width) / kTileCells : -1;
    bool seen = tile[t] < 0;
    RENDSEG_UNROLL
    for (int before = 0; before < t; ++before) seen |= tile[before] == tile[t];
    if (seen) continue;
    const int64_t at = n * tiles + tile[t];
    const unsigned place = atomicAdd(map.counts + at, 1u);
    if (place < kWindow) map.filed[at * kWindow + place] = static_cast<unsigned>(item % args.points);
  }
}

template <typename T>
struct TransposeTile {
  static constexpr int kPitch = kTilePoints + (sizeof(T) == 2 ? 2 : 1);
  T value[kTileChannels][kPitch];
};

// rows[n, p, c] = grad[n, c, p], zero from C on: kTileChannels by kTilePoints a block.
template <typename T>
__device__ inline void transpose_tile(const GradArgs<T>& args, const GradMap<T>& map, int64_t block,
                                      TransposeTile<T>& tile) {
  const int64_t channel_tiles = (map.pitch + kTileChannels - 1) / kTileChannels;
  const int64_t point_tiles = (args.points + kTilePoints - 1) / kTilePoints;
  const int64_t c0 = block % channel_tiles * kTileChannels, rest = block / channel_tiles;
  const int64_t p0 = rest % point_tiles * kTilePoints, n = rest / point_tiles;
  const T* from = map.grad + n * args.grad_n;
  const int64_t p = p0 + lane_id();
  RENDSEG_UNROLL
  for (int i = 0; i < kTileChannels; i += kSampleThreads / kWarp) {
    const int row = i + warp_id();
    const bool present = c0 + row < map.map.channels && p < args.points;
    tile.value[row][lane_id()] = present ? from[(c0 + row) * args.grad_c + p * args.grad_p] : T{};
  }
  __syncthreads();
  constexpr int kAtOnce = kSampleThreads / kTileChannels;
  const int column = static_cast<int>(threadIdx.x) % kTileChannels,
            first = static_cast<int>(threadIdx.x) / kTileChannels;
  if (c0 + column >= map.pitch) return;
  T* to = map.rows + (n * args.points + p0) * map.pitch + c0 + column;
  RENDSEG_UNROLL
  for (int i = 0; i < kTilePoints; i += kAtOnce) {
    if (p0 + first + i < args.points) to[(first + i) * map.pitch] = tile.value[column][first + i];
  }
}

template <typename T>
RENDSEG_HD int64_t filing_blocks(const GradArgs<T>& args, const GradMap<T>& map) {
  return map.counts == nullptr ? 0 : (args.images * args.points + kSampleThreads - 1) / kSampleThreads;
}

template <typename T>
RENDSEG_HD int64_t transpose_blocks(const GradArgs<T>& args, const GradMap<T>& map) {
  if (map.rows == nullptr) return 0;
  return args.images * ((map.pitch + kTileChannels - 1) / kTileChannels) *
         ((args.points + kTilePoints - 1) / kTilePoints);
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads) point_sample_prepare_kernel(GradArgs<T> args) {
  RENDSEG_SHARED(TransposeTile<T>, tile);
  const int i = map_of_block(args);
  const GradMap<T>& map = args.map[i];
  const int64_t block = blockIdx.x - args.first_block[i], filing = filing_blocks(args, map);
  if (block < filing) {
    file_point(args, map, block * kSampleThreads + threadIdx.x);
  } else {
    transpose_tile(args, map, block - filing, tile);
  }
}

// --- gather

// The taps of a window of points on the cells of a tile. Tap t of point i of the window is number 4 * i + t; those on a
// cell are entry[begin(cell) .. end(cell)), in the order of points.
template <typename T>
struct TapLists {
  alignas(16) int ends[4 + kTileCells];  // of the cells, from the fourth on; before them zero
  Acc<T> weight[4 * kWindow];
  unsigned point[kWindow];
  int16_t cell[4 * kWindow];  // -1 off the tile
  uint16_t arrived[4 * kWindow], entry[4 * kWindow];
  int scratch[kSampleThreads / kWarp + 1];

  __device__ int begin(int of) const { return ends[3 + of]; }
  __device__ int end(int of) const { return ends[4 + of]; }
};

// What a block gathers: kTileCells cells from `first_cell` on of image n.
struct CellTile {
  int64_t n, first_cell;
};

template <typename T>
__device__ inline PointTaps<Acc<T>> locate_point(const GradArgs<T>& args, const GradMap<T>& map, int64_t n, int64_t p) {
  return locate(args.coords + (n * args.points + p) * 2, map.map.height, map.map.width, args.options);
}

// Place of tap t in the tile, or -1.
template <typename A>
__device__ inline int place_in_tile(const PointTaps<A>& taps, int t, int32_t width, int64_t first_cell) {
  const int64_t place = tap_cell(taps, t, width) - first_cell;
  return (taps.inside >> t & 1) && place >= 0 && place < kTileCells ? static_cast<int>(place) : -1;
}

// The next points, in order from `from` on, that touch the tile, into lists.point; returns how many. All threads.
template <typename T>
__device__ inline int next_window(const GradArgs<T>& args, const GradMap<T>& map, const CellTile& tile, int64_t& from,
                                  TapLists<T>& lists) {
  int count = 0;
  for (; from < args.points && count <= kWindow - kSampleThreads; from += kSampleThreads) {
    const int64_t p = from + threadIdx.x;
    bool touches = false;
    if (p < args.points) {
      const PointTaps<Acc<T>> taps = locate_point(args, map, tile.n, p);
      RENDSEG_UNROLL
      for (int t = 0; t < 4; ++t) touches |= place_in_tile(taps, t, map.map.width, tile.first_cell) >= 0;
    }
    int total = 0;
    const int at = block_exclusive_scan(touches ? 1 : 0, total, lists.scratch);
    if (touches) lists.point[count + at] = static_cast<unsigned>(p);
    count += total;
  }
  return count;
}

// Lists the taps of lists.point[0 .. count), which may come in any order. All threads.
template <typename T>
__device__ inline void list_taps(const GradArgs<T>& args, const GradMap<T>& map, const CellTile& tile, int count,
                                 TapLists<T>& lists) {
  const int tid = static_cast<int>(threadIdx.x);
  int* const mine = lists.ends + 4 + kCellsPerThread * tid;
  __syncthreads();  // lists may still be in use, and lists.point was written by others
  store_vec(mine, Vec<int, kCellsPerThread>{});
  if (tid == 0) lists.ends[3] = 0;
  __syncthreads();
  if (count == 0) return;
  for (int i = tid; i < count; i += kSampleThreads) {
    const PointTaps<Acc<T>> taps = locate_point(args, map, tile.n, lists.point[i]);
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      const int cell = place_in_tile(taps, t, map.map.width, tile.first_cell);
      lists.cell[4 * i + t] = static_cast<int16_t>(cell);
      lists.weight[4 * i + t] = taps.weight[t];
      if (cell >= 0) atomicAdd(lists.ends + 4 + cell, 1);
    }
  }
  __syncthreads();
  Vec<int, kCellsPerThread> counts = load_vec<kCellsPerThread>(mine);
  int total = 0;
  int before = block_exclusive_scan(counts[0] + counts[1] + counts[2] + counts[3], total, lists.scratch);
  RENDSEG_UNROLL
  for (int k = 0; k < kCellsPerThread; ++k) {
    const int of_cell = counts[k];
    counts[k] = before;
    before += of_cell;
  }
  store_vec(mine, counts);  // where each cell begins
  __syncthreads();
  for (int tap = tid; tap < 4 * count; tap += kSampleThreads) {
    const int cell = lists.cell[tap];
    if (cell >= 0) lists.arrived[atomicAdd(lists.ends + 4 + cell, 1)] = static_cast<uint16_t>(tap);
  }
  __syncthreads();  // and now where it ends
  for (int tap = tid; tap < 4 * count; tap += kSampleThreads) {
    const int cell = lists.cell[tap];
    if (cell < 0) continue;
    const unsigned p = lists.point[tap / 4];
    const int begin = lists.begin(cell), end = lists.end(cell);
    int at = begin;  // and one on for each tap of an earlier point
    for (int e = begin; end - begin > 1 && e < end; ++e) at += lists.point[lists.arrived[e] / 4] < p;
    lists.entry[at] = static_cast<uint16_t>(tap);
  }
  __syncthreads();
}

// sum += weight * from[0 .. N)
template <int N, typename T>
__device__ inline void add_weighted(const T* from, Acc<T> weight, Acc<T> (&sum)[N]) {
  constexpr int kWidth = N < kVecWidth<T> ? N : kVecWidth<T>;
  RENDSEG_UNROLL
  for (int k = 0; k < N; k += kWidth) {
    const Vec<T, kWidth> value = load_vec<kWidth>(from + k);
    RENDSEG_UNROLL
    for (int j = 0; j < kWidth; ++j) sum[k + j] += weight * widen(value[j]);
  }
}

// Adds the listed taps on the four cells of this thread to sum[cell][channel], channels from c on.
template <int N, typename T>
__device__ inline void add_taps(const GradArgs<T>& args, const GradMap<T>& map, int64_t n, int64_t c,
                                const TapLists<T>& lists, Acc<T> (&sum)[kCellsPerThread][N]) {
  const int first = kCellsPerThread * static_cast<int>(threadIdx.x);
  const Vec<int, kCellsPerThread> ends = load_vec<kCellsPerThread>(lists.ends + 4 + first);
  int e = lists.begin(first);
  RENDSEG_UNROLL
  for (int k = 0; k < kCellsPerThread; ++k) {
    // A cell has few taps, and registers are short.
    RENDSEG_NO_UNROLL
    for (; e < ends[k]; ++e) {
      const int tap = lists.entry[e];
      const int64_t p = lists.point[tap / 4];
      if constexpr (N > 1) {
        add_weighted(map.rows + (n * args.points + p) * map.pitch + c, lists.weight[tap], sum[k]);
      } else {
        sum[k][0] += lists.weight[tap] * widen(map.grad[n * args.grad_n + c * args.grad_c + p * args.grad_p]);
      }
    }
  }
}

template <int N, typename T>
__device__ inline void store_cells(const GradMap<T>& map, const CellTile& tile, int64_t c,
                                   const Acc<T> (&sum)[kCellsPerThread][N]) {
  const int64_t cells = cells_of(map.map), channels = map.map.channels;
  const int64_t first = tile.first_cell + kCellsPerThread * threadIdx.x;
  if (first >= cells) return;
  constexpr int kWidth = sizeof(T) == 8 ? 2 : 4;
  const bool whole = cells % kWidth == 0 && !map.adjacent;
  RENDSEG_UNROLL
  for (int j = 0; j < N; ++j) {
    if (c + j >= channels) return;
    T* plane = map.result + (tile.n * channels + c + j) * cells + first;
    RENDSEG_UNROLL
    for (int k = 0; k < kCellsPerThread; k += kWidth) {
      if (whole) {
        Vec<T, kWidth> value;
        RENDSEG_UNROLL
        for (int i = 0; i < kWidth; ++i) value[i] = narrow<T>(sum[k + i][j]);
        if (first + k < cells) store_vec(plane + k, value);
        continue;
      }
      RENDSEG_UNROLL
      for (int i = k; i < k + kWidth; ++i) {
        if (first + i >= cells) continue;
        T* to = map.adjacent ? map.result + (tile.n * cells + first + i) * channels + c + j : plane + i;
        *to = narrow<T>(sum[i][j]);
      }
    }
  }
}

// Gathers kChunk channels, N at a time; a thread owns four cells. In a crowded tile the taps are listed window by
// window, anew for each N channels; else they are listed already.
template <int N, bool kCrowded, typename T>
__device__ inline void gather_cells(const GradArgs<T>& args, const GradMap<T>& map, const CellTile& tile,
                                    int64_t first_channel, TapLists<T>& lists) {
  const int64_t last = min(first_channel + kChunk<T>, map.map.channels);
  for (int64_t c = first_channel; c < last; c += N) {
    Acc<T> sum[kCellsPerThread][N] = {};
    if constexpr (kCrowded) {
      for (int64_t from = 0; from < args.points;) {
        const int count = next_window(args, map, tile, from, lists);
        list_taps(args, map, tile, count, lists);
        add_taps<N>(args, map, tile.n, c, lists, sum);
      }
    } else {
      add_taps<N>(args, map, tile.n, c, lists, sum);
    }
    store_cells<N>(map, tile, c, sum);
  }
}

// Gathers kChunk channels into a channels_last gradient: eight threads of 16 bytes each to a cell.
template <typename T>
__device__ inline void gather_vectors(const GradArgs<T>& args, const GradMap<T>& map, const CellTile& tile,
                                      int64_t first_channel, const TapLists<T>& lists) {
  constexpr int kWidth = kVecWidth<T>, kLanes = kChunk<T> / kWidth;
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t cells = cells_of(map.map), channels = map.map.channels;
  const int64_t c = first_channel + tid % kLanes * kWidth;
  if (c >= channels) return;
  const int here = static_cast<int>(min(cells - tile.first_cell, int64_t{kTileCells}));
  const T* rows = map.rows + tile.n * args.points * map.pitch + c;
  T* to = map.result + (tile.n * cells + tile.first_cell) * channels + c;
  const bool whole = channels % kWidth == 0;
  for (int cell = tid / kLanes; cell < here; cell += kSampleThreads / kLanes) {
    Acc<T> sum[kWidth] = {};
    const int end = lists.end(cell);
    for (int e = lists.begin(cell); e < end; ++e) {
      const int tap = lists.entry[e];
      add_weighted(rows + lists.point[tap / 4] * map.pitch, lists.weight[tap], sum);
    }
    Vec<T, kWidth> value;
    RENDSEG_UNROLL
    for (int j = 0; j < kWidth; ++j) value[j] = narrow<T>(sum[j]);
    if (whole) {
      store_vec(to + cell * channels, value);
    } else {
      RENDSEG_UNROLL
      for (int j = 0; j < kWidth; ++j) {
        if (c + j < channels) to[cell * channels + j] = value[j];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kSampleThreads, 3) point_sample_gather_kernel(GradArgs<T> args) {
  RENDSEG_SHARED(TapLists<T>, lists);
  const int i = map_of_block(args);
  const GradMap<T>& map = args.map[i];
  const int64_t block = blockIdx.x - args.first_block[i], chunks = chunks_of(map.map), tiles = tiles_of(map.map);
  const int64_t first_channel = block % chunks * kChunk<T>, rest = block / chunks;
  const CellTile tile{rest / tiles, rest % tiles * kTileCells};
  const int64_t count = map.counts == nullptr ? args.points : map.counts[rest];
  if (count > kWindow) {
    constexpr int kFew = kGroup<T> < 4 ? kGroup<T> : 4;  // leaves registers to what lists the taps
    return map.rows == nullptr ? gather_cells<1, true>(args, map, tile, first_channel, lists)
                               : gather_cells<kFew, true>(args, map, tile, first_channel, lists);
  }
  for (int64_t at = threadIdx.x; at < count; at += kSampleThreads) {
    lists.point[at] = map.counts == nullptr ? static_cast<unsigned>(at) : map.filed[rest * kWindow + at];
  }
  list_taps(args, map, tile, static_cast<int>(count), lists);
  if (map.rows == nullptr) {
    gather_cells<1, false>(args, map, tile, first_channel, lists);
  } else if (map.adjacent) {
    gather_vectors(args, map, tile, first_channel, lists);
  } else {
    gather_cells<kGroup<T>, false>(args, map, tile, first_channel, lists);
  }
}

// --- coordinates

constexpr int kSlopeWarps = kSampleThreads / kWarp;

// Whether the taps of a map are read as vectors: a warp per point; else a lane per point, and warps over channels.
template <typename T>
RENDSEG_HD bool reads_vectors(const GradMap<T>& map) {
  const int64_t sizes = map.map.channels | map.map.stride_n | map.map.stride_y | map.map.stride_x;
  return map.rows != nullptr && map.map.stride_c == 1 && sizes % kVecWidth<T> == 0 && is_aligned(map.map.data, 16);
}

// dot[t] += grad * (value of tap t), channels c .. c + step, ... of point p of image n
template <typename T>
__device__ inline void dot_planes(const GradArgs<T>& args, const GradMap<T>& map, const PointTaps<Acc<T>>& taps,
                                  int64_t n, int64_t p, Acc<T> (&dot)[4]) {
  const T* grad = map.grad + n * args.grad_n + p * args.grad_p;
  const T* from = map.map.data + n * map.map.stride_n + first_tap(map.map, taps.x, taps.y);
  for (int64_t c = warp_id(); c < map.map.channels; c += kSlopeWarps) {
    const Acc<T> upstream = widen(grad[c * args.grad_c]);
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      if (taps.inside >> t & 1) dot[t] += upstream * widen(from[c * map.map.stride_c + tap_step(map.map, t)]);
    }
  }
}

template <typename T>
__device__ inline void dot_vectors(const GradArgs<T>& args, const GradMap<T>& map, const PointTaps<Acc<T>>& taps,
                                   int64_t n, int64_t p, Acc<T> (&dot)[4]) {
  constexpr int kWidth = kVecWidth<T>;
  const T* grad = map.rows + (n * args.points + p) * map.pitch;
  const T* from = map.map.data + n * map.map.stride_n + first_tap(map.map, taps.x, taps.y);
  for (int64_t c = lane_id() * kWidth; c < map.map.channels; c += kWarp * kWidth) {
    const Vec<T, kWidth> upstream = load_vec<kWidth>(grad + c);
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      if (!(taps.inside >> t & 1)) continue;
      const Vec<T, kWidth> value = load_vec<kWidth>(from + c + tap_step(map.map, t));
      RENDSEG_UNROLL
      for (int j = 0; j < kWidth; ++j) dot[t] += widen(upstream[j]) * widen(value[j]);
    }
  }
  RENDSEG_UNROLL
  for (int t = 0; t < 4; ++t) dot[t] = warp_sum(dot[t]);
}

// With d_t = sum over channels of grad * (value of tap t), the slope in x is (d_ne - d_nw) * south weight +
// (d_se - d_sw) * north weight, and likewise in y. A block takes 32 points.
template <typename T>
__global__ void __launch_bounds__(kSampleThreads) point_sample_slope_kernel(GradArgs<T> args) {
  using A = Acc<T>;
  RENDSEG_SHARED(A[kSlopeWarps][4][kWarp], part);
  const int64_t point_tiles = (args.points + kWarp - 1) / kWarp;
  const int64_t n = blockIdx.x / point_tiles, p0 = blockIdx.x % point_tiles * kWarp;
  const int64_t mine = p0 + lane_id();
  const bool writes = warp_id() == 0 && mine < args.points;
  A slope[2] = {};
  for (int i = 0; i < args.maps; ++i) {
    const GradMap<T>& map = args.map[i];
    const bool vectors = reads_vectors(map);
    if (vectors) {
      for (int at = warp_id(); at < kWarp && p0 + at < args.points; at += kSlopeWarps) {
        A dot[4] = {};
        dot_vectors(args, map, locate_point(args, map, n, p0 + at), n, p0 + at, dot);
        if (lane_id() < 4) {
          const A low = lane_id() & 1 ? dot[1] : dot[0], high = lane_id() & 1 ? dot[3] : dot[2];
          part[0][lane_id()][at] = lane_id() & 2 ? high : low;
        }
      }
    } else {
      A dot[4] = {};
      if (mine < args.points) dot_planes(args, map, locate_point(args, map, n, mine), n, mine, dot);
      RENDSEG_UNROLL
      for (int t = 0; t < 4; ++t) part[warp_id()][t][lane_id()] = dot[t];
    }
    __syncthreads();
    if (writes) {
      A d[4] = {};
      for (int w = 0; w < (vectors ? 1 : kSlopeWarps); ++w) {
        RENDSEG_UNROLL
        for (int t = 0; t < 4; ++t) d[t] += part[w][t][lane_id()];
      }
      const A* coord = args.coords + (n * args.points + mine) * 2;
      const A cx = coord[0], cy = coord[1];
      const bool border = args.options.border, align_corners = args.options.align_corners;
      const AxisTaps<A> x = axis_taps(cx, map.map.width, border, align_corners);
      const AxisTaps<A> y = axis_taps(cy, map.map.height, border, align_corners);
      slope[0] +=
          ((d[1] - d[0]) * y.near + (d[3] - d[2]) * y.far) * position_slope(cx, map.map.width, border, align_corners);
      slope[1] +=
          ((d[2] - d[0]) * x.near + (d[3] - d[1]) * x.far) * position_slope(cy, map.map.height, border, align_corners);
    }
    __syncthreads();
  }
  if (!writes) return;
  A* to = args.slope + (n * args.points + mine) * 2;
  RENDSEG_UNROLL
  for (int k = 0; k < 2; ++k) to[k] = args.add_slope ? to[k] + slope[k] : slope[k];
}

// --- launches

// `first_block` is made here; counters are zero. Gradients are made where map.result and args.slope ask for them.
template <typename Launch, typename T>
void run_point_sample_backward(Launch& launch, GradArgs<T>& args) {
  const auto over_maps = [&](void (*kernel)(GradArgs<T>), auto&& blocks) {
    args.first_block[0] = 0;
    for (int i = 0; i < args.maps; ++i) args.first_block[i + 1] = args.first_block[i] + blocks(args.map[i]);
    launch({args.first_block[args.maps], kSampleThreads}, kernel, args);
  };
  over_maps(point_sample_prepare_kernel<T>,
            [&](const GradMap<T>& map) { return filing_blocks(args, map) + transpose_blocks(args, map); });
  over_maps(point_sample_gather_kernel<T>, [&](const GradMap<T>& map) {
    return map.result == nullptr ? 0 : args.images * tiles_of(map.map) * chunks_of(map.map);
  });
  if (args.slope == nullptr) return;
  launch({args.images * ((args.points + kWarp - 1) / kWarp), kSampleThreads}, point_sample_slope_kernel<T>, args);
}

}  // namespace rendseg
