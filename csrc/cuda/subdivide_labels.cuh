// CUDA kernels of _subdivide_labels: the argmax and the key of every output, without the upsampled logits, and without
// looking at the channels of outputs that are certain anyway.
//
// What is known without the channels. Let all four source cells of an output have the same largest channel a, with
// largest values s1 and second largest values s2. The stored value of a channel is a function I of its four source
// values, made of operations that never fall when one of them grows: products with weights >= 0, sums, roundings. (For
// finite values only: 0 * infinity is NaN. Cells with NaN, infinities or values whose sums might overflow are left out
// below.) Every other channel c is at most s2 at each source cell, so I(c) <= I(s2), and the computed margin, itself
// rounded, is at least bound = I(s1) - I(s2), rounded. Where bound > 0, a is strictly the largest: the label is a. No
// allowance for rounding is needed, because the bound goes through the very same roundings.
//
// Three passes:
// 1. label_sources: a, s1 and s2 of every source cell; the only pass that streams all logits. Writes a as the label
//    of the scale x scale outputs around the cell, and kNeverSelected as their keys if the selection reads all keys. A
//    source cell is always among the neighbours of the outputs around it, so this label is right for every output with
//    a bound.
// 2. label_unsettled: outputs without a bound are computed from their channels, and their keys counted. When at
//    least k keys lie in bins up to b, the k-th smallest key of the image does too: that b, from the keys counted here,
//    is the limit of the image (the last bin of all when fewer than k were counted).
// 3. label_uncertain: outputs whose bound lies in a bin up to the limit are computed as well. All others have keys
//    above at least k others, and are not selected at any key. They count as kNeverSelected: on a large
//    map upsampled by gaps the selection learns from the bounds which keys there are, and touches no others.
#pragma once

#include "subdivide.cuh"

namespace rendseg::subdivision {

template <typename T>
struct LabelArgs : UpsampleArgs<T> {
  void* labels;  // [N,H,W] uint8, or int16 when wide_labels
  bool wide_labels;
  bool fills_keys;  // the selection reads all keys, not only those that the bounds say are given
  int64_t k;
  Vec<T, 2>* largest;  // [N,h,w] the two largest logits of each source cell
  uint16_t* owner;     // [N,h,w] channel of the largest, or kNobody
  uint16_t* bound;     // [N] [units] histogram bin of the bound, or kSettled
  uint32_t* limit;     // [N]
  unsigned* counters;  // [N], zero
};

constexpr uint16_t kNobody = 0xffff;  // beyond any channel: there are at most 32768
constexpr uint16_t kSettled = kNoBound;

template <typename T>
__device__ inline void store_label(const LabelArgs<T>& a, int64_t at, int32_t label) {
  if (a.wide_labels) {
    static_cast<int16_t*>(a.labels)[at] = static_cast<int16_t>(label);
  } else {
    static_cast<uint8_t*>(a.labels)[at] = static_cast<uint8_t>(label);
  }
}

// --- pass 1

template <typename A>
struct SourceCell {
  TopTwo<A> top;
  A magnitude_seen = A(0);
  int32_t label = 0;

