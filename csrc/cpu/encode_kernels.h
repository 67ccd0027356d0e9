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
// Each product keeps a block of sums in registers (see "Register blocks"). These sum over the residuals x - c
// themselves, so nothing cancels where features or codewords lie far from zero or from each other. encode has a second
// form, `Centred`: products of x - m and c - m alone, m the mean codeword, with ||x||^2 - 2 x c + ||c||^2 and sum a x -
// c sum a. It has half the instructions, and loses at most four bits as long as every squared distance is at least a
// sixteenth of ||x - m||^2 + ||c - m||^2; a tile where one is not (or is NaN or infinite) takes the residuals, as do
// the tiles after it in the same chunk.
//
// Every sum is in two levels (block, then whole), which keeps rounding errors small. Tiles are grouped in chunks that
// depend on the shape alone; each has its own partial sums, which encode.cpp adds in order, so that results do not
// depend on the number of threads. Scratch of a thread: the tile and five arrays of [96][padded] values.
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

  // For the centred form, null where it is not to be taken: the mean codeword [D], the codewords minus it [D][padded],
  // their squares [padded]; the products of the gradient with them [B][padded], and rows [B][2 padded][D]: the
  // gradient, then minus the centred codewords
  const T *centre = nullptr, *centred = nullptr, *centred_squares = nullptr;
  const T *centred_grad = nullptr, *code_rows = nullptr;

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
constexpr int kWideRows = 8;  // by three vectors, with one thing to hold
#else
constexpr int kRows = 6;
constexpr int kPairVectors = 1;
constexpr int kAcrossRows = 3;
constexpr int kAcross = 2;
constexpr int kWideRows = 4;
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
    constexpr int64_t kAhead = 16;  // rows: they lie far apart, where the hardware sees no pattern
    for (int64_t i = 0; i < rows; ++i) {
      const X* from = source + i * row;
      if (i + kAhead < rows) {
        for (int64_t j = 0; j < columns; j += 64 / sizeof(X)) __builtin_prefetch(from + kAhead * row + j);
      }
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
                       T* squares, T* dots) {
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
      }
    }
    for (; k < padded; k += n) {
      for (int64_t t = 0; t < count; t += rows) {
        over_channels<T, rows, 1, kSquare, kDot>(
            tile + d * kTile + t, codes + d * padded + k, kDot ? grad + d * padded + k : nullptr, padded, block,
            kSquare ? squares + t * padded + k : nullptr, kDot ? dots + t * padded + k : nullptr, d == 0);
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
                        int64_t count, T* out, bool first) {
  int64_t d = 0;
  for (; d + kPairRows <= channels; d += kPairRows) {
    over_positions<T, kPairRows>(tile + d * kTile, codes + d * padded, weights, padded, count, out + d * padded, first);
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
                    int64_t codes, int64_t channels) {
  constexpr int step = kAcross * kLanes<T>;
  static_assert(kTile % step == 0);
  int64_t d = 0;
  auto from = [](const T* p, int64_t offset) { return p != nullptr ? p + offset : nullptr; };
  for (; d + kAcrossRows <= channels; d += kAcrossRows) {
    for (int64_t t = 0; t < kTile; t += step) {
      over_codes<T, kAcrossRows>(tile + d * kTile + t, from(grad, d * padded), from(assigned, t),
                                 from(code, d * padded), from(weight, t), padded, codes);
    }
  }
  for (; d < channels; ++d) {
    for (int64_t t = 0; t < kTile; t += step) {
      over_codes<T, 1>(tile + d * kTile + t, from(grad, d * padded), from(assigned, t), from(code, d * padded),
                       from(weight, t), padded, codes);
    }
  }
}

// ---- Products of the centred form

// f.operator()<R>(first), R rows at a time, and what is left by halves of R.
template <int R, typename F>
RENDSEG_INLINE void in_rows(int64_t count, const F& f, int64_t first = 0) {
  for (; first + R <= count; first += R) f.template operator()<R>(first);
  if constexpr (R > 1) in_rows<R / 2>(count, f, first);
}

// sum[r][v] += sum over i < count of a[i * a_step + r * kRow] * b[i * b_step + v * lanes].
template <int kRow, typename T, int NR, int NV>
RENDSEG_INLINE void multiply(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count,
                             Vec<T> (&sum)[NR][NV]) {
  for (int64_t i = 0; i < count; ++i, a += a_step, b += b_step) {
    Vec<T> w[NV];
#pragma GCC unroll 3
    for (int v = 0; v < NV; ++v) w[v] = load<T>(b + v * kLanes<T>);
#pragma GCC unroll 12
    for (int r = 0; r < NR; ++r) {
      const Vec<T> x = splat<T>(a[r * kRow]);
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) sum[r][v] = fused(x, w[v], sum[r][v]);
    }
  }
}

// f.operator()<V>(first) over the vectors of [padded], two at a time.
template <typename T, typename F>
RENDSEG_INLINE void in_vectors(int64_t padded, const F& f) {
  constexpr int n = kLanes<T>;
  int64_t k = 0;
  for (; k + 2 * n <= padded; k += 2 * n) f.template operator()<2>(k);
  for (; k < padded; k += n) f.template operator()<1>(k);
}

// out[kTile][padded] = sum over channels of tile[d][t] * codes[d][k].
template <typename T>
void multiply_channels(const T* tile, const T* codes, int64_t padded, int64_t channels, int64_t count, T* out) {
  static_assert(kTile % kRows == 0);
  for (int64_t d = 0; d < channels; d += kChannelBlock) {
    in_vectors<T>(padded, [&]<int NV>(int64_t k) {
      for (int64_t t = 0; t < count; t += kRows) {
        Vec<T> sum[kRows][NV] = {};
        multiply<1>(tile + d * kTile + t, kTile, codes + d * padded + k, padded, std::min(kChannelBlock, channels - d),
                    sum);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int v = 0; v < NV; ++v) put<T>(out + (t + r) * padded + k + v * kLanes<T>, sum[r][v], d == 0);
        }
      }
    });
  }
}

