// encode of 16-bit features on tensor cores: forward. The division of the work is drawn in encode_mma.cuh.
//
// Per tile, with the barriers of the block by number:
//
//   [1] load       the next tile sets out; the tile before has been used by all
//   [2]            this tile is there
//       contract   products of 32 positions with the codewords, over the slice of each warp
//       exchange   [3] the parts of all warps are there; sums, distances, softmax
//       weights    assignments times 4096, in two 16-bit parts
//   [4]            the weights of all positions are there; the parts are free
//       aggregate  into the result in registers. Then the next 32 positions, if the tile has 64
//
// No barrier is needed before the next contract(): it writes `squares` and `parts`, which were last read before [4];
// `weights` are written after the next [3], which no warp passes that still aggregates.
//
// Shared memory by its offset in bytes, S = 16 * steps channels:
//
//        0   parts      float [8 warps][32 positions][32 codes]
//   32,768   squares    float [8 warps][32 positions]
//   33,792   weights    X     [2 parts][32 positions][40]        rows of 80 bytes
//   38,912   totals     float [32]
//   39,040   constants  float [3][32]                            factor, constant, scale of each code
//   39,424   tiles      X     [stages][32 or 64][S + 8], or [stages][S][32 or 64, + 8]
//     then   reference  float [S]                                the mean codeword
#pragma once

#include "encode_mma.cuh"

namespace rendseg::encoding {

template <typename X, int kTile, bool kChannelsLast, int kStages>
struct ForwardMap {
  Part<float> parts, squares, totals, reference;
  Part<X> weights, tile[kStages];
  Part<CodeConstants> constants;
  int64_t bytes;

  // Tables of a fixed size first: their places are constants and take no registers.
  RENDSEG_HD explicit ForwardMap(int steps) {
    Layout<1> layout;
    parts = layout.add<float>(kWarps * kPart);
    squares = layout.add<float>(kWarps * kSub);
    weights = layout.add<X>(2 * kSub * kWeightPitch);
    totals = layout.add<float>(kMmaCodes);
    constants = layout.add<CodeConstants>(1);
    RENDSEG_UNROLL
    for (int i = 0; i < kStages; ++i) tile[i] = layout.add<X>(TileOf<X, kTile, kChannelsLast>::values(steps));
    reference = layout.add<float>(steps * kStep);
    bytes = layout.bytes();
  }
};

template <typename X, int kTile, bool kChannelsLast, int kStages>
__global__ void __launch_bounds__(kThreads, 1) encode_mma_kernel(MmaArgs args) {
  RENDSEG_DYNAMIC_SHARED(memory);
  const ForwardMap<X, kTile, kChannelsLast, kStages> map(args.steps);
  float* const parts = map.parts.in(memory);
  float* const squares = map.squares.in(memory);
  float* const totals = map.totals.in(memory);
  float* const reference = map.reference.in(memory);
  X* const own_weights = map.weights.in(memory);
  CodeConstants* const constants = map.constants.in(memory);
  const ChunkWalk<X, kTile, kChannelsLast, kStages> walk(args, map.tile, memory);

  walk.load_first();
  cp_async_commit();
  for (int d = threadIdx.x; d < args.steps * kStep; d += kThreads) reference[d] = args.reference[d];
  if (threadIdx.x < kMmaCodes) copy_constants(*args.constants, *constants);
  Codewords<2> codewords;
  load_codewords<2>(args, codewords);

  Result result = {};
  Vec<float, 4> assigned_sum{};
  for (int t = 0; t < walk.tiles; ++t) {
    walk.arrive(t);  // 1, 2
    const X* const tile = walk.tile(t);
    const int count = walk.count(t);
    for (int position = 0; position < count; position += kSub) {
      float product[2][4][4] = {}, square[2][2] = {};
      contract_slice<X, kTile, kChannelsLast, 2>(args, tile, reference, position, codewords, nullptr, 0, product,
                                                 square);
      put_squares(squares, square);
      const Vec<float, 4> products = exchange<1>(parts, product);  // 3
      const Softmax softmax = softmax_of(args, *constants, products, squares);
      const bool exists = position + softmax_position() < count;
      Vec<float, 4> weights;
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) weights[j] = exists ? softmax.assigned[j] * kWeightScale : 0.0f;
      const Vec<float, 4> seen = put_weights(own_weights, softmax_position(), softmax_code(), weights);
      RENDSEG_UNROLL
      for (int j = 0; j < 4; ++j) assigned_sum[j] += seen[j];
      __syncthreads();  // 4: the weights of all positions are there, and the parts have been read
      aggregate_slice<X, kTile, kChannelsLast>(args, tile, own_weights, position, result);
    }
  }
  put_totals(args, assigned_sum, parts, totals, nullptr);
  float* const out = args.sum_residual + walk.chunk * args.channels * args.padded;
  with_dtype(args.codewords.dtype, [&]<typename C>() {
    for_each_result(
        args, result, [&](int k, int d) { return static_cast<float>(widen(*address<C>(args.codewords, 0, k, d))); },
        [&](int k, int d, float sum, float c) {
          out[d * args.padded + k] = (sum - c * totals[k]) * (1.0f / kWeightScale);
        });
  });
}

}  // namespace rendseg::encoding
