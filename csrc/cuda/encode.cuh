// CUDA kernels of scaled_l2, aggregate, encode and their gradients for every dtype, layout and size (Zhang et al.,
// Context Encoding for Semantic Segmentation, 2018, section 3). See encode_parts.cuh for the vocabulary.
//
// A block walks over the tiles of one chunk. The channels of a tile lie in shared memory, all of them where they fit,
// so that x is read once; everything is summed over the residuals x - c themselves, so that nothing cancels where
// features or codewords lie far from zero.
#pragma once

#include "encode_parts.cuh"

namespace rendseg::encoding {

enum class Op { kScaledL2, kScaledL2Backward, kAggregate, kAggregateBackward, kEncode, kEncodeBackward };

// What an op does with a tile, in this order.
template <Op op>
struct Does {
  static constexpr bool encode = op == Op::kEncode, encode_backward = op == Op::kEncodeBackward;
  static constexpr bool l2 = op == Op::kScaledL2, l2_backward = op == Op::kScaledL2Backward;
  static constexpr bool aggregate = op == Op::kAggregate, aggregate_backward = op == Op::kAggregateBackward;

  static constexpr bool backward = encode_backward || l2_backward || aggregate_backward;
  static constexpr bool squares = !aggregate && !aggregate_backward;   // ||x - c||^2
  static constexpr bool dots = encode_backward || aggregate_backward;  // (x - c) . grad
  static constexpr bool softmax = encode || encode_backward;           // the assignment
  static constexpr bool residuals = !l2 && !aggregate_backward;        // sum over positions of weight * (x - c)
  static constexpr bool uses_scale = squares;
  // Arrays of rows [tile][row_stride]
  static constexpr int row_arrays = encode_backward ? 3 : l2_backward || aggregate_backward ? 2 : 1;
  static constexpr int square_row = 0;
  static constexpr int assigned_row = encode_backward ? 1 : 0;
  static constexpr int weight_row = encode_backward ? 2 : 1;
};

// --- moving a tile

// f(i, j) for all i < rows, j < 2^columns_log2, neighbouring threads along j, or along i where that is the contiguous
// direction in memory.
template <typename F>
__device__ inline void for_each(int rows, int columns_log2, bool along_rows, F&& f) {
  const int total = rows << columns_log2;
  if (along_rows) {
    for (int at = threadIdx.x; at < total; at += kThreads) f(at % rows, at / rows);
  } else {
    for (int at = threadIdx.x; at < total; at += kThreads) f(at >> columns_log2, at & ((1 << columns_log2) - 1));
  }
}

// Distance of channels in a tile: odd, so that neither direction has bank conflicts.
template <typename T>
__device__ inline int pitch(const Args<T>& args) {
  return args.tile + 1;
}

// tile[d][p] = x[image, first + p, channel + d], with zeros behind the last position.
template <typename T>
__device__ inline void read_tile(const Args<T>& args, int64_t image, int64_t first, int count, int64_t channel,
                                 int block, T* tile) {
  const View& x = args.x;
  const int stride = pitch(args);
  with_dtype(x.dtype, [&]<typename X>() {
    const X* from = address<X>(x, image, first, channel);
    for_each(block, args.tile_log2, x.channel < x.position, [&](int d, int p) {
      tile[d * stride + p] = p < count ? static_cast<T>(widen(from[p * x.position + d * x.channel])) : T(0);
    });
  });
}

template <typename T>
__device__ inline void write_tile(const Args<T>& args, int64_t image, int64_t first, int count, int64_t channel,
                                  int block, const T* tile) {
  const View& x = args.x_grad;
  const int stride = pitch(args);
  with_dtype(x.dtype, [&]<typename X>() {
    X* to = address<X>(x, image, first, channel);
    for_each(block, args.tile_log2, x.channel < x.position, [&](int d, int p) {
      if (p < count) to[p * x.position + d * x.channel] = narrow<X>(static_cast<Acc<X>>(tile[d * stride + p]));
    });
  });
}

// f(p, k) for the codes of the positions of a tile, in an order that suits `map`.
template <typename T, typename F>
__device__ inline void for_each_code(const Args<T>& args, const View& map, int count, F&& f) {
  const int64_t total = args.codes * count;
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    if (map.position < map.channel) {
      f(static_cast<int>(i % count), i / count);
    } else {
      f(static_cast<int>(i / args.codes), i % args.codes);
    }
  }
}