// out[channels][padded] (+)= sum over positions of tile[d][t] * weights[t][k], minus codes[d][k] * totals[k].
template <typename T>
void multiply_positions(const T* tile, const T* codes, const T* weights, const T* totals, int64_t padded,
                        int64_t channels, int64_t count, T* out, bool first) {
  constexpr int n = kLanes<T>;
  in_rows<kRows>(channels, [&]<int NR>(int64_t d) {
    in_vectors<T>(padded, [&]<int NV>(int64_t k) {
      Vec<T> sum[NR][NV];
#pragma GCC unroll 12
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) {
          sum[r][v] = -load<T>(codes + (d + r) * padded + k + v * n) * load<T>(totals + k + v * n);
        }
      }
      multiply<kTile>(tile + d * kTile, 1, weights + k, padded, count, sum);
#pragma GCC unroll 12
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 2
        for (int v = 0; v < NV; ++v) put<T>(out + (d + r) * padded + k + v * n, sum[r][v], first);
      }
    });
  });
}

// tile[d][t] = tile[d][t] * sum over k of weights[k][t] + sum over both * padded of rows[k][d] * columns[k][t], where
// `columns` are those of the assignment and then the weights, `rows` the gradient and then minus the codewords.
template <typename T>
void multiply_codes(T* tile, const T* rows, const T* columns, int64_t padded, int64_t channels) {
  constexpr int n = kLanes<T>, NV = 3;
  static_assert(kTile % (NV * n) == 0);
  for (int64_t t = 0; t < kTile; t += NV * n) {
    Vec<T> total[NV] = {};
    for (int64_t k = padded; k < 2 * padded; ++k) {
#pragma GCC unroll 3
      for (int v = 0; v < NV; ++v) total[v] += load<T>(columns + k * kTile + t + v * n);
    }
    in_rows<kWideRows>(channels, [&]<int NR>(int64_t d) {
      Vec<T> sum[NR][NV];
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) sum[r][v] = load<T>(tile + (d + r) * kTile + t + v * n) * total[v];
      }
      multiply<1>(rows + d, channels, columns + t, kTile, 2 * padded, sum);
#pragma GCC unroll 8
      for (int r = 0; r < NR; ++r) {
#pragma GCC unroll 3
        for (int v = 0; v < NV; ++v) store<T>(tile + (d + r) * kTile + t + v * n, sum[r][v]);
      }
    });
  }
}

