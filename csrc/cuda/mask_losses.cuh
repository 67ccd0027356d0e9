// CUDA kernels of mask_losses, of its gradient and of mask_costs, the same bits from run to run.
//
//   logits[B,Q,H,W], targets b: [T_b,h_b,w_b], coords of N pairs [N,P,2] -> two losses [N]; coords of images [B,P,2] ->
//   two costs [B,Q,T]
//
// Logits and targets are read where they lie, four taps at each point. Nothing of a target is copied or converted.
//
//   mask_sums_kernel    A block takes kMaskSlice points of a pair and adds up what its losses are made of: four numbers
//                       for each slice
//   mask_finish_kernel  A thread adds the slices of a pair in their order, and makes its losses
//   mask_slope_kernel   The gradient: from the same sums, d loss / dx of each point, 4 bytes for each of N P (8 in
//                       float64)
//   mask_gather_kernel  A block takes 1,024 adjacent cells of the plane of one query. It looks for the pairs of that
//                       plane, and sums their taps on its cells in the order of pairs, then points, with the lists of
//                       point_sample_backward.cuh. Each cell of the dense gradient is written once; a plane without a
//                       pair is filled with zeros
//   mask_costs_kernel   A block takes 32 queries, 32 targets and kCostSlice points of an image, 32 points at a time: in
//                       shared memory x, softplus(x) and sigmoid(x) of queries and y of targets, in registers four
//                       targets of a query for each thread. softplus(x) - x y is summed as such: two sums would cancel
//   mask_costs_finish_kernel  A thread adds the slices of a query and a target in their order
//
// A launch takes kMaskImages images, whose targets it gets by value: no table is copied to the GPU.
#pragma once

#include "point_sample_backward.cuh"

#include "../mask_views.h"

namespace rendseg {

constexpr int kMaskThreads = kSampleThreads;
constexpr int kMaskImages = 32;
constexpr int64_t kMaskSlice = 4096;  // points of a block that sums a pair
constexpr int64_t kCostSlice = 1024;  // points of a block of mask_costs
constexpr int kCostTile = 32;         // queries, targets, and points at a time
constexpr int kCostTargets = 4;       // of a thread
static_assert(kMaskThreads == kCostTile * kCostTile / kCostTargets);

template <typename T>
struct MaskArgs {
  SampleMap<T> logits;  // the channels are queries
  const Acc<T>* coords;
  int64_t points;
  MaskOptions options;
  int64_t all_images, first_image, images;  // the last two are those of this launch
  MaskView target[kMaskImages];
};

struct PairIndex {
  const int64_t *image, *query, *target;
  int64_t image_stride, query_stride, target_stride, pairs, queries;

  __device__ int64_t image_of(int64_t n) const { return image[n * image_stride]; }
  __device__ int64_t plane_of(int64_t n) const { return image_of(n) * queries + query[n * query_stride]; }
};

// The logit of a plane at a point.
template <typename T>
__device__ inline Acc<T> logit_at(const MaskArgs<T>& args, const T* plane, const Acc<T>* coord) {
  const SampleMap<T>& map = args.logits;
  const PointTaps<Acc<T>> taps = locate(coord, map.height, map.width, SampleOptions{false, args.options.border, false});
  const T* from = plane + first_tap(map, taps.x, taps.y);
  Acc<T> value[4];
  RENDSEG_UNROLL
  for (int t = 0; t < 4; ++t) value[t] = taps.inside >> t & 1 ? widen(from[tap_step(map, t)]) : Acc<T>(0);
  return weighted(value, taps);
}

template <typename A, typename E>
__device__ inline A number(E value) {
  if constexpr (std::is_same_v<E, half_t> || std::is_same_v<E, bfloat16_t>) {
    return static_cast<A>(widen(value));
  } else {
    return static_cast<A>(value);
  }
}

// Target t of an image at a point of its canvas, which is zero beyond the target.
template <typename A>
__device__ inline A target_at(const MaskView& view, int64_t t, const A* coord, const MaskOptions& options) {
  const PointTaps<A> taps =
      locate(coord, view.canvas_height, view.canvas_width, SampleOptions{options.nearest, options.border, false});
  A value[4];
  with_mask_dtype<half_t, bfloat16_t>(view.dtype, [&]<typename E>() {
    const E* mask = view.mask<E>(t);
    RENDSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int32_t x = taps.x + (i & 1), y = taps.y + (i >> 1);
      const bool there = (taps.inside >> i & 1) && x < view.width && y < view.height;
      value[i] = there ? number<A>(mask[y * view.stride_y + x * view.stride_x]) : A(0);
    }
  });
  return weighted(value, taps);
}

