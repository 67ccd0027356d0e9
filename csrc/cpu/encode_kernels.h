// The kernels of the encoding ops: scaled_l2, aggregate and encode with their gradients. Compiled once per instruction
// set, see compile_kernels.h.
//
// B images, M positions, D channels, K codes (`codes`, padded with zeros to `padded`, a multiple of kEncodePad). An op
// walks over tiles of kEncodeTile = 96 positions of one image. A tile is read once, widened and transposed where
// needed, into [D][96] (4 bytes D 96: 196 KB at D = 512, for the second-level cache), and everything is made while it
// is there:
//
//   contract_channels   tile, codewords [D][padded] -> distances [96][padded]: sum over channels of (x - c)^2, and in
//                       the backward the products of the residuals x - c with the gradient of the result
//   softmax_rows        distances -> assignment [96][padded]
//   contract_positions  tile, assignment -> sums [D][padded]: sum over positions of a (x - c)
//   contract_codes      tile, weights [padded][96] -> gradient of the tile, in place
//
// Each product keeps a block of sums in registers (see "Register blocks"). Everything is summed over the residuals x -
// c themselves: no ||x||^2 - 2 x c + ||c||^2, no sum a x - c sum a, hence nothing that cancels where features or
// codewords lie far from zero or from each other; the subtraction is nearly free beside the multiplication. Every sum
// is in two levels (block, then whole), which keeps rounding errors small. Tiles are grouped in chunks that depend on
// the shape alone; each has its own partial sums, which encode.cpp adds in order, so that results do not depend on the
// number of threads. Scratch of a thread: the tile and five arrays of [96][padded] values.
#ifndef RENDSEG_ISA

#include <algorithm>
#include <cmath>
#include <new>

namespace rendseg {

constexpr int64_t kEncodeTile = 96;
constexpr int64_t kEncodePad = 16;

// T is the type of the arithmetic: float, or double when an input is.
template <typename T>
struct EncodeTask {
  int64_t batch = 0, positions = 0, channels = 0, codes = 0, padded = 0;
  int64_t chunks = 0, chunk_tiles = 0;  // chunks of one image; tiles of one chunk

  PointsView x;                  // [B,M,D]
  const T* codewords = nullptr;  // [D][padded]
  const T* scale = nullptr;      // [padded]
  const T* grad = nullptr;       // [B][D][padded]: of the result [B,K,D]

  PointsView map;      // [B,M,K]: assignment, or gradient of scaled_l2
  PointsView map_out;  // [B,M,K]: scaled_l2, or gradient of the assignment
  PointsView x_grad;   // [B,M,D]

  // Partial sums of each chunk, [B * chunks] of each
  T* sum_residual = nullptr;  // [D][padded]: of weight * (x - codeword)
  T* sum_assigned = nullptr;  // [padded]: of the assignment
  T* sum_scale = nullptr;     // [padded]: gradient of the scale
};

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

// Register blocks, as large as the registers hold: positions or channels (rows) by vectors.
#if RENDSEG_ISA == 2
constexpr int kRows = 12;        // of one sum of two vectors a row
constexpr int kPairVectors = 2;  // vectors of a row of kPairRows, with two things to hold of each
constexpr int kAcrossRows = 4;   // channels by kAcross vectors of positions, likewise
constexpr int kAcross = 3;
#else
constexpr int kRows = 6;
constexpr int kPairVectors = 1;
constexpr int kAcrossRows = 3;
constexpr int kAcross = 2;
#endif
constexpr int kPairRows = 6;
constexpr int64_t kTile = kEncodeTile;
constexpr int64_t kChannelBlock = 64;  // channels whose tile rows and codewords fit the first-level cache

// ---- Moving between tensors of any dtype and stride, and rows of T

template <typename T, typename X>
RENDSEG_INLINE Vec<T> load_as(const X* p) {
  if constexpr (std::is_same_v<T, Wide<X>>) {
    return load(p);
  } else {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(p[i]);
    return v;
  }
}
template <typename T, typename X>
RENDSEG_INLINE void store_as(X* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, Wide<X>>) {
    store(p, v);
  } else {
    for (int i = 0; i < kLanes<T>; ++i) p[i] = static_cast<X>(v[i]);
  }
}