// The tile minus the centre, and the squares of its positions, [kTile].
template <typename T>
void centre_tile(const T* centre, int64_t channels, T* tile, T* squares) {
  constexpr int n = kLanes<T>;
  std::fill(squares, squares + kTile, T(0));
  for (int64_t first = 0; first < channels; first += kChannelBlock) {
    const int64_t last = std::min(first + kChannelBlock, channels);
    for (int64_t t = 0; t < kTile; t += 2 * n) {
      Vec<T> sum[2] = {};
      for (int64_t d = first; d < last; ++d) {
        const Vec<T> m = splat<T>(centre[d]);
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          T* at = tile + d * kTile + t + v * n;
          const Vec<T> x = load<T>(at) - m;
          store<T>(at, x);
          sum[v] = fused(x, x, sum[v]);
        }
      }
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) put<T>(squares + t + v * n, sum[v], false);
    }
  }
}

// products -> distances, in place: squares - 2 products + code_squares. Whether each of the first `codes` is finite and
// at least a sixteenth of the two squares.
template <typename T>
bool distances_of(const T* squares, const T* code_squares, int64_t padded, int64_t codes, int64_t count, T* rows) {
  constexpr int n = kLanes<T>;
  Ints<T> wrong = {};
  for (int64_t k = 0; k < padded; k += n) {
    const Vec<T> code = load<T>(code_squares + k);
    const Ints<T> real = lanes<T>() < static_cast<Lane<T>>(std::min<int64_t>(codes - k, n));
    for (int64_t t = 0; t < count; ++t) {
      T* at = rows + t * padded + k;
      const Vec<T> both = splat<T>(squares[t]) + code, distance = fused(load<T>(at), splat(T(-2)), both);
      wrong |= real & ~((distance * T(16) >= both) & (distance < std::numeric_limits<T>::infinity()));
      store<T>(at, distance);
    }
  }
  for (int i = 0; i < n; ++i) {
    if (wrong[i] != 0) return false;
  }
  return true;
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
  T* rows(int which) { return memory_ + tile_ + which * rows_; }  // five of [kTile][padded], side by side

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

// Reads a tile: where the centred form is wanted and accurate enough in that form, with its distances [kTile][padded],
// else as it is. Whether it is centred.
template <typename T>
bool read_centred(const EncodeTask<T>& task, const Tiles<T>& at, bool wanted, T* tile, T* distance) {
  read_tile(task, at.image, at.first, at.count(), tile);
  if (!wanted || task.centre == nullptr) return false;
  alignas(64) T squares[kTile];
  centre_tile(task.centre, task.channels, tile, squares);
  multiply_channels(tile, task.centred, task.padded, task.channels, at.count(), distance);
  if (distances_of(squares, task.centred_squares, task.padded, task.codes, at.count(), distance)) return true;
  read_tile(task, at.image, at.first, at.count(), tile);
  return false;
}

template <typename T>
void encode(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  T *tile = scratch.tile(), *rows = scratch.rows(0), *totals = scratch.rows(1);
  bool centred = true;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    const int64_t count = at.count();
    T* sums = task.sum_residual + at.chunk * channels * padded;
    centred = read_centred(task, at, centred || at.opening(), tile, rows);
    if (centred) {
      softmax_rows(rows, task.scale, padded, task.codes, count, rows);
      sum_rows<T>(rows, nullptr, padded, count, totals, true);
      multiply_positions(tile, task.centred, rows, totals, padded, channels, count, sums, at.opening());
    } else {
      contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, channels, count, rows, nullptr);
      softmax_rows(rows, task.scale, padded, task.codes, count, rows);
      contract_positions(tile, task.codewords, rows, padded, channels, count, sums, at.opening());
    }
  }
}

