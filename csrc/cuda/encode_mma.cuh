// encode on tensor cores, for float16 and bfloat16 features and any codewords: at most 32 codewords, 512 channels.
//
// A block of eight warps walks over the positions of one chunk, 32 at a time. Every warp owns a slice of the channels:
// its part of the distances (products of the slice with the codewords, which stay in registers), its part of the result
// (32 codes x slice, in registers from the first position to the last). The parts of the distances meet in shared
// memory, where all threads make the softmax. Features are read from memory once, in the layout that they have.
//
// Precision. Features are exact operands; codewords and assignments are split into two 16-bit values each, so products
// are good to about 2^-17 (bfloat16) or 2^-22 (float16), sums are float. With the mean codeword r and c' = c - r
//   ||x - c||^2 = ||x - r||^2 - 2 x.c' + (||c'||^2 + 2 r.c'),
// where the first term is summed over (x - r)^2 itself: what an offset common to all codewords and features would
// otherwise cancel is gone. Each codeword is scaled by a power of two to be small and far from the subnormals of
// float16, and so are assignments.
#pragma once

#include "encode_parts.cuh"
#include "mma.cuh"

namespace rendseg::encoding {

constexpr int kMmaCodes = 32;  // more take the general path
constexpr int kStep = 16;      // channels of one product
constexpr int kSteps = 4;      // of a warp, at most
constexpr int kMmaChannels = kWarps * kSteps * kStep;
constexpr int kSub = 32;                     // positions between two exchanges
constexpr int kWeightPitch = kMmaCodes + 8;  // of the weights [position][code]: rows of 80 bytes, no bank conflicts
constexpr float kWeightScale = 4096.0f;      // of the assignments, which float16 could not hold in two parts otherwise

// The codewords as the tensor cores want them: fragments of operand b, [step][split][lane][4 tiles of 8 codes][2].
constexpr int kFragment = kWarp * 8;
constexpr int64_t fragment_words(int64_t steps) { return steps * 2 * kFragment; }

// Of one codeword: distance = ||x - r||^2 + factor * products + constant.
struct CodeConstants {
  float factor[kMmaCodes], constant[kMmaCodes], scale[kMmaCodes];
};

struct MmaArgs {
  int64_t batch = 0, positions = 0, channels = 0, codes = 0;
  View x, codewords, scale, out;
  View grad, x_grad, scale_grad;  // backward; `out` is then the gradient of the codewords
  int64_t padded = 0, chunks = 0, chunk_positions = 0;
  int steps = 0;              // of kStep channels, all warps together
  bool wide = false;          // float32 features: see encode_tf32.cuh
  bool vectors = false;       // rows of a tile can be copied in 16 bytes
  bool grad_vectors = false;  // and those of its gradient
  // Scratch memory
  uint32_t* fragments = nullptr;  // of c', scaled
  float* reference = nullptr;     // r [steps * kStep]
  CodeConstants* constants = nullptr;
  float* sum_residual = nullptr;  // [B * chunks][D][padded]
  // and of backward
  void* code_rows = nullptr;          // c', scaled, [kMmaCodes][steps * kStep]; float32: forward as well, not scaled
  void* grad_rows = nullptr;          // gradient of the result, scaled, in two parts, [B][2][kMmaCodes][steps * kStep];
                                      // float32: not scaled, in one part
  float* grad_power = nullptr;        // [B][kMmaCodes]: what it was scaled by
  float* grad_dot = nullptr;          // [B][kMmaCodes]: its product with the codeword; float32: with c'
  float* packed_codewords = nullptr;  // see Args
  float* packed_scale = nullptr;
  float* packed_grad = nullptr;
  float* sum_assigned = nullptr;
  float* sum_scale = nullptr;
};

// --- preparation -----------------------------------------------------------------------------------------------------

__device__ inline bool is_finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// Sum and largest over the block, the same in all threads.
__device__ inline double block_sum(double value) {
  RENDSEG_SHARED(double[kWarps], parts);
  value = warp_sum(value);
  __syncthreads();
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  double total = 0;
  RENDSEG_UNROLL
  for (int w = 0; w < kWarps; ++w) total += parts[w];
  return total;
}
__device__ inline float block_max(float value) {
  RENDSEG_SHARED(float[kWarps], parts);
  value = warp_max(value);
  __syncthreads();
  if (lane_id() == 0) parts[warp_id()] = value;
  __syncthreads();
  float top = parts[0];
  RENDSEG_UNROLL
  for (int w = 1; w < kWarps; ++w) top = fmaxf(top, parts[w]);
  return top;
}

// A power of two that brings values up to `top` below 16; 1 where there is none.
__device__ inline float power_for(float top) {
  if (!(top > 0.0f) || !is_finite(top)) return 1.0f;
  int exponent = 0;
  frexpf(top, &exponent);
  return ldexpf(1.0f, max(-120, min(120, 4 - exponent)));
}

// Codewords as fragments of operand b of products over channels: column = code, row = channel. The pair of values at
// channels d, d + 1 (d even) of code k goes to word(d, k).
__device__ inline int64_t fragment_word(int64_t d, int k, int split) {
  const int64_t step = d / kStep;
  const int in_step = static_cast<int>(d % kStep), lane = k % 8 * 4 + in_step % 8 / 2;
  return ((step * 2 + split) * kWarp + lane) * 8 + k / 8 * 2 + in_step / 8;
}

// f(code, value) for every code at channel d. Eight loads are under way at a time.
template <typename F>
__device__ inline void for_each_code_of(const MmaArgs& args, int d, F&& f) {
  constexpr int kBatch = 8;
  with_dtype(args.codewords.dtype, [&](auto tag) {
    using C = typename decltype(tag)::Type;
    const int codes = static_cast<int>(args.codes);
    for (int from = 0; from < codes; from += kBatch) {
      C values[kBatch];
      RENDSEG_UNROLL
      for (int i = 0; i < kBatch; ++i) values[i] = *address<C>(args.codewords, 0, min(from + i, codes - 1), d);
      RENDSEG_UNROLL
      for (int i = 0; i < kBatch; ++i) {
        if (from + i < codes) f(from + i, static_cast<float>(widen(values[i])));
      }
    }
  });
}

// One block for each of kMmaCodes codewords. A codeword that is not finite has the distance that the sum of squares
// would give, and no part in the products, which it would make NaN for others too.
template <typename X>
__global__ void __launch_bounds__(kThreads) prepare_mma_kernel(MmaArgs args) {
  constexpr bool kWide = std::is_same_v<X, float>;
  RENDSEG_SHARED(float[kMmaChannels], reference);
  const int k = static_cast<int>(blockIdx.x);
  const bool exists = k < args.codes;
  const int padded = args.steps * kStep;
  float top = 0.0f, not_finite = 0.0f;
  double constant = 0;
  for (int d = threadIdx.x; d < padded; d += kThreads) {
    float sum = 0.0f, own = 0.0f;
    int count = 0;
    const auto add = [&](int other, float c) {
      if (is_finite(c)) {
        sum += c * (1.0f / kMmaCodes);
        ++count;
      }
      if (other == k) own = c;
    };
    if (d < args.channels) for_each_code_of(args, d, add);
    const float mean = count > 0 && is_finite(sum) ? sum * (static_cast<float>(kMmaCodes) / count) : 0.0f;
    reference[d] = mean;
    if (k == 0) args.reference[d] = mean;
    const float difference = own - mean;
    if (exists && d < args.channels) {
      if (is_finite(difference)) {
        top = fmaxf(top, fabsf(difference));
        constant += static_cast<double>(difference) * difference + (kWide ? 0.0 : 2.0 * mean * difference);
      } else {
        not_finite = difference == difference ? fmaxf(not_finite, 1.0f) : 2.0f;  // infinite; NaN
      }
    }
  }
  top = block_max(top);
  not_finite = block_max(not_finite);
  constant = block_sum(constant);
  const float power = kWide ? 1.0f : power_for(top);
  for (int d = threadIdx.x * 2; d < padded; d += kThreads * 2) {
    float value[2];
    RENDSEG_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool inside = exists && d + i < args.channels && not_finite == 0.0f;
      value[i] = inside ? (read<float>(args.codewords, 0, k, d + i) - reference[d + i]) * power : 0.0f;
    }
    if constexpr (!kWide) {
      const float rest[2] = {value[0] - widen(narrow<X>(value[0])), value[1] - widen(narrow<X>(value[1]))};
      args.fragments[fragment_word(d, k, 0)] = pack_half2<X>(value[0], value[1]);
      args.fragments[fragment_word(d, k, 1)] = pack_half2<X>(rest[0], rest[1]);
    }
    if (args.code_rows != nullptr) {
      store_vec(static_cast<X*>(args.code_rows) + k * padded + d,
                Vec<X, 2>{{narrow<X>(value[0]), narrow<X>(value[1])}});
    }
  }
  if (threadIdx.x == 0) {
    const float infinity = static_cast<float>(INFINITY);
    args.constants->factor[k] = -2.0f / power;
    args.constants->constant[k] = not_finite == 0.0f   ? static_cast<float>(constant)
                                  : not_finite == 1.0f ? infinity
                                                       : infinity - infinity;
    args.constants->scale[k] = exists ? read<float>(args.scale, 0, k, 0) : 0.0f;
  }
}

