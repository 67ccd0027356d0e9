// No include guard: compiled once per instruction set, see isa.h.
//
// Margins go through the cells in blocks that stay in the first-level cache, as vectors of kLanes cells. `A` is the
// type of the arithmetic: float, or double for float64 logits.
namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

#if RENDSEG_ISA == 2
constexpr int kVectorBytes = 64;
#elif RENDSEG_ISA == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// Scratch of one call, zeroed. (Not std::vector: its functions would be compiled for this instruction set under a name
// that the linker shares with every other file.)
template <typename A>
struct Buffer {
  A* data;

  explicit Buffer(int64_t size) : data(new A[static_cast<size_t>(size)]()) {}
  ~Buffer() { delete[] data; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
};

template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Mask __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vector = typename Simd<A>::Vector;
template <typename A>
using Mask = typename Simd<A>::Mask;

// Type of the arithmetic on logits of type T.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;

// kLanes consecutive logits, widened.
template <typename T>
inline Vector<Wide<T>> load(const T* p) {
  using A = Wide<T>;
  Vector<A> v;
  if constexpr (std::is_same_v<T, A>) {
    std::memcpy(&v, p, sizeof(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    Narrow narrow;
    std::memcpy(&narrow, p, sizeof(narrow));
    const Bits bits = __builtin_convertvector(narrow, Bits) << 16;
    std::memcpy(&v, &bits, sizeof(v));
  } else {
#if RENDSEG_ISA == 2
    v = (Vector<A>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif RENDSEG_ISA == 1
    v = (Vector<A>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    for (int i = 0; i < kLanes<A>; ++i) v[i] = static_cast<float>(p[i]);
#endif
  }
  return v;
}

// The first `count` < kLanes of them, zeros after.
template <typename T>
inline Vector<Wide<T>> load_part(const T* p, int64_t count) {
  T padded[kLanes<Wide<T>>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}

// kLanes values `stride` apart.
template <typename A>
inline Vector<A> load_strided(const A* p, int64_t stride) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i offset = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
    return (Vector<A>)_mm512_i32gather_ps(offset, p, 4);
  }
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i offset = _mm256_mullo_epi32(lane, _mm256_set1_epi32(static_cast<int>(stride)));
    return (Vector<A>)_mm256_i32gather_ps(p, offset, 4);
  }
#endif
  Vector<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * stride];
  return v;
}

// Lanes of a (0, 1, ...) and b (kLanes, kLanes + 1, ...) by index.
template <typename A>
inline Vector<A> permute(Vector<A> a, Vector<A> b, Mask<A> index) {
#if defined(__clang__)
  Vector<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = index[i] < kLanes<A> ? a[index[i]] : b[index[i] - kLanes<A>];
  return v;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// Rounded to the type the sample would be stored in.
template <typename T>
inline Vector<Wide<T>> round_to(Vector<Wide<T>> v) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    Bits bits;
    std::memcpy(&bits, &v, sizeof(v));
    bits = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    Vector<float> rounded;
    std::memcpy(&rounded, &bits, sizeof(v));
    return v == v ? rounded : v;
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if RENDSEG_ISA == 2
    return (Vector<float>)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif RENDSEG_ISA == 1
    return (Vector<float>)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(c10::Half(static_cast<float>(v[i])));
    return v;
#endif
  } else {
    return v;
  }
}

// a > b ? a : b and a < b ? a : b, b where either is NaN. (GCC 12 makes a comparison and a blend of the conditional.)
template <typename A>
inline Vector<A> larger(Vector<A> a, Vector<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Vector<A>)_mm512_max_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Vector<A>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <typename A>
inline Vector<A> smaller(Vector<A> a, Vector<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Vector<A>)_mm512_min_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Vector<A>)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

template <typename A>
inline Mask<A> larger_bits(Mask<A> a, Mask<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Mask<A>)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Mask<A>)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
  return a > b ? a : b;
}

template <typename A>
inline Mask<A> magnitude_bits(Vector<A> v) {
  Mask<A> bits;
  std::memcpy(&bits, &v, sizeof(v));
  return bits & std::numeric_limits<std::conditional_t<std::is_same_v<A, float>, int32_t, int64_t>>::max();
}

// The two largest channels so far of kLanes cells, and the largest magnitude as bits, which tells whether a NaN was
// seen.
template <typename A>
struct Running {
  Vector<A> first;
  Vector<A> second;
  Mask<A> magnitude;

  static Running start() {
    Running r;
    r.first = r.second = Vector<A>{} - std::numeric_limits<A>::infinity();
    r.magnitude = Mask<A>{};
    return r;
  }

