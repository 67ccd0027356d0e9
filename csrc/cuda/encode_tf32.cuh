// encode on tensor cores for float32 features: at most 32 codewords, 512 channels, and a tile that fits the shared
// memory of the GPU. The frame is that of encode_mma.cuh: eight warps, each with a slice of the channels, 32 positions
// between two exchanges, features read once.
//
// Products. Each operand is split into high + low, two tf32 values that hold 22 bits of it, as it is loaded from shared
// memory; a product is high * high + high * low + low * high (3xTF32), good to about 2^-22. tf32 has the exponents of
// float, so nothing is scaled. Two bfloat16 values would take half the products, but the gradient of x, a sum over 32
// codes alone, would be off by 2^-18.
//
// Distances are ||x'||^2 - 2 x'.c' + ||c'||^2 with x' = x - r, c' = c - r and r the mean codeword.
//
// Result. sum_m A_mk x'_m - c'_k sum_m A_mk cancels where features lie on codewords. So each position is measured from
// the codeword n(m) nearest to it, y_m = x_m - c_n(m), which is exact there, and
//   sum_m A_mk (x_m - c_k) = sum_m A_mk y_m + sum_j N_kj (c_j - c_k),  N_kj = sum of A_mk over the m with n(m) = j.
// N is a product on tensor cores as well; the second sum is made once, after the last position of a chunk.
//
// Shared memory at 512 channels, bytes: c' 65,536, a tile of 32 positions 65,536, the parts of the distances 32,768
// (weights take their place), small tables 2 K: 161 K with one tile (sm_80), 225 K with two (sm_90). Backward holds the
// gradient of the result as well: 226 K with one tile; on sm_80 up to 320 channels.
#pragma once

#include "encode_mma.cuh"

namespace rendseg::encoding {

constexpr int kGrid = kSub * kMmaCodes;  // weights [32][32] as rows of 32 values, see swapped()
static_assert(kSub == 32 && kMmaCodes == 32, "weights are square");
static_assert(6 * kGrid <= kWarps * kPart, "three arrays of weights in two parts take the place of the distances");

// --- operands

// Operand a of 16 by 8, or two operands b of 8 by 8, in two parts.
struct TwoParts {
  uint32_t high[4], low[4];
};

// The nearest tf32 value. to_tf32() asks whether x is finite first; here a NaN may become zero, since the rest is NaN.
__device__ inline float high_part(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }

__device__ inline void split(TwoParts& parts, int i, float value) {
  const float high = high_part(value);
  parts.high[i] = __float_as_uint(high);
  parts.low[i] = __float_as_uint(value - high);  // the products read its upper 19 bits
}

// d += a * b, where b is the `which`-th of two operands b. Small terms first.
__device__ inline void multiply(float (&d)[4], const TwoParts& a, const TwoParts& b, int which) {
  const uint32_t high[2] = {b.high[which * 2], b.high[which * 2 + 1]},
                 low[2] = {b.low[which * 2], b.low[which * 2 + 1]};
  mma_m16n8k8_tf32(d, a.low, high);
  mma_m16n8k8_tf32(d, a.high, low);
  mma_m16n8k8_tf32(d, a.high, high);
}

// Four 8x4 matrices of rows [row][width]: values[i] is element (lane / 4, lane % 4) of the matrix at
// (row + i % 2 * rows, column + i / 2 * columns).
__device__ inline void load_along_rows(float (&values)[4], const float* grid, int width, int row, int rows, int column,
                                       int columns) {
  const int matrix = lane_id() / 8, at = row + lane_id() % 8 + matrix % 2 * rows;
  uint32_t bits[4];
  ldmatrix_x4(bits, grid + at * width + swapped(at, column + matrix / 2 * columns));
  RENDSEG_UNROLL
  for (int i = 0; i < 4; ++i) values[i] = __uint_as_float(bits[i]);
}

// The same of their transposes: values[i] is the element of column lane / 4 and row lane % 4 of the 4x8 matrix at
// (row + i / 2 * rows, column + i % 2 * columns).
__device__ inline void load_across_rows(float (&values)[4], const float* grid, int width, int row, int rows, int column,
                                        int columns) {
  RENDSEG_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int at = row + lane_id() % 4 + i / 2 * rows;
    values[i] = grid[at * width + swapped(at, column + lane_id() / 4 + i % 2 * columns)];
  }
}