// One block for each of kMmaCodes codewords of each image: the gradient of the result as rows of operands.
template <typename X>
__global__ void __launch_bounds__(kThreads) prepare_gradient_kernel(MmaArgs args) {
  const int64_t image = blockIdx.x / kMmaCodes;
  const int k = static_cast<int>(blockIdx.x % kMmaCodes), padded = args.steps * kStep;
  constexpr bool kWide = std::is_same_v<X, float>;
  const bool exists = k < args.codes;
  const auto gradient = [&](int d) { return exists && d < args.channels ? read<float>(args.grad, image, k, d) : 0.0f; };
  float top = 0.0f;
  double dot = 0;
  for (int d = threadIdx.x; d < padded; d += kThreads) {
    const float g = gradient(d);
    top = fmaxf(top, fabsf(g));
    if (exists && d < args.channels) {
      const float c = read<float>(args.codewords, 0, k, d);
      dot += static_cast<double>(g) * (kWide ? c - args.reference[d] : c);
    }
  }
  top = block_max(top);
  dot = block_sum(dot);
  const float power = kWide ? 1.0f : power_for(top);
  X* const to = static_cast<X*>(args.grad_rows) + (image * (kWide ? 1 : 2) * kMmaCodes + k) * padded;
  for (int d = threadIdx.x; d < padded; d += kThreads) {
    const float value = gradient(d) * power;
    const X high = narrow<X>(value);
    to[d] = high;
    if constexpr (!kWide) to[kMmaCodes * padded + d] = narrow<X>(value - widen(high));
  }
  if (threadIdx.x == 0) {
    args.grad_power[blockIdx.x] = power;
    args.grad_dot[blockIdx.x] = static_cast<float>(dot);
  }
}

// --- a tile in shared memory -----------------------------------------------------------------------------------------

// Features of kTile positions: [channel][position], or [position][channel] where channels are contiguous in memory.
// Rows are an odd number of 16 bytes: ldmatrix has no bank conflicts in either direction.
template <typename X, int kTile, bool kChannelsLast>
struct TileOf {
  static __host__ __device__ int rows(int steps) { return kChannelsLast ? kTile : steps * kStep; }
  static __host__ __device__ int columns(int steps) { return kChannelsLast ? steps * kStep : kTile; }
  static __host__ __device__ int pitch(int steps) { return columns(steps) + 8; }
  static __host__ __device__ int64_t bytes(int steps) {
    return static_cast<int64_t>(rows(steps)) * pitch(steps) * static_cast<int64_t>(sizeof(X));
  }
  static __device__ int place(int steps, int row, int column) { return row * pitch(steps) + column; }
  static __device__ int at(int steps, int position, int channel) {
    return kChannelsLast ? place(steps, position, channel) : place(steps, channel, position);
  }
};

// Where 32-bit values lie in rows of `width` values, a multiple of 32: fours are swapped by row, so that eight rows of
// four columns (ldmatrix) and four rows of eight columns (plain loads of operands) have no bank conflicts, if the rows
// begin at a multiple of their number. Takes no memory, as a pitch would.
__device__ inline int swapped(int row, int column) { return column ^ ((row & 3) << 3) ^ (row & 4); }

template <int kTile, bool kChannelsLast>
struct TileOf<float, kTile, kChannelsLast> {
  static __host__ __device__ int rows(int steps) { return kChannelsLast ? kTile : steps * kStep; }
  static __host__ __device__ int columns(int steps) { return kChannelsLast ? steps * kStep : kTile; }
  static __host__ __device__ int64_t bytes(int steps) { return int64_t{4} * kTile * steps * kStep; }
  static __device__ int place(int steps, int row, int column) { return row * columns(steps) + swapped(row, column); }
  static __device__ int at(int steps, int position, int channel) {
    return kChannelsLast ? place(steps, position, channel) : place(steps, channel, position);
  }
};

// Starts copying the tile from position `first` on; zeros behind `count` positions and behind the last channel.
template <typename X, int kTile, bool kChannelsLast>
__device__ inline void load_tile(const MmaArgs& args, int64_t image, int64_t first, int count, X* tile) {
  using Tile = TileOf<X, kTile, kChannelsLast>;
  const View& x = args.x;
  const X* const from = address<X>(x, image, first, 0);
  const int channels = static_cast<int>(args.channels);
  const int row_limit = kChannelsLast ? count : channels, column_limit = kChannelsLast ? channels : count;
  const int64_t row_stride = kChannelsLast ? x.position : x.channel,
                column_stride = kChannelsLast ? x.channel : x.position;
  constexpr int kUnit = kVecWidth<X>;
  const int units = Tile::columns(args.steps) / kUnit, total = Tile::rows(args.steps) * units;
  const auto each = [&](auto&& move) {
    for (int i = threadIdx.x; i < total; i += kThreads) {
      const int row = i / units, column = i % units * kUnit;
      move(tile + Tile::place(args.steps, row, column), row, column);
    }
  };
  if (args.vectors) {
    each([&](X* to, int row, int column) {
      const bool valid = row < row_limit && column < column_limit;
      cp_async_16(to, valid ? from + row * row_stride + column : from, valid);
    });
  } else {
    each([&](X* to, int row, int column) {
      Vec<X, kUnit> values;
      RENDSEG_UNROLL
      for (int j = 0; j < kUnit; ++j) {
        const bool valid = row < row_limit && column + j < column_limit;
        values[j] = valid ? from[row * row_stride + (column + j) * column_stride] : narrow<X>(0.0f);
      }
      store_vec(to, values);
    });
  }
}

