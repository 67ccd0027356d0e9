// CUDA kernels of uncertainty and uncertain_points: one pass over the logits makes the margin of every cell, and for
// the selection its key and the first histogram of the keys.
//
// Planar maps (NCHW): a thread owns a few neighbouring cells and walks over the channels. Interleaved maps
// (channels_last): the channels of a tile of cells are staged in shared memory, so that global memory is read in order,
// and one to eight threads share a cell.
#pragma once

#include "device.cuh"

#include "../math/margin.h"
#include "../math/radix_key.h"
#include "block_select.cuh"
#include "mma.cuh"
#include "select.cuh"

namespace rendseg {

template <typename T>
struct MarginArgs {
  const T* logits;  // [images, channels, cells]
  int64_t images, channels, cells;
  int64_t image_stride, channel_stride, cell_stride;  // in elements; cell_stride or channel_stride is 1, or channels is
  const int64_t* class_index;                         // [images]: the one channel that matters; or null
  int64_t class_index_stride;
  float* uncertainty;    // [images, cells]: minus the margin; or null, then
  uint32_t* keys;        // [images, cells]
  uint32_t* histograms;  // [images, kHistogramBins], zeroed, or null
};

constexpr int kMarginThreads = 256;

// What the cell kernels read of one image.
template <typename T>
struct MarginSource {
  const T* base;
  int64_t channels;

  __device__ MarginSource(const MarginArgs<T>& args, int64_t image)
      : base(args.logits + image * args.image_stride), channels(args.channels) {
    if (args.class_index == nullptr) return;
    const int64_t chosen = args.class_index[image * args.class_index_stride];
    const bool valid = chosen >= 0 && chosen < channels;
    RENDSEG_DEVICE_ASSERT(valid, "class_index must lie in [0, C)");
    base += valid ? chosen * args.channel_stride : 0;
    channels = 1;
  }
};

// Where the margins of one image go; counts the keys in shared memory on the way. (Holds next to nothing, since the
// registers are wanted elsewhere: `args` are in constant memory.)
template <typename T>
class MarginSink {
 public:
  __device__ MarginSink(const MarginArgs<T>& args, uint32_t image, uint32_t* histogram)
      : args_(args), image_(image), histogram_(histogram) {
    if (args_.histograms == nullptr) return;
    clear_histogram(histogram_);
    __syncthreads();
  }

  // The margins of V consecutive cells. All lanes of the warp take part, with or without cells.
  template <int V>
  __device__ void put(int64_t cell, const float (&margin)[V], bool valid) {
    const int64_t at = image_ * args_.cells + cell;
    if (args_.uncertainty != nullptr) {
      Vec<float, V> out;
      RENDSEG_UNROLL
      for (int i = 0; i < V; ++i) out[i] = 0.0f - margin[i];
      if (valid) store_vec(args_.uncertainty + at, out);
      return;
    }
    Vec<uint32_t, V> out;
    RENDSEG_UNROLL
    for (int i = 0; i < V; ++i) out[i] = margin_key(margin[i]);
    if (valid) store_vec(args_.keys + at, out);
    if (args_.histograms == nullptr) return;
    RENDSEG_UNROLL
    for (int i = 0; i < V; ++i) add_to_histogram(histogram_, histogram_bin(out[i]), valid);
  }

  __device__ void finish() {
    if (args_.histograms == nullptr) return;
    __syncthreads();
    flush_histogram(histogram_, args_.histograms + int64_t{image_} * kHistogramBins);
  }

 private:
  const MarginArgs<T>& args_;
  uint32_t image_;
  uint32_t* histogram_;
};

// Cells to a thread in planar maps: 16 bytes of margins or of float64 logits. More halves would cost too many
// registers.
template <typename T>
constexpr int kPlanarCells = std::is_same_v<T, double> ? 2 : 4;

// One vector of cells in each of up to four planes.
template <typename T, int V>
struct Planes {
  static constexpr int kCount = 4;
  Vec<T, V> at[kCount];

  __device__ void load(const T* from, int64_t stride, int64_t left) {
    RENDSEG_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (n < left) at[n] = load_vec<V>(from + n * stride);
    }
  }
  __device__ void add_to(TopTwo<Acc<T>> (&top)[V], int64_t left) const {
    RENDSEG_UNROLL
    for (int n = 0; n < kCount; ++n) {
      if (n >= left) break;
      RENDSEG_UNROLL
      for (int i = 0; i < V; ++i) top[i].add(widen(at[n][i]));
    }
  }
};