// out[i][j] (j contiguous, rows `out_stride` apart) = source[i * row + j * column], for i < rows, j < columns.
template <typename T, typename X>
void read_rows(const X* source, int64_t row, int64_t column, int64_t rows, int64_t columns, T* out,
               int64_t out_stride) {
  constexpr int n = kLanes<T>;
  if (column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const X* from = source + i * row;
      T* to = out + i * out_stride;
      int64_t j = 0;
      for (; j + n <= columns; j += n) store<T>(to + j, load_as<T, X>(from + j));
      for (; j < columns; ++j) to[j] = static_cast<T>(from[j]);
    }
    return;
  }
  const int64_t full_rows = row == 1 ? rows / n * n : 0, full_columns = columns / n * n;
  for (int64_t j = 0; j < full_columns; j += n) {
    for (int64_t i = 0; i < full_rows; i += n) {
      Vec<T> v[n];
#pragma GCC unroll 16
      for (int lane = 0; lane < n; ++lane) v[lane] = load_as<T, X>(source + i + (j + lane) * column);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int lane = 0; lane < n; ++lane) store<T>(out + (i + lane) * out_stride + j, v[lane]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < full_rows ? full_columns : 0; j < columns; ++j) {
      out[i * out_stride + j] = static_cast<T>(source[i * row + j * column]);
    }
  }
}

// The inverse of read_rows.
template <typename T, typename X>
void write_rows(X* target, int64_t row, int64_t column, int64_t rows, int64_t columns, const T* in, int64_t in_stride) {
  constexpr int n = kLanes<T>;
  if (column == 1) {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = in + i * in_stride;
      X* to = target + i * row;
      int64_t j = 0;
      for (; j + n <= columns; j += n) store_as<T, X>(to + j, load<T>(from + j));
      for (; j < columns; ++j) to[j] = static_cast<X>(from[j]);
    }
    return;
  }
  const int64_t full_rows = row == 1 ? rows / n * n : 0, full_columns = columns / n * n;
  for (int64_t j = 0; j < full_columns; j += n) {
    for (int64_t i = 0; i < full_rows; i += n) {
      Vec<T> v[n];
#pragma GCC unroll 16
      for (int lane = 0; lane < n; ++lane) v[lane] = load<T>(in + (i + lane) * in_stride + j);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int lane = 0; lane < n; ++lane) store_as<T, X>(target + i + (j + lane) * column, v[lane]);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < full_rows ? full_columns : 0; j < columns; ++j) {
      target[i * row + j * column] = static_cast<X>(in[i * in_stride + j]);
    }
  }
}

// The tile [channels][kTile] of x from position `first` on, with zeros beyond the last position.
template <typename T>
void read_tile(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, T* tile) {
  const PointsView& x = task.x;
  with_element(x.dtype, [&]<typename X>() {
    read_rows<T, X>(x.at<const X>(image, 0, first), x.stride_c, x.stride_p, task.channels, count, tile, kTile);
  });
  if (count < kTile) {
    for (int64_t d = 0; d < task.channels; ++d) std::fill(tile + d * kTile + count, tile + (d + 1) * kTile, T(0));
  }
}

template <typename T>
void write_tile(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, const T* tile) {
  const PointsView& x = task.x_grad;
  with_element(x.dtype, [&]<typename X>() {
    write_rows<T, X>(x.at<X>(image, 0, first), x.stride_c, x.stride_p, task.channels, count, tile, kTile);
  });
}

// rows [kTile][padded] of a map [B,M,K], with zeros beyond the last code and the last position.
template <typename T>
void read_map(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, T* rows) {
  const PointsView& map = task.map;
  std::fill(rows, rows + kTile * task.padded, T(0));
  with_element(map.dtype, [&]<typename X>() {
    read_rows<T, X>(map.at<const X>(image, 0, first), map.stride_p, map.stride_c, count, task.codes, rows, task.padded);
  });
}