// Operand a of 16 positions by 16 channels.
template <typename X, int kTile, bool kChannelsLast>
__device__ inline void positions_by_channels(uint32_t (&a)[4], const X* tile, int steps, int position, int channel) {
  using Tile = TileOf<X, kTile, kChannelsLast>;
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  if constexpr (kChannelsLast) {
    ldmatrix_x4(a, tile + Tile::at(steps, position + matrix % 2 * 8 + row, channel + matrix / 2 * 8));
  } else {
    ldmatrix_x4_trans(a, tile + Tile::at(steps, position + matrix % 2 * 8, channel + matrix / 2 * 8 + row));
  }
}

// Two operands b of 16 positions by 8 channels: b[0], b[1] of the first eight channels, b[2], b[3] of the others.
template <typename X, int kTile, bool kChannelsLast>
__device__ inline void channels_over_positions(uint32_t (&b)[4], const X* tile, int steps, int position, int channel) {
  using Tile = TileOf<X, kTile, kChannelsLast>;
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  if constexpr (kChannelsLast) {
    ldmatrix_x4_trans(b, tile + Tile::at(steps, position + matrix % 2 * 8 + row, channel + matrix / 2 * 8));
  } else {
    ldmatrix_x4(b, tile + Tile::at(steps, position + matrix % 2 * 8, channel + matrix / 2 * 8 + row));
  }
}

template <typename X>
__device__ inline float low_half(uint32_t pair) {
  X value;
  const uint16_t bits = static_cast<uint16_t>(pair);
  memcpy(&value, &bits, 2);
  return widen(value);
}
template <typename X>
__device__ inline float high_half(uint32_t pair) {
  return low_half<X>(pair >> 16);
}

// --- the exchange of distances ---------------------------------------------------------------------------------------

// Parts of products [32 positions][32 codes], one for each warp. Columns are swapped by row so that fragments are
// written, and rows read, without bank conflicts. In two rounds, each of half the positions, they take half the memory.
constexpr int kPart = kSub * kMmaCodes;
__device__ inline int part_at(int position, int code) { return position * kMmaCodes + (code ^ (position % 4 * 8)); }

template <int kRounds = 1>
__device__ inline void put_part(float* parts, const float (&product)[2][4][4], int round = 0) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  float* const part = parts + warp_id() * (kPart / kRounds);
  RENDSEG_UNROLL
  for (int m = 0; m < 2; ++m) {
    if (kRounds == 2 && m != round) continue;
    RENDSEG_UNROLL
    for (int n = 0; n < 4; ++n) {
      RENDSEG_UNROLL
      for (int half = 0; half < 2; ++half) {
        const Vec<float, 2> pair{{product[m][n][half * 2], product[m][n][half * 2 + 1]}};
        store_vec(part + part_at((kRounds == 2 ? 0 : m * 16) + half * 8 + group, n * 8 + 2 * in_group), pair);
      }
    }
  }
}

// squares[warp][position]
__device__ inline void put_squares(float* squares, const float (&square)[2][2]) {
  if (lane_id() % 4 != 0) return;
  RENDSEG_UNROLL
  for (int m = 0; m < 2; ++m) {
    RENDSEG_UNROLL
    for (int half = 0; half < 2; ++half) {
      squares[warp_id() * kSub + m * 16 + half * 8 + lane_id() / 4] = square[m][half];
    }
  }
}

// Sum of the parts of all warps for four codes of one position.
template <int kRounds = 1>
__device__ inline Vec<float, 4> sum_parts(const float* parts, int position, int code) {
  Vec<float, 4> sum = load_vec<4>(parts + part_at(position, code));
  RENDSEG_UNROLL
  for (int w = 1; w < kWarps; ++w) {
    const Vec<float, 4> part = load_vec<4>(parts + w * (kPart / kRounds) + part_at(position, code));
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += part[j];
  }
  return sum;
}

// The thread of a block that makes the softmax: four codes of one position; eight neighbouring lanes share a position.
__device__ inline int softmax_position() { return static_cast<int>(threadIdx.x) / 8; }
__device__ inline int softmax_code() { return static_cast<int>(threadIdx.x) % 8 * 4; }

// Products of all warps together, for the codes of this thread. Every thread must take part, and `parts` be free.
template <int kRounds>
__device__ inline Vec<float, 4> exchange(float* parts, const float (&product)[2][4][4]) {
  constexpr int kPositions = kSub / kRounds;
  Vec<float, 4> sum{};
  RENDSEG_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    if (round > 0) __syncthreads();  // the round before has been read
    put_part<kRounds>(parts, product, round);
    __syncthreads();
    if (softmax_position() / kPositions == round) {
      sum = sum_parts<kRounds>(parts, softmax_position() % kPositions, softmax_code());
    }
  }
  return sum;
}

template <typename F>
__device__ inline float over_position(float value, F&& combine) {
  RENDSEG_UNROLL
  for (int distance = 4; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// By the first kMmaCodes threads.
__device__ inline void copy_constants(const CodeConstants& from, CodeConstants& to) {
  to.factor[threadIdx.x] = from.factor[threadIdx.x];
  to.constant[threadIdx.x] = from.constant[threadIdx.x];
  to.scale[threadIdx.x] = from.scale[threadIdx.x];
}

// Squared distances and their softmax, for the codes of this thread.
struct Softmax {
  Vec<float, 4> distance, assigned;
};

__device__ inline Softmax softmax_of(const MmaArgs& args, const CodeConstants& constants, const Vec<float, 4>& products,
                                     const float* squares) {
  const int position = softmax_position(), code = softmax_code();
  float square = 0.0f;
  RENDSEG_UNROLL
  for (int w = 0; w < kWarps; ++w) square += squares[w * kSub + position];
  Softmax result;
  Vec<float, 4> logit;
  float peak = -static_cast<float>(INFINITY);
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    const float distance = square + fmaf(constants.factor[code + j], products[j], constants.constant[code + j]);
    result.distance[j] = distance < 0.0f ? 0.0f : distance;  // a NaN stays
    logit[j] = constants.scale[code + j] * result.distance[j];
    if (code + j < args.codes) peak = fmaxf(peak, logit[j]);
  }
  peak = over_position(peak, [](float a, float b) { return fmaxf(a, b); });
  float total = 0.0f;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    result.assigned[j] = code + j < args.codes ? expf(logit[j] - peak) : 0.0f;
    total += result.assigned[j];
  }
  total = over_position(total, [](float a, float b) { return a + b; });
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) result.assigned[j] = code + j < args.codes ? result.assigned[j] / total : 0.0f;
  return result;
}

// weights[split][position][code ..] = values in two parts. Returns their sums: what the products see.
template <typename X>
__device__ inline Vec<float, 4> put_weights(X* weights, int position, int code, const Vec<float, 4>& values) {
  X* const to = weights + position * kWeightPitch + code;
  Vec<X, 4> high, low;
  Vec<float, 4> seen;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; j += 2) {
    const Vec<X, 2> pair = narrow_pair<X>(values[j], values[j + 1]);
    const Vec<X, 2> rest = narrow_pair<X>(values[j] - widen(pair[0]), values[j + 1] - widen(pair[1]));
    RENDSEG_UNROLL
    for (int i = 0; i < 2; ++i) {
      high[j + i] = pair[i];
      low[j + i] = rest[i];
      seen[j + i] = widen(pair[i]) + widen(rest[i]);
    }
  }
  store_vec(to, high);
  store_vec(to + kSub * kWeightPitch, low);
  return seen;
}

// Operand a of 16 codes by 16 positions.
template <typename X>
__device__ inline void codes_by_positions(uint32_t (&a)[4], const X* weights, int code, int position) {
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  ldmatrix_x4_trans(a, weights + (position + matrix / 2 * 8 + row) * kWeightPitch + code + matrix % 2 * 8);
}

