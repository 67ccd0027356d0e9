// CUDA kernels of subdivide: bilinear upsampling, margin keys and their first histogram in one pass over the outputs;
// and its gradient. subdivide_labels.cuh makes labels without the upsampled logits.
//
//   logits[N,C,h,w] -> fine[N,C,H,W] where wanted, keys[N,H,W] uint32, histograms[N,2048] uint32 of their upper 11 bits
//
// Every logit is read from memory once and every value written once, in the layout of the logits; a key is 4 bytes.
// Which kernel runs:
//
//   layout, factor        kernel                 work
//   contiguous, 2         upsample_gaps_kernel   a thread: V outputs in both rows of a gap (see Gap). V is 16 bytes of
//                                                them where rows are aligned, else 2; stores pass L2 from 32 MB on
//   contiguous, other     upsample_any_kernel    a thread: one output
//   channels_last, 2      upsample_last_kernel   a warp: the 2x2 outputs of 8 gaps
//   channels_last, other  upsample_last_kernel   a warp: 32 outputs of a row
//   channels_last, where only the margins of one channel are wanted: upsample_any_kernel
//   gradient, 2           gradient_gaps_kernel   a thread: one value of the source, from 4x4 outputs
//   gradient, other       tabulate_neighbours_kernel, then gradient_any_kernel
//
// "Other" are all other factors, and 2 with aligned corners.
#pragma once

#include "device.cuh"

#include <limits>

#include "../math/margin.h"
#include "../math/radix_key.h"
#include "select.cuh"
#include "upsample.cuh"

namespace rendseg::subdivision {

template <typename T>
struct UpsampleArgs {
  const T* source;  // logits[N,C,h,w], contiguous or channels_last
  T* fine;          // [N,C,H,W] in the layout of source, or null when the upsampled logits are not wanted
  bool channels_last, align_corners;
  bool streaming;          // fine is too large to stay in L2
  bool single;             // the margin is |logit of one channel|: C == 1, or class_index
  const int64_t* channel;  // [N] that channel, or null for channel 0
  int64_t images, channels, h, w, scale, height, width;
  uint32_t* keys;        // [N,H,W]
  uint32_t* histograms;  // [N, kHistogramBins], zero; or null when they are not wanted
};

constexpr int kSubdivideThreads = 256;

// --- keys

using HistogramTable = uint32_t[kHistogramBins];

// The histogram of a block, in shared memory. All threads take part in both functions.
__device__ inline void clear_bins(HistogramTable& bins) {
  clear_histogram(bins);
  __syncthreads();
}

// Adds to the histogram of an image, if there is one. Counts are integers: the order does not matter.
__device__ inline void add_bins(const HistogramTable& bins, uint32_t* histogram) {
  if (histogram == nullptr) return;
  __syncthreads();
  flush_histogram(bins, histogram);
}

template <typename T>
__device__ inline uint32_t* histogram_of(const UpsampleArgs<T>& a, int64_t image) {
  return a.histograms == nullptr ? nullptr : a.histograms + image * kHistogramBins;
}

// The channel whose magnitude is the margin.
template <typename T>
__device__ inline int64_t single_channel(const UpsampleArgs<T>& a, int64_t image) {
  if (a.channel == nullptr) return 0;
  const int64_t chosen = a.channel[image];
  const bool inside = chosen >= 0 && chosen < a.channels;
  RENDSEG_DEVICE_ASSERT(inside, "class_index must lie in [0, C)");
  return inside ? chosen : 0;
}

// --- tiles

// A block takes a tile of work items of one image, 1 << shift items wide (32, less on a narrow map) and as high as its
// threads times `rows` allow. Blocks count tiles of a row first, then rows of tiles, then images.
struct Tiling {
  int shift, rows;
  int64_t across, per_image;  // tiles
};

inline Tiling tiles_of(int64_t columns, int64_t lines, int rows) {
  Tiling tiling{0, rows, 0, 0};
  while (tiling.shift < 5 && (int64_t{1} << tiling.shift) < columns) ++tiling.shift;
  const int64_t wide = int64_t{1} << tiling.shift, high = (kSubdivideThreads >> tiling.shift) * rows;
  tiling.across = (columns + wide - 1) / wide;
  tiling.per_image = tiling.across * ((lines + high - 1) / high);
  return tiling;
}

struct Tile {
  int64_t image, row, column;  // of its first item
};

__device__ inline Tile tile_of_block(const Tiling& tiling) {
  const int64_t image = blockIdx.x / tiling.per_image, tile = blockIdx.x % tiling.per_image;
  const int high = (kSubdivideThreads >> tiling.shift) * tiling.rows;
  return {image, tile / tiling.across * high, (tile % tiling.across) << tiling.shift};
}

// --- factor 2, channels apart

// TopTwo of V neighbours.
template <typename T, int V>
class TopTwoOf {
 public:
  __device__ void add(const Vec<T, V>& values) {
    RENDSEG_UNROLL
    for (int v = 0; v < V; ++v) top_[v].add(widen(values[v]));
  }
  __device__ float margin(int v, bool single) const { return top_[v].margin(single); }