// rows[p][k] = map[image, first + p, k]; zeros behind the last code.
template <typename T>
__device__ inline void read_rows(const Args<T>& args, int64_t image, int64_t first, int count, T* rows) {
  for (int64_t i = threadIdx.x; i < args.tile * (args.padded - args.codes); i += kThreads) {
    rows[i % args.tile * args.row_stride + args.codes + i / args.tile] = T(0);
  }
  with_dtype(args.map.dtype, [&]<typename X>() {
    const X* from = address<X>(args.map, image, first, 0);
    for_each_code(args, args.map, count, [&](int p, int64_t k) {
      rows[p * args.row_stride + k] = static_cast<T>(widen(from[p * args.map.position + k * args.map.channel]));
    });
  });
}

// map_out[image, first + p, k] = rows[p][k], times scale[k] when given.
template <typename T>
__device__ inline void write_rows(const Args<T>& args, int64_t image, int64_t first, int count, const T* rows,
                                  const T* scale) {
  with_dtype(args.map_out.dtype, [&]<typename X>() {
    X* to = address<X>(args.map_out, image, first, 0);
    for_each_code(args, args.map_out, count, [&](int p, int64_t k) {
      const T value = rows[p * args.row_stride + k] * (scale != nullptr ? scale[k] : T(1));
      to[p * args.map_out.position + k * args.map_out.channel] = narrow<X>(static_cast<Acc<X>>(value));
    });
  });
}

// --- products of a tile

constexpr int kPartial = 64;  // channels of a partial sum: two levels keep rounding errors small

// squares[p][k] (+)= sum over the channels of the tile of (x - c)^2 and dots[p][k] (+)= that of (x - c) * grad.
// A thread makes four codes of one position; a warp shares its codes, which it thus reads as a broadcast.
template <bool kSquares, bool kDots, typename T>
__device__ inline void contract_channels(const Args<T>& args, const T* tile, const T* codewords, const T* grad,
                                         int block, bool first, int count, T* squares, T* dots) {
  const int stride = pitch(args);
  const int64_t total = args.padded / 4 << args.tile_log2;
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const int p = static_cast<int>(i & (args.tile - 1));
    const int64_t k = (i >> args.tile_log2) * 4;
    if (p >= count) continue;
    Four<T> square{}, dot{};
    for (int from = 0; from < block; from += kPartial) {
      Four<T> square_part{}, dot_part{};
      const int to = min(from + kPartial, block);
      for (int d = from; d < to; ++d) {
        const T x = tile[d * stride + p];
        const Four<T> c = load_four(codewords + d * args.padded + k);
        Four<T> g{};
        if constexpr (kDots) g = load_four(grad + d * args.padded + k);
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          const T residual = x - c.at[j];
          if constexpr (kSquares) square_part.at[j] = fused(residual, residual, square_part.at[j]);
          if constexpr (kDots) dot_part.at[j] = fused(residual, g.at[j], dot_part.at[j]);
        }
      }
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) {
        square.at[j] += square_part.at[j];
        dot.at[j] += dot_part.at[j];
      }
    }
    const int64_t at = p * args.row_stride + k;
    if (!first) {
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (kSquares) square.at[j] += squares[at + j];
        if constexpr (kDots) dot.at[j] += dots[at + j];
      }
    }
    if constexpr (kSquares) store_four(squares + at, square);
    if constexpr (kDots) store_four(dots + at, dot);
  }
}

// sums[d][k] (+)= sum over positions of (x - c) * weights[p][k], for four codes of two channels a thread.
template <typename T>
__device__ inline void contract_positions(const Args<T>& args, const T* tile, const T* codewords, const T* weights,
                                          int block, bool first, int count, T* sums) {
  const int stride = pitch(args);
  const int64_t groups = args.padded / 4, total = groups * ((block + 1) / 2);
  for (int64_t i = threadIdx.x; i < total; i += kThreads) {
    const int64_t k = i % groups * 4;
    const int low = static_cast<int>(i / groups) * 2, high = min(low + 1, block - 1);
    const Four<T> c_low = load_four(codewords + low * args.padded + k);
    const Four<T> c_high = load_four(codewords + high * args.padded + k);
    Four<T> sum_low{}, sum_high{};
    for (int p = 0; p < count; ++p) {
      const Four<T> w = load_four(weights + p * args.row_stride + k);
      const T x_low = tile[low * stride + p], x_high = tile[high * stride + p];
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) {
        sum_low.at[j] = fused(x_low - c_low.at[j], w.at[j], sum_low.at[j]);
        sum_high.at[j] = fused(x_high - c_high.at[j], w.at[j], sum_high.at[j]);
      }
    }
    const auto put = [&](int d, Four<T>& sum) {
      T* to = sums + d * args.padded + k;
      if (!first) {
        const Four<T> before = load_four(to);
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) sum.at[j] += before.at[j];
      }
      store_four(to, sum);
    };
    put(low, sum_low);
    if (high > low) put(high, sum_high);
  }
}

