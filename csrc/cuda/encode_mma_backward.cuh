// encode of 16-bit features on tensor cores: backward. The division of the work is drawn in encode_mma.cuh.
//
// With g the gradient of the result, dA = (x - c).g, dL = A (dA - sum A dA) and W = 2 s dL, the gradient
//   of x              is sum_k A_k g_k + W_k (x - c_k) = sum_k A_k g_k - W_k c'_k + (x - r) sum_k W_k,
//   of the codewords  is -(sum_m A g + 2 s sum_m dL (x - c)),
//   of the scale      is sum_m dL ||x - c||^2.
// A second product over the slice gives x.g; one with the 64 rows [g; c'] gives the gradient of x, which replaces the
// tile in shared memory (a warp is the only one to touch its slice) and leaves from there.
//
// Per tile of 32 positions, with the barriers of the block by number:
//
//   [1] [2] load   as in forward
//       contract   products with the codewords;  exchange [3]: distances, softmax
//       contract   products with g;  [4] the distances have been read;  exchange [5]: dA, dL
//   [6]            only where weights take the place of the parts: these have been read
//       weights    A and -W in 16 bits with one power of two for each position, and their sums
//   [7]            the largest dL of every warp is known: one power of two for the sums over positions
//       weights    dL in two 16-bit parts
//   [8]            all weights are there
//       aggregate  dL x, added to the sums in registers
//       replace    the slice of each warp by its gradient, and store it; no barrier, its own warp reads it alone
//
// An exchange in two rounds has two more barriers: [3'] and [5'], between the rounds.
//
// Shared memory, offset in bytes with one round (two rounds), S = 16 * steps channels:
//
//        0            parts          float [8 warps][32 positions][32 codes]; two rounds: [8][16][32], and then in
//                                    their place logit_weights and weights
//   32,768 (16,384)   squares        float [8 warps][32 positions]
//   33,792            logit_weights  X     [2 parts][32 positions][40]                 dL
//   38,912            weights        X     [A, -W; bfloat16: and the rest of A][32][40]
//     then            totals, tops, grad_unscale, grad_dot   float [32], [8], [32], [32]
//                     factors        float [2][32]             constants  float [3][32]
//                     tiles          X     [stages][32][S + 8], or [stages][S][40]
//                     grad_rows      X     [2 parts][32 codes][S + 8]     code_rows  X [32][S + 8]
//                     reference      float [S]
//
// At 512 channels, at most: two tiles and one round on sm_90 (231,456 bytes), one tile and two rounds on sm_80
// (161,312).
#pragma once

#include "encode_mma.cuh"

namespace rendseg::encoding {

// --- products of a warp

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

// --- the kernel

template <typename X, bool kChannelsLast, int kStages, int kRounds>
struct BackwardMap {
  Part<float> parts, squares, reference, totals, tops, grad_unscale, grad_dot;
  Part<X> tile[kStages], grad_rows, code_rows, logit_weights, weights;
  Part<PositionFactors> factors;
  Part<CodeConstants> constants;
  int64_t bytes;

  // Tables of a fixed size first: their places are constants and take no registers.
  RENDSEG_HD explicit BackwardMap(int steps) {
    constexpr int64_t kArrays = kSplitGradient<X> ? 3 : 2, kWeights = kSub * kWeightPitch;
    static_assert((2 + kArrays) * kWeights * 2 <= kWarps * kPart / 2 * 4, "weights take the place of the parts");
    Layout<1> layout, over_parts;
    parts = layout.add<float>(kWarps * kPart / kRounds);
    squares = layout.add<float>(kWarps * kSub);
    Layout<1>& of_weights = kRounds == 2 ? over_parts : layout;
    logit_weights = of_weights.add<X>(2 * kWeights);
    weights = of_weights.add<X>(kArrays * kWeights);
    totals = layout.add<float>(kMmaCodes);
    tops = layout.add<float>(kWarps);
    grad_unscale = layout.add<float>(kMmaCodes);
    grad_dot = layout.add<float>(kMmaCodes);
    factors = layout.add<PositionFactors>(1);
    constants = layout.add<CodeConstants>(1);
    const int64_t pitch = steps * kStep + 8;
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) tile[i] = layout.add<X>(TileOf<X, kSub, kChannelsLast>::values(steps));
    grad_rows = layout.add<X>(2 * kMmaCodes * pitch);
    code_rows = layout.add<X>(kMmaCodes * pitch);
    reference = layout.add<float>(steps * kStep);
    bytes = layout.bytes();
  }
};