 private:
  TopTwo<Acc<T>> top_[V];
};

// Two 16-bit values at a time, with one instruction each: like larger_of(), smaller_of() and larger_or_nan().
#if defined(__CUDACC__)
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, half_t>, __half2, __nv_bfloat162>;
template <typename P>
__device__ inline P larger_pair(const P& a, const P& b) {
  return __hmax2(a, b);
}
template <typename P>
__device__ inline P smaller_pair(const P& a, const P& b) {
  return __hmin2(a, b);
}
template <typename P>
__device__ inline P larger_pair_or_nan(const P& a, const P& b) {
  return __hmax2_nan(a, b);
}
#else
template <typename T>
struct Pair {
  T x, y;
};
template <typename T>
Pair<T> larger_pair(const Pair<T>& a, const Pair<T>& b) {
  return {narrow<T>(larger_of(widen(a.x), widen(b.x))), narrow<T>(larger_of(widen(a.y), widen(b.y)))};
}
template <typename T>
Pair<T> smaller_pair(const Pair<T>& a, const Pair<T>& b) {
  return {narrow<T>(smaller_of(widen(a.x), widen(b.x))), narrow<T>(smaller_of(widen(a.y), widen(b.y)))};
}
template <typename T>
Pair<T> larger_pair_or_nan(const Pair<T>& a, const Pair<T>& b) {
  return {narrow<T>(larger_or_nan(widen(a.x), widen(b.x))), narrow<T>(larger_or_nan(widen(a.y), widen(b.y)))};
}
#endif

// Half the instructions, half the registers, the same result.
template <typename T, int V>
  requires(sizeof(T) == 2)
class TopTwoOf<T, V> {
 public:
  __device__ TopTwoOf() {
    const T lowest = narrow<T>(-std::numeric_limits<float>::infinity());
    RENDSEG_UNROLL
    for (int i = 0; i < V / 2; ++i) first_[i] = second_[i] = Pair<T>{lowest, lowest};
  }
  __device__ void add(const Vec<T, V>& values) {
    RENDSEG_UNROLL
    for (int i = 0; i < V / 2; ++i) {
      const Pair<T> value{values[2 * i], values[2 * i + 1]};
      second_[i] = larger_pair(second_[i], smaller_pair(value, first_[i]));
      first_[i] = larger_pair_or_nan(value, first_[i]);
    }
  }
  __device__ float margin(int v, bool single) const {
    const Pair<T> first = first_[v / 2], second = second_[v / 2];
    return TopTwo<float>{widen(v % 2 == 0 ? first.x : first.y), widen(v % 2 == 0 ? second.x : second.y)}.margin(single);
  }

 private:
  Pair<T> first_[V / 2], second_[V / 2];
};

// Source cells of one channel under `V` adjacent outputs of a row: V/2 cells and one more on each side.
template <typename T, int V>
struct SourceSpan {
  static constexpr int kCells = V / 2;
  Vec<T, kCells> centre;
  T left{}, right{};

  // Nothing is read beyond the row.
  __device__ void load(const T* from, bool at_left, bool at_right) {
    centre = load_vec<kCells>(from);
    if (!at_left) left = from[-1];
    if (!at_right) right = from[kCells];
  }