// Weights [32][32] lie in fours swapped once more, so that threads may store columns of a four of rows.
__device__ inline int weight_at(int row, int column) { return row * kMmaCodes + swapped(row, column ^ (row & 24)); }

// Stores a weight in two parts, `column` of `row` of an array in two parts.
__device__ inline void put_weight_parts(float* weights, int row, int column, float value) {
  const float high = high_part(value);
  weights[weight_at(row, column)] = high;
  weights[kGrid + weight_at(row, column)] = value - high;
}
__device__ inline void put_weight_parts(float* weights, int row, int column, const Vec<float, 4>& values) {
  Vec<float, 4> high, low;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    high[j] = high_part(values[j]);
    low[j] = values[j] - high[j];
  }
  store_vec(weights + weight_at(row, column), high);
  store_vec(weights + kGrid + weight_at(row, column), low);
}

// Operand a: rows row .. row + 15, columns column .. column + 7 of weights.
__device__ inline void load_weights(TwoParts& a, const float* weights, int row, int column) {
  const int matrix = lane_id() / 8, at = row + matrix % 2 * 8 + lane_id() % 8;
  const float* const from = weights + weight_at(at, column + matrix / 2 * 4);
  ldmatrix_x4(a.high, from);
  ldmatrix_x4(a.low, from + kGrid);
}

// x of 16 positions by 8 channels, as operand a has them.
template <bool kChannelsLast>
__device__ inline void features_of_distances(float (&x)[4], const float* tile, int width, int position, int channel) {
  if constexpr (kChannelsLast) {
    load_along_rows(x, tile, width, position, 8, channel, 4);
  } else {
    load_across_rows(x, tile, kSub, channel, 4, position, 8);
  }
}

// x of 16 positions by 8 channels, as two operands b have them.
template <bool kChannelsLast>
__device__ inline void features_of_sums(float (&x)[4], const float* tile, int width, int position, int channel) {
  if constexpr (kChannelsLast) {
    RENDSEG_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int at = position + lane_id() % 4 + i * 4;
      x[i] = tile[at * width + swapped(at, channel + lane_id() / 4)];
    }
  } else {
    load_along_rows(x, tile, kSub, channel, 0, position + lane_id() / 8 % 2 * 4, 8);
  }
}

// --- products of a warp