// tile = sum over codes of grad * assigned + (x - c) * 2 scale * weight, in place, for one position of kBlock channels
// a thread. Either term may be left out.
template <bool kAssigned, bool kWeight, typename T>
__device__ inline void contract_codes(const Args<T>& args, T* tile, const T* codewords, const T* grad,
                                      const T* assigned, const T* weights, int block, int count) {
  constexpr int kBlock = 4;
  const int stride = pitch(args), total = (block + kBlock - 1) / kBlock << args.tile_log2;
  for (int i = threadIdx.x; i < total; i += kThreads) {
    const int p = i & (args.tile - 1), d = (i >> args.tile_log2) * kBlock;
    if (p >= count) continue;
    T x[kBlock], sum[kBlock];
    RENDSEG_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      sum[r] = 0;
      x[r] = kWeight ? tile[min(d + r, block - 1) * stride + p] : T(0);
    }
    for (int64_t k = 0; k < args.padded; k += 4) {
      Four<T> a{}, w{};
      if constexpr (kAssigned) a = load_four(assigned + p * args.row_stride + k);
      if constexpr (kWeight) {
        w = load_four(weights + p * args.row_stride + k);
        const Four<T> s = load_four(args.packed_scale + k);
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) w.at[j] = T(2) * s.at[j] * w.at[j];
      }
      RENDSEG_UNROLL
      for (int r = 0; r < kBlock; ++r) {
        const int64_t at = min(d + r, block - 1) * args.padded + k;
        Four<T> c{}, g{};
        if constexpr (kWeight) c = load_four(codewords + at);
        if constexpr (kAssigned) g = load_four(grad + at);
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          T next = sum[r];
          if constexpr (kAssigned) next = fused(g.at[j], a.at[j], next);
          if constexpr (kWeight) next = fused(x[r] - c.at[j], w.at[j], next);
          if (k + j < args.codes) sum[r] = next;  // an infinite x times the zeros of the padding would be NaN
        }
      }
    }
    RENDSEG_UNROLL
    for (int r = 0; r < kBlock; ++r) {
      if (d + r < block) tile[(d + r) * stride + p] = sum[r];
    }
  }
}

// --- rows of codes

// assigned[p] = softmax over the codes of scale * squares[p], one warp a position; zeros behind the last code.
// `assigned` may be `squares`.
template <typename T>
__device__ inline void softmax_rows(const Args<T>& args, int count, const T* squares, T* assigned) {
  for (int p = warp_id(); p < count; p += kWarps) {
    const T* d = squares + p * args.row_stride;
    T* a = assigned + p * args.row_stride;
    T peak = -static_cast<T>(INFINITY);
    for (int64_t k = lane_id(); k < args.codes; k += kWarp) {
      const T logit = args.packed_scale[k] * d[k];
      a[k] = logit;
      peak = max(peak, logit);
    }
    peak = warp_max(peak);
    T total = 0;
    for (int64_t k = lane_id(); k < args.codes; k += kWarp) {
      const T e = exponential(a[k] - peak);  // NaN for every code where all logits are infinite, as it should be
      a[k] = e;
      total += e;
    }
    const T share = T(1) / warp_sum(total);
    for (int64_t k = lane_id(); k < args.padded; k += kWarp) a[k] = k < args.codes ? a[k] * share : T(0);
  }
}

// weights, the gradient of the assignment -> gradient of the logits, in place.
template <typename T>
__device__ inline void softmax_rows_backward(const Args<T>& args, int count, const T* assigned, T* weights) {
  for (int p = warp_id(); p < count; p += kWarps) {
    const T* a = assigned + p * args.row_stride;
    T* w = weights + p * args.row_stride;
    T sum = 0;
    for (int64_t k = lane_id(); k < args.codes; k += kWarp) sum = fused(a[k], w[k], sum);
    const T dot = warp_sum(sum);
    for (int64_t k = lane_id(); k < args.padded; k += kWarp) w[k] = k < args.codes ? a[k] * (w[k] - dot) : T(0);
  }
}