  // Interpolated along x.
  __device__ void interpolate(bool at_left, bool at_right, Acc<T> (&out)[V]) const {
    using A = Acc<T>;
    constexpr A kNear = Gap<A>::kNear, kFar = Gap<A>::kFar;
    A cells[kCells + 2];
    RENDSEG_UNROLL
    for (int i = 0; i < kCells; ++i) cells[i + 1] = widen(centre[i]);
    // The neighbours of the outermost outputs: see Gap.
    cells[kCells + 1] = at_right ? cells[kCells] : widen(right);
    cells[0] = at_left ? cells[2] : widen(left);
    const A near_weight = at_left ? A(1) : kNear, far_weight = at_left ? A(0) : kFar;
    RENDSEG_UNROLL
    for (int i = 0; i < kCells; ++i) {
      out[2 * i] = i == 0 ? mix_quarter(cells[1], cells[0], near_weight, far_weight)
                          : mix_quarter(cells[i + 1], cells[i], kNear, kFar);
      out[2 * i + 1] = mix_quarter(cells[i + 1], cells[i + 2], kNear, kFar);
    }
  }
};

template <bool kStreaming, int N, typename T>
__device__ inline void store_outputs(T* to, const Vec<T, N>& values) {
  if constexpr (kStreaming) {
    store_vec_streaming(to, values);
  } else {
    store_vec(to, values);
  }
}

// A thread makes `V` adjacent outputs in both rows of a gap, channel after channel, with the two largest logits of each
// in registers. The sources of the next channel are on their way meanwhile.
template <typename T, int V, bool kStreaming>
__global__ void __launch_bounds__(kSubdivideThreads, sizeof(T) == 8 ? 1 : 4)
    upsample_gaps_kernel(UpsampleArgs<T> a, Tiling tiling) {
  using A = Acc<T>;
  RENDSEG_SHARED(HistogramTable, bins);
  if (a.histograms != nullptr) clear_bins(bins);
  const Tile tile = tile_of_block(tiling);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = tile.row + (thread >> tiling.shift);
  const int64_t column = (tile.column + (thread & ((1 << tiling.shift) - 1))) * V;
  if (row <= a.h && column < a.width) {
    const Gap<A> gap(static_cast<int32_t>(row - 1), static_cast<int32_t>(a.h));
    const int64_t cell = column / 2;
    const bool at_left = cell == 0, at_right = cell + V / 2 == a.w;
    const int32_t chosen = a.single ? static_cast<int32_t>(single_channel(a, tile.image)) : 0;
    const bool only_chosen = a.single && a.fine == nullptr;
    const int32_t begin = only_chosen ? chosen : 0;
    const int32_t end = only_chosen ? chosen + 1 : static_cast<int32_t>(a.channels);
    const int64_t plane = a.h * a.w, fine_plane = a.height * a.width;
    const T* low = a.source + (tile.image * a.channels + begin) * plane + gap.low * a.w + cell;
    const int32_t to_high = (gap.high - gap.low) * static_cast<int32_t>(a.w);
    const bool stores_first = a.fine != nullptr && gap.has_first, stores_second = a.fine != nullptr && gap.has_second;
    int64_t to = tile.image * a.channels * fine_plane + (2 * row - 1) * a.width + column;  // in fine

    TopTwoOf<T, V> first, second;
    SourceSpan<T, V> next_low, next_high;
    next_low.load(low, at_left, at_right);
    next_high.load(low + to_high, at_left, at_right);
    RENDSEG_NO_UNROLL
    for (int32_t c = begin; c < end; ++c) {
      A at_low[V], at_high[V];
      next_low.interpolate(at_left, at_right, at_low);
      next_high.interpolate(at_left, at_right, at_high);
      if (c + 1 < end) low += plane;  // the last channel is loaded twice
      next_low.load(low, at_left, at_right);
      next_high.load(low + to_high, at_left, at_right);
      Vec<T, V> values[2];
      RENDSEG_UNROLL
      for (int v = 0; v < V; v += 2) {
        const Vec<T, 2> above =
            narrow_pair<T>(gap.first(at_low[v], at_high[v]), gap.first(at_low[v + 1], at_high[v + 1]));
        const Vec<T, 2> below =
            narrow_pair<T>(gap.second(at_low[v], at_high[v]), gap.second(at_low[v + 1], at_high[v + 1]));
        values[0][v] = above[0], values[0][v + 1] = above[1];
        values[1][v] = below[0], values[1][v + 1] = below[1];
      }
      if (stores_first) store_outputs<kStreaming>(a.fine + to, values[0]);
      if (stores_second) store_outputs<kStreaming>(a.fine + to + a.width, values[1]);
      to += fine_plane;
      if (!a.single || c == chosen) {  // of one channel alone the value is the first
        first.add(values[0]);
        second.add(values[1]);
      }
    }

    // From the place that `to` has reached to the same in a.keys.
    const int64_t passed = (tile.image * (a.channels - 1) + (only_chosen ? 1 : a.channels)) * fine_plane;
    RENDSEG_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (!(r == 0 ? gap.has_first : gap.has_second)) continue;
      constexpr int kWide = V < 4 ? V : 4;
      uint32_t* keys = a.keys + (to - passed) + r * a.width;
      RENDSEG_UNROLL
      for (int v = 0; v < V; v += kWide) {
        Vec<uint32_t, kWide> wide;
        RENDSEG_UNROLL
        for (int i = 0; i < kWide; ++i) {
          wide[i] = margin_key(r == 0 ? first.margin(v + i, a.single) : second.margin(v + i, a.single));
          if (a.histograms != nullptr) atomicAdd(&bins[histogram_bin(wide[i])], 1u);
        }
        store_vec(keys + v, wide);
      }
    }
  }
  add_bins(bins, histogram_of(a, tile.image));
}