template <typename T>
void write_map(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, const T* rows) {
  const PointsView& map = task.map_out;
  with_element(map.dtype, [&]<typename X>() {
    write_rows<T, X>(map.at<X>(image, 0, first), map.stride_p, map.stride_c, count, task.codes, rows, task.padded);
  });
}

// columns[k][t] = rows[t][k], [kTile][padded] -> [padded][kTile].
template <typename T>
void transpose_rows(const T* rows, int64_t padded, T* columns) {
  read_rows<T, T>(rows, 1, padded, padded, kTile, columns, kTile);
}

// Fetches the tile that comes next into the second-level cache, a few lines at a time between the register blocks: its
// rows lie far apart in memory, where the hardware sees no pattern.
class Ahead {
 public:
  Ahead() = default;
  Ahead(const void* first, int64_t rows, int64_t row_bytes, int64_t stride_bytes, int64_t calls)
      : at_(static_cast<const char*>(first)),
        rows_(rows),
        lines_((row_bytes + 63) / 64),
        stride_(stride_bytes),
        each_((rows_ * lines_ + calls - 1) / std::max<int64_t>(1, calls)) {}
  RENDSEG_INLINE void step() {
    for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
      __builtin_prefetch(at_ + line_ * 64, 0, 2);
      if (++line_ == lines_) {
        line_ = 0;
        at_ += stride_;
        --rows_;
      }
    }
  }

 private:
  const char* at_ = nullptr;
  int64_t rows_ = 0, lines_ = 0, stride_ = 0, each_ = 0, line_ = 0;
};

// ---- Products of a tile; register blocks first

template <typename T>
RENDSEG_INLINE void put(T* to, Vec<T> value, bool first) {  // to (+)= value
  store<T>(to, first ? value : load<T>(to) + value);
}