// Starts copying the rows of the gradient of an image (two parts) and of the codewords into shared memory.
template <typename X>
__device__ inline void load_backward_rows(const MmaArgs& args, int64_t image, int pitch, X* to_grad, X* to_code) {
  const int channels = args.steps * kStep;
  const X* const grad_rows = static_cast<const X*>(args.grad_rows) + image * 2 * kMmaCodes * channels;
  const X* const code_rows = static_cast<const X*>(args.code_rows);
  for (int i = threadIdx.x; i < 3 * kMmaCodes * channels / 8; i += kThreads) {
    const int row = i / (channels / 8), d = i % (channels / 8) * 8, code_row = row - 2 * kMmaCodes;
    if (code_row < 0) {
      cp_async_16(to_grad + row * pitch + d, grad_rows + row * channels + d);
    } else {
      cp_async_16(to_code + code_row * pitch + d, code_rows + code_row * channels + d);
    }
  }
}

// Of four codes of one position: dL, the weights of g and c' in the gradient of x, not yet scaled, and sum_k W_k.
struct PositionGradient {
  Vec<float, 4> logit, assigned, weight;
  float weight_sum, largest_logit, largest_weight;
};

// From dA times the scale of the gradient, where the position and the code exist. Adds A and dL ||x - c||^2 to sums.
__device__ inline PositionGradient position_gradient(const MmaArgs& args, const Softmax& softmax,
                                                     const Vec<float, 4>& products, bool inside, const float* unscale,
                                                     const float* grad_dot, const CodeConstants& constants,
                                                     Vec<float, 4>& assigned_sum, Vec<float, 4>& scale_sum) {
  const int code = softmax_code();
  Vec<float, 4> assigned_grad;
  float dot = 0.0f;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    assigned_grad[j] = fmaf(products[j], unscale[code + j], -grad_dot[code + j]);
    dot = fmaf(softmax.assigned[j], assigned_grad[j], dot);
  }
  dot = over_position(dot, sum_of);
  PositionGradient result;
  result.weight_sum = result.largest_logit = result.largest_weight = 0.0f;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    const bool exists = inside && code + j < args.codes;
    const float assigned = exists ? softmax.assigned[j] : 0.0f;
    const float gradient = exists ? softmax.assigned[j] * (assigned_grad[j] - dot) : 0.0f;
    const float weight = 2.0f * constants.scale[code + j] * gradient;
    result.logit[j] = gradient;
    result.largest_logit = fmaxf(result.largest_logit, fabsf(gradient));
    assigned_sum[j] += assigned;
    scale_sum[j] += exists ? gradient * softmax.distance[j] : 0.0f;
    result.weight_sum += weight;
    result.assigned[j] = assigned * unscale[code + j];
    result.weight[j] = weight * constants.factor[code + j] * 0.5f;  // the factor is -2 / the power of the codeword
    result.largest_weight = fmaxf(result.largest_weight, fmaxf(fabsf(result.assigned[j]), fabsf(result.weight[j])));
  }
  result.weight_sum = over_position(result.weight_sum, sum_of);
  return result;
}

// A, -W and the rest of A, scaled by a power of two of the position, into weights [3][position][code].
template <typename X>
__device__ inline void put_position_weights(X* weights, PositionFactors& factors, const PositionGradient& gradient,
                                            float scale) {
  const int own = softmax_position();
  Vec<X, 4> a_high, a_low, w_high;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) {
    a_high[j] = narrow<X>(gradient.assigned[j] * scale);
    a_low[j] = narrow<X>(gradient.assigned[j] * scale - widen(a_high[j]));
    w_high[j] = narrow<X>(gradient.weight[j] * scale);
  }
  X* const to = weights + own * kWeightPitch + softmax_code();
  store_vec(to, a_high);
  store_vec(to + kSub * kWeightPitch, w_high);
  if constexpr (kSplitGradient<X>) store_vec(to + 2 * kSub * kWeightPitch, a_low);
  if (lane_id() % 8 == 0) {
    factors.unscale[own] = 1.0f / scale;
    factors.weight_sum[own] = gradient.weight_sum;
  }
}

// The gradients of the logits share one power of two over all positions; it shrinks when larger ones come, and what was
// summed before with it. tops[kWarps] hold the largest of each warp.
__device__ inline void shrink_power(float& power, const float* tops, float largest, Result& result,
                                    Vec<float, 4>& logit_sum) {
  RENDSEG_UNROLL
  for (int i = 0; i < kWarps; ++i) largest = fmaxf(largest, tops[i]);
  const float fitting = largest > 0.0f ? power_for(largest) * 256.0f : power;
  if (!(fitting < power)) return;
  const float change = power < static_cast<float>(INFINITY) ? fitting / power : 1.0f;
  power = fitting;
  RENDSEG_UNROLL
  for (int i = 0; i < kSteps * 16; ++i) result[i / 16][i / 8 % 2][i / 4 % 2][i % 4] *= change;
  RENDSEG_UNROLL
  for (int j = 0; j < 4; ++j) logit_sum[j] *= change;
}