// Products of the 32 positions of a tile with `kTables` tables of rows [32 codes][width], one after the other, over
// the slice of this warp, and (x - r)^2 summed over it as contract_slice() has it.
template <bool kChannelsLast, int kTables>
__device__ inline void contract_rows(const MmaArgs& args, const float* tile, const float* rows,
                                     float (&product)[kTables][2][4][4], float (&square)[2][2]) {
  const int width = args.steps * kStep, in_group = lane_id() % 4;
  RENDSEG_NO_UNROLL
  for (int step = warp_id(); step < args.steps; step += kWarps) {
    const float* const reference = args.reference + step * kStep + in_group;
    RENDSEG_NO_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int channel = step * kStep + half * 8;
      const float r[2] = {__ldg(reference + half * 8), __ldg(reference + half * 8 + 4)};
      TwoParts a[2];
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) {
        float x[4];
        features_of_distances<kChannelsLast>(x, tile, width, m * 16, channel);
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          const float centred = x[j] - r[j / 2];
          square[m][j % 2] = fmaf(centred, centred, square[m][j % 2]);
          split(a[m], j, centred);
        }
      }
      RENDSEG_UNROLL
      for (int table = 0; table < kTables; ++table) {
        RENDSEG_UNROLL
        for (int pair = 0; pair < 2; ++pair) {
          float c[4];
          // Matrices: eight codes by channels 0-3, the same codes by channels 4-7, then eight more codes.
          const int matrix = lane_id() / 8, code = table * kMmaCodes + pair * 16 + matrix / 2 * 8 + lane_id() % 8;
          uint32_t bits[4];
          ldmatrix_x4(bits, rows + code * width + swapped(code, channel + matrix % 2 * 4));
          TwoParts b;
          RENDSEG_UNROLL
          for (int j = 0; j < 4; ++j) {
            c[j] = __uint_as_float(bits[j]);
            split(b, j, c[j]);
          }
          RENDSEG_UNROLL
          for (int n = 0; n < 2; ++n) {
            RENDSEG_UNROLL
            for (int m = 0; m < 2; ++m) multiply(product[table][m][pair * 2 + n], a[m], b, n);
          }
        }
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

// N: each warp has eight columns of it, of half the positions; [2][4]: all 32 rows.
using Counts = float[2][4];

// result += weights [32 codes][32 positions] * (x - r) [32 positions][slice]; with `nearest`, of x - r - c' of the
// nearest code, and counts += weights * (position is nearest to code). Tensor cores cut sums off instead of rounding
// them: those of 16 positions are made from zero and added here.
template <bool kChannelsLast, bool kNearest>
__device__ inline void aggregate_rows(const MmaArgs& args, const float* tile, const float* weights, const float* codes,
                                      const int* nearest, Result& result, Counts& counts) {
  const int width = args.steps * kStep, group = lane_id() / 4, in_group = lane_id() % 4;
  const float* const reference = args.reference + own_step(0) * kStep + group;
  RENDSEG_NO_UNROLL
  for (int position = 0; position < kSub; position += 16) {
    TwoParts a[2][2];  // [8 positions][codes]
    RENDSEG_UNROLL
    for (int k = 0; k < 2; ++k) {
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) load_weights(a[k][m], weights, m * 16, position + k * 8);
    }
    int code[4], at[4];  // nearest to four positions, and the place of c' in the first channel of this thread
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      code[j] = kNearest ? nearest[position + j * 4 + in_group] : 0;
      at[j] = code[j] * width + swapped(code[j], own_step(0) * kStep + group);
    }
    RENDSEG_UNROLL
    for (int i = 0; i < kSteps; ++i) {
      if (own_step(i) >= args.steps) break;
      RENDSEG_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int channel = own_step(i) * kStep + n * 8;
        const float r = __ldg(reference + i * kWarps * kStep + n * 8);
        float x[4];
        features_of_sums<kChannelsLast>(x, tile, width, position, channel);
        TwoParts b;
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          x[j] -= r;
          if constexpr (kNearest) x[j] -= codes[(at[j] ^ (n * 8)) + i * kWarps * kStep];
          split(b, j, x[j]);
        }
        float sum[2][4] = {};
        RENDSEG_UNROLL
        for (int k = 0; k < 2; ++k) {
          RENDSEG_UNROLL
          for (int m = 0; m < 2; ++m) multiply(sum[m], a[k][m], b, k);
        }
        RENDSEG_UNROLL
        for (int m = 0; m < 2; ++m) {
          RENDSEG_UNROLL
          for (int j = 0; j < 4; ++j) result[i][m][n][j] += sum[m][j];
        }
      }
    }
    if (kNearest && warp_id() / 4 == position / 16) {
      float sum[2][4] = {};
      RENDSEG_UNROLL
      for (int k = 0; k < 2; ++k) {
        uint32_t b[2];
        RENDSEG_UNROLL
        for (int j = 0; j < 2; ++j) b[j] = __float_as_uint(code[k * 2 + j] == warp_id() % 4 * 8 + group ? 1.0f : 0.0f);
        RENDSEG_UNROLL
        for (int m = 0; m < 2; ++m) {
          mma_m16n8k8_tf32(sum[m], a[k][m].low, b);
          mma_m16n8k8_tf32(sum[m], a[k][m].high, b);
        }
      }
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) {
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) counts[m][j] += sum[m][j];
      }
    }
  }
}