// --- products of a warp ----------------------------------------------------------------------------------------------

// The step of channels that is the i-th of this warp.
__device__ inline int own_step(int i) { return warp_id() + i * kWarps; }

using Result = float[kSteps][2][2][4];  // [32 codes][slice]

// Fragments of the codewords in the slice of a warp: both parts, or the lower alone.
template <int kParts>
using Codewords = uint32_t[kSteps][kParts][8];

template <int kParts>
__device__ inline void load_codewords(const MmaArgs& args, Codewords<kParts>& fragments) {
  RENDSEG_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    RENDSEG_UNROLL
    for (int part = 0; part < kParts; ++part) {
      RENDSEG_UNROLL
      for (int half = 0; half < 2; ++half) {
        Vec<uint32_t, 4> words{};
        if (own_step(i) < args.steps) {
          const int table = own_step(i) * 2 + 2 - kParts + part;
          words = load_vec<4>(args.fragments + (table * kWarp + lane_id()) * 8 + half * 4);
        }
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) fragments[i][part][half * 4 + j] = words[j];
      }
    }
  }
}

// Two operands b of 16 channels by 8 codes from rows [code][channel]: b[0], b[1] of the first eight codes.
template <typename X>
__device__ inline void channels_by_codes(uint32_t (&b)[4], const X* rows, int pitch, int code, int channel) {
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  ldmatrix_x4(b, rows + (code + matrix / 2 * 8 + row) * pitch + channel + matrix % 2 * 8);
}

// Products of 32 positions from `position` on with the codewords, over the slice of this warp; and (x - r)^2 summed
// over it: square[m][half] is that of position m * 16 + half * 8 + lane / 4, in every lane of four. Where `fragments`
// holds the lower part alone, the higher comes from rows [code][pitch] in shared memory, which saves registers.
template <typename X, int kTile, bool kChannelsLast, int kParts>
__device__ inline void contract_slice(const MmaArgs& args, const X* tile, const float* reference, int position,
                                      const Codewords<kParts>& fragments, const X* rows, int pitch,
                                      float (&product)[2][4][4], float (&square)[2][2]) {
  const int in_group = lane_id() % 4;
  RENDSEG_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    if (own_step(i) >= args.steps) break;
    const int channel = own_step(i) * kStep;
    const Vec<float, 2> r_low = load_vec<2>(reference + channel + 2 * in_group);
    const Vec<float, 2> r_high = load_vec<2>(reference + channel + 8 + 2 * in_group);
    uint32_t high[2][4];
    RENDSEG_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      if constexpr (kParts == 1) {
        channels_by_codes(high[pair], rows, pitch, pair * 16, channel);
      } else {
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) high[pair][j] = fragments[i][0][pair * 4 + j];
      }
    }
    RENDSEG_UNROLL
    for (int m = 0; m < 2; ++m) {
      uint32_t a[4];
      positions_by_channels<X, kTile, kChannelsLast>(a, tile, args.steps, position + m * 16, channel);
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) {
        const Vec<float, 2>& r = j < 2 ? r_low : r_high;
        const float low = low_half<X>(a[j]) - r[0], high = high_half<X>(a[j]) - r[1];
        square[m][j % 2] = fmaf(low, low, fmaf(high, high, square[m][j % 2]));
      }
      RENDSEG_UNROLL
      for (int n = 0; n < 4; ++n) {
        const uint32_t b_low[2] = {fragments[i][kParts - 1][n * 2], fragments[i][kParts - 1][n * 2 + 1]};
        const uint32_t b_high[2] = {high[n / 2][n % 2 * 2], high[n / 2][n % 2 * 2 + 1]};
        mma_m16n8k16(product[m][n], a, b_low, X{});
        mma_m16n8k16(product[m][n], a, b_high, X{});
      }
    }
  }
  RENDSEG_UNROLL
  for (int m = 0; m < 2; ++m) {
    RENDSEG_UNROLL
    for (int half = 0; half < 2; ++half) {
      square[m][half] += __shfl_xor_sync(kAllLanes, square[m][half], 1);
      square[m][half] += __shfl_xor_sync(kAllLanes, square[m][half], 2);
    }
  }
}

// result += weights [32 codes][32 positions] * features [32 positions][slice].
template <typename X, int kTile, bool kChannelsLast>
__device__ inline void aggregate_slice(const MmaArgs& args, const X* tile, const X* weights, int position,
                                       Result& result) {
  RENDSEG_UNROLL
  for (int p = 0; p < kSub; p += 16) {
    uint32_t a[2][2][4];  // [split][codes]
    RENDSEG_UNROLL
    for (int split = 0; split < 2; ++split) {
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) {
        codes_by_positions(a[split][m], weights + split * kSub * kWeightPitch, m * 16, p);
      }
    }
    RENDSEG_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (own_step(i) >= args.steps) break;
      uint32_t b[4];
      channels_over_positions<X, kTile, kChannelsLast>(b, tile, args.steps, position + p, own_step(i) * kStep);
      RENDSEG_UNROLL
      for (int n = 0; n < 2; ++n) {
        const uint32_t b_own[2] = {b[n * 2], b[n * 2 + 1]};
        RENDSEG_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k16(result[i][m][n], a[1][m], b_own, X{});
          mma_m16n8k16(result[i][m][n], a[0][m], b_own, X{});
        }
      }
    }
  }
}

// f(code, channel, value, load(code, channel)) for what this thread holds of a result. Sixteen loads are under way at a
// time: f stores, and the compiler does not move loads across stores.
template <typename L, typename F>
__device__ inline void for_each_result(const MmaArgs& args, const Result& result, L&& load, F&& f) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  RENDSEG_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    const auto each = [&](auto&& at) {
      RENDSEG_UNROLL
      for (int n = 0; n < 2; ++n) {
        RENDSEG_UNROLL
        for (int m = 0; m < 2; ++m) {
          RENDSEG_UNROLL
          for (int j = 0; j < 4; ++j) {
            const int code = m * 16 + j / 2 * 8 + group, channel = own_step(i) * kStep + n * 8 + 2 * in_group + j % 2;
            if (code < args.codes && channel < args.channels) at(code, channel, n * 8 + m * 4 + j);
          }
        }
      }
    };
    float loaded[16] = {};
    each([&](int code, int channel, int at) { loaded[at] = load(code, channel); });
    each([&](int code, int channel, int at) { f(code, channel, result[i][at / 4 % 2][at / 8][at % 4], loaded[at]); });
  }
}

// totals[code] = sum over the positions of the block of `mine`, of each thread that makes a softmax. `scratch` holds
// [kSub][kMmaCodes].
__device__ inline void sum_positions(const Vec<float, 4>& mine, float* scratch, float* totals) {
  store_vec(scratch + softmax_position() * kMmaCodes + softmax_code(), mine);
  __syncthreads();
  if (threadIdx.x < kMmaCodes) {
    float total = 0.0f;
    for (int p = 0; p < kSub; ++p) total += scratch[p * kMmaCodes + threadIdx.x];
    totals[threadIdx.x] = total;
  }
  __syncthreads();
}

// --- forward ---------------------------------------------------------------------------------------------------------

template <typename X, int kTile, bool kChannelsLast, int kStages>
struct ForwardShared {
  X* tile[kStages];
  float *parts, *squares, *reference, *totals;
  X* weights;
  CodeConstants* constants;
  int64_t bytes;