// --- any factor, channels apart

// A thread makes one output, channel after channel. The source may have any layout; `fine`, if there is one, is
// contiguous.
template <typename T, bool kQuarters>
__global__ void __launch_bounds__(kSubdivideThreads) upsample_any_kernel(UpsampleArgs<T> a, Tiling tiling) {
  using A = Acc<T>;
  RENDSEG_SHARED(HistogramTable, bins);
  if (a.histograms != nullptr) clear_bins(bins);
  const Tile tile = tile_of_block(tiling);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row = tile.row + (thread >> tiling.shift);
  const int64_t column = tile.column + (thread & ((1 << tiling.shift) - 1));
  if (row < a.height && column < a.width) {
    const SingleUnit<A, kQuarters> unit(a, row, column);
    const int64_t chosen = a.single ? single_channel(a, tile.image) : 0;
    const bool only_chosen = a.single && a.fine == nullptr;
    const int64_t begin = only_chosen ? chosen : 0, end = only_chosen ? chosen + 1 : a.channels;
    const int64_t fine_plane = a.height * a.width;
    const int64_t cell_stride = a.channels_last ? a.channels : 1;
    const int64_t channel_stride = a.channels_last ? 1 : a.h * a.w;
    const T* source = a.source + tile.image * a.channels * a.h * a.w + begin * channel_stride;
    const T* corner[4];
    T next[4];
    RENDSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
      corner[i] = source + unit.corner(i, a.w) * cell_stride;
      next[i] = *corner[i];
    }
    const int64_t output = row * a.width + column;
    T* fine = a.fine == nullptr ? nullptr : a.fine + tile.image * a.channels * fine_plane + output;
    TopTwo<A> top;
    for (int64_t c = begin; c < end; ++c) {
      A values[4], out[1];
      RENDSEG_UNROLL
      for (int i = 0; i < 4; ++i) values[i] = widen(next[i]);
      if (c + 1 < end) {
        RENDSEG_UNROLL
        for (int i = 0; i < 4; ++i) next[i] = *(corner[i] += channel_stride);
      }
      unit.values(values, out);
      const Vec<T, 1> stored{narrow<T>(out[0])};
      if (fine != nullptr) {
        store_vec(fine, stored);
        fine += fine_plane;
      }
      if (!a.single || c == chosen) top.add(widen(stored[0]));
    }
    const uint32_t key = margin_key(top.margin(a.single));
    a.keys[tile.image * fine_plane + output] = key;
    if (a.histograms != nullptr) atomicAdd(&bins[histogram_bin(key)], 1u);
  }
  add_bins(bins, histogram_of(a, tile.image));
}

// --- channels together

// A warp makes 32 outputs: the 2x2 of 8 gaps, or 32 neighbours in a row. Its lanes take channels while they load and
// store, which coalesces, and outputs while they look for the two largest: values change hands through shared memory,
// up to 32 channels at a time.
constexpr int kLastThreads = 128;
constexpr int kLastChannels = 32;
constexpr int kGapsPerWarp = 8;

// The rows are 33 long, so that lanes meet no bank conflict either way.
template <typename T>
using LastTile = T[kWarp][kLastChannels + 1];

// Channels in rounds of (nearly) equal size.
struct Rounds {
  uint32_t size, inverse;  // i / size == i * inverse >> 16 for i < 1024

  __device__ explicit Rounds(int64_t channels) {
    const int64_t count = (channels + kLastChannels - 1) / kLastChannels;
    size = static_cast<uint32_t>((channels + count - 1) / count);
    inverse = ((1u << 16) + size - 1) / size;
  }
  __device__ uint32_t divide(uint32_t i) const { return i * inverse >> 16; }
};