// sum[m][n] += weights [32 rows][32 codes] * rows [32 codes][width], over the 16 channels from `channel` on.
__device__ inline void multiply_rows(float (&sum)[2][2][4], const float* weights, const float* rows, int width,
                                     int channel) {
  RENDSEG_UNROLL
  for (int code = 0; code < kMmaCodes; code += 8) {
    TwoParts b;
    float values[4];
    const int at = code + lane_id() % 4;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      const int row = at + j % 2 * 4;
      values[j] = rows[row * width + swapped(row, channel + j / 2 * 8 + lane_id() / 4)];
      split(b, j, values[j]);
    }
    RENDSEG_UNROLL
    for (int m = 0; m < 2; ++m) {
      TwoParts a;
      load_weights(a, weights, m * 16, code);
      RENDSEG_UNROLL
      for (int n = 0; n < 2; ++n) multiply(sum[m][n], a, b, n);
    }
  }
}

// Starts copying `count` rows [count][width] from global into shared memory.
__device__ inline void load_rows(float* to, const void* from, int count, int width) {
  for (int i = threadIdx.x; i < count * width / 4; i += kThreads) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    cp_async_16(to + row * width + swapped(row, column), static_cast<const float*>(from) + row * width + column);
  }
}

// --- forward

// Forward, per tile, with the barriers of the block by number: [1] [2] load, contract, exchange [3]; softmax, and the
// code nearest to each position; [4] the distances have been read, weights take their place; [5] the weights are there;
// aggregate.
//
// Shared memory by its offset in bytes, S = 16 * steps channels:
//
//        0   parts      float [8 warps][32 positions][32 codes]; then in their place weights float [2 parts][32][32]
//   32,768   squares    float [8 warps][32 positions]
//   33,792   nearest    int   [32 positions]
//   33,920   constants  float [3][32]
//   34,304   codes      float [32 codes][S]                      c', fours swapped by row
//     then   tiles      float [stages][32][S], or [stages][S][32]
template <bool kChannelsLast, int kStages>
struct WideForwardMap {
  Part<float> parts, squares, codes, tile[kStages];
  Part<int> nearest;
  Part<CodeConstants> constants;
  int64_t bytes;

  RENDSEG_HD explicit WideForwardMap(int steps) {
    Layout<1> layout;
    parts = layout.add<float>(kWarps * kPart);
    squares = layout.add<float>(kWarps * kSub);
    nearest = layout.add<int>(kSub);
    constants = layout.add<CodeConstants>(1);
    codes = layout.add<float>(kMmaCodes * steps * kStep);
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) tile[i] = layout.add<float>(kSub * steps * kStep);
    bytes = layout.bytes();
  }
};

// The code nearest to the position of this thread, the same in the lanes that share it, unless distances are NaN.
__device__ inline int nearest_code(const MmaArgs& args, const Vec<float, 4>& distance) {
  int nearest = softmax_code();
  float least = static_cast<float>(INFINITY);
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    const int code = softmax_code() + j;
    if (code < args.codes && distance[j] < least) {
      least = distance[j];
      nearest = code;
    }
  }
  RENDSEG_UNROLL
  for (int away = 4; away > 0; away /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, least, away);
    const int code = __shfl_xor_sync(kAllLanes, nearest, away);
    if (other < least || (other == least && code < nearest)) {
      least = other;
      nearest = code;
    }
  }
  return nearest;
}