  __host__ __device__ ForwardShared(unsigned char* memory, int steps) {
    int64_t at = 0;
    const auto take = [&](auto*& pointer, int64_t values) {
      using V = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<V*>(memory + at);
      at += values * static_cast<int64_t>(sizeof(V));
    };
    // Tables of a fixed size first: their places are constants and take no registers.
    take(parts, kWarps * kPart);
    take(squares, kWarps * kSub);
    take(weights, 2 * kSub * kWeightPitch);
    take(totals, kMmaCodes);
    take(constants, 1);
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) {
      take(tile[i], TileOf<X, kTile, kChannelsLast>::bytes(steps) / static_cast<int64_t>(sizeof(X)));
    }
    take(reference, steps * kStep);
    bytes = at;
  }
};

template <typename X, int kTile, bool kChannelsLast, int kStages>
__global__ void __launch_bounds__(kThreads, 1) encode_mma_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const ForwardShared<X, kTile, kChannelsLast, kStages> shared(memory, args.steps);
  const int64_t chunk = blockIdx.x, image = chunk / args.chunks;
  const int64_t first_of_chunk = chunk % args.chunks * args.chunk_positions;
  const int begin = static_cast<int>(first_of_chunk);  // fits_mma() has seen to it
  const int end = static_cast<int>(min(first_of_chunk + args.chunk_positions, args.positions));
  const int tiles = (end - begin + kTile - 1) / kTile;
  const auto load = [&](int t) {
    const int first = begin + t * kTile;
    load_tile<X, kTile, kChannelsLast>(args, image, first, min(kTile, end - first),
                                       kStages == 1 || t % 2 == 0 ? shared.tile[0] : shared.tile[kStages - 1]);
  };

  if (kStages == 2) load(0);
  cp_async_commit();
  for (int d = threadIdx.x; d < args.steps * kStep; d += kThreads) shared.reference[d] = args.reference[d];
  if (threadIdx.x < kMmaCodes) {
    copy_constants(*args.constants, *shared.constants);
  }
  Codewords<2> codewords;
  load_codewords<2>(args, codewords);

  Result result = {};
  Vec<float, 4> assigned_sum{};
  for (int t = 0; t < tiles; ++t) {
    if (t > 0) __syncthreads();  // the tile that comes goes where the one before was
    if (kStages == 1) {
      load(t);
    } else if (t + 1 < tiles) {
      load(t + 1);
    }
    cp_async_commit();
    cp_async_wait<kStages - 1>();
    __syncthreads();
    const X* const tile = kStages == 1 || t % 2 == 0 ? shared.tile[0] : shared.tile[kStages - 1];
    const int count = min(kTile, end - begin - t * kTile);
    for (int position = 0; position < count; position += kSub) {
      float product[2][4][4] = {}, square[2][2] = {};
      contract_slice<X, kTile, kChannelsLast, 2>(args, tile, shared.reference, position, codewords, nullptr, 0, product,
                                                 square);
      put_squares(shared.squares, square);
      const Vec<float, 4> products = exchange<1>(shared.parts, product);
      const Softmax softmax = softmax_of(args, *shared.constants, products, shared.squares);
      const bool exists = position + softmax_position() < count;
      Vec<float, 4> weights;
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) weights[j] = exists ? softmax.assigned[j] * kWeightScale : 0.0f;
      const Vec<float, 4> seen = put_weights(shared.weights, softmax_position(), softmax_code(), weights);
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) assigned_sum[j] += seen[j];
      __syncthreads();
      aggregate_slice<X, kTile, kChannelsLast>(args, tile, shared.weights, position, result);
    }
  }
  __syncthreads();
  sum_positions(assigned_sum, shared.parts, shared.totals);
  float* const out = args.sum_residual + chunk * args.channels * args.padded;
  with_dtype(args.codewords.dtype, [&](auto tag) {
    using C = typename decltype(tag)::Type;
    for_each_result(
        args, result, [&](int k, int d) { return static_cast<float>(widen(*address<C>(args.codewords, 0, k, d))); },
        [&](int k, int d, float sum, float c) {
          out[d * args.padded + k] = (sum - c * shared.totals[k]) * (1.0f / kWeightScale);
        });
  });
}

// --- backward --------------------------------------------------------------------------------------------------------
//
// With g the gradient of the result, dA = (x - c).g, dL = A (dA - sum A dA) and W = 2 s dL, the gradient
//   of x              is sum_k A_k g_k + W_k (x - c_k) = sum_k A_k g_k - W_k c'_k + (x - r) sum_k W_k,
//   of the codewords  is -(sum_m A g + 2 s sum_m dL (x - c)),
//   of the scale      is sum_m dL ||x - c||^2.
// A second product over the slice gives x.g; one with the 64 rows [g; c'] gives the gradient of x, which replaces the
// tile in shared memory (a warp is the only one to touch its slice) and leaves from there.

// Two operands b of 16 codes by 8 channels: b[0], b[1] of the first eight channels.
template <typename X>
__device__ inline void codes_by_channels(uint32_t (&b)[4], const X* rows, int pitch, int code, int channel) {
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  ldmatrix_x4_trans(b, rows + (code + matrix % 2 * 8 + row) * pitch + channel + matrix / 2 * 8);
}

// Operand a of 16 positions by 16 codes from weights [position][code].
template <typename X>
__device__ inline void positions_by_codes(uint32_t (&a)[4], const X* weights, int position, int code) {
  const int matrix = lane_id() / 8, row = lane_id() % 8;
  ldmatrix_x4(a, weights + (position + matrix % 2 * 8 + row) * kWeightPitch + code + matrix / 2 * 8);
}

// Products of 32 positions with the gradient, over the slice of this warp; rows [2][kMmaCodes][pitch] in two parts.
template <typename X, bool kChannelsLast>
__device__ inline void contract_gradient(const MmaArgs& args, const X* tile, const X* rows, int pitch,
                                         float (&product)[2][4][4]) {
  for (int step = warp_id(); step < args.steps; step += kWarps) {
    uint32_t a[2][4];
    RENDSEG_UNROLL
    for (int m = 0; m < 2; ++m) {
      positions_by_channels<X, kSub, kChannelsLast>(a[m], tile, args.steps, m * 16, step * kStep);
    }
    RENDSEG_UNROLL
    for (int split = 1; split >= 0; --split) {
      RENDSEG_UNROLL
      for (int pair = 0; pair < 2; ++pair) {
        uint32_t b[4];
        channels_by_codes(b, rows + split * kMmaCodes * pitch, pitch, pair * 16, step * kStep);
        RENDSEG_UNROLL
        for (int n = 0; n < 2; ++n) {
          const uint32_t b_own[2] = {b[n * 2], b[n * 2 + 1]};
          RENDSEG_UNROLL
          for (int m = 0; m < 2; ++m) mma_m16n8k16(product[m][pair * 2 + n], a[m], b_own, X{});
        }
      }
    }
  }
}

// The gradient of x is as coarse as X, and so may be the operands of its products, except that the rounding of both
// operands of bfloat16 could add up to more than that of the result: there A and g are split as well.
template <typename X>
constexpr bool kSplitGradient = std::is_same_v<X, bfloat16_t>;

// What the gradient of x needs to know of each position: 1 / the scale of its weights, and sum_k W_k.
struct PositionFactors {
  float unscale[kSub], weight_sum[kSub];
};