// Rows and columns of the outputs that one warp makes.
struct LastPlace {
  int64_t unit_row, first;  // gaps, counted from 0 for gap -1; or row and first column
};

// Values of `size` channels from c0 on into the tile, and into `fine` if there is one. Few channels leave lanes over,
// which then take other gaps: each group of lanes goes along a run of gaps and keeps the source cells between two.
template <typename T>
__device__ inline void upsample_gaps_into(LastTile<T>& tile, const UpsampleArgs<T>& a, const T* source, T* fine,
                                          const LastPlace& place, int64_t c0, uint32_t size) {
  using A = Acc<T>;
  constexpr int kBatch = 4;  // gaps whose sources are on their way
  const int group_shift = size > 16 ? 5 : size > 8 ? 4 : size > 4 ? 3 : 2;
  const int run = max(1, kGapsPerWarp >> (5 - group_shift));
  const int begin = (lane_id() >> group_shift) * run;  // of the gaps of this warp
  const uint32_t c = static_cast<uint32_t>(lane_id()) & ((1u << group_shift) - 1);
  const int32_t w = static_cast<int32_t>(a.w), gap = static_cast<int32_t>(place.first) - 1 + begin;
  if (c >= size || gap >= w) return;
  const int64_t step = a.channels;
  const Gap<A> y(static_cast<int32_t>(place.unit_row - 1), static_cast<int32_t>(a.h));
  const Gap<A> x(gap, w);  // the first one; only here may the left output be missing
  const T* low = source + (y.low * a.w + x.low) * step + c0 + c;
  const T* high = source + (y.high * a.w + x.low) * step + c0 + c;
  A left_low = widen(*low), left_high = widen(*high);
  low += (x.high - x.low) * step, high += (x.high - x.low) * step;
  const bool stores_first = fine != nullptr && y.has_first, stores_second = fine != nullptr && y.has_second;
  // Outputs left and right in the upper row; the lower row follows.
  int64_t left = ((2 * place.unit_row - 1) * a.width + 2 * gap + 1) * step + c0 + c;
  const int64_t row = a.width * step;
  T* slot = &tile[begin * 2][c];
  constexpr int kSlotRow = kLastChannels + 1;
  for (int first = 0; first < run; first += kBatch) {
    T right_low[kBatch], right_high[kBatch];
    RENDSEG_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      right_low[i] = *low, right_high[i] = *high;
      if (gap + first + i + 2 < w) low += step, high += step;
    }
    RENDSEG_UNROLL
    for (int i = 0; i < kBatch; ++i) {
      const int at = first + i;
      if (at >= run || gap + at >= w) break;
      const bool leftmost = i == 0 && gap + at < 0, rightmost = gap + at + 1 == w;
      const A near_weight = leftmost ? A(1) : Gap<A>::kNear, far_weight = leftmost ? A(0) : Gap<A>::kFar;
      const A corner_low = widen(right_low[i]), corner_high = widen(right_high[i]);
      const A on_left[2] = {x.first(left_low, corner_low), x.first(left_high, corner_high)};
      const A on_right[2] = {mix_quarter(corner_low, left_low, near_weight, far_weight),
                             mix_quarter(corner_high, left_high, near_weight, far_weight)};
      const Vec<T, 2> upper = narrow_pair<T>(y.first(on_left[0], on_left[1]), y.first(on_right[0], on_right[1]));
      const Vec<T, 2> lower = narrow_pair<T>(y.second(on_left[0], on_left[1]), y.second(on_right[0], on_right[1]));
      left_low = corner_low, left_high = corner_high;
      slot[0] = upper[0], slot[kSlotRow] = upper[1];
      slot[16 * kSlotRow] = lower[0], slot[17 * kSlotRow] = lower[1];
      slot += 2 * kSlotRow;
      if (fine != nullptr) {
        T* const to = fine + left;
        if (stores_first && !leftmost) to[0] = upper[0];
        if (stores_first && !rightmost) to[step] = upper[1];
        if (stores_second && !leftmost) to[row] = lower[0];
        if (stores_second && !rightmost) to[row + step] = lower[1];
        left += 2 * step;
      }
    }
  }
}