  __device__ void add(A value, int32_t channel) {
    if (value > top.first) label = channel;
    top.add(value);
    magnitude_seen = larger_or_nan(magnitude(value), magnitude_seen);
  }
  // Weights add up to one but for a rounding: no sum of such values overflows.
  __device__ bool is_tame() const { return magnitude_seen <= std::numeric_limits<A>::max() / 4; }
};

// `count` equal values from `to` on, which is aligned to `count` of them when that is a power of two.
template <int count, typename V>
__device__ inline void fill(V* to, const V (&values)[count / 2]) {
  constexpr int kWide = count < kVecWidth<V> ? count : kVecWidth<V>;
  RENDSEG_UNROLL
  for (int i = 0; i < count; i += kWide) {
    Vec<V, kWide> wide;
    RENDSEG_UNROLL
    for (int j = 0; j < kWide; ++j) wide[j] = values[(i + j) / 2];
    store_vec(to + i, wide);
  }
}

// What pass 1 knows of `V` adjacent source cells of a row, and first labels and keys of the outputs around them.
template <typename T, int V>
__device__ inline void store_sources(const LabelArgs<T>& a, int64_t image, int64_t row, int64_t column,
                                     const SourceCell<Acc<T>> (&cells)[V]) {
  const int64_t cell = (image * a.h + row) * a.w + column;
  Vec<uint16_t, V> owners;
  RENDSEG_UNROLL
  for (int v = 0; v < V; ++v) {
    owners[v] = cells[v].is_tame() ? static_cast<uint16_t>(cells[v].label) : kNobody;
  }
  store_vec(a.owner + cell, owners);
  constexpr int kPairs = V < kVecWidth<T> / 2 ? V : kVecWidth<T> / 2;  // that fit one store
  RENDSEG_UNROLL
  for (int v = 0; v < V; v += kPairs) {
    Vec<T, 2 * kPairs> pairs;
    RENDSEG_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      pairs[2 * i] = narrow<T>(cells[v + i].top.first), pairs[2 * i + 1] = narrow<T>(cells[v + i].top.second);
    }
    store_vec(reinterpret_cast<T*>(a.largest + cell + v), pairs);
  }

  const int64_t output = (image * a.height + row * a.scale) * a.width + column * a.scale;
  if (a.scale == 2) {
    uint32_t keys[V];
    uint8_t narrow_labels[V];
    int16_t wide_labels[V];
    RENDSEG_UNROLL
    for (int v = 0; v < V; ++v) {
      keys[v] = kNeverSelected;
      narrow_labels[v] = static_cast<uint8_t>(cells[v].label), wide_labels[v] = static_cast<int16_t>(cells[v].label);
    }
    RENDSEG_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (a.fills_keys) fill<2 * V>(a.keys + output + r * a.width, keys);
      if (a.wide_labels) {
        fill<2 * V>(static_cast<int16_t*>(a.labels) + output + r * a.width, wide_labels);
      } else {
        fill<2 * V>(static_cast<uint8_t*>(a.labels) + output + r * a.width, narrow_labels);
      }
    }
    return;
  }
  for (int64_t r = 0; r < a.scale; ++r) {
    RENDSEG_UNROLL
    for (int v = 0; v < V; ++v) {
      for (int64_t i = 0; i < a.scale; ++i) {
        const int64_t at = output + r * a.width + v * a.scale + i;
        if (a.fills_keys) a.keys[at] = kNeverSelected;
        store_label(a, at, cells[v].label);
      }
    }
  }
}

// Channels apart: a thread takes `V` adjacent cells (w is a multiple of V).
template <typename T, int V>
__global__ void __launch_bounds__(kSubdivideThreads) label_sources_kernel(LabelArgs<T> a) {
  const int64_t plane = a.h * a.w;
  const int64_t spans = a.images * (plane / V);
  for (int64_t span = global_thread(); span < spans; span += global_threads()) {
    const int64_t image = span / (plane / V), cell = span % (plane / V) * V;
    const T* source = a.source + image * a.channels * plane + cell;
    SourceCell<Acc<T>> cells[V];
    constexpr int kAhead = 4;  // channels on their way
    int64_t c = 0;
    for (; c + kAhead <= a.channels; c += kAhead) {
      Vec<T, V> values[kAhead];
      RENDSEG_UNROLL
      for (int i = 0; i < kAhead; ++i) values[i] = load_vec<V>(source + (c + i) * plane);
      RENDSEG_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        RENDSEG_UNROLL
        for (int v = 0; v < V; ++v) cells[v].add(widen(values[i][v]), static_cast<int32_t>(c + i));
      }
    }
    for (; c < a.channels; ++c) {
      const Vec<T, V> values = load_vec<V>(source + c * plane);
      RENDSEG_UNROLL
      for (int v = 0; v < V; ++v) cells[v].add(widen(values[v]), static_cast<int32_t>(c));
    }
    store_sources<T, V>(a, image, cell / a.w, cell % a.w, cells);
  }
}