// squares[r][v] (+)= sum over channels of (tile - code)^2 and dots[r][v] (+)= that of (tile - code) * grad, for NR
// positions and NV vectors of codes.
template <typename T, int NR, int NV, bool kSquare, bool kDot>
RENDSEG_INLINE void over_channels(const T* tile, const T* codes, const T* grad, int64_t padded, int64_t channels,
                                  T* squares, T* dots, bool first) {
  constexpr int n = kLanes<T>;
  Vec<T> square[NR][NV] = {}, dot[NR][NV] = {};
  for (int64_t d = 0; d < channels; ++d) {
    Vec<T> c[NV], g[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      c[v] = load<T>(codes + d * padded + v * n);
      if constexpr (kDot) g[v] = load<T>(grad + d * padded + v * n);
    }
#pragma GCC unroll 12
    for (int r = 0; r < NR; ++r) {
      const Vec<T> x = splat<T>(tile[d * kTile + r]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) {
        const Vec<T> residual = x - c[v];
        if constexpr (kSquare) square[r][v] = fused(residual, residual, square[r][v]);
        if constexpr (kDot) dot[r][v] = fused(residual, g[v], dot[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      if constexpr (kSquare) put<T>(squares + r * padded + v * n, square[r][v], first);
      if constexpr (kDot) put<T>(dots + r * padded + v * n, dot[r][v], first);
    }
  }
}

// squares, dots[kTile][padded]: distances of the positions to the codewords, products of their residuals with the
// gradient.
template <typename T, bool kSquare, bool kDot>
void contract_channels(const T* tile, const T* codes, const T* grad, int64_t padded, int64_t channels, int64_t count,
                       T* squares, T* dots, Ahead& ahead) {
  constexpr int n = kLanes<T>, rows = kDot ? kPairRows : kRows, vectors = kDot ? kPairVectors : 2;
  static_assert(kTile % rows == 0);
  if (channels == 0) {
    if constexpr (kSquare) std::fill(squares, squares + kTile * padded, T(0));
    if constexpr (kDot) std::fill(dots, dots + kTile * padded, T(0));
  }
  for (int64_t d = 0; d < channels; d += kChannelBlock) {
    const int64_t block = std::min(kChannelBlock, channels - d);
    int64_t k = 0;
    for (; k + vectors * n <= padded; k += vectors * n) {
      for (int64_t t = 0; t < count; t += rows) {
        over_channels<T, rows, vectors, kSquare, kDot>(
            tile + d * kTile + t, codes + d * padded + k, kDot ? grad + d * padded + k : nullptr, padded, block,
            kSquare ? squares + t * padded + k : nullptr, kDot ? dots + t * padded + k : nullptr, d == 0);
        ahead.step();
      }
    }
    for (; k < padded; k += n) {
      for (int64_t t = 0; t < count; t += rows) {
        over_channels<T, rows, 1, kSquare, kDot>(
            tile + d * kTile + t, codes + d * padded + k, kDot ? grad + d * padded + k : nullptr, padded, block,
            kSquare ? squares + t * padded + k : nullptr, kDot ? dots + t * padded + k : nullptr, d == 0);
        ahead.step();
      }
    }
  }
}

// out[r][v] (+)= sum over positions of (tile - code) * weight, for NR channels and NV vectors of codes.
template <typename T, int NR, int NV>
RENDSEG_INLINE void over_positions(const T* tile, const T* codes, const T* weights, int64_t padded, int64_t count,
                                   T* out, bool first) {
  constexpr int n = kLanes<T>;
  Vec<T> sum[NR][NV] = {}, code[NR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) code[r][v] = load<T>(codes + r * padded + v * n);
  }
  for (int64_t t = 0; t < count; ++t) {
    Vec<T> w[NV];
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) w[v] = load<T>(weights + t * padded + v * n);
#pragma GCC unroll 6
    for (int r = 0; r < NR; ++r) {
      const Vec<T> x = splat<T>(tile[r * kTile + t]);
#pragma GCC unroll 2
      for (int v = 0; v < NV; ++v) sum[r][v] = fused(x - code[r][v], w[v], sum[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) put<T>(out + r * padded + v * n, sum[r][v], first);
  }
}

template <typename T, int NR>
RENDSEG_INLINE void over_positions(const T* tile, const T* codes, const T* weights, int64_t padded, int64_t count,
                                   T* out, bool first) {
  constexpr int n = kLanes<T>;
  int64_t k = 0;
  for (; k + kPairVectors * n <= padded; k += kPairVectors * n) {
    over_positions<T, NR, kPairVectors>(tile, codes + k, weights + k, padded, count, out + k, first);
  }
  for (; k < padded; k += n) over_positions<T, NR, 1>(tile, codes + k, weights + k, padded, count, out + k, first);
}

// out[channels][padded] (+)= sum over positions of (tile[d][t] - codes[d][k]) * weights[t][k].
template <typename T>
void contract_positions(const T* tile, const T* codes, const T* weights, int64_t padded, int64_t channels,
                        int64_t count, T* out, bool first, Ahead& ahead) {
  int64_t d = 0;
  for (; d + kPairRows <= channels; d += kPairRows) {
    over_positions<T, kPairRows>(tile + d * kTile, codes + d * padded, weights, padded, count, out + d * padded, first);
    ahead.step();
  }
  for (; d + 2 <= channels; d += 2) {
    over_positions<T, 2>(tile + d * kTile, codes + d * padded, weights, padded, count, out + d * padded, first);
  }
  for (; d < channels; ++d) {
    over_positions<T, 1>(tile + d * kTile, codes + d * padded, weights, padded, count, out + d * padded, first);
  }
}

// tile = sum over codes of grad * assigned + (tile - code) * weight, for NR channels and kAcross vectors of positions;
// assigned and weight are [codes][kTile]. Either term is left out where its weights are null.
template <typename T, int NR>
RENDSEG_INLINE void over_codes(T* tile, const T* grad, const T* assigned, const T* code, const T* weight,
                               int64_t padded, int64_t codes) {
  constexpr int n = kLanes<T>, NV = kAcross;
  Vec<T> sum[NR][NV] = {};
  if (assigned != nullptr) {
    for (int64_t k = 0; k < codes; ++k) {
      Vec<T> w[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) w[v] = load<T>(assigned + k * kTile + v * n);
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) {
        const Vec<T> g = splat<T>(grad[r * padded + k]);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) sum[r][v] = fused(g, w[v], sum[r][v]);
      }
    }
  }
  if (weight != nullptr) {
    Vec<T> x[NR][NV];
#pragma GCC unroll 4
    for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) x[r][v] = load<T>(tile + r * kTile + v * n);
    }
    for (int64_t k = 0; k < codes; ++k) {
      Vec<T> w[NV];
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) w[v] = load<T>(weight + k * kTile + v * n);
#pragma GCC unroll 4
      for (int r = 0; r < NR; ++r) {
        const Vec<T> c = splat<T>(code[r * padded + k]);
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) sum[r][v] = fused(x[r][v] - c, w[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) store<T>(tile + r * kTile + v * n, sum[r][v]);
  }
}