// The same for 32 neighbours in a row. Lane l brings the neighbours of output l.
template <typename T>
__device__ inline void upsample_row_into(LastTile<T>& tile, const UpsampleArgs<T>& a, const T* source, T* fine,
                                         const LastPlace& place, int64_t c0, uint32_t size, const Rounds& rounds,
                                         const Neighbours<Acc<T>>& y, const Neighbours<Acc<T>>& x) {
  const T* near = source + y.near * a.w * a.channels + c0;
  const T* far = source + y.far * a.w * a.channels + c0;
  const int64_t output = (place.unit_row * a.width + place.first) * a.channels + c0;
  RENDSEG_NO_UNROLL
  for (uint32_t item = static_cast<uint32_t>(lane_id()); item < kWarp * rounds.size; item += kWarp) {
    const uint32_t which = rounds.divide(item), c = item - which * rounds.size;
    const int lane = static_cast<int>(which);
    Neighbours<Acc<T>> at;
    at.near = __shfl_sync(kAllLanes, x.near, lane), at.far = __shfl_sync(kAllLanes, x.far, lane);
    at.near_weight = __shfl_sync(kAllLanes, x.near_weight, lane);
    at.far_weight = __shfl_sync(kAllLanes, x.far_weight, lane);
    if (c >= size || place.first + which >= a.width) continue;
    const int64_t left = at.near * a.channels + c, right = at.far * a.channels + c;
    const T stored = narrow<T>(mix(mix(widen(near[left]), widen(near[right]), at.near_weight, at.far_weight),
                                   mix(widen(far[left]), widen(far[right]), at.near_weight, at.far_weight),
                                   y.near_weight, y.far_weight));
    tile[which][c] = stored;
    if (fine != nullptr) fine[output + which * a.channels + c] = stored;
  }
}

template <typename T, bool kGaps>
__global__ void __launch_bounds__(kLastThreads) upsample_last_kernel(UpsampleArgs<T> a, int64_t blocks_per_image) {
  using A = Acc<T>;
  constexpr int kUnits = kGaps ? kGapsPerWarp : kWarp;
  RENDSEG_SHARED(HistogramTable, bins);
  RENDSEG_SHARED(LastTile<T>[kLastThreads / kWarp], tiles);
  if (a.histograms != nullptr) clear_bins(bins);
  LastTile<T>& tile = tiles[warp_id()];
  const int lane = lane_id();
  const int64_t image = blockIdx.x / blocks_per_image, block = blockIdx.x % blocks_per_image;
  const int64_t chosen = a.single ? single_channel(a, image) : 0;
  const int64_t units_wide = kGaps ? a.w + 1 : a.width, units_high = kGaps ? a.h + 1 : a.height;
  const int64_t across = (units_wide + kUnits - 1) / kUnits;
  const Rounds rounds(a.channels);
  const T* source = a.source + image * a.channels * a.h * a.w;
  T* fine = a.fine == nullptr ? nullptr : a.fine + image * a.channels * a.height * a.width;

  for (int64_t task = block * (kLastThreads / kWarp) + warp_id(); task < across * units_high;
       task += blocks_per_image * (kLastThreads / kWarp)) {
    const LastPlace place{task / across, task % across * kUnits};
    // The output of this lane.
    const int64_t row = kGaps ? 2 * place.unit_row - 1 + (lane >> 4) : place.unit_row;
    const int64_t column = kGaps ? 2 * place.first - 1 + (lane & 15) : place.first + lane;
    const bool inside = row >= 0 && row < a.height && column >= 0 && column < a.width;
    Neighbours<A> y{}, x{};
    if constexpr (!kGaps) {
      y = neighbours<A>(place.unit_row, a.h, a.scale, a.align_corners);
      x = neighbours<A>(inside ? column : a.width - 1, a.w, a.scale, a.align_corners);
    }
    TopTwo<A> top;
    for (int64_t c0 = 0; c0 < a.channels; c0 += rounds.size) {
      const uint32_t size = a.channels - c0 < rounds.size ? static_cast<uint32_t>(a.channels - c0) : rounds.size;
      if constexpr (kGaps) {
        upsample_gaps_into(tile, a, source, fine, place, c0, size);
      } else {
        upsample_row_into(tile, a, source, fine, place, c0, size, rounds, y, x);
      }
      __syncwarp();
      if (inside) {
        if (!a.single) {
          for (uint32_t c = 0; c < size; ++c) top.add(widen(tile[lane][c]));
        } else if (chosen >= c0 && chosen < c0 + size) {
          top.add(widen(tile[lane][chosen - c0]));
        }
      }
      __syncwarp();
    }
    if (inside) {
      const uint32_t key = margin_key(top.margin(a.single));
      a.keys[(image * a.height + row) * a.width + column] = key;
      if (a.histograms != nullptr) atomicAdd(&bins[histogram_bin(key)], 1u);
    }
  }
  add_bins(bins, histogram_of(a, image));
}