template <typename T>
void encode_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  constexpr int n = kLanes<T>;
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  T *tile = scratch.tile(), *distance = scratch.rows(0), *assigned = scratch.rows(1), *weight = scratch.rows(2);
  T *assigned_columns = scratch.rows(3), *weight_columns = scratch.rows(4);
  bool centred = true;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    const int64_t count = at.count();
    const T* grad = task.grad + at.image * channels * padded;
    T* sums = task.sum_residual + at.chunk * channels * padded;
    centred = read_centred(task, at, centred || at.opening(), tile, distance);
    if (centred) {
      multiply_channels(tile, grad, padded, channels, count, weight);
      for (int64_t t = 0; t < count; ++t) {
        for (int64_t k = 0; k < padded; k += n) {
          T* to = weight + t * padded + k;
          store<T>(to, load<T>(to) - load<T>(task.centred_grad + at.image * padded + k));
        }
      }
    } else {
      contract_channels<T, true, true>(tile, task.codewords, grad, padded, channels, count, distance, weight);
    }
    softmax_rows(distance, task.scale, padded, task.codes, count, assigned);
    softmax_rows_backward(assigned, padded, count, weight);
    sum_rows<T>(assigned, nullptr, padded, count, task.sum_assigned + at.chunk * padded, at.opening());
    sum_rows<T>(weight, distance, padded, count, task.sum_scale + at.chunk * padded, at.opening());
    if (centred) {
      T* totals = weight_columns;  // for now
      sum_rows<T>(weight, nullptr, padded, count, totals, true);
      multiply_positions(tile, task.centred, weight, totals, padded, channels, count, sums, at.opening());
    } else {
      contract_positions(tile, task.codewords, weight, padded, channels, count, sums, at.opening());
    }
    distance_weights(task.scale, padded, count, weight);
    std::fill(assigned + count * padded, assigned + kTile * padded, T(0));
    std::fill(weight + count * padded, weight + kTile * padded, T(0));
    transpose_rows(assigned, padded, assigned_columns);
    transpose_rows(weight, padded, weight_columns);
    if (centred) {
      multiply_codes(tile, task.code_rows + at.image * 2 * padded * channels, assigned_columns, padded, channels);
    } else {
      contract_codes<T>(tile, grad, assigned_columns, task.codewords, weight_columns, padded, task.codes, channels);
    }
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
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, task.channels, count, rows, nullptr);
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
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, channels, count, distance, nullptr);
    read_map(task, at.image, at.first, count, weight);
    sum_rows<T>(weight, distance, padded, count, task.sum_scale + at.chunk * padded, at.opening());
    contract_positions(tile, task.codewords, weight, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening());
    distance_weights(task.scale, padded, count, weight);
    transpose_rows(weight, padded, columns);
    contract_codes<T>(tile, nullptr, nullptr, task.codewords, columns, padded, task.codes, channels);
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
    read_tile(task, at.image, at.first, count, tile);
    read_map(task, at.image, at.first, count, rows);
    contract_positions(tile, task.codewords, rows, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening());
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
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, false, true>(tile, task.codewords, grad, padded, channels, count, nullptr, product);
    write_map(task, at.image, at.first, count, product);
    read_map(task, at.image, at.first, count, rows);
    sum_rows<T>(rows, nullptr, padded, count, task.sum_assigned + at.chunk * padded, at.opening());
    transpose_rows(rows, padded, columns);
    contract_codes<T>(tile, grad, columns, nullptr, nullptr, padded, task.codes, channels);
    write_tile(task, at.image, at.first, count, tile);
  }
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
