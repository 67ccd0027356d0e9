// No include guard: the vector kernels of the encoding ops, compiled once for each instruction set (see isa.h,
// encode.h).
//
// Everything is summed over the residuals x - c themselves: no ||x||^2 - 2 x c + ||c||^2, no sum a x - c sum a, hence
// nothing that cancels where features or codewords lie far from zero or from each other. The subtraction is nearly free
// beside the multiplication. Every sum over channels or positions is in two levels (block, then whole), which keeps
// rounding errors small.
namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {

#define RENDSEG_INLINE inline __attribute__((always_inline))

// Register blocks, as large as the registers hold: positions or channels (rows) by vectors.
#if RENDSEG_ISA == 2
constexpr int kVectorBytes = 64;
constexpr int kRows = 12;       // of one sum of two vectors a row
constexpr int kWide = 2;        // vectors of a row of kPairRows, with two things to hold of each
constexpr int kAcrossRows = 4;  // channels by kAcross vectors of positions, likewise
constexpr int kAcross = 3;
#else
constexpr int kVectorBytes = RENDSEG_ISA == 1 ? 32 : 16;
constexpr int kRows = 6;
constexpr int kWide = 1;
constexpr int kAcrossRows = 3;
constexpr int kAcross = 2;
#endif
constexpr int kPairRows = 6;
constexpr int64_t kTile = kEncodeTile;
constexpr int64_t kChannelBlock = 64;  // channels whose tile rows and codewords fit the first-level cache

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef float Loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Lane;
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef double Loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Lane;
  static constexpr int kLanes = kVectorBytes / 8;
};
template <typename T>
using Vec = typename Simd<T>::V;
template <typename T>
using Lane = typename Simd<T>::Lane;
template <typename T>
constexpr int kLanes = Simd<T>::kLanes;

template <typename T>
RENDSEG_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Loose*>(p);
}
template <typename T>
RENDSEG_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Loose*>(p) = v;
}
template <typename T>
RENDSEG_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};
}

template <typename T>
RENDSEG_INLINE typename Simd<T>::I lanes() {  // 0, 1, 2, ...
  typename Simd<T>::I v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = i;
  return v;
}

RENDSEG_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {  // a * b + c
#if RENDSEG_ISA == 2 && defined(__x86_64__)
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RENDSEG_ISA == 1 && defined(__x86_64__)
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
RENDSEG_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#if RENDSEG_ISA == 2 && defined(__x86_64__)
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif RENDSEG_ISA == 1 && defined(__x86_64__)
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Lane i of the result is lane (i xor Step) of v.
template <typename T, int Step, int... Lane>
RENDSEG_INLINE Vec<T> exchange(Vec<T> v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ Step)...);
}
template <typename T, int Step>
RENDSEG_INLINE Vec<T> exchange(Vec<T> v) {
  return exchange<T, Step>(v, std::make_integer_sequence<int, kLanes<T>>{});
}
template <typename T, int Step = kLanes<T> / 2>
RENDSEG_INLINE T sum_lanes(Vec<T> v) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    return sum_lanes<T, Step / 2>(v + exchange<T, Step>(v));
  }
}
template <typename T>
RENDSEG_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <typename T, int Step = kLanes<T> / 2>
RENDSEG_INLINE T max_lanes(Vec<T> v) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    return max_lanes<T, Step / 2>(larger<T>(v, exchange<T, Step>(v)));
  }
}

// exp(x) for x <= 0 (or NaN), to about one unit in the last place; below the normal range it is 0.
RENDSEG_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using U = Simd<float>::U;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec<float> shifted = fused(x, splat(1.44269504f), splat(kShift));
  const Vec<float> n = shifted - kShift;
  Vec<float> r = fused(n, splat(-0.693145752f), x);  // ln 2 in two parts; the first has trailing zero bits
  r = fused(n, splat(-1.42860677e-6f), r);
  // Taylor to the seventh order: |r| <= ln(2) / 2, so the rest is below 6e-9.
  Vec<float> p = splat(1.0f / 5040);
  p = fused(p, r, splat(1.0f / 720));
  p = fused(p, r, splat(1.0f / 120));
  p = fused(p, r, splat(1.0f / 24));
  p = fused(p, r, splat(1.0f / 6));
  p = fused(p, r, splat(0.5f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  const Vec<float> power = (Vec<float>)(((U)shifted << 23) + 0x3f800000u);
  return x < -87.3f ? Vec<float>{} : p * power;
}
RENDSEG_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// ---- Moving between tensors of any dtype and stride, and rows of T

template <typename T, typename X>
RENDSEG_INLINE Vec<T> load_as(const X* p) {
  if constexpr (std::is_same_v<T, X>) {
    return load<T>(p);
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    Half bits;
    std::memcpy(&bits, p, sizeof(bits));
    return (Vec<float>)(__builtin_convertvector(bits, Simd<float>::U) << 16);
#if RENDSEG_ISA == 2 && defined(__x86_64__)
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::Half>) {
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RENDSEG_ISA == 1 && defined(__x86_64__)
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::Half>) {
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
  } else {
    Vec<T> v;
    for (int i = 0; i < kLanes<T>; ++i) v[i] = static_cast<T>(p[i]);
    return v;
  }
}

template <typename T, typename X>
RENDSEG_INLINE void store_as(X* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, X>) {
    store<T>(p, v);
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::BFloat16>) {
    typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
    const Simd<float>::U bits = (Simd<float>::U)v;
    const Simd<float>::U even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Simd<float>::U nan = Simd<float>::U{} + 0x7fc0u;
    const Half out = __builtin_convertvector(v == v ? even : nan, Half);
    std::memcpy(p, &out, sizeof(out));
#if RENDSEG_ISA == 2 && defined(__x86_64__)
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::Half>) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif RENDSEG_ISA == 1 && defined(__x86_64__)
  } else if constexpr (std::is_same_v<T, float> && std::is_same_v<X, c10::Half>) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#endif
  } else {
    for (int i = 0; i < kLanes<T>; ++i) p[i] = static_cast<X>(v[i]);
  }
}