// Blocks for each image of `tasks` warp tasks: enough to fill the GPU, else several tasks each, since a block has a
// histogram to write.
template <typename Launch>
int64_t last_blocks(Launch& launch, int64_t images, int64_t tasks) {
  constexpr int64_t kWarps = kLastThreads / kWarp, kMostTasks = 16;
  const int64_t wanted = 32 * launch.processors();
  int64_t each = images * tasks / (wanted * kWarps);
  each = each < 1 ? 1 : (each > kMostTasks ? kMostTasks : each);
  return (tasks + kWarps * each - 1) / (kWarps * each);
}

// --- gradient

template <typename T>
struct GradientArgs {
  const T* grad;  // [N,C,H,W], contiguous or channels_last
  T* out;         // [N,C,h,w] in the same layout
  bool channels_last, align_corners;
  int64_t images, channels, h, w, scale, height, width;
  Neighbours<Acc<T>>* rows;     // [H], scratch; not needed by gaps
  Neighbours<Acc<T>>* columns;  // [W]
};

template <typename T>
__global__ void __launch_bounds__(kSubdivideThreads) tabulate_neighbours_kernel(GradientArgs<T> a) {
  for (int64_t i = global_thread(); i < a.height + a.width; i += global_threads()) {
    if (i < a.height) {
      a.rows[i] = neighbours<Acc<T>>(i, a.h, a.scale, a.align_corners);
    } else {
      a.columns[i - a.height] = neighbours<Acc<T>>(i - a.height, a.w, a.scale, a.align_corners);
    }
  }
}

// A source cell, its channel, and where the gradients of that channel lie.
template <typename T>
struct GradientItem {
  int64_t row, column, stride;  // stride: of adjacent outputs
  const T* plane;

  __device__ GradientItem(const GradientArgs<T>& a, int64_t i) {
    // Neighbouring threads take neighbours in memory.
    int64_t channel, image;
    if (a.channels_last) {
      channel = i % a.channels, i /= a.channels;
      column = i % a.w, i /= a.w;
      row = i % a.h, image = i / a.h;
    } else {
      column = i % a.w, i /= a.w;
      row = i % a.h, i /= a.h;
      channel = i % a.channels, image = i / a.channels;
    }
    stride = a.channels_last ? a.channels : 1;
    const int64_t outputs = a.height * a.width;
    plane = a.grad + image * a.channels * outputs + channel * (a.channels_last ? 1 : outputs);
  }
};

// Outputs 2 cell - 1 .. 2 cell + 2 have the source cell among their neighbours; with these weights.
template <typename A>
__device__ inline void gap_weights(int64_t cell, int64_t size, A (&weights)[4]) {
  const bool first = cell == 0, last = cell == size - 1;
  weights[0] = first ? A(0) : Gap<A>::kFar;
  weights[1] = first ? A(1) : Gap<A>::kNear;
  weights[2] = last ? A(1) : Gap<A>::kNear;
  weights[3] = last ? A(0) : Gap<A>::kFar;
}

// A thread gathers the gradient of one value of the source, in a fixed order.
template <typename T>
__global__ void __launch_bounds__(kSubdivideThreads) gradient_gaps_kernel(GradientArgs<T> a) {
  using A = Acc<T>;
  const int64_t total = a.images * a.channels * a.h * a.w;
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const GradientItem<T> item(a, i);
    A y[4], x[4];
    gap_weights(item.row, a.h, y);
    gap_weights(item.column, a.w, x);
    A values[4][4];
    RENDSEG_UNROLL
    for (int r = 0; r < 4; ++r) {
      const T* line = item.plane + ((2 * item.row - 1 + r) * a.width + 2 * item.column - 1) * item.stride;
      RENDSEG_UNROLL
      for (int c = 0; c < 4; ++c) {  // a weight of zero lies off the map
        values[r][c] = y[r] != A(0) && x[c] != A(0) ? widen(line[c * item.stride]) : A(0);
      }
    }
    A sum = A(0);
    RENDSEG_UNROLL
    for (int r = 0; r < 4; ++r) {
      A of_row = A(0);
      RENDSEG_UNROLL
      for (int c = 0; c < 4; ++c) of_row += x[c] * values[r][c];
      sum += y[r] * of_row;
    }
    a.out[i] = narrow<T>(sum);
  }
}