// `blocks_each` blocks to an image; V cells to a thread, V divides `cells`.
template <typename T, int V>
__global__ void __launch_bounds__(kMarginThreads) planar_margin_kernel(MarginArgs<T> args, uint32_t blocks_each) {
  RENDSEG_SHARED(uint32_t[kHistogramBins], histogram);
  const uint32_t image = blockIdx.x / blocks_each, part = blockIdx.x % blocks_each;
  const MarginSource<T> source(args, image);
  MarginSink<T> sink(args, image, histogram);
  const int64_t vectors = args.cells / V;
  for (int64_t first = int64_t{part} * blockDim.x; first < vectors; first += int64_t{blocks_each} * blockDim.x) {
    const int64_t vector = first + threadIdx.x;
    const bool valid = vector < vectors;
    TopTwo<Acc<T>> top[V];
    if (valid) {
      const T* planes = source.base + vector * V;
      Planes<T, V> now, next;
      now.load(planes, args.channel_stride, source.channels);
      RENDSEG_NO_UNROLL
      for (int64_t left = source.channels; left > 0; left -= now.kCount) {
        planes += now.kCount * args.channel_stride;
        next.load(planes, args.channel_stride, left - now.kCount);  // under way while the others are added
        now.add_to(top, left);
        now = next;
      }
    }
    float margin[V];
    RENDSEG_UNROLL
    for (int i = 0; i < V; ++i) margin[i] = top[i].margin(source.channels == 1);
    sink.put(vector * V, margin, valid);
  }
  sink.finish();
}

// How a tile of an interleaved map is shared out.
struct InterleavedPlan {
  int lanes;     // to a cell: 1, 2, 4 or 8
  int cells;     // of a tile
  int slab;      // channels staged at a time
  bool vectors;  // whether rows can be copied 16 bytes at a time
  bool dense;    // whether the tile is one run of memory
  int shared_bytes;
};

// Copies `rows` x `length` elements into shared memory, rows one after the other.
template <typename T>
__device__ inline void stage(const T* from, int64_t row_stride, int rows, int length, bool vectors, T* to) {
  constexpr int V = kVecWidth<T>;
  const int in_vectors = vectors && (rows == 1 || length % V == 0) ? length / V : 0;
  for (int i = static_cast<int>(threadIdx.x); i < rows * in_vectors; i += kMarginThreads) {
    const int row = i / in_vectors, at = (i - row * in_vectors) * V;
    cp_async_16(to + row * length + at, from + row * row_stride + at);
  }
  const int rest = length - in_vectors * V;
  for (int i = static_cast<int>(threadIdx.x); i < rows * rest; i += kMarginThreads) {
    const int row = i / rest, at = in_vectors * V + i - row * rest;
    to[row * length + at] = from[row * row_stride + at];
  }
  cp_async_commit();
  cp_async_wait<0>();
}

template <typename T>
__global__ void __launch_bounds__(kMarginThreads)
    interleaved_margin_kernel(MarginArgs<T> args, InterleavedPlan plan, uint32_t blocks_each) {
  RENDSEG_SHARED(uint32_t[kHistogramBins], histogram);
  RENDSEG_DYNAMIC_SHARED(memory);
  T* const tile = reinterpret_cast<T*>(memory);
  const uint32_t image = blockIdx.x / blocks_each, part = blockIdx.x % blocks_each;
  const MarginSource<T> source(args, image);
  MarginSink<T> sink(args, image, histogram);
  const int lane = static_cast<int>(threadIdx.x) % plan.lanes, local = static_cast<int>(threadIdx.x) / plan.lanes;
  for (int64_t first = int64_t{part} * plan.cells; first < args.cells; first += int64_t{blocks_each} * plan.cells) {
    const int cells = static_cast<int>(min(args.cells - first, int64_t{plan.cells}));
    TopTwo<Acc<T>> top;
    for (int64_t begin = 0; begin < source.channels; begin += plan.slab) {
      const int slab = static_cast<int>(min(source.channels - begin, int64_t{plan.slab}));
      __syncthreads();  // the tile may still be read
      const T* from = source.base + first * args.cell_stride + begin;
      stage(from, args.cell_stride, plan.dense ? 1 : cells, plan.dense ? cells * slab : slab, plan.vectors, tile);
      __syncthreads();
      if (local < cells) {
        const T* row = tile + local * slab;
        // The order of the channels does not matter, so each cell starts somewhere else where neighbouring cells would
        // meet in the same banks.
        const int turns = (slab - lane + plan.lanes - 1) / plan.lanes;
        int c = lane;
        if ((slab / plan.lanes) % 2 == 0 && turns > 0) c += local % turns * plan.lanes;
        for (int turn = 0; turn < turns; ++turn) {
          top.add(widen(row[c]));
          c += plan.lanes;
          if (c >= slab) c = lane;
        }
      }
    }
    for (int distance = plan.lanes / 2; distance > 0; distance /= 2) {
      TopTwo<Acc<T>> other;
      other.first = __shfl_xor_sync(kAllLanes, top.first, distance);
      other.second = __shfl_xor_sync(kAllLanes, top.second, distance);
      top.add(other);
    }
    const float margin[1] = {top.margin(source.channels == 1)};
    sink.put(first + local, margin, lane == 0 && local < cells);
  }
  sink.finish();
}