// result += sum_j N_kj (c_j - c_k): a product with the codewords, once -sum_j N_kj stands on the diagonal of N.
__device__ inline void add_differences(const MmaArgs& args, const Counts& counts, float* scratch, float* weights,
                                       const float* codes, Result& result) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  for (int half = 0; half < 2; ++half) {  // of the positions
    if (warp_id() / 4 == half) {
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) {
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int row = m * 16 + j / 2 * 8 + group, column = warp_id() % 4 * 8 + 2 * in_group + j % 2;
          float& to = scratch[row * kMmaCodes + column];
          to = half == 0 ? counts[m][j] : to + counts[m][j];
        }
      }
    }
    __syncthreads();
  }
  const int row = static_cast<int>(threadIdx.x) / 8, column = static_cast<int>(threadIdx.x) % 8 * 4;
  Vec<float, 4> values = load_vec<4>(scratch + row * kMmaCodes + column);
  float total = 0.0f;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (column + j == row) values[j] = 0.0f;
    total += values[j];
  }
  total = over_position(total, sum_of);
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    if (column + j == row) values[j] = -total;
  }
  put_weight_parts(weights, row, column, values);
  __syncthreads();
  RENDSEG_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    if (own_step(i) >= args.steps) break;
    multiply_rows(result[i], weights, codes, args.steps * kStep, own_step(i) * kStep);
  }
}

template <bool kChannelsLast, int kStages>
__global__ void __launch_bounds__(kThreads, 1) encode_tf32_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const WideForwardMap<kChannelsLast, kStages> map(args.steps);
  float* const parts = map.parts.in(memory);
  float* const weights = parts;
  float* const squares = map.squares.in(memory);
  float* const codes = map.codes.in(memory);
  int* const nearest_of = map.nearest.in(memory);
  CodeConstants* const constants = map.constants.in(memory);
  const ChunkWalk<float, kSub, kChannelsLast, kStages> walk(args, map.tile, memory);

  load_rows(codes, args.code_rows, kMmaCodes, args.steps * kStep);
  walk.load_first();
  cp_async_commit();
  if (threadIdx.x < kMmaCodes) copy_constants(*args.constants, *constants);

  Result result = {};
  Counts counts = {};
  for (int t = 0; t < walk.tiles; ++t) {
    walk.arrive(t);  // 1, 2
    const float* const tile = walk.tile(t);
    Vec<float, 4> products;
    {
      float product[1][2][4][4] = {}, square[2][2] = {};
      contract_rows<kChannelsLast, 1>(args, tile, codes, product, square);
      put_squares(squares, square);
      products = exchange<1>(parts, product[0]);  // 3
    }
    const Softmax softmax = softmax_of(args, *constants, products, squares);
    const int nearest = nearest_code(args, softmax.distance), own = softmax_position();
    __syncthreads();  // 4: the distances have been read, weights take their place
    const bool exists = own < walk.count(t);
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      put_weight_parts(weights, softmax_code() + j, own, exists ? softmax.assigned[j] : 0.0f);
    }
    if (lane_id() % 8 == 0) nearest_of[own] = nearest;
    __syncthreads();  // 5: the weights are there
    aggregate_rows<kChannelsLast, true>(args, tile, weights, codes, nearest_of, result, counts);
  }
  __syncthreads();
  add_differences(args, counts, parts, parts + kGrid, codes, result);

  float* const out = args.sum_residual + walk.chunk * args.channels * args.padded;
  for_each_result(
      args, result, [](int, int) { return 0.0f; },
      [&](int k, int d, float sum, float) { out[d * args.padded + k] = sum; });
  // A codeword that is not finite took no part; its residuals are not finite either, at any weight.
  if (!__any_sync(kAllLanes, !is_finite(constants->constant[lane_id()]))) return;  // the same in all warps
  __syncthreads();
  for (int i = threadIdx.x; i < args.codes * args.channels; i += kThreads) {
    const int k = static_cast<int>(i % args.codes), d = static_cast<int>(i / args.codes);
    if (!is_finite(constants->constant[k])) out[d * args.padded + k] += 0.0f * read<float>(args.codewords, 0, k, d);
  }
}

// --- backward
//
// As in encode_mma.cuh. Distances and products with the gradient g of the result are made together; dA is
// (x - c).g = x'.g - c'.g. The gradient of x replaces the tile:
//   sum_k A_k g_k - W_k c'_k + (x - r) sum_k W_k.