template <typename T>
void contract_codes(T* tile, const T* grad, const T* assigned, const T* code, const T* weight, int64_t padded,
                    int64_t codes, int64_t channels, Ahead& ahead) {
  constexpr int step = kAcross * kLanes<T>;
  static_assert(kTile % step == 0);
  int64_t d = 0;
  auto from = [](const T* p, int64_t offset) { return p != nullptr ? p + offset : nullptr; };
  for (; d + kAcrossRows <= channels; d += kAcrossRows) {
    for (int64_t t = 0; t < kTile; t += step) {
      over_codes<T, kAcrossRows>(tile + d * kTile + t, from(grad, d * padded), from(assigned, t),
                                 from(code, d * padded), from(weight, t), padded, codes);
    }
    ahead.step();
  }
  for (; d < channels; ++d) {
    for (int64_t t = 0; t < kTile; t += step) {
      over_codes<T, 1>(tile + d * kTile + t, from(grad, d * padded), from(assigned, t), from(code, d * padded),
                       from(weight, t), padded, codes);
    }
  }
}

// ---- Rows of codes

// rows = softmax over the codes of scale * distance; codes beyond the last get 0. `from` may be `rows`.
template <typename T>
void softmax_rows(const T* from, const T* scale, int64_t padded, int64_t codes, int64_t count, T* rows) {
  constexpr int n = kLanes<T>;
  const T low = -std::numeric_limits<T>::infinity();
  for (int64_t t = 0; t < count; ++t) {
    const T* d = from + t * padded;
    T* a = rows + t * padded;
    Vec<T> top = splat<T>(low);
    for (int64_t k = 0; k < padded; k += n) {
      Vec<T> logit = load<T>(scale + k) * load<T>(d + k);
      if (k + n > codes) logit = lanes<T>() < static_cast<Lane<T>>(codes - k) ? logit : splat<T>(low);
      store<T>(a + k, logit);
      top = larger<T>(top, logit);
    }
    const Vec<T> peak = splat<T>(max_lanes<T>(top));
    Vec<T> total = {};
    for (int64_t k = 0; k < padded; k += n) {
      const Vec<T> e = exp_nonpositive(load<T>(a + k) - peak);
      store<T>(a + k, e);
      total += e;
    }
    const Vec<T> share = splat<T>(T(1) / sum_lanes<T>(total));
    for (int64_t k = 0; k < padded; k += n) store<T>(a + k, load<T>(a + k) * share);
  }
}

// total[k] (+)= sum over positions of rows[t][k] (times factor[t][k] when given).
template <typename T>
void sum_rows(const T* rows, const T* factor, int64_t padded, int64_t count, T* total, bool first) {
  constexpr int n = kLanes<T>;
  for (int64_t k = 0; k < padded; k += n) {
    Vec<T> sum = {};
    if (factor != nullptr) {
      for (int64_t t = 0; t < count; ++t)
        sum = fused(load<T>(rows + t * padded + k), load<T>(factor + t * padded + k), sum);
    } else {
      for (int64_t t = 0; t < count; ++t) sum += load<T>(rows + t * padded + k);
    }
    store<T>(total + k, first ? sum : load<T>(total + k) + sum);
  }
}