// total[k] (+)= sum over positions of rows[p][k], times factor[p][k] when given.
template <typename T>
__device__ inline void sum_rows(const Args<T>& args, int count, bool first, const T* rows, const T* factor, T* total) {
  for (int64_t k = threadIdx.x; k < args.codes; k += kThreads) {
    T sum = 0;
    for (int p = 0; p < count; ++p) {
      const int64_t at = p * args.row_stride + k;
      sum = factor != nullptr ? fused(rows[at], factor[at], sum) : sum + rows[at];
    }
    total[k] = first ? sum : total[k] + sum;
  }
}

// --- the kernel

// One tile: count positions from `first` on. `opens`: the first of its chunk.
template <Op op, typename T>
__device__ inline void do_tile(const Args<T>& args, int64_t chunk, int64_t image, int64_t first, int count, bool opens,
                               T* tile, T* rows) {
  using O = Does<op>;
  const int64_t width = args.channels * args.padded;
  T* const squares = rows + O::square_row * args.tile * args.row_stride;
  T* const assigned = rows + O::assigned_row * args.tile * args.row_stride;
  T* const weights = rows + O::weight_row * args.tile * args.row_stride;
  const T* const grad = O::dots ? args.packed_grad + image * width : nullptr;
  const bool resident = args.block == args.channels;  // the tile stays in shared memory from here to the end

  __syncthreads();  // of the tile before
  if constexpr (O::aggregate || O::aggregate_backward) read_rows(args, image, first, count, assigned);
  if constexpr (O::l2_backward) read_rows(args, image, first, count, weights);
  if constexpr (O::squares || O::dots) {
    for (int64_t d = 0; d < args.channels; d += args.block) {
      const int block = static_cast<int>(min(int64_t{args.block}, args.channels - d));
      if (d > 0) __syncthreads();
      read_tile(args, image, first, count, d, block, tile);
      __syncthreads();
      contract_channels<O::squares, O::dots>(args, tile, args.packed_codewords + d * args.padded,
                                             O::dots ? grad + d * args.padded : nullptr, block, d == 0, count, squares,
                                             weights);
    }
    __syncthreads();
  }
  if constexpr (O::l2) write_rows<T>(args, image, first, count, squares, args.packed_scale);
  if constexpr (O::aggregate_backward) write_rows<T>(args, image, first, count, weights, nullptr);
  if constexpr (O::softmax) {
    softmax_rows(args, count, squares, assigned);
    if constexpr (O::backward) softmax_rows_backward(args, count, assigned, weights);  // by the same warps
    __syncthreads();
  }
  if constexpr (O::dots) sum_rows<T>(args, count, opens, assigned, nullptr, args.sum_assigned + chunk * args.padded);
  if constexpr (O::squares && O::backward) {
    sum_rows<T>(args, count, opens, weights, squares, args.sum_scale + chunk * args.padded);
  }
  if constexpr (O::residuals || O::backward) {
    for (int64_t d = 0; d < args.channels; d += args.block) {
      const int block = static_cast<int>(min(int64_t{args.block}, args.channels - d));
      const T* const codewords = args.packed_codewords + d * args.padded;
      if (!resident || O::aggregate) {
        __syncthreads();
        read_tile(args, image, first, count, d, block, tile);
        __syncthreads();
      }
      if constexpr (O::residuals) {
        contract_positions(args, tile, codewords, O::backward ? weights : assigned, block, opens, count,
                           args.sum_residual + chunk * width + d * args.padded);
      }
      if constexpr (O::backward) {
        __syncthreads();
        contract_codes<O::dots, O::squares>(args, tile, codewords, O::dots ? grad + d * args.padded : nullptr, assigned,
                                            weights, block, count);
        __syncthreads();
        write_tile(args, image, first, count, d, block, tile);
      }
    }
  }
}

// Two blocks to a multiprocessor where their registers allow it: one works while the other waits for memory.
template <typename T, Op op>
constexpr int kResident = sizeof(T) == 4 && op != Op::kScaledL2Backward ? 2 : 1;