// tile = gradient of x, for the slice of this warp. weights [3][position][code]: A, -W and the rest of A, scaled.
template <typename X, bool kChannelsLast>
__device__ inline void replace_by_gradient(const MmaArgs& args, X* tile, const X* weights, const X* grad_rows,
                                           const X* code_rows, int pitch, const float* reference,
                                           const PositionFactors& factors) {
  using Tile = TileOf<X, kSub, kChannelsLast>;
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  for (int step = warp_id(); step < args.steps; step += kWarps) {
    float sum[2][2][4] = {};
    const auto add = [&](int table, const X* rows) {  // over all codes
      RENDSEG_UNROLL
      for (int code = 0; code < kMmaCodes; code += 16) {
        uint32_t a[4], b[4];
        codes_by_channels(b, rows, pitch, code, step * kStep);
        RENDSEG_UNROLL
        for (int m = 0; m < 2; ++m) {
          positions_by_codes(a, weights + table * kSub * kWeightPitch, m * 16, code);
          RENDSEG_UNROLL
          for (int n = 0; n < 2; ++n) {
            const uint32_t b_own[2] = {b[n * 2], b[n * 2 + 1]};
            mma_m16n8k16(sum[m][n], a, b_own, X{});
          }
        }
      }
    };
    if constexpr (kSplitGradient<X>) {
      add(2, grad_rows);
      add(0, grad_rows + kMmaCodes * pitch);
    }
    add(0, grad_rows);
    add(1, code_rows);
    RENDSEG_UNROLL
    for (int m = 0; m < 2; ++m) {
      RENDSEG_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int position = m * 16 + half * 8 + group;
        const float unscale = factors.unscale[position], weight_sum = factors.weight_sum[position];
        RENDSEG_UNROLL
        for (int n = 0; n < 2; ++n) {
          RENDSEG_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int channel = step * kStep + n * 8 + 2 * in_group + j;
            X& x = tile[Tile::at(args.steps, position, channel)];
            x = narrow<X>(fmaf(widen(x) - reference[channel], weight_sum, sum[m][n][half * 2 + j] * unscale));
          }
        }
      }
    }
  }
}

// Writes the slice of this warp out of the tile.
template <typename X, bool kChannelsLast>
__device__ inline void store_slice(const MmaArgs& args, int64_t image, int64_t first, int count, const X* tile) {
  using Tile = TileOf<X, kSub, kChannelsLast>;
  const View& x = args.x_grad;
  X* const to = address<X>(x, image, first, 0);
  const int channels = static_cast<int>(args.channels);
  for (int step = warp_id(); step < args.steps; step += kWarps) {
    if (args.grad_vectors) {
      constexpr int kUnit = kVecWidth<X>;
      constexpr int kUnits = (kChannelsLast ? kStep : kSub) / kUnit;  // of 16 bytes in a row
      constexpr int kRows = kChannelsLast ? kSub : kStep;
      RENDSEG_UNROLL
      for (int i = 0; i < kRows * kUnits; i += kWarp) {
        const int row = (i + lane_id()) / kUnits, unit = (i + lane_id()) % kUnits * kUnit;
        const int position = kChannelsLast ? row : unit, channel = step * kStep + (kChannelsLast ? unit : row);
        if (position >= count || channel >= channels) continue;
        store_vec_streaming(to + position * x.position + channel * x.channel,
                            load_vec<kUnit>(tile + Tile::at(args.steps, position, channel)));
      }
    } else {
      const bool along_channels = x.channel < x.position;
      for (int i = lane_id(); i < kSub * kStep; i += kWarp) {
        const int position = along_channels ? i / kStep : i % kSub;
        const int channel = step * kStep + (along_channels ? i % kStep : i / kSub);
        if (position >= count || channel >= channels) continue;
        to[position * x.position + channel * x.channel] = tile[Tile::at(args.steps, position, channel)];
      }
    }
  }
}

// With two rounds of an exchange, weights take the place of the parts.
template <typename X, bool kChannelsLast, int kStages, int kRounds>
struct BackwardShared {
  X* tile[kStages];
  X *grad_rows, *code_rows, *logit_weights, *weights;
  float *parts, *squares, *reference, *totals, *tops, *grad_unscale, *grad_dot;
  PositionFactors* factors;
  CodeConstants* constants;
  int64_t bytes;

  __host__ __device__ BackwardShared(unsigned char* memory, int steps) {
    const int64_t pitch = steps * kStep + 8;
    int64_t at = 0;
    const auto take = [&](auto*& pointer, int64_t values) {
      using V = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<V*>(memory + at);
      at += values * static_cast<int64_t>(sizeof(V));
    };
    // Tables of a fixed size first: their places are constants and take no registers.
    constexpr int64_t kArrays = kSplitGradient<X> ? 3 : 2, kWeights = kSub * kWeightPitch;
    static_assert((2 + kArrays) * kWeights * 2 <= kWarps * kPart / 2 * 4, "weights take the place of the parts");
    take(parts, kWarps * kPart / kRounds);
    take(squares, kWarps * kSub);
    if constexpr (kRounds == 2) {
      logit_weights = reinterpret_cast<X*>(parts);
      weights = logit_weights + 2 * kWeights;
    } else {
      take(logit_weights, 2 * kWeights);
      take(weights, kArrays * kWeights);
    }
    take(totals, kMmaCodes);
    take(tops, kWarps);
    take(grad_unscale, kMmaCodes);
    take(grad_dot, kMmaCodes);
    take(factors, 1);
    take(constants, 1);
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) {
      take(tile[i], TileOf<X, kSub, kChannelsLast>::bytes(steps) / static_cast<int64_t>(sizeof(X)));
    }
    take(grad_rows, 2 * kMmaCodes * pitch);
    take(code_rows, kMmaCodes * pitch);
    take(reference, steps * kStep);
    bytes = at;
  }
};

__device__ inline float sum_of(float a, float b) { return a + b; }
__device__ inline float larger_of(float a, float b) { return fmaxf(a, b); }