  void add(Vector<A> value) {
    magnitude = larger_bits<A>(magnitude_bits<A>(value), magnitude);
    second = larger<A>(smaller<A>(value, first), second);
    first = larger<A>(value, first);
  }

  // As float32, the type of the result; `out` has room for kLanes.
  void store_margin(bool single, float* out) const {
    Vector<A> margin = first - second;
    if (single) margin = first < A(0) ? -first : first;
    const Vector<A> infinity = Vector<A>{} + std::numeric_limits<A>::infinity();
    const Vector<A> nan = Vector<A>{} + std::numeric_limits<A>::quiet_NaN();
    margin = magnitude > magnitude_bits<A>(infinity) ? nan : margin;
    if constexpr (std::is_same_v<A, float>) {
      std::memcpy(out, &margin, sizeof(margin));
    } else {
      for (int i = 0; i < kLanes<A>; ++i) out[i] = static_cast<float>(margin[i]);
    }
  }
};

constexpr int64_t kBlock = 2048;  // cells whose margins are made together

template <typename A>
constexpr int64_t kBlockVectors = kBlock / kLanes<A>;

// Adds `Channels` planes to the running top two of `count` <= kBlock cells. Several planes at a time, so that the state
// is loaded and stored less often, and few enough for the hardware prefetcher to follow.
template <typename T, int Channels>
inline void add_planes(const T* planes, int64_t channel_stride, int64_t count, Running<Wide<T>>* state) {
  using A = Wide<T>;
  const int64_t whole = count / kLanes<A>;
  for (int64_t v = 0; v < whole; ++v) {
    Running<A> running = state[v];
    for (int c = 0; c < Channels; ++c) running.add(load(planes + c * channel_stride + v * kLanes<A>));
    state[v] = running;
  }
  const int64_t rest = count - whole * kLanes<A>;
  if (rest > 0) {
    for (int c = 0; c < Channels; ++c) {
      state[whole].add(load_part(planes + c * channel_stride + whole * kLanes<A>, rest));
    }
  }
}

template <typename T>
void planar_margins(const T* planes, int64_t channels, int64_t channel_stride, int64_t count, float* margin) {
  using A = Wide<T>;
  Running<A> state[kBlockVectors<A>];
  const int64_t vectors = (count + kLanes<A> - 1) / kLanes<A>;
  for (int64_t v = 0; v < vectors; ++v) state[v] = Running<A>::start();
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) add_planes<T, 8>(planes + c * channel_stride, channel_stride, count, state);
  for (; c < channels; ++c) add_planes<T, 1>(planes + c * channel_stride, channel_stride, count, state);
  for (int64_t v = 0; v < vectors; ++v) state[v].store_margin(channels == 1, margin + v * kLanes<A>);
}

// In place: rows[i][j] becomes rows[j][i], by log2(kLanes) rounds of interleaving the upper half with the lower.
template <typename A>
inline void transpose(Vector<A>* rows) {
  constexpr int kHalf = kLanes<A> / 2;
  Mask<A> low, high;
  for (int i = 0; i < kHalf; ++i) {
    low[2 * i] = i;
    low[2 * i + 1] = i + kLanes<A>;
    high[2 * i] = i + kHalf;
    high[2 * i + 1] = i + kHalf + kLanes<A>;
  }
#pragma GCC unroll 8
  for (int round = 1; round < kLanes<A>; round *= 2) {
    Vector<A> next[kLanes<A>];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) {
      next[2 * i] = permute<A>(rows[i], rows[i + kHalf], low);
      next[2 * i + 1] = permute<A>(rows[i], rows[i + kHalf], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) rows[i] = next[i];
  }
}

// `row` has the channels of kLanes cells, `stride` apart.
template <typename A>
inline void interleaved_vector(const A* row, int64_t channels, int64_t stride, float* margin) {
  Running<A> running = Running<A>::start();
  if (channels < kLanes<A>) {
    for (int64_t c = 0; c < channels; ++c) running.add(load_strided(row + c, stride));
  } else {
    // The last square reaches back over channels that are already in, and leaves them out.
    for (int64_t c = 0; c < channels; c += kLanes<A>) {
      const int64_t at = c + kLanes<A> <= channels ? c : channels - kLanes<A>;
      Vector<A> square[kLanes<A>];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes<A>; ++i) square[i] = load(row + i * stride + at);
      transpose<A>(square);
      if (at == c) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes<A>; ++i) running.add(square[i]);
      } else {
        for (int64_t i = c - at; i < kLanes<A>; ++i) running.add(square[i]);
      }
    }
  }
  running.store_margin(channels == 1, margin);
}