template <typename T, Op op>
__global__ void __launch_bounds__(kThreads, kResident<T, op>) tiles_kernel(Args<T> args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  T* const tile = reinterpret_cast<T*>(memory);
  const int64_t row_values = Does<op>::row_arrays * args.tile * args.row_stride;
  // Rows come first: they must be aligned.
  T* const rows = args.rows != nullptr ? args.rows + blockIdx.x * row_values : tile;
  T* const channels = args.rows != nullptr ? tile : tile + row_values;
  for (int64_t chunk = blockIdx.x; chunk < args.batch * args.chunks; chunk += gridDim.x) {
    const int64_t image = chunk / args.chunks, length = args.chunk_tiles * args.tile;
    const int64_t begin = chunk % args.chunks * length, end = min(begin + length, args.positions);
    for (int64_t first = begin; first < end; first += args.tile) {
      const int count = static_cast<int>(min(int64_t{args.tile}, end - first));
      do_tile<op>(args, chunk, image, first, count, first == begin, channels, rows);
    }
  }
}

// --- host

constexpr int64_t kSharedBudget = 99 * 1024;          // what every GPU since sm_80 can give to a block
constexpr int64_t kChunksWanted = 256;                // of all images together
constexpr int64_t kPartialBytes = int64_t{16} << 20;  // of all partial sums, where one per image allows it

// Sizes that depend on the shape alone.
template <Op op, typename T>
void plan(Args<T>& args) {
  constexpr int64_t size = sizeof(T);
  args.padded = (args.codes + kPad - 1) / kPad * kPad;
  args.row_stride = args.padded + (args.padded / 4 % 2 == 0 ? 4 : 0);  // an odd number of fours: no bank conflicts
  const auto row_bytes = [&](int64_t tile) { return Does<op>::row_arrays * tile * args.row_stride * size; };
  args.tile = 32;
  while (args.tile > 8 && row_bytes(args.tile) + args.channels * (args.tile + 1) * size > kSharedBudget) args.tile /= 2;
  args.tile_log2 = args.tile == 32 ? 5 : args.tile == 16 ? 4 : 3;
  const bool rows_in_shared = row_bytes(args.tile) <= kSharedBudget / 2;
  const int64_t left = kSharedBudget - (rows_in_shared ? row_bytes(args.tile) : 0);
  const int64_t fitting = left / ((args.tile + 1) * size);
  args.block = static_cast<int>(args.channels < fitting ? args.channels : fitting);
  args.shared_bytes = (rows_in_shared ? row_bytes(args.tile) : 0) + args.block * (args.tile + 1) * size;

  const int64_t tiles = (args.positions + args.tile - 1) / args.tile;
  int64_t wanted = kPartialBytes / (args.channels * args.padded * size);
  wanted = wanted < 1 ? 1 : wanted > kChunksWanted ? kChunksWanted : wanted;
  const int64_t per_image = wanted / args.batch < 1 ? 1 : wanted / args.batch;
  args.chunk_tiles = (tiles + per_image - 1) / per_image;
  args.chunks = (tiles + args.chunk_tiles - 1) / args.chunk_tiles;
  args.blocks = blocks_for(args.batch * args.chunks, 1);
  if (!rows_in_shared && args.blocks > kChunksWanted) args.blocks = kChunksWanted;  // each has rows of its own
}

// The scratch memory.
template <Op op, typename T>
Scratch lay_out(Args<T>& args) {
  using O = Does<op>;
  Scratch scratch;
  const int64_t width = args.channels * args.padded, chunks = args.batch * args.chunks;
  const int64_t row_values = O::row_arrays * args.tile * args.row_stride;
  const bool rows_in_shared = row_values * static_cast<int64_t>(sizeof(T)) <= kSharedBudget / 2;
  scratch.add(args.packed_codewords, width);
  if (O::uses_scale) scratch.add(args.packed_scale, args.padded);
  if (O::dots) scratch.add(args.packed_grad, args.batch * width);
  if (!rows_in_shared) scratch.add(args.rows, args.blocks * row_values);
  if (O::residuals) scratch.add(args.sum_residual, chunks * width);
  if (O::dots) scratch.add(args.sum_assigned, chunks * args.padded);
  if (O::squares && O::backward) scratch.add(args.sum_scale, chunks * args.padded);
  return scratch;
}

// Everything after plan() and lay_out().
template <Op op, typename T, typename Launch>
void run(Launch& launch, const Args<T>& args) {
  run_pack(launch, args);
  launch({args.blocks, kThreads, args.shared_bytes}, tiles_kernel<T, op>, args);
  if constexpr (Does<op>::backward) {
    run_sum_gradients(launch, args);
  } else if constexpr (Does<op>::residuals) {
    run_sum_encodings(launch, args);
  }
}

}  // namespace rendseg::encoding
