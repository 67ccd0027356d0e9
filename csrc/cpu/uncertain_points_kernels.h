// Kernels of uncertainty, uncertain_points and sample_uncertain_points. Compiled once per instruction set, see
// compile_kernels.h.
//
// Margins go through the cells in blocks that stay in the first-level cache, as vectors of kLanes cells. `A` is the
// type of the arithmetic: float, or double for float64 logits.
#ifndef RENDSEG_ISA

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "../math/philox4x32.h"
#include "../math/radix_key.h"
#include "point_spots.h"

namespace rendseg {

// Logits of one image, its cells equally spaced in row order. Either stride_p is 1 (planar: NCHW), or the channels are
// adjacent (interleaved: channels_last) or single.
struct MarginMap : PointsView {
  int64_t height = 0, width = 0;
  bool planar() const { return stride_p == 1 && (stride_c != 1 || channels == 1); }
};

struct SampleOptions {
  bool border;
  bool align_corners;
};

}  // namespace rendseg

#else

#include "point_spots.h"

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

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
inline Ints<A> magnitude_bits(Vec<A> v) {
  return (Ints<A>)v & std::numeric_limits<Lane<A>>::max();
}

// The two largest channels so far of kLanes cells, and the largest magnitude as bits, which tells whether a NaN was
// seen.
template <typename A>
struct Running {
  Vec<A> first;
  Vec<A> second;
  Ints<A> magnitude;

  static Running start() {
    Running r;
    r.first = r.second = Vec<A>{} - std::numeric_limits<A>::infinity();
    r.magnitude = Ints<A>{};
    return r;
  }

  void add(Vec<A> value) {
    magnitude = larger_ints<A>(magnitude_bits<A>(value), magnitude);
    second = larger<A>(smaller<A>(value, first), second);
    first = larger<A>(value, first);
  }

  // As float32, the type of the result; `out` has room for kLanes.
  void store_margin(bool single, float* out) const {
    Vec<A> margin = first - second;
    if (single) margin = first < A(0) ? -first : first;
    const Vec<A> infinity = Vec<A>{} + std::numeric_limits<A>::infinity();
    const Vec<A> nan = Vec<A>{} + std::numeric_limits<A>::quiet_NaN();
    margin = magnitude > magnitude_bits<A>(infinity) ? nan : margin;
    if constexpr (std::is_same_v<A, float>) {
      store(out, margin);
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
      Vec<A> square[kLanes<A>];
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
      widen_row(cell, channels, scratch + i * channels);
    }
    interleaved_vector(scratch, channels, channels, margin + begin);
  }
}