// `scratch` has room for kLanes * channels.
template <typename T>
void interleaved_margins(const T* cells, int64_t channels, int64_t cell_stride, int64_t count, Wide<T>* scratch,
                         float* margin) {
  using A = Wide<T>;
  for (int64_t begin = 0; begin < count; begin += kLanes<A>) {
    const int64_t width = count - begin < kLanes<A> ? count - begin : kLanes<A>;
    const T* from = cells + begin * cell_stride;
    if constexpr (std::is_same_v<T, A>) {
      if (width == kLanes<A> && cell_stride < (int64_t{1} << 26)) {
        interleaved_vector(from, channels, cell_stride, margin + begin);
        continue;
      }
    }
    for (int64_t i = 0; i < width; ++i) {
      const T* cell = from + i * cell_stride;
      A* wide = scratch + i * channels;
      int64_t c = 0;
      for (; c + kLanes<A> <= channels; c += kLanes<A>) {
        const Vector<A> v = load(cell + c);
        std::memcpy(wide + c, &v, sizeof(v));
      }
      for (; c < channels; ++c) wide[c] = static_cast<A>(cell[c]);
    }
    interleaved_vector(scratch, channels, channels, margin + begin);
  }
}

// Calls `use(offset, count, margin)` for blocks of the cells [begin, end).
template <typename T, typename Use>
void for_each_margin_block(const LogitMap& map, int64_t begin, int64_t end, const Use& use) {
  using A = Wide<T>;
  const T* base = static_cast<const T*>(map.base);
  const bool planar = map.cell_stride == 1 && (map.channel_stride != 1 || map.channels == 1);
  const Buffer<A> scratch(planar ? 0 : kLanes<A> * map.channels);
  float margin[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = end - block < kBlock ? end - block : kBlock;
    const T* cells = base + block * map.cell_stride;
    if (planar) {
      planar_margins(cells, map.channels, map.channel_stride, count, margin);
    } else {
      interleaved_margins(cells, map.channels, map.cell_stride, count, scratch.data, margin);
    }
    use(block - begin, count, margin);
  }
}

// Two tables, so that equal neighbours do not wait for each other.
struct Counter {
  uint32_t table[2][kHistogramBins] = {};

  void keys(const float* margin, int64_t count, uint32_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = margin_key(margin[i]);
    int64_t i = 0;
    for (; i + 1 < count; i += 2) {
      ++table[0][histogram_bin(out[i])];
      ++table[1][histogram_bin(out[i + 1])];
    }
    if (i < count) ++table[0][histogram_bin(out[i])];
  }

  void add_to(uint32_t* histogram) const {
    for (int bin = 0; bin < kHistogramBins; ++bin) histogram[bin] += table[0][bin] + table[1][bin];
  }
};

// Where the bilinear taps of a block of points lie and what they weigh; a tap off the map has index -1 and counts as 0.
template <typename A>
struct Taps {
  static constexpr int64_t kPoints = 2048;
  int32_t index[4][kPoints];
  A weight[4][kPoints];
};

template <typename A>
void locate(const float* xy, int64_t count, int32_t height, int32_t width, SampleOptions options, Taps<A>& taps) {
  const bool border = options.border;
  const bool align_corners = options.align_corners;
  for (int64_t i = 0; i < count; ++i) {
    const AxisTaps<A> x = axis_taps(static_cast<A>(xy[2 * i]), width, border, align_corners);
    const AxisTaps<A> y = axis_taps(static_cast<A>(xy[2 * i + 1]), height, border, align_corners);
    const int32_t corner = y.cell * width + x.cell;
    // A point without a neighbour along one axis (NaN among them) is all zero, not NaN.
    const bool lost = !((x.has_near | x.has_far) & (y.has_near | y.has_far));
    taps.index[0][i] = (x.has_near & y.has_near) ? corner : -1;
    taps.index[1][i] = (x.has_far & y.has_near) ? corner + 1 : -1;
    taps.index[2][i] = (x.has_near & y.has_far) ? corner + width : -1;
    taps.index[3][i] = (x.has_far & y.has_far) ? corner + width + 1 : -1;
    taps.weight[0][i] = lost ? A(0) : x.near * y.near;
    taps.weight[1][i] = lost ? A(0) : x.far * y.near;
    taps.weight[2][i] = lost ? A(0) : x.near * y.far;
    taps.weight[3][i] = lost ? A(0) : x.far * y.far;
  }
  for (int64_t i = count; i % kLanes<A> != 0; ++i) {
    for (int tap = 0; tap < 4; ++tap) {
      taps.index[tap][i] = -1;
      taps.weight[tap][i] = A(0);
    }
  }
}