// One step of the transposition of a square of vectors: swaps the off-diagonal blocks of size Step.
template <typename T, int Step, int... Lane>
RENDSEG_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<T>;
  const Vec<T> low = __builtin_shufflevector(a, b, ((Lane & Step) ? n + (Lane ^ Step) : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) ? n + Lane : (Lane ^ Step))...);
  a = low;
}
template <typename T, int Step>
RENDSEG_INLINE void transpose_steps(Vec<T>* v) {
  if constexpr (Step > 0) {
    constexpr int n = kLanes<T>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (!(i & Step)) swap_blocks<T, Step>(v[i], v[i | Step], std::make_integer_sequence<int, n>{});
    }
    transpose_steps<T, Step / 2>(v);
  }
}
template <typename T>
RENDSEG_INLINE void transpose_square(Vec<T>* v) {
  transpose_steps<T, kLanes<T> / 2>(v);
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
      transpose_square<T>(v);
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
      transpose_square<T>(v);
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

template <typename X>
const X* at_position(const EncodeView& view, int64_t image, int64_t position) {
  return static_cast<const X*>(view.data) + image * view.image + position * view.position;
}

// The tile [channels][kTile] of x from position `first` on, with zeros behind the last position.
template <typename T>
void read_tile(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, T* tile) {
  const EncodeView& x = task.x;
  auto read = [&]<typename X>(const X* source) {
    read_rows<T, X>(source, x.channel, x.position, task.channels, count, tile, kTile);
  };
  switch (x.dtype) {
    case c10::ScalarType::Half:
      read(at_position<c10::Half>(x, image, first));
      break;
    case c10::ScalarType::BFloat16:
      read(at_position<c10::BFloat16>(x, image, first));
      break;
    case c10::ScalarType::Double:
      read(at_position<double>(x, image, first));
      break;
    default:
      read(at_position<float>(x, image, first));
  }
  if (count < kTile) {
    for (int64_t d = 0; d < task.channels; ++d) std::fill(tile + d * kTile + count, tile + (d + 1) * kTile, T(0));
  }
}

template <typename T>
void write_tile(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, const T* tile) {
  const EncodeView& x = task.x_grad;
  auto write = [&]<typename X>(const X* target) {
    write_rows<T, X>(const_cast<X*>(target), x.channel, x.position, task.channels, count, tile, kTile);
  };
  switch (x.dtype) {
    case c10::ScalarType::Half:
      write(at_position<c10::Half>(x, image, first));
      break;
    case c10::ScalarType::BFloat16:
      write(at_position<c10::BFloat16>(x, image, first));
      break;
    case c10::ScalarType::Double:
      write(at_position<double>(x, image, first));
      break;
    default:
      write(at_position<float>(x, image, first));
  }
}

// rows [kTile][padded] of a map [B,M,K], with zeros behind the last code and the last position.
template <typename T>
void read_map(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, T* rows) {
  const EncodeView& map = task.map;
  std::fill(rows, rows + kTile * task.padded, T(0));
  auto read = [&]<typename X>(const X* source) {
    read_rows<T, X>(source, map.position, map.channel, count, task.codes, rows, task.padded);
  };
  switch (map.dtype) {
    case c10::ScalarType::Half:
      read(at_position<c10::Half>(map, image, first));
      break;
    case c10::ScalarType::BFloat16:
      read(at_position<c10::BFloat16>(map, image, first));
      break;
    case c10::ScalarType::Double:
      read(at_position<double>(map, image, first));
      break;
    default:
      read(at_position<float>(map, image, first));
  }
}

template <typename T>
void write_map(const EncodeTask<T>& task, int64_t image, int64_t first, int64_t count, const T* rows) {
  const EncodeView& map = task.map_out;
  auto write = [&]<typename X>(const X* target) {
    write_rows<T, X>(const_cast<X*>(target), map.position, map.channel, count, task.codes, rows, task.padded);
  };
  switch (map.dtype) {
    case c10::ScalarType::Half:
      write(at_position<c10::Half>(map, image, first));
      break;
    case c10::ScalarType::BFloat16:
      write(at_position<c10::BFloat16>(map, image, first));
      break;
    case c10::ScalarType::Double:
      write(at_position<double>(map, image, first));
      break;
    default:
      write(at_position<float>(map, image, first));
  }
}

// columns[k][t] = rows[t][k], [kTile][padded] -> [padded][kTile].
template <typename T>
void turn(const T* rows, int64_t padded, T* columns) {
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
  constexpr int n = kLanes<T>, rows = kDot ? kPairRows : kRows, vectors = kDot ? kWide : 2;
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
  for (; k + kWide * n <= padded; k += kWide * n) {
    over_positions<T, NR, kWide>(tile, codes + k, weights + k, padded, count, out + k, first);
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
    const EncodeView& x = task_.x;
    const int64_t size = c10::elementSize(x.dtype);
    const char* from = static_cast<const char*>(x.data) + (after.image * x.image + after.first * x.position) * size;
    if (x.position == 1) return {from, task_.channels, after.count() * size, x.channel * size, calls};
    if (x.channel == 1) return {from, after.count(), task_.channels * size, x.position * size, calls};
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
  const int64_t vectors = task.padded / kLanes<T>, wide = dot ? kWide : 2, rows = dot ? kPairRows : kRows;
  return (task.channels + kChannelBlock - 1) / kChannelBlock * (vectors / wide + vectors % wide) * (kTile / rows);
}

template <typename T>
void EncodeKernels<T>::encode(const EncodeTask<T>& task, int64_t begin, int64_t end) {
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
void EncodeKernels<T>::encode_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  const int64_t steps = steps_over_channels(task, true) + channels / kPairRows + channels / kAcrossRows;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *distance = scratch.rows(0), *assigned = scratch.rows(1), *weight = scratch.rows(2);
    T *assigned_turned = scratch.rows(3), *weight_turned = scratch.rows(4);
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
    turn(assigned, padded, assigned_turned);
    turn(weight, padded, weight_turned);
    contract_codes<T>(tile, grad, assigned_turned, task.codewords, weight_turned, padded, task.codes, channels, ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

template <typename T>
void EncodeKernels<T>::scaled_l2(const EncodeTask<T>& task, int64_t begin, int64_t end) {
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
void EncodeKernels<T>::scaled_l2_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *distance = scratch.rows(0), *weight = scratch.rows(1), *turned = scratch.rows(2);
    const int64_t count = at.count();
    Ahead ahead = at.ahead(steps_over_channels(task, false) + channels / kPairRows);
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, true, false>(tile, task.codewords, nullptr, padded, channels, count, distance, nullptr, ahead);
    read_map(task, at.image, at.first, count, weight);
    sum_rows<T>(weight, distance, padded, count, task.sum_scale + at.chunk * padded, at.opening());
    contract_positions(tile, task.codewords, weight, padded, channels, count,
                       task.sum_residual + at.chunk * channels * padded, at.opening(), ahead);
    distance_weights(task.scale, padded, count, weight);
    turn(weight, padded, turned);
    contract_codes<T>(tile, nullptr, nullptr, task.codewords, turned, padded, task.codes, channels, ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

template <typename T>
void EncodeKernels<T>::aggregate(const EncodeTask<T>& task, int64_t begin, int64_t end) {
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
void EncodeKernels<T>::aggregate_backward(const EncodeTask<T>& task, int64_t begin, int64_t end) {
  Scratch<T> scratch(task);
  const int64_t padded = task.padded, channels = task.channels;
  for (Tiles<T> at(task, begin, end); at.more(); at.next()) {
    T *tile = scratch.tile(), *rows = scratch.rows(0), *turned = scratch.rows(1), *product = scratch.rows(2);
    const int64_t count = at.count();
    const T* grad = task.grad + at.image * channels * padded;
    Ahead ahead = at.ahead(steps_over_channels(task, true));
    read_tile(task, at.image, at.first, count, tile);
    contract_channels<T, false, true>(tile, task.codewords, grad, padded, channels, count, nullptr, product, ahead);
    write_map(task, at.image, at.first, count, product);
    read_map(task, at.image, at.first, count, rows);
    sum_rows<T>(rows, nullptr, padded, count, task.sum_assigned + at.chunk * padded, at.opening());
    turn(rows, padded, turned);
    contract_codes<T>(tile, grad, turned, nullptr, nullptr, padded, task.codes, channels, ahead);
    write_tile(task, at.image, at.first, count, tile);
  }
}

template struct EncodeKernels<float>;
template struct EncodeKernels<double>;

#undef RENDSEG_INLINE

}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