// Per tile: [1] [2] load, contract with both tables, exchange [3]: distances, softmax; [4] they have been read;
// exchange [5]: dA, dL; [6] the products have been read, weights take their place; [7] the weights are there;
// aggregate, replace the slice of each warp, store it.
//
// Shared memory by its offset in bytes, S = 16 * steps channels:
//
//        0   parts       float [8 warps][32 positions][32 codes]; then in their place, each float [2 parts][32][32]:
//            assigned    A [position][code]; 8,192 negative: -W [position][code]; 16,384 logits: dL [code][position]
//   32,768   squares     float [8 warps][32 positions]
//   33,792   weight_sum  float [32 positions]
//   33,920   grad_dot    float [32]
//   34,048   totals      float [32]
//   34,176   constants   float [3][32]
//   34,560   rows        float [c'; g][32 codes][S]
//     then   tiles       float [stages][32][S], or [stages][S][32]
template <bool kChannelsLast, int kStages>
struct WideBackwardMap {
  Part<float> parts, assigned, negative, logits, squares, weight_sum, grad_dot, totals, rows, tile[kStages];
  Part<CodeConstants> constants;
  int64_t bytes;

  RENDSEG_HD explicit WideBackwardMap(int steps) {
    Layout<1> layout, over_parts;
    parts = layout.add<float>(kWarps * kPart);
    assigned = over_parts.add<float>(2 * kGrid);
    negative = over_parts.add<float>(2 * kGrid);
    logits = over_parts.add<float>(2 * kGrid);
    squares = layout.add<float>(kWarps * kSub);
    weight_sum = layout.add<float>(kSub);
    grad_dot = layout.add<float>(kMmaCodes);
    totals = layout.add<float>(kMmaCodes);
    constants = layout.add<CodeConstants>(1);
    rows = layout.add<float>(2 * kMmaCodes * steps * kStep);
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) tile[i] = layout.add<float>(kSub * steps * kStep);
    bytes = layout.bytes();
  }
};

// tile = gradient of x, for the slice of this warp.
template <bool kChannelsLast>
__device__ inline void replace_by_wide_gradient(const MmaArgs& args, const float* assigned, const float* negative,
                                                const float* rows, const float* weight_sum, float* tile) {
  using Tile = TileOf<float, kSub, kChannelsLast>;
  const int width = args.steps * kStep, group = lane_id() / 4, in_group = lane_id() % 4;
  RENDSEG_NO_UNROLL
  for (int step = warp_id(); step < args.steps; step += kWarps) {
    float sum[2][2][4] = {};
    multiply_rows(sum, assigned, rows + kMmaCodes * width, width, step * kStep);
    multiply_rows(sum, negative, rows, width, step * kStep);
    RENDSEG_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int channel = step * kStep + n * 8 + 2 * in_group;
      const float r[2] = {__ldg(args.reference + channel), __ldg(args.reference + channel + 1)};
      RENDSEG_UNROLL
      for (int m = 0; m < 2; ++m) {
        RENDSEG_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int position = m * 16 + j / 2 * 8 + group;
          float& x = tile[Tile::at(args.steps, position, channel + j % 2)];
          x = fmaf(x - r[j % 2], weight_sum[position], sum[m][n][j]);
        }
      }
    }
  }
}