// rows -> 2 scale rows, in place: the weights of the residuals in the gradient of a distance.
template <typename T>
void distance_weights(const T* scale, int64_t padded, int64_t count, T* rows) {
  constexpr int n = kLanes<T>;
  for (int64_t t = 0; t < count; ++t) {
    for (int64_t k = 0; k < padded; k += n) {
      store<T>(rows + t * padded + k, T(2) * load<T>(scale + k) * load<T>(rows + t * padded + k));
    }
  }
}

// Gradient of the softmax: rows, the gradient of the assignment -> gradient of the logits, in place.
template <typename T>
void softmax_rows_backward(const T* assignment, int64_t padded, int64_t count, T* rows) {
  constexpr int n = kLanes<T>;
  for (int64_t t = 0; t < count; ++t) {
    const T* a = assignment + t * padded;
    T* g = rows + t * padded;
    Vec<T> sum = {};
    for (int64_t k = 0; k < padded; k += n) sum = fused(load<T>(a + k), load<T>(g + k), sum);
    const Vec<T> dot = splat<T>(sum_lanes<T>(sum));
    for (int64_t k = 0; k < padded; k += n) store<T>(g + k, load<T>(a + k) * (load<T>(g + k) - dot));
  }
}

// ---- The ops

// Scratch memory of one thread, in cache lines.
template <typename T>
class Scratch {
 public:
  explicit Scratch(const EncodeTask<T>& task)
      : rows_(kTile * task.padded),
        tile_(kTile * task.channels),
        memory_(static_cast<T*>(::operator new((tile_ + 5 * rows_) * sizeof(T), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* tile() { return memory_; }
  T* rows(int which) { return memory_ + tile_ + which * rows_; }  // five of [kTile][padded]

 private:
  int64_t rows_, tile_;
  T* memory_;
};

// Walks over the tiles of the chunks [begin, end): for (Tiles at(task, begin, end); at.more(); at.next()).
template <typename T>
class Tiles {
 public:
  Tiles(const EncodeTask<T>& task, int64_t begin, int64_t end) : chunk(begin), task_(task), end_(end) {
    if (more()) open();
  }
  bool more() const { return chunk < end_; }
  void next() {
    first += kTile;
    if (first >= chunk_end_ && ++chunk < end_) open();
  }
  int64_t count() const { return std::min(kTile, task_.positions - first); }
  bool opening() const { return first == chunk_first_; }
  // What fetches the next tile in `calls` steps.
  Ahead ahead(int64_t calls) const {
    Tiles after = *this;
    after.next();
    if (!after.more()) return {};
    const PointsView& x = task_.x;
    const int64_t size = element_size(x.dtype);
    const char* from = static_cast<const char*>(x.data) + (after.image * x.stride_n + after.first * x.stride_p) * size;
    if (x.stride_p == 1) return {from, task_.channels, after.count() * size, x.stride_c * size, calls};
    if (x.stride_c == 1) return {from, after.count(), task_.channels * size, x.stride_p * size, calls};
    return {};
  }
  int64_t chunk, image = 0, first = 0;

 private:
  void open() {
    image = chunk / task_.chunks;
    chunk_first_ = first = chunk % task_.chunks * task_.chunk_tiles * kTile;
    chunk_end_ = std::min(first + task_.chunk_tiles * kTile, task_.positions);
  }
  const EncodeTask<T>& task_;
  int64_t end_, chunk_first_ = 0, chunk_end_ = 0;
};

// Register blocks of each kind in a full tile: how often Ahead::step is called.
template <typename T>
int64_t steps_over_channels(const EncodeTask<T>& task, bool dot) {
  const int64_t vectors = task.padded / kLanes<T>, wide = dot ? kPairVectors : 2, rows = dot ? kPairRows : kRows;
  return (task.channels + kChannelBlock - 1) / kChannelBlock * (vectors / wide + vectors % wide) * (kTile / rows);
}

template <typename T>
void encode(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  const int64_t steps = steps_over_channels(task, false) + channels / kPairRows;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *rows = scratch.rows(0);
    const int64_t count = at.count();
    Ahead ahead = at.ahead(steps);
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, channels, count, rows, nullptr, ahead);
    softmax_rows(rows, task.scale, padded, task.codes, count, rows);
    contract_positions(tile, task.codewords, rows, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening(), ahead);
  }
}

template <typename T>
void encode_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  const int64_t steps = steps_over_channels(task, true) + channels / kPairRows + channels / kAcrossRows;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *distance = scratch.rows(0), *assigned = scratch.rows(1), *weight = scratch.rows(2);
    T *assigned_columns = scratch.rows(3), *weight_columns = scratch.rows(4);
    const int64_t count = at.count();
    const T* grad = task.grad + at.image * channels * padded;
    Ahead ahead = at.ahead(steps);
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, true>(tile, task.codewords, grad, padded, channels, count, distance, weight, ahead);
    softmax_rows(distance, task.scale, padded, task.codes, count, assigned);
    softmax_rows_backward(assigned, padded, count, weight);
    sum_rows<T>(assigned, nullptr, padded, count, task.sum_assigned + at.chunk * padded, at.opening());
    sum_rows<T>(weight, distance, padded, count, task.sum_scale + at.chunk * padded, at.opening());
    contract_positions(tile, task.codewords, weight, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening(), ahead);
    distance_weights(task.scale, padded, count, weight);
    std::fill(assigned + count * padded, assigned + kTile * padded, T(0));
    std::fill(weight + count * padded, weight + kTile * padded, T(0));
    transpose_rows(assigned, padded, assigned_columns);
    transpose_rows(weight, padded, weight_columns);
    contract_codes<T>(tile, grad, assigned_columns, task.codewords, weight_columns, padded, task.codes, channels,
                      ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

template <typename T>
void scaled_l2(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *rows = scratch.rows(0);
    const int64_t count = at.count();
    Ahead ahead = at.ahead(steps_over_channels(task, false));
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, task.channels, count, rows, nullptr,
                                      ahead);
    for (int64_t t = 0; t < count; ++t) {
      for (int64_t k = 0; k < padded; ++k) rows[t * padded + k] *= task.scale[k];
    }
    write_map(task, at.image, at.first, count, rows);
  }
}