// Channels together: a warp takes 32 cells, its lanes channels while they load, cells while they look.
template <typename T>
__global__ void __launch_bounds__(kLastThreads) label_sources_last_kernel(LabelArgs<T> a) {
  RENDSEG_SHARED(LastTile<T>[kLastThreads / kWarp], tiles);
  LastTile<T>& tile = tiles[warp_id()];
  const uint32_t lane = static_cast<uint32_t>(lane_id());
  const int64_t cells = a.images * a.h * a.w;
  const Rounds rounds(a.channels);
  for (int64_t first = (global_thread() - lane_id()); first < cells; first += global_threads()) {
    SourceCell<Acc<T>> mine;
    for (int64_t c0 = 0; c0 < a.channels; c0 += rounds.size) {
      const uint32_t size = a.channels - c0 < rounds.size ? static_cast<uint32_t>(a.channels - c0) : rounds.size;
      const T* source = a.source + first * a.channels + c0;
      for (uint32_t item = lane; item < kWarp * rounds.size; item += kWarp) {
        const uint32_t which = rounds.divide(item), c = item - which * rounds.size;
        if (c < size && first + which < cells) tile[which][c] = source[which * a.channels + c];
      }
      __syncwarp();
      if (first + lane < cells) {
        for (uint32_t c = 0; c < size; ++c) mine.add(widen(tile[lane][c]), static_cast<int32_t>(c0 + c));
      }
      __syncwarp();
    }
    const int64_t cell = first + lane;
    if (cell < cells) {
      const SourceCell<Acc<T>> one[1] = {mine};
      store_sources<T, 1>(a, cell / (a.h * a.w), cell / a.w % a.h, cell % a.w, one);
    }
  }
}

// --- passes 2 and 3

// A thread looks at kLookRows units of a tile; those to be computed go into a list, so that full warps compute.
constexpr int kLookRows = 4;
constexpr int kTileUnits = kSubdivideThreads * kLookRows;

struct UnitList {
  unsigned count;
  uint16_t units[kTileUnits];  // row in the tile << shift | column in the tile
};

// Appends `unit` of every lane that wants to. All lanes of a warp take part.
__device__ inline void append(UnitList& list, bool wanted, unsigned unit) {
  const unsigned ballot = __ballot_sync(kAllLanes, wanted);
  if (ballot == 0) return;
  unsigned first = 0;
  if (lane_id() == 0) first = atomicAdd(&list.count, static_cast<unsigned>(__popc(ballot)));
  first = __shfl_sync(kAllLanes, first, 0);
  if (wanted) list.units[first + __popc(ballot & ((1u << lane_id()) - 1))] = static_cast<uint16_t>(unit);
}

// Labels and keys of the listed units from their channels. A thread takes a unit; the next channel is on its way.
template <typename T, bool kGaps>
__device__ inline void compute_listed(const LabelArgs<T>& a, const Tile& tile, int shift, const UnitList& list,
                                      HistogramTable& bins) {
  using A = Acc<T>;
  constexpr int kOutputs = Unit<A, kGaps>::kOutputs;
  const int64_t cell_stride = a.channels_last ? a.channels : 1;
  const int64_t channel_stride = a.channels_last ? 1 : a.h * a.w;
  for (unsigned i = threadIdx.x; i < list.count; i += blockDim.x) {
    const unsigned at = list.units[i];
    const Unit<A, kGaps> unit(a, tile.row + (at >> shift), tile.column + (at & ((1u << shift) - 1)));
    const T* source = a.source + tile.image * a.channels * a.h * a.w;
    const T* corner[4];
    T next[4];
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      corner[j] = source + unit.corner(j, a.w) * cell_stride;
      next[j] = *corner[j];
    }
    TopTwoLabel<A> top[kOutputs];
    for (int64_t c = 0; c < a.channels; ++c) {
      A values[4], out[kOutputs];
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) values[j] = widen(next[j]);
      if (c + 1 < a.channels) {
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) next[j] = *(corner[j] += channel_stride);
      }
      unit.values(values, out);
      RENDSEG_UNROLL
      for (int j = 0; j < kOutputs; ++j) top[j].add(as_stored<T>(out[j]), static_cast<int32_t>(c));
    }
    RENDSEG_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      if (!unit.has(j)) continue;
      const int64_t output = tile.image * a.height * a.width + unit.output(j, a.width);
      const uint32_t key = margin_key(top[j].top.margin(false));
      a.keys[output] = key;
      store_label(a, output, top[j].label);
      atomicAdd(&bins[histogram_bin(key)], 1u);
    }
  }
}