template <typename T>
InterleavedPlan interleaved_plan(const MarginArgs<T>& args) {
  constexpr int64_t kTileBytes = 24 * 1024, kSize = sizeof(T);
  const int64_t channels = args.class_index == nullptr ? args.channels : 1;
  // At least 32 cells to a tile.
  const int64_t slab = channels * kSize <= kTileBytes / 32 ? channels : kTileBytes / 32 / kSize;
  int lanes = 1;
  while (kMarginThreads / lanes * slab * kSize > kTileBytes) lanes *= 2;
  InterleavedPlan plan;
  plan.lanes = lanes;
  plan.cells = kMarginThreads / lanes;
  plan.slab = static_cast<int>(slab);
  plan.dense = slab == args.cell_stride;
  // Tiles start at multiples of 32 cells, so that a dense tile is aligned where the map is.
  plan.vectors = args.class_index == nullptr && is_aligned(args.logits, 16) && args.image_stride * kSize % 16 == 0 &&
                 (plan.dense || (args.cell_stride * kSize % 16 == 0 && slab * kSize % 16 == 0));
  plan.shared_bytes = static_cast<int>(plan.cells * slab * kSize);
  return plan;
}

// Blocks for each of `images`, out of `tiles` pieces of work in each: a few to a multiprocessor, each with several
// pieces where there are many, so that histograms are seldom flushed.
template <typename Launch>
int64_t blocks_per_image(Launch& launch, int64_t images, int64_t tiles, int64_t blocks_per_processor) {
  const int64_t wanted = (launch.processors() * blocks_per_processor + images - 1) / images;
  return wanted < tiles ? wanted : tiles;
}

template <typename T, int V, typename Launch>
void run_planar_margins(Launch& launch, const MarginArgs<T>& args) {
  const int64_t vectors = args.cells / V;
  const int64_t threads = vectors < kMarginThreads ? (vectors + kWarp - 1) / kWarp * kWarp : kMarginThreads;
  const int64_t each = blocks_per_image(launch, args.images, (vectors + threads - 1) / threads, 8);
  launch({args.images * each, static_cast<int>(threads)}, planar_margin_kernel<T, V>, args,
         static_cast<uint32_t>(each));
}

template <typename T, typename Launch>
void run_margins(Launch& launch, const MarginArgs<T>& args) {
  if (args.cell_stride == 1) {
    constexpr int V = kPlanarCells<T>;
    const auto whole = [](int64_t elements) { return elements % V == 0; };
    if (whole(args.cells) && whole(args.image_stride) && whole(args.channel_stride) &&
        is_aligned(args.logits, sizeof(T) * V)) {
      run_planar_margins<T, V>(launch, args);
    } else {
      run_planar_margins<T, 1>(launch, args);
    }
    return;
  }
  const InterleavedPlan plan = interleaved_plan(args);
  const int64_t each = blocks_per_image(launch, args.images, (args.cells + plan.cells - 1) / plan.cells, 8);
  launch({args.images * each, kMarginThreads, plan.shared_bytes}, interleaved_margin_kernel<T>, args, plan,
         static_cast<uint32_t>(each));
}

}  // namespace rendseg