// Calls `use(offset, count, margin)` for blocks of the cells [begin, end).
template <typename T, typename Use>
RENDSEG_INLINE void for_each_margin_block(const MarginMap& map, int64_t begin, int64_t end, const Use& use) {
  using A = Wide<T>;
  const T* base = static_cast<const T*>(map.data);
  const bool planar = map.planar();
  const Buffer<A> scratch(planar ? 0 : kLanes<A> * map.channels);
  float margin[kBlock];
  for (int64_t block = begin; block < end; block += kBlock) {
    const int64_t count = end - block < kBlock ? end - block : kBlock;
    const T* cells = base + block * map.stride_p;
    if (planar) {
      planar_margins(cells, map.channels, map.stride_c, count, margin);
    } else {
      interleaved_margins(cells, map.channels, map.stride_p, count, scratch.data, margin);
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

constexpr int64_t kFewSpots = 512;  // points whose spots stay in the first-level cache

// The spots of points of [0, 1]^2.
template <typename A>
class SampledSpots {
 public:
  explicit SampledSpots(int64_t capacity) : cell_(2 * capacity), weight_(4 * capacity), xy_(kWide * 2 * capacity) {
    A* w = weight_.data;
    spots = {cell_.data, cell_.data + capacity, {w, w + capacity, w + 2 * capacity, w + 3 * capacity}};
  }
  void find(const float* xy, int64_t count, const MarginMap& map, SampleOptions options) {
    const auto height = static_cast<int32_t>(map.height), width = static_cast<int32_t>(map.width);
    const SpotOptions how{false, options.border, options.align_corners};
    if constexpr (kWide) {
      for (int64_t i = 0; i < 2 * count; ++i) xy_.data[i] = xy[i];
      find_spots<A>(xy_.data, count, height, width, how, spots);
    } else {
      find_spots<A>(xy, count, height, width, how, spots);
    }
    // A point without a neighbour along one axis (NaN among them) is all zero, not NaN.
    int32_t lost = 0;
    for (int64_t i = 0; i < count; ++i) lost |= spots.y[i] > height;
    for (int t = 0; t < 4 * lost; ++t) {
      A* __restrict weight = spots.weight[t];
      for (int64_t i = 0; i < count; ++i) weight[i] = spots.y[i] > height ? A(0) : weight[i];
    }
  }

  Spots<A> spots;

 private:
  static constexpr bool kWide = sizeof(A) == 8;
  Buffer<int32_t> cell_;
  Buffer<A> weight_, xy_;
};

// A single plane: its margin is its magnitude.
template <typename T>
void sampled_plane(const MarginMap& map, const float* xy, int64_t count, SampleOptions options, uint32_t* keys,
                   Counter& counter) {
  using A = Wide<T>;
  const SpotPlane plane{static_cast<int32_t>(map.height), static_cast<int32_t>(map.width), map.width, 1};
  const int64_t bytes = map.height * map.width * int64_t{sizeof(T)};
  if (worth_reading(bytes, count)) read_lines(map.data, bytes);
  SampledSpots<A> located(kFewSpots);
  A values[kFewSpots] = {};
  float margin[kFewSpots];
  for (int64_t first = 0; first < count; first += kFewSpots) {
    const int64_t size = count - first < kFewSpots ? count - first : kFewSpots;
    located.find(xy + 2 * first, size, map, options);
    spot_values(static_cast<const T*>(map.data), plane, located.spots, size, values);
    for (int64_t i = 0; i < size; i += kLanes<A>) {
      const auto magnitude = (Vec<A>)magnitude_bits<A>(round_to<T>(load(values + i)));
      if constexpr (std::is_same_v<A, float>) {
        store(margin + i, magnitude);
      } else {
        for (int lane = 0; lane < kLanes<A>; ++lane) margin[i + lane] = static_cast<float>(magnitude[lane]);
      }
    }
    counter.keys(margin, size, keys + first);
  }
}

template <typename T>
void sampled_planar(const MarginMap& map, const float* xy, int64_t count, SampleOptions options, uint32_t* keys,
                    Counter& counter) {
  using A = Wide<T>;
  const T* base = static_cast<const T*>(map.data);
  const SpotPlane plane{static_cast<int32_t>(map.height), static_cast<int32_t>(map.width), map.width, 1};
  constexpr int64_t group = 4 * kBlock;  // channels outside, so that one plane at a time is in cache
  SampledSpots<A> located(group);
  const Buffer<Running<A>> state(group / kLanes<A>);
  A values[kBlock];
  float margin[kBlock];
  for (int64_t first = 0; first < count; first += group) {
    const int64_t in_group = count - first < group ? count - first : group;
    located.find(xy + 2 * first, in_group, map, options);
    for (int64_t v = 0; v < group / kLanes<A>; ++v) state.data[v] = Running<A>::start();
    for (int64_t c = 0; c < map.channels; ++c) {
      for (int64_t b = 0; b < in_group; b += kBlock) {
        const int64_t size = in_group - b < kBlock ? in_group - b : kBlock;
        spot_values(base + c * map.stride_c, plane, located.spots.from(b), size, values);
        for (int64_t i = size; i % kLanes<A> != 0; ++i) values[i] = A(0);
        for (int64_t i = 0; i < size; i += kLanes<A>) {
          state.data[(b + i) / kLanes<A>].add(round_to<T>(load(values + i)));
        }
      }
    }
    for (int64_t b = 0; b < in_group; b += kBlock) {
      const int64_t size = in_group - b < kBlock ? in_group - b : kBlock;
      for (int64_t i = 0; i < size; i += kLanes<A>) {
        state.data[(b + i) / kLanes<A>].store_margin(false, margin + i);
      }
      counter.keys(margin, size, keys + first + b);
    }
  }
}

// Channels adjacent: each point reads its four cells whole.
template <typename T>
void sampled_interleaved(const MarginMap& map, const float* xy, int64_t count, SampleOptions options, uint32_t* keys,
                         Counter& counter) {
  using A = Wide<T>;
  const T* base = static_cast<const T*>(map.data);
  const int64_t channels = map.channels;
  SampledSpots<A> located(kBlock);
  const Spots<A>& spots = located.spots;
  const Buffer<T> zeros(channels);
  const Buffer<A> scratch(kLanes<A> * channels);
  float margin[kBlock];
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = count - first < kBlock ? count - first : kBlock;
    located.find(xy + 2 * first, size, map, options);
    for (int64_t begin = 0; begin < size; begin += kLanes<A>) {
      const int64_t lanes = size - begin < kLanes<A> ? size - begin : kLanes<A>;
      for (int64_t lane = 0; lane < lanes; ++lane) {
        const T* tap[4];
        A weight[4];
        for (int k = 0; k < 4; ++k) {
          const int64_t x = spots.x[begin + lane] + (k & 1), y = spots.y[begin + lane] + (k >> 1);
          const bool inside = x >= 0 && y >= 0 && x < map.width && y < map.height;
          tap[k] = inside ? base + (y * map.width + x) * map.stride_p : zeros.data;
          weight[k] = spots.weight[k][begin + lane];
        }
        A* out = scratch.data + lane * channels;
        int64_t c = 0;
        for (; c + kLanes<A> <= channels; c += kLanes<A>) {
          Vec<A> sum = load(tap[0] + c) * weight[0];
          for (int k = 1; k < 4; ++k) sum += load(tap[k] + c) * weight[k];
          sum = round_to<T>(sum);
          store(out + c, sum);
        }
        if (c < channels) {
          Vec<A> sum = load_part(tap[0] + c, channels - c) * weight[0];
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

// Words of Philox, in the lower halves of the lanes, as numbers of [0, 1): x[0], y[0], x[1], y[1], ...
RENDSEG_INLINE Vec<double> uniform_of_words(Bits<double> x, Bits<double> y) {
  const Bits<float> bits = (Bits<float>)((x & 0xffffffffu) | (y << 32));
  return (Vec<double>)(__builtin_convertvector((Ints<float>)(bits >> 8), Vec<float>) * 0x1p-24f);
}

// Pairs of points of N vectors of counters from `first` on, philox_4x32(key, 0, counter) each, out[4 * N * lanes]. N
// breaks the dependency of one round on the one before.
template <int N>
RENDSEG_INLINE void uniform_vectors(uint64_t key, int64_t first, float* out) {
  constexpr int n = kLanes<double>;
  auto key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
  Bits<double> x[N] = {}, y[N] = {}, z[N], w[N];
  for (int v = 0; v < N; ++v) {
    z[v] = (Bits<double>)(lanes<double>() + (first + v * n));
    w[v] = z[v] >> 32;
  }
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 2
    for (int v = 0; v < N; ++v) {
      const Bits<double> product_0 = wide_product(x[v], kPhiloxFactor0), product_1 = wide_product(z[v], kPhiloxFactor1);
      x[v] = (product_1 >> 32) ^ y[v] ^ key_0;
      z[v] = (product_0 >> 32) ^ w[v] ^ key_1;
      y[v] = product_1;  // what is above 32 bits does not count
      w[v] = product_0;
    }
    key_0 += kPhiloxStep0;
    key_1 += kPhiloxStep1;
  }
  for (int v = 0; v < N; ++v) {
    store_interleaved(uniform_of_words(x[v], y[v]), uniform_of_words(z[v], w[v]), out + 4 * n * v,
                      std::make_integer_sequence<int, n>{});
  }
}

// Points 2 * first to 2 * (first + count) of a stream, out[4 * count]: those of pair i are philox_4x32(key, 0, i).
void uniform_pairs(uint64_t key, int64_t first, int64_t count, float* out) {
  constexpr int n = kLanes<double>;
  int64_t i = 0;
  for (; i + 2 * n <= count; i += 2 * n) uniform_vectors<2>(key, first + i, out + 4 * i);
  for (; i < count; ++i) {
    const PhiloxWords words = philox_4x32(key, 0, static_cast<uint64_t>(first + i));
    const uint32_t bits[4] = {words.x, words.y, words.z, words.w};
    for (int k = 0; k < 4; ++k) out[4 * i + k] = uniform_from_bits(bits[k]);
  }
}

// -margin of the cells [begin, end) into out[end - begin]
void uncertainty_kernel(const MarginMap& map, int64_t begin, int64_t end, float* out) {
  with_element(map.dtype, [&]<typename T>() {
    for_each_margin_block<T>(map, begin, end, [&](int64_t offset, int64_t count, const float* margin) {
      for (int64_t i = 0; i < count; ++i) out[offset + i] = 0.0f - margin[i];
    });
  });
}

// Keys of the cells [begin, end) into keys[end - begin], counted into histogram[kHistogramBins].
void margin_keys_kernel(const MarginMap& map, int64_t begin, int64_t end, uint32_t* keys, uint32_t* histogram) {
  with_element(map.dtype, [&]<typename T>() {
    Counter counter;  // here, so that the compiler sees that nothing else points to it
    for_each_margin_block<T>(map, begin, end, [&](int64_t offset, int64_t count, const float* margin) {
      counter.keys(margin, count, keys + offset);
    });
    counter.add_to(histogram);
  });
}

// The same at points xy[count][2] of [0, 1]^2, of the bilinear samples rounded to the type of the map.
void sampled_margin_keys_kernel(const MarginMap& map, const float* xy, int64_t count, SampleOptions options,
                                uint32_t* keys, uint32_t* histogram) {
  Counter counter;
  with_element(map.dtype, [&]<typename T>() {
    if (map.planar() && map.channels == 1) {
      sampled_plane<T>(map, xy, count, options, keys, counter);
    } else if (map.planar()) {
      sampled_planar<T>(map, xy, count, options, keys, counter);
    } else {
      sampled_interleaved<T>(map, xy, count, options, keys, counter);
    }
  });
  counter.add_to(histogram);
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