// One tap of kLanes points from one plane.
template <typename T>
inline Vector<Wide<T>> gather(const T* plane, const int32_t* index) {
  using A = Wide<T>;
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<T, float>) {
    const __m512i at = _mm512_loadu_si512(index);
    const __mmask16 on_map = _mm512_cmpge_epi32_mask(at, _mm512_setzero_si512());
    return (Vector<A>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), on_map, at, plane, 4);
  }
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<T, float>) {
    const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
    const __m256i on_map = _mm256_xor_si256(at, _mm256_set1_epi32(-1));
    return (Vector<A>)_mm256_mask_i32gather_ps(_mm256_setzero_ps(), plane, at, _mm256_castsi256_ps(on_map), 4);
  }
#endif
  T picked[kLanes<A>];
  for (int i = 0; i < kLanes<A>; ++i) picked[i] = index[i] >= 0 ? plane[index[i]] : T(0);
  return load(picked);
}

template <typename A>
inline Vector<A> load_weight(const A* p) {
  Vector<A> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

// Adds one plane, sampled at the points of `taps` and rounded to T, to their running top two.
template <typename T, typename Plane>
void add_sampled_plane(const Plane* plane, const Taps<Wide<T>>& taps, int64_t count, Running<Wide<T>>* state) {
  using A = Wide<T>;
  for (int64_t i = 0; i < count; i += kLanes<A>) {
    Vector<A> sum = gather(plane, taps.index[0] + i) * load_weight(taps.weight[0] + i);
    for (int tap = 1; tap < 4; ++tap) {
      sum += gather(plane, taps.index[tap] + i) * load_weight(taps.weight[tap] + i);
    }
    state[i / kLanes<A>].add(round_to<T>(sum));
  }
}

template <typename T>
void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes<float> <= count; i += kLanes<float>) {
    const Vector<float> v = load(from + i);
    std::memcpy(to + i, &v, sizeof(v));
  }
  for (; i < count; ++i) to[i] = static_cast<float>(from[i]);
}

template <typename T>
void sampled_planar(const LogitMap& map, const float* xy, int64_t count, SampleOptions options, uint32_t* keys,
                    Counter& counter) {
  using A = Wide<T>;
  constexpr int64_t kPoints = Taps<A>::kPoints;
  const T* base = static_cast<const T*>(map.base);
  const int64_t cells = map.height * map.width;
  const int64_t blocks = (count + kPoints - 1) / kPoints;
  // Channels outside, so that one plane at a time is in cache, unless there is a single one.
  const int64_t group = map.channels == 1 ? 1 : blocks < 4 ? blocks : 4;
  const int64_t vectors = kPoints / kLanes<A>;
  const Buffer<Taps<A>> tap_buffer(group);
  const Buffer<Running<A>> state_buffer(group * vectors);
  Taps<A>* const taps = tap_buffer.data;
  Running<A>* const state = state_buffer.data;
  // Halves cannot be gathered as vectors: with many points to a cell, widening the plane first is cheaper.
  const bool wide_plane = kIsHalf<T> && 4 * count >= cells;
  const Buffer<float> wide(wide_plane ? cells : 0);
  float margin[kPoints];
  for (int64_t first = 0; first < blocks; first += group) {
    const int64_t in_group = blocks - first < group ? blocks - first : group;
    const auto size_of = [&](int64_t b) {
      const int64_t left = count - (first + b) * kPoints;
      return left < kPoints ? left : kPoints;
    };
    for (int64_t b = 0; b < in_group; ++b) {
      locate(xy + 2 * (first + b) * kPoints, size_of(b), static_cast<int32_t>(map.height),
             static_cast<int32_t>(map.width), options, taps[b]);
    }
    for (int64_t v = 0; v < in_group * vectors; ++v) state[v] = Running<A>::start();
    for (int64_t c = 0; c < map.channels; ++c) {
      const T* plane = base + c * map.channel_stride;
      if constexpr (kIsHalf<T>) {
        if (wide_plane && (first == 0 || map.channels > 1)) widen(plane, cells, wide.data);
      }
      for (int64_t b = 0; b < in_group; ++b) {
        Running<A>* block_state = state + b * vectors;
        if constexpr (kIsHalf<T>) {
          if (wide_plane) {
            add_sampled_plane<T>(static_cast<const float*>(wide.data), taps[b], size_of(b), block_state);
            continue;
          }
        }
        add_sampled_plane<T>(plane, taps[b], size_of(b), block_state);
      }
    }
    for (int64_t b = 0; b < in_group; ++b) {
      const int64_t size = size_of(b);
      for (int64_t i = 0; i < size; i += kLanes<A>) {
        state[b * vectors + i / kLanes<A>].store_margin(map.channels == 1, margin + i);
      }
      counter.keys(margin, size, keys + (first + b) * kPoints);
    }
  }
}