// softplus(x) and sigmoid(x) from one exponential, which cannot overflow.
template <typename A>
struct Soft {
  A plus, sigmoid;
};
template <typename A>
__device__ inline Soft<A> soft(A x) {
  const A e = std::exp(-std::abs(x));
  const A half = A(1) / (A(1) + e);
  return {(x > A(0) ? x : A(0)) + std::log1p(e), x > A(0) ? half : e * half};
}

// --- the losses of pairs

// Planes and points of a pair; `there` is false for a pair of an image that another launch takes.
template <typename T>
struct PairPlanes {
  bool there;
  int64_t image, target;
  const T* logits;
  const Acc<T>* coords;
};

template <typename T>
__device__ inline PairPlanes<T> planes_of(const MaskArgs<T>& args, const PairIndex& index, int64_t n) {
  const int64_t image = index.image_of(n) - args.first_image;
  if (image < 0 || image >= args.images) return {};
  const int64_t q = index.query[n * index.query_stride], t = index.target[n * index.target_stride];
  RENDSEG_DEVICE_ASSERT(q >= 0 && q < index.queries, "query_index must lie in [0, Q)");
  RENDSEG_DEVICE_ASSERT(t >= 0 && t < args.target[image].count, "target_index must lie in [0, T)");
  const SampleMap<T>& map = args.logits;
  const T* logits = map.data + (args.first_image + image) * map.stride_n + q * map.stride_c;
  return {true, image, t, logits, args.coords + n * args.points * 2};
}

template <typename A>
__device__ inline MaskSums<A> operator+(const MaskSums<A>& a, const MaskSums<A>& b) {
  return {a.entropy + b.entropy, a.overlap + b.overlap, a.sigmoid + b.sigmoid, a.target + b.target};
}

// Of all slices of a pair, in their order.
template <typename A>
__device__ inline MaskSums<A> sums_of(const MaskSums<A>* parts, int64_t slices, int64_t n) {
  MaskSums<A> sums;
  for (int64_t i = 0; i < slices; ++i) sums = sums + parts[n * slices + i];
  return sums;
}