template <typename T>
void scaled_l2_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *distance = scratch.rows(0), *weight = scratch.rows(1), *columns = scratch.rows(2);
    const int64_t count = at.count();
    Ahead ahead = at.ahead(steps_over_channels(task, false) + channels / kPairRows);
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, channels, count, distance, nullptr, ahead);
    read_map(task, at.image, at.first, count, weight);
    sum_rows<T>(weight, distance, padded, count, task.sum_scale + at.chunk * padded, at.opening());
    contract_positions(tile, task.codewords, weight, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening(), ahead);
    distance_weights(task.scale, padded, count, weight);
    transpose_rows(weight, padded, columns);
    contract_codes<T>(tile, nullptr, nullptr, task.codewords, columns, padded, task.codes, channels, ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

template <typename T>
void aggregate(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *rows = scratch.rows(0);
    const int64_t count = at.count();
    Ahead ahead = at.ahead(channels / kPairRows);
    read_tile(task, at.image, at.first, count, tile);
    read_map(task, at.image, at.first, count, rows);
    contract_positions(tile, task.codewords, rows, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening(), ahead);
  }
}

template <typename T>
void aggregate_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *rows = scratch.rows(0), *columns = scratch.rows(1), *product = scratch.rows(2);
    const int64_t count = at.count();
    const T* grad = task.grad + at.image * channels * padded;
    Ahead ahead = at.ahead(steps_over_channels(task, true));
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, false, true>(tile, task.codewords, grad, padded, channels, count, nullptr, product, ahead);
    write_map(task, at.image, at.first, count, product);
    read_map(task, at.image, at.first, count, rows);
    sum_rows<T>(rows, nullptr, padded, count, task.sum_assigned + at.chunk * padded, at.opening());
    transpose_rows(rows, padded, columns);
    contract_codes<T>(tile, grad, columns, nullptr, nullptr, padded, task.codes, channels, ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
