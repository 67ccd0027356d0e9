// encode on tensor cores: what its kernels share. At most 32 codewords and 512 channels; float16 and bfloat16 features
// here (encode_mma_forward.cuh, encode_mma_backward.cuh), float32 in encode_tf32.cuh, launches in encode_mma_run.cuh.
//
// A block of eight warps walks over the positions of one chunk of an image, a tile of 32 or 64 of them at a time, and
// reads the features of each once. A warp owns a slice of the channels, up to four steps of 16:
//
//   channel       0      16     32    ..  112    128    144   ..  240    256   ..   511
//   step          0      1      2     ..  7      8      9     ..  15     16    ..   31
//   warp          0      1      2     ..  7      0      1     ..  7      0 .. 7, 0 .. 7
//               +------+------+------+--+------+------+------+--+------+----------------+
//   position 0  |                                                                       |
//            .. |  a tile in shared memory, as the features have it: [channel][position]|
//            31 |  or, where channels are adjacent, [position][channel]                 |
//               +------+------+------+--+------+------+------+--+------+----------------+
//
//   contract    a warp: tile [32 positions][slice] x c' [slice][32 codes] is its part of the distances
//   exchange    the block: the eight parts meet in shared memory. Thread t sums them for codes 4 (t % 8) .. + 3 of
//               position t / 8, and has their squared distances, softmax and assignment A; eight lanes share a position
//   aggregate   a warp: A [32 codes][32 positions] x tile [32 positions][slice] is added to its part of the result
//               [32 codes][slice], in registers from the first position of the chunk to the last
//
// Codewords are fragments in registers (16-bit features) or rows in shared memory. encode_parts.cuh adds the results of
// all chunks of an image.
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

// --- preparation

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
  with_dtype(args.codewords.dtype, [&]<typename C>() {
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

// --- a tile in shared memory

// Features of kTile positions: [channel][position], or [position][channel] where channels are contiguous in memory.
// Rows are an odd number of 16 bytes: ldmatrix has no bank conflicts in either direction.
template <typename X, int kTile, bool kChannelsLast>
struct TileOf {
  static __host__ __device__ int rows(int steps) { return kChannelsLast ? kTile : steps * kStep; }
  static __host__ __device__ int columns(int steps) { return kChannelsLast ? steps * kStep : kTile; }
  static __host__ __device__ int pitch(int steps) { return columns(steps) + 8; }
  static __host__ __device__ int64_t values(int steps) { return static_cast<int64_t>(rows(steps)) * pitch(steps); }
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
  static __host__ __device__ int64_t values(int steps) { return int64_t{kTile} * steps * kStep; }
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

// --- the exchange of distances

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

// --- products of a warp

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

// --- the walk over a chunk

// The positions of this block: those of one chunk, kTile at a time, in kStages tiles of shared memory by turns. With
// two, the next tile is on its way while this one is worked on. The order of all sums is the same in both.
template <typename X, int kTile, bool kChannelsLast, int kStages>
struct ChunkWalk {
  const MmaArgs& args;
  int64_t chunk, image;
  int begin, end, tiles;
  X *even, *odd;

  __device__ ChunkWalk(const MmaArgs& args, const Part<X> (&places)[kStages], unsigned char* memory)
      : args(args), chunk(blockIdx.x), image(chunk / args.chunks) {
    const int64_t first_of_chunk = chunk % args.chunks * args.chunk_positions;
    begin = static_cast<int>(first_of_chunk);  // fits_mma() has seen to it
    end = static_cast<int>(min(first_of_chunk + args.chunk_positions, args.positions));
    tiles = (end - begin + kTile - 1) / kTile;
    even = places[0].in(memory), odd = places[kStages - 1].in(memory);
  }
  __device__ X* tile(int t) const { return kStages == 1 || t % 2 == 0 ? even : odd; }
  __device__ int first(int t) const { return begin + t * kTile; }
  __device__ int count(int t) const { return min(kTile, end - begin - t * kTile); }
  __device__ void load(int t) const { load_tile<X, kTile, kChannelsLast>(args, image, first(t), count(t), tile(t)); }
  // What the block needs from the start may be copied before or after this; cp_async_commit() follows.
  __device__ void load_first() const {
    if (kStages == 2) load(0);
  }
  // Barriers 1 and 2 of a tile. Tile t is then there for all threads.
  __device__ void arrive(int t) const {
    if (t > 0) __syncthreads();  // 1: the tile that comes goes where the one before was
    if (kStages == 1) {
      load(t);
    } else if (t + 1 < tiles) {
      load(t + 1);
    }
    cp_async_commit();
    cp_async_wait<kStages - 1>();
    __syncthreads();  // 2: the copies of all threads are there
  }
};

// Adds up `sums` of all threads that make a softmax, into totals[kMmaCodes] in shared memory and into `out` if given.
// `scratch` holds [kSub][kMmaCodes].
__device__ inline void put_totals(const MmaArgs& args, const Vec<float, 4>& sums, float* scratch, float* totals,
                                  float* out) {
  __syncthreads();
  sum_positions(sums, scratch, totals);
  if (out != nullptr && threadIdx.x < args.codes) out[threadIdx.x] = totals[threadIdx.x];
}

__device__ inline float sum_of(float a, float b) { return a + b; }
__device__ inline float larger_of(float a, float b) { return fmaxf(a, b); }

// Writes the slice of this warp out of a tile of kSub positions.
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

// --- host

constexpr int64_t kMmaChunks = 128;  // of all images together: a block for every multiprocessor of the largest GPUs

// Whether the tensor cores can do it.
inline bool fits_mma(const MmaArgs& args) {
  return args.positions < (int64_t{1} << 30) && args.codes <= kMmaCodes && args.channels >= kStep &&
         args.channels <= kMmaChannels;
}

inline bool is_backward(const MmaArgs& args) { return args.grad.data != nullptr; }
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

// The scratch memory.
inline Scratch lay_out_mma(MmaArgs& args) {
  Scratch scratch;
  const int64_t channels = args.steps * kStep, width = args.channels * args.padded, chunks = args.batch * args.chunks;
  const int64_t element = args.wide ? 4 : 2;
  if (!args.wide) scratch.add(args.fragments, fragment_words(args.steps));
  if (args.wide || is_backward(args)) scratch.add_bytes(args.code_rows, kMmaCodes * channels * element);
  scratch.add(args.reference, channels);
  scratch.add(args.constants, 1);
  scratch.add(args.sum_residual, chunks * width);
  if (!is_backward(args)) return scratch;
  scratch.add_bytes(args.grad_rows, args.batch * kMmaCodes * channels * 4);
  scratch.add(args.grad_power, args.batch * kMmaCodes);
  scratch.add(args.grad_dot, args.batch * kMmaCodes);
  scratch.add(args.packed_codewords, width);
  scratch.add(args.packed_scale, args.padded);
  scratch.add(args.packed_grad, args.batch * width);
  scratch.add(args.sum_assigned, chunks * args.padded);
  scratch.add(args.sum_scale, chunks * args.padded);
  return scratch;
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

}  // namespace rendseg::encoding