template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    mask_sums_kernel(MaskArgs<T> args, PairIndex index, int64_t slices, MaskSums<Acc<T>>* parts) {
  using A = Acc<T>;
  RENDSEG_SHARED(A[kMaskThreads / kWarp][4], of_warp);
  const int64_t n = blockIdx.x / slices, first = blockIdx.x % slices * kMaskSlice;
  RENDSEG_DEVICE_ASSERT(index.image_of(n) >= 0 && index.image_of(n) < args.all_images,
                        "image_index must lie in [0, B)");
  const PairPlanes<T> pair = planes_of(args, index, n);
  if (!pair.there) return;
  const int64_t last = min(first + kMaskSlice, args.points);
  MaskSums<A> sums;
  for (int64_t p = first + threadIdx.x; p < last; p += kMaskThreads) {
    const A x = logit_at(args, pair.logits, pair.coords + p * 2);
    const A y = target_at(args.target[pair.image], pair.target, pair.coords + p * 2, args.options);
    const Soft<A> of_x = soft(x);
    sums = sums + MaskSums<A>{of_x.plus - x * y, of_x.sigmoid * y, of_x.sigmoid, y};
  }
  const MaskSums<A> of_lanes{warp_sum(sums.entropy), warp_sum(sums.overlap), warp_sum(sums.sigmoid),
                             warp_sum(sums.target)};
  if (lane_id() == 0) {
    A* to = of_warp[warp_id()];
    to[0] = of_lanes.entropy;
    to[1] = of_lanes.overlap;
    to[2] = of_lanes.sigmoid;
    to[3] = of_lanes.target;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  MaskSums<A> total;
  for (int warp = 0; warp < kMaskThreads / kWarp; ++warp) {
    const A* from = of_warp[warp];
    total = total + MaskSums<A>{from[0], from[1], from[2], from[3]};
  }
  parts[blockIdx.x] = total;
}

template <typename A>
__global__ void mask_finish_kernel(const MaskSums<A>* parts, int64_t slices, int64_t pairs, int64_t points,
                                   A* cross_entropy, A* dice) {
  for (int64_t n = global_thread(); n < pairs; n += global_threads()) {
    const MaskSums<A> sums = sums_of(parts, slices, n);
    cross_entropy[n] = sums.cross_entropy(points);
    dice[n] = sums.dice();
  }
}

// --- their gradient

template <typename A>
struct LossGrads {
  const A *cross_entropy, *dice;  // [N]
  int64_t cross_entropy_stride, dice_stride;
};

template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    mask_slope_kernel(MaskArgs<T> args, PairIndex index, LossGrads<Acc<T>> grads, int64_t slices,
                      const MaskSums<Acc<T>>* parts, Acc<T>* slopes /*[N,P]*/) {
  using A = Acc<T>;
  const int64_t n = blockIdx.x / slices, first = blockIdx.x % slices * kMaskSlice;
  const PairPlanes<T> pair = planes_of(args, index, n);
  if (!pair.there) return;
  const MaskSlope<A> slope =
      mask_slope(sums_of(parts, slices, n), args.points, grads.cross_entropy[n * grads.cross_entropy_stride],
                 grads.dice[n * grads.dice_stride]);
  const int64_t last = min(first + kMaskSlice, args.points);
  for (int64_t p = first + threadIdx.x; p < last; p += kMaskThreads) {
    const A x = logit_at(args, pair.logits, pair.coords + p * 2);
    const A y = target_at(args.target[pair.image], pair.target, pair.coords + p * 2, args.options);
    slopes[n * args.points + p] = slope(soft(x).sigmoid, y);
  }
}

// `taps`: the pairs as images of one channel, whose upstream gradient are the slopes.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads, 3)
    mask_gather_kernel(GradArgs<Acc<T>> taps, PairIndex index, GradMap<T> out) {
  using A = Acc<T>;
  RENDSEG_SHARED(TapLists<A>, lists);
  RENDSEG_SHARED(int[kMaskThreads], chosen);
  const GradMap<A>& map = taps.map[0];
  const int64_t tiles = tiles_of(map.map), plane = blockIdx.x / tiles;
  const int64_t first_cell = blockIdx.x % tiles * kTileCells;
  A sum[kCellsPerThread][1] = {};
  for (int64_t start = 0; start < index.pairs; start += kMaskThreads) {
    const int64_t n = start + threadIdx.x;
    const bool mine = n < index.pairs && index.plane_of(n) == plane;
    int total = 0;
    const int at = block_exclusive_scan(mine ? 1 : 0, total, lists.scratch);
    if (mine) chosen[at] = static_cast<int>(threadIdx.x);
    __syncthreads();
    for (int i = 0; i < total; ++i) {
      const CellTile tile{start + chosen[i], first_cell};
      for (int64_t from = 0; from < taps.points;) {
        const int count = next_window(taps, map, tile, from, lists);
        list_taps(taps, map, tile, count, lists);
        add_taps<1>(taps, map, tile.n, 0, lists, sum);
      }
    }
    __syncthreads();  // chosen is still in use
  }
  const CellTile tile{plane / index.queries, first_cell};
  store_cells<1>(out, tile, plane % index.queries, sum);
}

// --- costs

template <typename A>
struct CostTile {
  static constexpr int kPitch = kCostTile + 1;
  A x[kCostTile][kPitch], plus[kCostTile][kPitch], sigmoid[kCostTile][kPitch], y[kCostTile][kPitch];
};

// What a slice adds to a query and a target.
template <typename A>
struct CostParts {
  A* entropy;  // [slices,B,Q,T] of softplus(x) - x y
  A* overlap;  // [slices,B,Q,T] of s y
  A* sigmoid;  // [slices,B,Q] of s
  A* target;   // [slices,B,T] of y
};

// Blocks: slices, then tiles of targets, then tiles of queries, then images of this launch.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads, sizeof(T) == 8 ? 2 : 3)  // with more, registers spill
    mask_costs_kernel(MaskArgs<T> args, int64_t most_targets, CostParts<Acc<T>> parts) {
  using A = Acc<T>;
  RENDSEG_SHARED(CostTile<A>, tile);
  const int64_t slices = (args.points + kCostSlice - 1) / kCostSlice, queries = args.logits.channels;
  const int64_t target_tiles = (most_targets + kCostTile - 1) / kCostTile;
  const int64_t query_tiles = (queries + kCostTile - 1) / kCostTile;
  const int64_t slice = blockIdx.x % slices, rest = blockIdx.x / slices, image = rest / target_tiles / query_tiles;
  const int64_t first_target = rest % target_tiles * kCostTile;
  const int64_t first_query = rest / target_tiles % query_tiles * kCostTile;
  const MaskView& view = args.target[image];
  if (first_target >= view.count) return;
  const int64_t b = args.first_image + image;
  const A* coords = args.coords + b * args.points * 2;
  const T* logits = args.logits.data + b * args.logits.stride_n;
  const int lane = lane_id(), warp = warp_id();
  const int q = static_cast<int>(threadIdx.x) / (kCostTile / kCostTargets);
  const int t0 = static_cast<int>(threadIdx.x) % (kCostTile / kCostTargets) * kCostTargets;
  A entropy[kCostTargets] = {}, overlap[kCostTargets] = {}, target[kCostTargets] = {}, sigmoid = 0;
  const int64_t last = min((slice + 1) * kCostSlice, args.points);
  for (int64_t start = slice * kCostSlice; start < last; start += kCostTile) {
    const int64_t p = start + lane;
    __syncthreads();  // the tile is still in use
    for (int row = warp; row < kCostTile; row += kMaskThreads / kWarp) {
      // Points and queries that are not there add nothing.
      const bool query = p < last && first_query + row < queries, mask = p < last && first_target + row < view.count;
      const A x = query ? logit_at(args, logits + (first_query + row) * args.logits.stride_c, coords + p * 2) : A(0);
      const Soft<A> of_x = query ? soft(x) : Soft<A>{A(0), A(0)};
      tile.x[row][lane] = x;
      tile.plus[row][lane] = of_x.plus;
      tile.sigmoid[row][lane] = of_x.sigmoid;
      tile.y[row][lane] = mask ? target_at(view, first_target + row, coords + p * 2, args.options) : A(0);
    }
    __syncthreads();
    for (int i = 0; i < kCostTile; ++i) {
      const A x = tile.x[q][i], plus = tile.plus[q][i], s = tile.sigmoid[q][i];
      sigmoid += s;
      RENDSEG_UNROLL
      for (int k = 0; k < kCostTargets; ++k) {
        const A y = tile.y[t0 + k][i];
        entropy[k] += plus - x * y;
        overlap[k] += s * y;
        target[k] += y;
      }
    }
  }
  if (first_query + q >= queries) return;
  const int64_t row = (slice * args.all_images + b) * queries + first_query + q;
  if (first_target == 0 && t0 == 0) parts.sigmoid[row] = sigmoid;
  RENDSEG_UNROLL
  for (int k = 0; k < kCostTargets; ++k) {
    const int64_t t = first_target + t0 + k;
    if (t >= view.count) return;
    parts.entropy[row * most_targets + t] = entropy[k];
    parts.overlap[row * most_targets + t] = overlap[k];
    if (first_query + q == 0) parts.target[(slice * args.all_images + b) * most_targets + t] = target[k];
  }
}

// Of the images of this launch; zero beyond their targets.
template <typename T>
__global__ void mask_costs_finish_kernel(MaskArgs<T> args, int64_t most_targets, CostParts<Acc<T>> parts,
                                         Acc<T>* cross_entropy, Acc<T>* dice) {
  using A = Acc<T>;
  const int64_t slices = (args.points + kCostSlice - 1) / kCostSlice, queries = args.logits.channels;
  const int64_t of_image = queries * most_targets;
  for (int64_t item = global_thread(); item < args.images * of_image; item += global_threads()) {
    const int64_t image = item / of_image, b = args.first_image + image;
    const int64_t q = item % of_image / most_targets, t = item % most_targets;
    MaskSums<A> sums;
    if (t < args.target[image].count) {
      for (int64_t slice = 0; slice < slices; ++slice) {
        const int64_t row = (slice * args.all_images + b) * queries + q;
        sums = sums + MaskSums<A>{parts.entropy[row * most_targets + t], parts.overlap[row * most_targets + t],
                                  parts.sigmoid[row], parts.target[(slice * args.all_images + b) * most_targets + t]};
      }
    }
    cross_entropy[b * of_image + q * most_targets + t] = sums.cross_entropy(args.points);
    dice[b * of_image + q * most_targets + t] = sums.dice();  // of nothing: 0
  }
}

}  // namespace rendseg