template <typename X, bool kChannelsLast, int kStages, int kRounds>
__global__ void __launch_bounds__(kThreads, 1) encode_mma_backward_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const BackwardShared<X, kChannelsLast, kStages, kRounds> shared(memory, args.steps);
  const int64_t chunk = blockIdx.x, image = chunk / args.chunks;
  const int64_t first_of_chunk = chunk % args.chunks * args.chunk_positions;
  const int begin = static_cast<int>(first_of_chunk);  // fits_mma() has seen to it
  const int end = static_cast<int>(min(first_of_chunk + args.chunk_positions, args.positions));
  const int tiles = (end - begin + kSub - 1) / kSub;
  const int channels = args.steps * kStep, pitch = channels + 8;
  const auto tile_of = [&](int t) { return kStages == 1 || t % 2 == 0 ? shared.tile[0] : shared.tile[kStages - 1]; };
  const auto count_of = [&](int t) { return min(kSub, end - begin - t * kSub); };
  const auto load = [&](int t) {
    load_tile<X, kSub, kChannelsLast>(args, image, begin + t * kSub, count_of(t), tile_of(t));
  };

  if (kStages == 2) load(0);
  const X* const grad_rows = static_cast<const X*>(args.grad_rows) + image * 2 * kMmaCodes * channels;
  const X* const code_rows = static_cast<const X*>(args.code_rows);
  for (int i = threadIdx.x; i < 3 * kMmaCodes * channels / 8; i += kThreads) {
    const int row = i / (channels / 8), d = i % (channels / 8) * 8, code_row = row - 2 * kMmaCodes;
    if (code_row < 0) {
      cp_async_16(shared.grad_rows + row * pitch + d, grad_rows + row * channels + d);
    } else {
      cp_async_16(shared.code_rows + code_row * pitch + d, code_rows + code_row * channels + d);
    }
  }
  cp_async_commit();
  for (int d = threadIdx.x; d < channels; d += kThreads) shared.reference[d] = args.reference[d];
  if (threadIdx.x < kMmaCodes) {
    const int64_t of_image = image * kMmaCodes + threadIdx.x;
    copy_constants(*args.constants, *shared.constants);
    shared.grad_unscale[threadIdx.x] = 1.0f / args.grad_power[of_image];
    shared.grad_dot[threadIdx.x] = args.grad_dot[of_image];
  }
  Codewords<1> codewords;
  load_codewords<1>(args, codewords);

  const int code = softmax_code(), own = softmax_position();
  Result result = {};  // sum of dL * x, times `power`
  float power = static_cast<float>(INFINITY);
  Vec<float, 4> assigned_sum{}, logit_sum{}, scale_sum{};
  for (int t = 0; t < tiles; ++t) {
    if (t > 0) __syncthreads();  // the tile that comes goes where the one before was
    if (kStages == 1) {
      load(t);
    } else if (t + 1 < tiles) {
      load(t + 1);
    }
    cp_async_commit();
    cp_async_wait<kStages - 1>();
    __syncthreads();
    X* const tile = tile_of(t);
    const int count = count_of(t);

    Vec<float, 4> products;
    {
      float product[2][4][4] = {}, square[2][2] = {};
      contract_slice<X, kSub, kChannelsLast, 1>(args, tile, shared.reference, 0, codewords, shared.code_rows, pitch,
                                                product, square);
      put_squares(shared.squares, square);
      products = exchange<kRounds>(shared.parts, product);
    }
    const Softmax softmax = softmax_of(args, *shared.constants, products, shared.squares);
    Vec<float, 4> logit_grad;
    {
      float product[2][4][4] = {};
      contract_gradient<X, kChannelsLast>(args, tile, shared.grad_rows, pitch, product);
      __syncthreads();  // the distances have been read
      logit_grad = exchange<kRounds>(shared.parts, product);
    }
    float dot = 0.0f;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      logit_grad[j] = fmaf(logit_grad[j], shared.grad_unscale[code + j], -shared.grad_dot[code + j]);
      dot = fmaf(softmax.assigned[j], logit_grad[j], dot);
    }
    dot = over_position(dot, sum_of);
    Vec<float, 4> a, w;
    float weight_sum = 0.0f, top = 0.0f, logit_top = 0.0f;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bool exists = own < count && code + j < args.codes;
      const float assigned = exists ? softmax.assigned[j] : 0.0f;
      const float gradient = exists ? softmax.assigned[j] * (logit_grad[j] - dot) : 0.0f;
      const float weight = 2.0f * shared.constants->scale[code + j] * gradient;
      logit_grad[j] = gradient;
      logit_top = fmaxf(logit_top, fabsf(gradient));
      assigned_sum[j] += assigned;
      scale_sum[j] += exists ? gradient * softmax.distance[j] : 0.0f;
      weight_sum += weight;
      a[j] = assigned * shared.grad_unscale[code + j];
      w[j] = weight * shared.constants->factor[code + j] * 0.5f;  // the factor is -2 / the power of the codeword
      top = fmaxf(top, fmaxf(fabsf(a[j]), fabsf(w[j])));
    }
    weight_sum = over_position(weight_sum, sum_of);
    const float scale = power_for(over_position(top, larger_of));
    if constexpr (kRounds == 2) __syncthreads();  // the products have been read
    Vec<X, 4> a_high, a_low, w_high;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      a_high[j] = narrow<X>(a[j] * scale);
      a_low[j] = narrow<X>(a[j] * scale - widen(a_high[j]));
      w_high[j] = narrow<X>(w[j] * scale);
    }
    X* const to = shared.weights + own * kWeightPitch + code;
    store_vec(to, a_high);
    store_vec(to + kSub * kWeightPitch, w_high);
    if constexpr (kSplitGradient<X>) store_vec(to + 2 * kSub * kWeightPitch, a_low);
    if (lane_id() % 8 == 0) {
      shared.factors->unscale[own] = 1.0f / scale;
      shared.factors->weight_sum[own] = weight_sum;
    }

    // The gradients of the logits share one power of two over all positions; it shrinks when larger ones come.
    logit_top = warp_max(logit_top);
    if (lane_id() == 0) shared.tops[warp_id()] = logit_top;
    __syncthreads();
    RENDSEG_UNROLL
    for (int i = 0; i < kWarps; ++i) logit_top = fmaxf(logit_top, shared.tops[i]);
    const float fitting = logit_top > 0.0f ? power_for(logit_top) * 256.0f : power;
    if (fitting < power) {
      const float change = power < static_cast<float>(INFINITY) ? fitting / power : 1.0f;
      power = fitting;
      RENDSEG_UNROLL
      for (int i = 0; i < kSteps * 16; ++i) result[i / 16][i / 8 % 2][i / 4 % 2][i % 4] *= change;
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) logit_sum[j] *= change;
    }
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) logit_grad[j] = logit_grad[j] == 0.0f ? 0.0f : logit_grad[j] * power;
    const Vec<float, 4> seen = put_weights(shared.logit_weights, own, code, logit_grad);
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) logit_sum[j] += seen[j];
    __syncthreads();
    aggregate_slice<X, kSub, kChannelsLast>(args, tile, shared.logit_weights, 0, result);
    __syncwarp();
    replace_by_gradient<X, kChannelsLast>(args, tile, shared.weights, shared.grad_rows, shared.code_rows, pitch,
                                          shared.reference, *shared.factors);
    __syncwarp();
    store_slice<X, kChannelsLast>(args, image, begin + t * kSub, count, tile);
  }

  const float unscale = power < static_cast<float>(INFINITY) ? 1.0f / power : 0.0f;
  const auto put_totals = [&](const Vec<float, 4>& sums, float* out) {
    __syncthreads();
    sum_positions(sums, shared.parts, shared.totals);
    if (out != nullptr && threadIdx.x < args.codes) out[threadIdx.x] = shared.totals[threadIdx.x];
  };
  put_totals(assigned_sum, args.sum_assigned + chunk * args.padded);
  put_totals(scale_sum, args.sum_scale + chunk * args.padded);
  put_totals(logit_sum, nullptr);
  float* const out = args.sum_residual + chunk * args.channels * args.padded;
  for_each_result(
      args, result, [&](int k, int d) { return __ldg(args.packed_codewords + d * args.padded + k); },
      [&](int k, int d, float sum, float c) { out[d * args.padded + k] = (sum - c * shared.totals[k]) * unscale; });
}

// --- host ------------------------------------------------------------------------------------------------------------

constexpr int64_t kMmaChunks = 128;  // of all images together: a block for every multiprocessor of the largest GPUs

// Whether the tensor cores can do it.
inline bool fits_mma(const MmaArgs& args) {
  return args.positions < (int64_t{1} << 30) && args.codes <= kMmaCodes && args.channels >= kStep &&
         args.channels <= kMmaChannels;
}

inline bool is_channels_last(const MmaArgs& args) { return args.x.channel == 1 && args.channels > 1; }

// Whether rows of `view` can be moved in 16 bytes.
inline bool moves_in_vectors(const MmaArgs& args, const View& view, bool channels_last) {
  const int64_t row = channels_last ? view.position : view.channel;
  const int64_t unit = args.wide ? 4 : 8;
  return (channels_last ? view.channel : view.position) == 1 && row % unit == 0 && view.image % unit == 0 &&
         (channels_last ? args.channels : args.positions) % unit == 0 && is_aligned(view.data, 16);
}