// Channels adjacent: each point reads its four cells whole.
template <typename T>
void sampled_interleaved(const LogitMap& map, const float* xy, int64_t count, SampleOptions options, uint32_t* keys,
                         Counter& counter) {
  using A = Wide<T>;
  constexpr int64_t kPoints = Taps<A>::kPoints;
  const T* base = static_cast<const T*>(map.base);
  const int64_t channels = map.channels;
  const Buffer<Taps<A>> tap_buffer(1);
  Taps<A>& taps = *tap_buffer.data;
  const Buffer<T> zeros(channels);
  const Buffer<A> scratch(kLanes<A> * channels);
  float margin[kPoints];
  for (int64_t first = 0; first < count; first += kPoints) {
    const int64_t size = count - first < kPoints ? count - first : kPoints;
    locate(xy + 2 * first, size, static_cast<int32_t>(map.height), static_cast<int32_t>(map.width), options, taps);
    for (int64_t begin = 0; begin < size; begin += kLanes<A>) {
      const int64_t lanes = size - begin < kLanes<A> ? size - begin : kLanes<A>;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* tap[4];
        A weight[4];
        for (int k = 0; k < 4; ++k) {
          const int32_t index = taps.index[k][begin + lane];
          tap[k] = index >= 0 ? base + index * map.cell_stride : zeros.data;
          weight[k] = taps.weight[k][begin + lane];
        }
        A* out = scratch.data + lane * channels;
        int64_t c = 0;
        for (; c + kLanes<A> <= channels; c += kLanes<A>) {
          Vector<A> sum = load(tap[0] + c) * weight[0];
          for (int k = 1; k < 4; ++k) sum += load(tap[k] + c) * weight[k];
          sum = round_to<T>(sum);
          std::memcpy(out + c, &sum, sizeof(sum));
        }
        if (c < channels) {
          Vector<A> sum = load_part(tap[0] + c, channels - c) * weight[0];
          for (int k = 1; k < 4; ++k) sum += load_part(tap[k] + c, channels - c) * weight[k];
          sum = round_to<T>(sum);
          for (int64_t i = c; i < channels; ++i) out[i] = sum[i - c];
        }
      }
      interleaved_vector(static_cast<const A*>(scratch.data), channels, channels, margin + begin);
    }
    counter.keys(margin, size, keys + first);
  }
}

template <typename Run>
void dispatch(LogitType type, const Run& run) {
  switch (type) {
    case LogitType::kFloat:
      return run(float{});
    case LogitType::kDouble:
      return run(double{});
    case LogitType::kHalf:
      return run(c10::Half{});
    case LogitType::kBFloat16:
      return run(c10::BFloat16{});
  }
}

}  // namespace

void uncertainty_kernel(const LogitMap& map, int64_t begin, int64_t end, float* out) {
  dispatch(map.type, [&](auto zero) {
    for_each_margin_block<decltype(zero)>(map, begin, end, [&](int64_t offset, int64_t count, const float* margin) {
      for (int64_t i = 0; i < count; ++i) out[offset + i] = 0.0f - margin[i];
    });
  });
}

void margin_keys_kernel(const LogitMap& map, int64_t begin, int64_t end, uint32_t* keys, uint32_t* histogram) {
  Counter counter;
  dispatch(map.type, [&](auto zero) {
    for_each_margin_block<decltype(zero)>(map, begin, end, [&](int64_t offset, int64_t count, const float* margin) {
      counter.keys(margin, count, keys + offset);
    });
  });
  counter.add_to(histogram);
}

void sampled_margin_keys_kernel(const LogitMap& map, const float* xy, int64_t count, SampleOptions options,
                                uint32_t* keys, uint32_t* histogram) {
  Counter counter;
  dispatch(map.type, [&](auto zero) {
    using T = decltype(zero);
    if (map.cell_stride == 1 && (map.channel_stride != 1 || map.channels == 1)) {
      sampled_planar<T>(map, xy, count, options, keys, counter);
    } else {
      sampled_interleaved<T>(map, xy, count, options, keys, counter);
    }
  });
  counter.add_to(histogram);
}

}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