// Outputs [begin, end) along an axis: all those that have the source cell among their neighbours, and a few more.
struct OutputRange {
  int64_t begin, end;

  __device__ OutputRange(int64_t cell, int64_t size, int64_t scale, bool align_corners) {
    const int64_t outputs = size * scale;
    if (!align_corners) {
      begin = cell * scale - (scale + 1) / 2, end = (cell + 1) * scale + scale / 2 + 1;
    } else if (size == 1) {
      begin = 0, end = outputs;
    } else {
      begin = (cell - 1) * (outputs - 1) / (size - 1), end = (cell + 1) * (outputs - 1) / (size - 1) + 2;
    }
    if (begin < 0) begin = 0;
    if (end > outputs) end = outputs;
  }
};

template <typename A>
__device__ inline A weight_on(const Neighbours<A>& output, int64_t cell) {
  return (output.near == cell ? output.near_weight : A(0)) + (output.far == cell ? output.far_weight : A(0));
}

template <typename T>
__global__ void __launch_bounds__(kSubdivideThreads) gradient_any_kernel(GradientArgs<T> a) {
  using A = Acc<T>;
  const int64_t total = a.images * a.channels * a.h * a.w;
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const GradientItem<T> item(a, i);
    const OutputRange rows(item.row, a.h, a.scale, a.align_corners),
        columns(item.column, a.w, a.scale, a.align_corners);
    A sum = A(0);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const A y = weight_on(a.rows[row], item.row);
      if (y == A(0)) continue;
      const T* line = item.plane + row * a.width * item.stride;
      A of_row = A(0);
      for (int64_t column = columns.begin; column < columns.end; ++column) {
        const A x = weight_on(a.columns[column], item.column);
        if (x != A(0)) of_row += x * widen(line[column * item.stride]);
      }
      sum += y * of_row;
    }
    a.out[i] = narrow<T>(sum);
  }
}

// --- host

template <typename Launch, typename T>
void run_subdivide_backward(Launch& launch, const GradientArgs<T>& a) {
  const int64_t blocks = blocks_for(a.images * a.channels * a.h * a.w, kSubdivideThreads);
  if (by_gaps(a)) {
    launch({blocks, kSubdivideThreads}, gradient_gaps_kernel<T>, a);
    return;
  }
  launch({blocks_for(a.height + a.width, kSubdivideThreads), kSubdivideThreads}, tabulate_neighbours_kernel<T>, a);
  launch({blocks, kSubdivideThreads}, gradient_any_kernel<T>, a);
}

// Upsampled logits (where wanted), keys and histograms: one launch.
template <typename Launch, typename T>
void run_subdivide(Launch& launch, const UpsampleArgs<T>& a) {
  // A single channel of channels that lie together is read where it lies.
  const bool together = a.channels_last && !(a.single && a.fine == nullptr);
  if (together) {
    const bool gaps = by_gaps(a);
    const int64_t across = (units_along(a, a.w) + (gaps ? kGapsPerWarp : kWarp) - 1) / (gaps ? kGapsPerWarp : kWarp);
    const int64_t blocks = last_blocks(launch, a.images, across * units_along(a, a.h));
    launch({a.images * blocks, kLastThreads}, gaps ? upsample_last_kernel<T, true> : upsample_last_kernel<T, false>, a,
           blocks);
  } else if (by_gaps(a) && !a.channels_last) {
    constexpr int V = kVecWidth<T>;
    const bool vectors = a.width % V == 0 && is_aligned(a.source, V / 2 * sizeof(T)) && is_aligned(a.fine, 16);
    const Tiling tiling = tiles_of(a.width / (vectors ? V : 2), a.h + 1, 1);
    launch({a.images * tiling.per_image, kSubdivideThreads},
           !vectors      ? upsample_gaps_kernel<T, 2, false>
           : a.streaming ? upsample_gaps_kernel<T, V, true>
                         : upsample_gaps_kernel<T, V, false>,
           a, tiling);
  } else {
    const Tiling tiling = tiles_of(a.width, a.height, 1);
    launch({a.images * tiling.per_image, kSubdivideThreads},
           by_gaps(a) ? upsample_any_kernel<T, true> : upsample_any_kernel<T, false>, a, tiling);
  }
}

}  // namespace rendseg::subdivision