template <typename X, bool kChannelsLast, int kStages, int kRounds>
__global__ void __launch_bounds__(kThreads, 1) encode_mma_backward_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const BackwardMap<X, kChannelsLast, kStages, kRounds> map(args.steps);
  float* const parts = map.parts.in(memory);
  float* const squares = map.squares.in(memory);
  float* const totals = map.totals.in(memory);
  float* const tops = map.tops.in(memory);
  float* const grad_unscale = map.grad_unscale.in(memory);
  float* const grad_dot = map.grad_dot.in(memory);
  float* const reference = map.reference.in(memory);
  X* const grad_rows = map.grad_rows.in(memory);
  X* const code_rows = map.code_rows.in(memory);
  X* const logit_weights = map.logit_weights.in(memory);
  X* const weights = map.weights.in(memory);
  PositionFactors* const factors = map.factors.in(memory);
  CodeConstants* const constants = map.constants.in(memory);
  const ChunkWalk<X, kSub, kChannelsLast, kStages> walk(args, map.tile, memory);
  const int channels = args.steps * kStep, pitch = channels + 8;

  walk.load_first();
  load_backward_rows(args, walk.image, pitch, grad_rows, code_rows);
  cp_async_commit();
  for (int d = threadIdx.x; d < channels; d += kThreads) reference[d] = args.reference[d];
  if (threadIdx.x < kMmaCodes) {
    const int64_t of_image = walk.image * kMmaCodes + threadIdx.x;
    copy_constants(*args.constants, *constants);
    grad_unscale[threadIdx.x] = 1.0f / args.grad_power[of_image];
    grad_dot[threadIdx.x] = args.grad_dot[of_image];
  }
  Codewords<1> codewords;
  load_codewords<1>(args, codewords);

  const int code = softmax_code(), own = softmax_position();
  Result result = {};  // sum of dL * x, times `power`
  float power = static_cast<float>(INFINITY);
  Vec<float, 4> assigned_sum{}, logit_sum{}, scale_sum{};
  for (int t = 0; t < walk.tiles; ++t) {
    walk.arrive(t);  // 1, 2
    X* const tile = walk.tile(t);
    const int count = walk.count(t);

    Vec<float, 4> products;
    {
      float product[2][4][4] = {}, square[2][2] = {};
      contract_slice<X, kSub, kChannelsLast, 1>(args, tile, reference, 0, codewords, code_rows, pitch, product, square);
      put_squares(squares, square);
      products = exchange<kRounds>(parts, product);  // 3
    }
    const Softmax softmax = softmax_of(args, *constants, products, squares);
    {
      float product[2][4][4] = {};
      contract_gradient<X, kChannelsLast>(args, tile, grad_rows, pitch, product);
      __syncthreads();                               // 4: the distances have been read
      products = exchange<kRounds>(parts, product);  // 5
    }
    const PositionGradient gradient = position_gradient(args, softmax, products, own < count, grad_unscale, grad_dot,
                                                        *constants, assigned_sum, scale_sum);
    const float scale = power_for(over_position(gradient.largest_weight, larger_of));
    if constexpr (kRounds == 2) __syncthreads();  // 6: the products have been read
    put_position_weights(weights, *factors, gradient, scale);

    const float largest = warp_max(gradient.largest_logit);
    if (lane_id() == 0) tops[warp_id()] = largest;
    __syncthreads();  // 7: the largest of every warp is there
    shrink_power(power, tops, largest, result, logit_sum);
    Vec<float, 4> logit_grad;
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) logit_grad[j] = gradient.logit[j] == 0.0f ? 0.0f : gradient.logit[j] * power;
    const Vec<float, 4> seen = put_weights(logit_weights, own, code, logit_grad);
    RENDSEG_UNROLL
    for (int j = 0; j < 4; ++j) logit_sum[j] += seen[j];
    __syncthreads();  // 8: all weights are there
    aggregate_slice<X, kSub, kChannelsLast>(args, tile, logit_weights, 0, result);
    __syncwarp();
    replace_by_gradient<X, kChannelsLast>(args, tile, weights, grad_rows, code_rows, pitch, reference, *factors);
    __syncwarp();
    store_slice<X, kChannelsLast>(args, walk.image, walk.first(t), count, tile);
  }

  const float unscale = power < static_cast<float>(INFINITY) ? 1.0f / power : 0.0f;
  put_totals(args, assigned_sum, parts, totals, args.sum_assigned + walk.chunk * args.padded);
  put_totals(args, scale_sum, parts, totals, args.sum_scale + walk.chunk * args.padded);
  put_totals(args, logit_sum, parts, totals, nullptr);
  float* const out = args.sum_residual + walk.chunk * args.channels * args.padded;
  for_each_result(
      args, result, [&](int k, int d) { return __ldg(args.packed_codewords + d * args.padded + k); },
      [&](int k, int d, float sum, float c) { out[d * args.padded + k] = (sum - c * totals[k]) * unscale; });
}

}  // namespace rendseg::encoding