inline void plan_mma(MmaArgs& args) {
  args.padded = (args.codes + kPad - 1) / kPad * kPad;
  args.steps = static_cast<int>((args.channels + kStep - 1) / kStep);
  if (args.wide) args.steps += args.steps % 2;  // rows of a multiple of 32 channels
  const int64_t units = (args.positions + 63) / 64,
                per_image = kMmaChunks / args.batch < 1 ? 1 : kMmaChunks / args.batch;
  args.chunk_positions = (units + per_image - 1) / per_image * 64;
  args.chunks = (args.positions + args.chunk_positions - 1) / args.chunk_positions;
  const bool last = is_channels_last(args);
  args.vectors = moves_in_vectors(args, args.x, last);
  args.grad_vectors = args.x_grad.data != nullptr && moves_in_vectors(args, args.x_grad, last);
}

// Places of the scratch memory from `memory` on; returns the bytes that they take.
inline int64_t lay_out_mma(MmaArgs& args, void* memory) {
  int64_t bytes = 0;
  const auto place = [&](int64_t size) {
    unsigned char* const at = memory == nullptr ? nullptr : static_cast<unsigned char*>(memory) + bytes;
    bytes += (size + 255) / 256 * 256;
    return static_cast<void*>(at);
  };
  const auto floats = [&](int64_t values) { return static_cast<float*>(place(values * 4)); };
  const int64_t channels = args.steps * kStep, width = args.channels * args.padded, chunks = args.batch * args.chunks;
  if (args.wide) {
    args.code_rows = place(kMmaCodes * channels * 4);
  } else {
    args.fragments = static_cast<uint32_t*>(place(fragment_words(args.steps) * 4));
  }
  args.reference = floats(channels);
  args.constants = static_cast<CodeConstants*>(place(sizeof(CodeConstants)));
  args.sum_residual = floats(chunks * width);
  if (args.grad.data == nullptr) return bytes;
  if (!args.wide) args.code_rows = place(kMmaCodes * channels * 2);
  args.grad_rows = place(args.batch * 2 * kMmaCodes * channels * 2);
  args.grad_power = floats(args.batch * kMmaCodes);
  args.grad_dot = floats(args.batch * kMmaCodes);
  args.packed_codewords = floats(width);
  args.packed_scale = floats(args.padded);
  args.packed_grad = floats(args.batch * width);
  args.sum_assigned = floats(chunks * args.padded);
  args.sum_scale = floats(chunks * args.padded);
  return bytes;
}

// What packing and the last sums want to know.
inline Args<float> general_args(const MmaArgs& args) {
  Args<float> general;
  general.batch = args.batch;
  general.channels = args.channels;
  general.codes = args.codes;
  general.padded = args.padded;
  general.chunks = args.chunks;
  general.codewords = args.codewords;
  general.scale = args.scale;
  general.grad = args.grad;
  general.out = args.out;
  general.scale_grad = args.scale_grad;
  general.packed_codewords = args.packed_codewords;
  general.packed_scale = args.packed_scale;
  general.packed_grad = args.packed_grad;
  general.sum_residual = args.sum_residual;
  general.sum_assigned = args.sum_assigned;
  general.sum_scale = args.sum_scale;
  return general;
}

// An address to measure a layout from.
inline unsigned char* nowhere() { return reinterpret_cast<unsigned char*>(uintptr_t{4096}); }

template <typename X, int kTile, bool kChannelsLast, int kStages, typename Launch>
bool launch_encode_mma(Launch& launch, const MmaArgs& args, bool try_only) {
  const int64_t bytes = ForwardShared<X, kTile, kChannelsLast, kStages>(nowhere(), args.steps).bytes;
  if (bytes > launch.shared_limit()) return false;
  if (!try_only) {
    launch({args.batch * args.chunks, kThreads, bytes}, encode_mma_kernel<X, kTile, kChannelsLast, kStages>, args);
  }
  return true;
}

// Of float32 features, in encode_tf32.cuh.
template <bool kChannelsLast, typename Launch>
bool pick_encode_tf32(Launch& launch, const MmaArgs& args, bool try_only);
template <bool kChannelsLast, typename Launch>
bool pick_encode_tf32_backward(Launch& launch, const MmaArgs& args, bool try_only);

// Two tiles under way where the GPU has the shared memory, else one, else a smaller one. The order of all sums is the
// same in each.
template <typename X, bool kChannelsLast, typename Launch>
bool pick_encode_mma(Launch& launch, const MmaArgs& args, bool try_only) {
  if constexpr (std::is_same_v<X, float>) {
    return pick_encode_tf32<kChannelsLast>(launch, args, try_only);
  } else {
    return launch_encode_mma<X, 64, kChannelsLast, 2>(launch, args, try_only) ||
           launch_encode_mma<X, 32, kChannelsLast, 2>(launch, args, try_only) ||
           launch_encode_mma<X, 32, kChannelsLast, 1>(launch, args, try_only);
  }
}

// Whether it was done. With `try_only`: whether it can be, on this GPU.
template <typename X, typename Launch>
bool run_encode_mma(Launch& launch, const MmaArgs& args, bool try_only) {
  if (!try_only) launch({kMmaCodes, kThreads}, prepare_mma_kernel<X>, args);
  if (!(is_channels_last(args) ? pick_encode_mma<X, true>(launch, args, try_only)
                               : pick_encode_mma<X, false>(launch, args, try_only))) {
    return false;
  }
  if (!try_only) {
    run_sum_encodings(launch, general_args(args));
  }
  return true;
}

template <typename X, bool kChannelsLast, int kStages, int kRounds, typename Launch>
bool launch_encode_mma_backward(Launch& launch, const MmaArgs& args, bool try_only) {
  const int64_t bytes = BackwardShared<X, kChannelsLast, kStages, kRounds>(nowhere(), args.steps).bytes;
  if (bytes > launch.shared_limit()) return false;
  if (!try_only) {
    launch({args.batch * args.chunks, kThreads, bytes}, encode_mma_backward_kernel<X, kChannelsLast, kStages, kRounds>,
           args);
  }
  return true;
}

// At 512 channels: two tiles and two rounds on sm_90 (202 K), one tile on sm_80 (161 K). Sums are the same in each.
template <typename X, bool kChannelsLast, typename Launch>
bool pick_encode_mma_backward(Launch& launch, const MmaArgs& args, bool try_only) {
  if constexpr (std::is_same_v<X, float>) {
    return pick_encode_tf32_backward<kChannelsLast>(launch, args, try_only);
  } else {
    return launch_encode_mma_backward<X, kChannelsLast, 2, 1>(launch, args, try_only) ||
           launch_encode_mma_backward<X, kChannelsLast, 2, 2>(launch, args, try_only) ||
           launch_encode_mma_backward<X, kChannelsLast, 1, 2>(launch, args, try_only);
  }
}

template <typename X, typename Launch>
bool run_encode_mma_backward(Launch& launch, const MmaArgs& args, bool try_only) {
  if (!try_only) {
    run_pack(launch, general_args(args));
    launch({kMmaCodes, kThreads}, prepare_mma_kernel<X>, args);
    launch({args.batch * kMmaCodes, kThreads}, prepare_gradient_kernel<X>, args);
  }
  if (!(is_channels_last(args) ? pick_encode_mma_backward<X, true>(launch, args, try_only)
                               : pick_encode_mma_backward<X, false>(launch, args, try_only))) {
    return false;
  }
  if (!try_only) run_sum_gradients(launch, general_args(args));
  return true;
}

}  // namespace rendseg::encoding