// The bin of the smallest bound of a unit, or kSettled when it has outputs without one.
template <typename T, bool kGaps>
__device__ inline uint16_t bound_of(const LabelArgs<T>& a, int64_t image, const Unit<Acc<T>, kGaps>& unit) {
  using A = Acc<T>;
  constexpr int kOutputs = Unit<A, kGaps>::kOutputs;
  int64_t cell[4];
  uint16_t owner[4];
  RENDSEG_UNROLL
  for (int i = 0; i < 4; ++i) {
    cell[i] = image * a.h * a.w + unit.corner(i, a.w);
    owner[i] = a.owner[cell[i]];
  }
  if (owner[0] == kNobody || owner[1] != owner[0] || owner[2] != owner[0] || owner[3] != owner[0]) return kSettled;
  A largest[4], second[4], at_largest[kOutputs], at_second[kOutputs];
  RENDSEG_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vec<T, 2> two = a.largest[cell[i]];
    largest[i] = widen(two[0]), second[i] = widen(two[1]);
  }
  unit.values(largest, at_largest);
  unit.values(second, at_second);
  uint32_t key = kNeverSelected;
  bool certain = true;
  RENDSEG_UNROLL
  for (int i = 0; i < kOutputs; ++i) {
    if (!unit.has(i)) continue;
    const A bound = as_stored<T>(at_largest[i]) - as_stored<T>(at_second[i]);
    certain = certain && bound > A(0);
    key = min(key, margin_key(static_cast<float>(bound)));
  }
  return certain ? static_cast<uint16_t>(histogram_bin(key)) : kSettled;
}

// The first bin up to which the histogram holds `k` keys, or the last one, into `limit`.
__device__ inline void find_limit(const uint32_t* histogram, int64_t k, uint32_t* limit) {
  constexpr int kEach = kHistogramBins / kSubdivideThreads;
  RENDSEG_SHARED(unsigned long long[kSubdivideThreads / kWarp + 1], scratch);
  const int first = static_cast<int>(threadIdx.x) * kEach;
  unsigned long long mine = 0, total;
  for (int i = 0; i < kEach; ++i) mine += __ldcg(histogram + first + i);
  unsigned long long below = block_exclusive_scan(mine, total, scratch);
  const unsigned long long wanted = static_cast<unsigned long long>(k);
  if (total < wanted) {
    if (threadIdx.x == 0) *limit = kHistogramBins - 1;
  } else if (below < wanted && below + mine >= wanted) {
    int bin = first;
    while ((below += __ldcg(histogram + bin)) < wanted) ++bin;
    *limit = static_cast<uint32_t>(bin);
  }
}