template <bool kChannelsLast, int kStages>
__global__ void __launch_bounds__(kThreads, 1) encode_tf32_backward_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const WideBackwardMap<kChannelsLast, kStages> map(args.steps);
  float* const parts = map.parts.in(memory);
  float* const assigned_weights = map.assigned.in(memory);
  float* const negative_weights = map.negative.in(memory);
  float* const logit_weights = map.logits.in(memory);
  float* const squares = map.squares.in(memory);
  float* const weight_sums = map.weight_sum.in(memory);
  float* const grad_dot = map.grad_dot.in(memory);
  float* const totals = map.totals.in(memory);
  float* const rows = map.rows.in(memory);
  CodeConstants* const constants = map.constants.in(memory);
  const ChunkWalk<float, kSub, kChannelsLast, kStages> walk(args, map.tile, memory);
  const int width = args.steps * kStep;

  load_rows(rows, args.code_rows, kMmaCodes, width);
  load_rows(rows + kMmaCodes * width, static_cast<const float*>(args.grad_rows) + walk.image * kMmaCodes * width,
            kMmaCodes, width);
  walk.load_first();
  cp_async_commit();
  if (threadIdx.x < kMmaCodes) {
    copy_constants(*args.constants, *constants);
    grad_dot[threadIdx.x] = args.grad_dot[walk.image * kMmaCodes + threadIdx.x];
  }

  const int code = softmax_code(), own = softmax_position();
  Result result = {};  // sum of dL * (x - r)
  Vec<float, 4> assigned_sum{}, logit_sum{}, scale_sum{};
  for (int t = 0; t < walk.tiles; ++t) {
    walk.arrive(t);  // 1, 2
    float* const tile = walk.tile(t);
    const int count = walk.count(t);

    float product[2][2][4][4] = {};
    {
      float square[2][2] = {};
      contract_rows<kChannelsLast, 2>(args, tile, rows, product, square);
      put_squares(squares, square);
    }
    const Vec<float, 4> products = exchange<1>(parts, product[0]);  // 3
    const Softmax softmax = softmax_of(args, *constants, products, squares);
    __syncthreads();                                            // 4: the distances have been read
    Vec<float, 4> logit_grad = exchange<1>(parts, product[1]);  // 5
    Vec<float, 4> assigned, negative;
    float dot = 0.0f, weight_sum = 0.0f;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      logit_grad[j] -= grad_dot[code + j];
      dot = fmaf(softmax.assigned[j], logit_grad[j], dot);
    }
    dot = over_position(dot, sum_of);
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) {
      const bool exists = own < count && code + j < args.codes;
      assigned[j] = exists ? softmax.assigned[j] : 0.0f;
      logit_grad[j] = exists ? softmax.assigned[j] * (logit_grad[j] - dot) : 0.0f;
      negative[j] = -2.0f * constants->scale[code + j] * logit_grad[j];
      weight_sum -= negative[j];
      assigned_sum[j] += assigned[j];
      logit_sum[j] += logit_grad[j];
      scale_sum[j] += exists ? logit_grad[j] * softmax.distance[j] : 0.0f;
    }
    weight_sum = over_position(weight_sum, sum_of);
    __syncthreads();  // 6: the products have been read, weights take their place
    put_weight_parts(assigned_weights, own, code, assigned);
    put_weight_parts(negative_weights, own, code, negative);
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) put_weight_parts(logit_weights, code + j, own, logit_grad[j]);
    if (lane_id() % 8 == 0) weight_sums[own] = weight_sum;
    __syncthreads();  // 7: the weights are there
    Counts unused;
    aggregate_rows<kChannelsLast, false>(args, tile, logit_weights, nullptr, nullptr, result, unused);
    __syncwarp();
    replace_by_wide_gradient<kChannelsLast>(args, assigned_weights, negative_weights, rows, weight_sums, tile);
    __syncwarp();
    store_slice<float, kChannelsLast>(args, walk.image, walk.first(t), count, tile);
  }

  put_totals(args, assigned_sum, parts, totals, args.sum_assigned + walk.chunk * args.padded);
  put_totals(args, scale_sum, parts, totals, args.sum_scale + walk.chunk * args.padded);
  put_totals(args, logit_sum, parts, totals, nullptr);
  float* const out = args.sum_residual + walk.chunk * args.channels * args.padded;
  for_each_result(
      args, result, [&](int k, int d) { return rows[k * width + swapped(k, d)]; },
      [&](int k, int d, float sum, float c) { out[d * args.padded + k] = fmaf(-c, totals[k], sum); });
}

}  // namespace rendseg::encoding