template <typename T, bool kGaps>
__global__ void __launch_bounds__(kSubdivideThreads)
    label_unsettled_kernel(LabelArgs<T> a, Tiling tiling, int64_t units_high, int64_t units_wide) {
  RENDSEG_SHARED(HistogramTable, bins);
  RENDSEG_SHARED(UnitList, list);
  if (threadIdx.x == 0) list.count = 0;
  clear_bins(bins);
  const Tile tile = tile_of_block(tiling);
  const int high = kSubdivideThreads >> tiling.shift;
  for (int look = 0; look < kLookRows; ++look) {
    const int at = static_cast<int>(threadIdx.x) + look * kSubdivideThreads;
    const int64_t row = tile.row + look * high + (static_cast<int>(threadIdx.x) >> tiling.shift);
    const int64_t column = tile.column + (at & ((1 << tiling.shift) - 1));
    bool wanted = false;
    if (row < units_high && column < units_wide) {
      const uint16_t bound = bound_of<T, kGaps>(a, tile.image, Unit<Acc<T>, kGaps>(a, row, column));
      a.bound[(tile.image * units_high + row) * units_wide + column] = bound;
      wanted = bound == kSettled;
    }
    append(list, wanted, static_cast<unsigned>(at));
  }
  __syncthreads();
  compute_listed<T, kGaps>(a, tile, tiling.shift, list, bins);
  uint32_t* histogram = histogram_of(a, tile.image);
  add_bins(bins, histogram);
  if (last_block_to_arrive(a.counters + tile.image, static_cast<unsigned>(tiling.per_image))) {
    find_limit(histogram, a.k, a.limit + tile.image);
  }
}

template <typename T, bool kGaps>
__global__ void __launch_bounds__(kSubdivideThreads)
    label_uncertain_kernel(LabelArgs<T> a, Tiling tiling, int64_t units_high, int64_t units_wide) {
  RENDSEG_SHARED(HistogramTable, bins);
  RENDSEG_SHARED(UnitList, list);
  if (threadIdx.x == 0) list.count = 0;
  clear_bins(bins);
  const Tile tile = tile_of_block(tiling);
  const uint32_t limit = a.limit[tile.image];
  const int high = kSubdivideThreads >> tiling.shift;
  for (int look = 0; look < kLookRows; ++look) {
    const int at = static_cast<int>(threadIdx.x) + look * kSubdivideThreads;
    const int64_t row = tile.row + look * high + (static_cast<int>(threadIdx.x) >> tiling.shift);
    const int64_t column = tile.column + (at & ((1 << tiling.shift) - 1));
    const bool wanted = row < units_high && column < units_wide &&
                        a.bound[(tile.image * units_high + row) * units_wide + column] <= limit;
    append(list, wanted, static_cast<unsigned>(at));
  }
  __syncthreads();
  if (list.count == 0) return;
  compute_listed<T, kGaps>(a, tile, tiling.shift, list, bins);
  add_bins(bins, histogram_of(a, tile.image));
}

// --- host

// Labels, keys (kNeverSelected where an output cannot be among the k most uncertain) and histograms of the other keys:
// three launches. Needs C >= 2.
template <typename Launch, typename T>
void run_subdivide_labels(Launch& launch, const LabelArgs<T>& a) {
  if (a.channels_last) {
    launch({blocks_for(a.images * a.h * a.w, kLastThreads), kLastThreads}, label_sources_last_kernel<T>, a);
  } else {
    constexpr int V = kVecWidth<T> < 4 ? kVecWidth<T> : 4;
    const bool vectors = a.w % V == 0 && is_aligned(a.source, V * sizeof(T));
    launch({blocks_for(a.images * a.h * a.w / (vectors ? V : 1), kSubdivideThreads), kSubdivideThreads},
           vectors ? label_sources_kernel<T, V> : label_sources_kernel<T, 1>, a);
  }
  const int64_t units_high = units_along(a, a.h), units_wide = units_along(a, a.w);
  const Tiling tiling = tiles_of(units_wide, units_high, kLookRows);
  const LaunchShape shape{a.images * tiling.per_image, kSubdivideThreads};
  const bool gaps = by_gaps(a);
  launch(shape, gaps ? label_unsettled_kernel<T, true> : label_unsettled_kernel<T, false>, a, tiling, units_high,
         units_wide);
  launch(shape, gaps ? label_uncertain_kernel<T, true> : label_uncertain_kernel<T, false>, a, tiling, units_high,
         units_wide);
}

}  // namespace rendseg::subdivision
