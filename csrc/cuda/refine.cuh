// CUDA kernels of refine: one step of the inference loop of PointRend (Kirillov et al. 2020), section 3.1, with a stock
// point head, in one kernel: gather at the selected cells, the MLP on tensor cores, scatter.
//
// A block takes 32, 64, 80 or 128 points and keeps their activations in shared memory, one row per point:
//
//   [ coarse logits, padded | fine features of layer 0, later the hidden activations, in place | 16 bytes of pad ]
//
// The coarse logits stay where they are, so joining them to a layer is a matter of where the layer begins to read, and
// every order of concatenation is a matter of how its weights are packed. Rows are an odd multiple of 16 bytes apart,
// hence free of bank conflicts for ldmatrix and for 16-byte stores. A row is cut into slices of 32 bytes, 16 half or 8
// tf32 columns: what one step along the inner dimension of a product reads. All of that is the same for H = half_t,
// bfloat16_t and float, which stands for tf32.
//
// All eight warps read the whole block of activations; each multiplies it by its share of the layer's outputs, up to
// four tiles of eight, so that every weight is fetched from L2 once per block, in the order in which lanes use it.
#pragma once

#include "device.cuh"
#include "mma.cuh"
#include "upsample.cuh"

#include "../math/bilinear.h"
#include "../strided.h"

#if defined(__CUDACC__)
#define RENDSEG_GRID_CONSTANT __grid_constant__  // indexed where it lies, never copied
#else
#define RENDSEG_GRID_CONSTANT
#endif

namespace rendseg {

constexpr int kRefineMaps = 8;    // fine feature maps
constexpr int kRefineLayers = 8;  // linear layers
constexpr int kRefineWarps = 8;   // of a block
constexpr int kRefineThreads = kRefineWarps * kWarp;
constexpr int kRefineWarpTiles = 4;  // tiles of eight outputs that a warp sums at a time
constexpr int kRefineTiles = kRefineWarps * kRefineWarpTiles;
constexpr int kRefineHidden = 8 * kRefineTiles;  // widest hidden layer: written over the layer's own input, so at once
constexpr int kSliceBytes = 32, kChunkBytes = 16;

// Columns [column, column + count) of the rows are the inputs [source, source + count) of a layer as its weights have
// them; every other column is zero.
struct RefineSegment {
  int32_t column, count, source;
};

struct RefineLayer {
  const void* weight;  // [out, inputs], in H
  const void* bias;    // [out], in H
  int32_t inputs, out;
  int32_t column;  // of the rows, where it begins to read
  int32_t slices;  // that it reads
  int32_t tiles;   // of eight outputs
  int32_t segment, segments;
  int64_t word, bias_word;  // where its packed weights and biases begin
};

// A head as the kernels take it. The packed weights are words of 8 bytes, [slice][tile][lane]: the second operand of a
// product. Biases are floats, zero beyond the last output.
struct RefineHead {
  RefineLayer layers[kRefineLayers];
  RefineSegment segments[kRefineMaps + 1 + 2 * kRefineLayers];
  int32_t layer_count;
  int32_t row_bytes;
  int32_t hidden_column;                 // where the fine features and the hidden activations begin
  int32_t map_columns[kRefineMaps + 1];  // where the channels of each map go, the coarse one first, and the columns
  int32_t map_chunks[kRefineMaps + 1];   // that it fills, in chunks of 16 bytes
  int64_t words, bias_words;
  uint2* packed;
  float* biases;
};

// A map[N,channels,height,width] to gather from.
struct RefineMap : MapView {
  bool vectors = false;  // channels are adjacent, and 16 bytes of a row come from aligned vectors of them
};

// Where the values go: logits[N,C,H,W], or labels[N,H,W].
struct RefineTarget {
  void* data;
  Dtype dtype;          // of the logits, also where labels are written
  int32_t label_bytes;  // 0: logits
  int64_t stride_n, stride_c, stride_cell;
  const int64_t* class_index = nullptr;  // [N]: of every image, only this class is written, as its only channel

  __device__ int64_t class_of(int64_t n, int64_t classes) const {
    const int64_t chosen = class_index[n];
    RENDSEG_DEVICE_ASSERT(chosen >= 0 && chosen < classes, "class_index must lie in [0, C)");
    return chosen;
  }
};

// Masks of boxes: mask n reads the features of image_index[n], one of `images`, inside boxes[n], (x0, y0, x1, y1).
struct RefineBoxes {
  const int64_t* image_index;  // [N], null: mask n reads image n
  const float* boxes;          // [N,4]
  int64_t images;

  __device__ int64_t image_of(int64_t n) const {
    const int64_t image = image_index[n];
    RENDSEG_DEVICE_ASSERT(image >= 0 && image < images, "image_index must lie in [0, B)");
    return image;
  }
  __device__ float place_x(int64_t n, float x) const { return boxes[4 * n] + x * (boxes[4 * n + 2] - boxes[4 * n]); }
  __device__ float place_y(int64_t n, float y) const {
    return boxes[4 * n + 1] + y * (boxes[4 * n + 3] - boxes[4 * n + 1]);
  }
};

struct RefineStep {
  RefineMap maps[kRefineMaps + 1];  // the coarse logits, then the fine features
  int32_t map_count;
  bool border;
  // Not 0: the coarse logits are the cells themselves of the map that maps[0] is upsampled to by this factor.
  int64_t scale;
  bool align_corners;
  const int64_t* indices;  // [images, count], null: every cell in order
  int64_t images, count, height, width;
  RefineBoxes boxes;
  RefineTarget target;
};

// --- planning on the host

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Lays out rows and packed weights for a head of `layers` layers, whose weights[l] are [outs[l], ...]. False where the
// fused kernel does not take the head. Pointers are left to the caller.
inline bool plan_refine(RefineHead& head, int64_t element_bytes, int64_t classes, const int64_t* channels, int64_t maps,
                        const int64_t* outs, int64_t layers, bool coarse_each_layer, bool coarse_first) {
  if (maps > kRefineMaps || layers > kRefineLayers) return false;
  const int64_t slice = kSliceBytes / element_bytes, chunk = kChunkBytes / element_bytes;
  int64_t fine = 0, widest = classes;
  for (int64_t m = 0; m < maps; ++m) {
    fine += channels[m];
    widest = channels[m] > widest ? channels[m] : widest;
  }
  if (widest > (int64_t{1} << 20)) return false;  // far beyond any shared memory; all below fits 32 bits
  for (int64_t l = 0; l + 1 < layers; ++l) {
    if (outs[l] > kRefineHidden) return false;
  }
  head = RefineHead{};
  head.layer_count = static_cast<int32_t>(layers);
  int32_t segments = 0;
  const auto add_segment = [&](int64_t column, int64_t count, int64_t source) {
    head.segments[segments++] = {static_cast<int32_t>(column), static_cast<int32_t>(count),
                                 static_cast<int32_t>(source)};
  };
  // Layer 0 reads every map.
  const int64_t hidden_column = round_up(classes, slice);
  head.hidden_column = static_cast<int32_t>(hidden_column);
  head.map_chunks[0] = static_cast<int32_t>(hidden_column / chunk);
  add_segment(0, classes, coarse_first ? 0 : fine);
  int64_t column = hidden_column, source = coarse_first ? classes : 0;
  for (int64_t m = 0; m < maps; ++m) {
    const int64_t end = round_up(column + channels[m], m + 1 < maps ? chunk : slice);
    head.map_columns[m + 1] = static_cast<int32_t>(column);
    head.map_chunks[m + 1] = static_cast<int32_t>((end - column) / chunk);
    add_segment(column, channels[m], source);
    source += channels[m];
    column = end;
  }
  int64_t columns = column, inputs = classes + fine, reads = column, begin = 0;
  for (int64_t l = 0; l < layers; ++l) {
    RefineLayer& layer = head.layers[l];
    const bool last = l + 1 == layers;
    const int64_t tiles = last ? (outs[l] + 7) / 8 : round_up(outs[l], slice) / 8;
    const int64_t slices = reads / slice;
    layer.inputs = static_cast<int32_t>(inputs);
    layer.out = static_cast<int32_t>(outs[l]);
    layer.column = static_cast<int32_t>(begin);
    layer.slices = static_cast<int32_t>(slices);
    layer.tiles = static_cast<int32_t>(tiles);
    if (l > 0) {
      layer.segment = segments;
      if (coarse_each_layer) add_segment(0, classes, coarse_first ? 0 : outs[l - 1]);
      add_segment(hidden_column, outs[l - 1], coarse_each_layer && coarse_first ? classes : 0);
    }
    layer.segments = segments - layer.segment;
    layer.word = head.words;
    layer.bias_word = head.bias_words;
    head.words += slices * tiles * kWarp;
    head.bias_words += tiles * 8;
    if (last) break;
    inputs = outs[l] + (coarse_each_layer ? classes : 0);
    begin = coarse_each_layer ? 0 : hidden_column;
    reads = hidden_column + tiles * 8 - begin;
    columns = hidden_column + tiles * 8 > columns ? hidden_column + tiles * 8 : columns;
  }
  head.row_bytes = static_cast<int32_t>(columns * element_bytes + kChunkBytes);
  return true;
}

// A point of the block at one map: the cell at its upper left and the weights of the four cells around it. At an
// upsampled map: the nearest source cell, the weights of the near and the far one along y, then along x, and which way
// the far ones are.
struct alignas(16) RefineTaps {
  float weight[4];
  int64_t offset;   // of the cell, in elements; may lie outside the map
  uint32_t inside;  // bit t: cell (row t / 2, column t % 2) lies on the map
  int16_t down, right;
};

inline int64_t refine_shared_bytes(const RefineHead& head, int64_t maps, int64_t points) {
  return points * (head.row_bytes + maps * static_cast<int64_t>(sizeof(RefineTaps)) + 16);
}

constexpr int kRefineBlocks[] = {32, 64, 80, 128};  // points to a block

// What all weights cost on their way from L2 to one block, in points that the block could have multiplied meanwhile:
// with 5.5 TB/s for 132 processors and two thirds of the tensor cores' peak, which mma.sync reaches, 90 to 113 for half
// and for tf32 heads of any shape. Blocks of 64 thus wait for weights, blocks of 128 for products.
constexpr int64_t kRefineWeightPoints = 96;

// The time of a step with blocks of `size` points: that of all weights from L2, or that of the products of the busiest
// processor, whichever is longer. In points to a processor, times the number of processors.
inline int64_t refine_cost(int64_t points, int64_t size, int64_t processors) {
  const int64_t blocks = (points + size - 1) / size;
  const int64_t weights = kRefineWeightPoints * blocks, products = size * round_up(blocks, processors);
  return weights > products ? weights : products;
}

// Points per block, the smallest of several that cost the same: its points are gathered by more processors. 0: the head
// does not fit.
inline int refine_points_per_block(const RefineHead& head, int64_t maps, int64_t points, int processors,
                                   int64_t shared_limit) {
  int best = 0;
  for (const int size : kRefineBlocks) {
    if (refine_shared_bytes(head, maps, size) > shared_limit) break;
    if (best == 0 || refine_cost(points, size, processors) < refine_cost(points, best, processors)) best = size;
  }
  return best;
}

// --- packing the weights

__device__ inline uint32_t operand_bits(float x) { return to_tf32(x); }
__device__ inline uint32_t operand_bits(half_t x) {
#if defined(__CUDACC__)
  return __half_as_ushort(x);
#else
  return x.bits;
#endif
}
__device__ inline uint32_t operand_bits(bfloat16_t x) {
#if defined(__CUDACC__)
  return __bfloat16_as_ushort(x);
#else
  return x.bits;
#endif
}

// The weight from column `column` of the rows to output `out`, as an operand of a product.
template <typename H>
__device__ uint32_t packed_weight(const RefineHead& head, const RefineLayer& layer, int out, int column) {
  if (out >= layer.out) return 0;
  for (int s = layer.segment; s < layer.segment + layer.segments; ++s) {
    const RefineSegment& segment = head.segments[s];
    const int i = column - segment.column;
    if (i >= 0 && i < segment.count) {
      const int64_t at = static_cast<int64_t>(out) * layer.inputs + segment.source + i;
      return operand_bits(static_cast<const H*>(layer.weight)[at]);
    }
  }
  return 0;
}

// One register of the second operand: of slice `slice` of the layer, rows `half` * 8 (tf32: 4) and on.
template <typename H>
__device__ uint32_t packed_operand(const RefineHead& head, const RefineLayer& layer, int tile, int slice, int half,
                                   int lane) {
  const int out = tile * 8 + lane / 4, in_group = lane % 4;
  if constexpr (sizeof(H) == 4) {
    return packed_weight<H>(head, layer, out, layer.column + slice * 8 + half * 4 + in_group);
  } else {
    const int column = layer.column + slice * 16 + half * 8 + 2 * in_group;
    return packed_weight<H>(head, layer, out, column) | packed_weight<H>(head, layer, out, column + 1) << 16;
  }
}

// Writes the packed words and biases of all layers.
template <typename H>
__global__ void __launch_bounds__(256) pack_head_kernel(const RENDSEG_GRID_CONSTANT RefineHead head) {
  for (int64_t i = global_thread(); i < head.words; i += global_threads()) {
    int l = 0;
    while (l + 1 < head.layer_count && i >= head.layers[l + 1].word) ++l;
    const RefineLayer& layer = head.layers[l];
    const int lane = static_cast<int>((i - layer.word) % kWarp), at = static_cast<int>((i - layer.word) / kWarp);
    const int slice = at / layer.tiles, tile = at % layer.tiles;
    head.packed[i] = make_uint2(packed_operand<H>(head, layer, tile, slice, 0, lane),
                                packed_operand<H>(head, layer, tile, slice, 1, lane));
  }
  for (int64_t i = global_thread(); i < head.bias_words; i += global_threads()) {
    int l = 0;
    while (l + 1 < head.layer_count && i >= head.layers[l + 1].bias_word) ++l;
    const RefineLayer& layer = head.layers[l];
    const int64_t out = i - layer.bias_word;
    head.biases[i] = out < layer.out ? widen(static_cast<const H*>(layer.bias)[out]) : 0.0f;
  }
}

// --- gathering

// Centre of cell i of `size` along one axis, as uncertain_points gives it.
__device__ inline float cell_centre(int64_t i, int64_t size) {
  return (static_cast<float>(i) + 0.5f) / static_cast<float>(size);
}

// Columns of a row for one chunk of sums, rounded as point_sample stores them (S) and then as the head takes them (H).
template <typename H, typename S, int kWidth>
__device__ inline uint4 round_chunk(const float (&sum)[kWidth]) {
  float stored[kWidth];
  RENDSEG_UNROLL
  for (int j = 0; j < kWidth; ++j) stored[j] = widen(narrow<S>(sum[j]));
  if constexpr (sizeof(H) == 4) {
    return make_uint4(to_tf32(stored[0]), to_tf32(stored[1]), to_tf32(stored[2]), to_tf32(stored[3]));
  } else {
    return make_uint4(pack_half2<H>(stored[0], stored[1]), pack_half2<H>(stored[2], stored[3]),
                      pack_half2<H>(stored[4], stored[5]), pack_half2<H>(stored[6], stored[7]));
  }
}

// The channels of one chunk at the four cells around a point, adjacent and aligned in memory.
template <typename H, typename S>
struct GatheredChunk {
  static constexpr int kWidth = kChunkBytes / static_cast<int>(sizeof(H));
  static constexpr int kPart = kWidth < kVecWidth<S> ? kWidth : kVecWidth<S>, kParts = kWidth / kPart;
  Vec<S, kPart> cells[4][kParts];

  __device__ void load(const RefineMap& map, const RefineTaps& taps, int channel) {
    const bool some = channel < static_cast<int>(map.channels);
    const S* from = static_cast<const S*>(map.data) + taps.offset + channel;
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      const S* cell = from + (t / 2 ? map.stride_y : 0) + (t % 2 ? map.stride_x : 0);
      RENDSEG_UNROLL
      for (int part = 0; part < kParts; ++part) {
        cells[t][part] = some && (taps.inside >> t & 1) ? load_vec<kPart>(cell + part * kPart) : Vec<S, kPart>{};
      }
    }
  }

  __device__ uint4 interpolate(const RefineTaps& taps) const {
    float sum[kWidth];
    RENDSEG_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      sum[j] = widen(cells[0][j / kPart][j % kPart]) * taps.weight[0];
      RENDSEG_UNROLL
      for (int t = 1; t < 4; ++t) sum[j] = fmaf(widen(cells[t][j / kPart][j % kPart]), taps.weight[t], sum[j]);
    }
    return round_chunk<H, S>(sum);
  }
};

// Fills the columns of one map: `rows` points at its first column. Two chunks at a time keep eight loads in flight.
template <typename H, typename S, int kPoints>
__device__ void gather_vectors(const RefineMap& map, int chunks, const RefineTaps* taps /*[kPoints]*/,
                               unsigned char* rows, int row_bytes) {
  constexpr int kWidth = GatheredChunk<H, S>::kWidth;
  const int items = chunks * kPoints;  // neighbouring threads take neighbouring chunks of a point
  for (int i = static_cast<int>(threadIdx.x); i < items; i += 2 * kRefineThreads) {
    const int point = i / chunks, chunk = i - point * chunks;
    const int other = min(i + kRefineThreads, items - 1);
    const int other_point = other / chunks, other_chunk = other - other_point * chunks;
    GatheredChunk<H, S> one, two;
    one.load(map, taps[point], chunk * kWidth);
    two.load(map, taps[other_point], other_chunk * kWidth);
    *reinterpret_cast<uint4*>(rows + point * row_bytes + chunk * kChunkBytes) = one.interpolate(taps[point]);
    if (i + kRefineThreads < items) {
      *reinterpret_cast<uint4*>(rows + other_point * row_bytes + other_chunk * kChunkBytes) =
          two.interpolate(taps[other_point]);
    }
  }
}

// The same from a map of any strides, value by value. Neighbouring threads take neighbouring points, which ascend and
// so often share cache lines, or neighbouring channels where those are adjacent.
template <typename H, typename S, int kPoints>
__device__ void gather_values(const RefineMap& map, int chunks, const RefineTaps* taps /*[kPoints]*/,
                              unsigned char* rows, int row_bytes) {
  constexpr int kWidth = kChunkBytes / static_cast<int>(sizeof(H));
  const int items = chunks * kPoints;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kRefineThreads) {
    const bool adjacent = map.stride_c == 1;
    const int point = adjacent ? i / chunks : i % kPoints, chunk = adjacent ? i % chunks : i / kPoints;
    const RefineTaps at = taps[point];
    const S* from = static_cast<const S*>(map.data) + at.offset + chunk * kWidth * map.stride_c;
    float sum[kWidth];
    RENDSEG_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      const bool some = chunk * kWidth + j < static_cast<int>(map.channels);
      float value[4];
      RENDSEG_UNROLL
      for (int t = 0; t < 4; ++t) {
        const S* cell = from + j * map.stride_c + (t / 2 ? map.stride_y : 0) + (t % 2 ? map.stride_x : 0);
        value[t] = some && (at.inside >> t & 1) ? widen(*cell) : 0.0f;
      }
      sum[j] = value[0] * at.weight[0];
      RENDSEG_UNROLL
      for (int t = 1; t < 4; ++t) sum[j] = fmaf(value[t], at.weight[t], sum[j]);
    }
    *reinterpret_cast<uint4*>(rows + point * row_bytes + chunk * kChunkBytes) = round_chunk<H, S>(sum);
  }
}

// The same for cells of the map that `map` is upsampled to, as subdivide stores them. They are made here: the upsampled
// map is not there in steps that recompute every cell or give labels, and where it is, other blocks may have replaced
// values in it by now.
template <typename H, typename S, int kPoints>
__device__ void gather_upsampled(const RefineMap& map, bool quarters, int chunks, const RefineTaps* taps /*[kPoints]*/,
                                 unsigned char* rows, int row_bytes) {
  constexpr int kWidth = kChunkBytes / static_cast<int>(sizeof(H));
  const int items = chunks * kPoints;
  for (int i = static_cast<int>(threadIdx.x); i < items; i += kRefineThreads) {
    const bool adjacent = map.stride_c == 1;
    const int point = adjacent ? i / chunks : i % kPoints, chunk = adjacent ? i % chunks : i / kPoints;
    const RefineTaps at = taps[point];
    const S* near = static_cast<const S*>(map.data) + at.offset + chunk * kWidth * map.stride_c;
    const S* far = near + at.down * map.stride_y;
    const int64_t aside = at.right * map.stride_x;
    float values[kWidth];
    RENDSEG_UNROLL
    for (int j = 0; j < kWidth; ++j) {
      values[j] = 0.0f;
      if (chunk * kWidth + j < static_cast<int>(map.channels)) {
        const int64_t c = j * map.stride_c;
        const float corner[4] = {widen(near[c]), widen(near[c + aside]), widen(far[c]), widen(far[c + aside])};
        values[j] = subdivision::interpolate(corner, {0, 0, at.weight[0], at.weight[1]},
                                             {0, 0, at.weight[2], at.weight[3]}, quarters);
      }
    }
    *reinterpret_cast<uint4*>(rows + point * row_bytes + chunk * kChunkBytes) = round_chunk<H, S>(values);
  }
}

// f.operator()<S>() with the type of a map. The fused kernel takes no doubles.
template <typename F>
__device__ inline void with_map_type(Dtype dtype, F&& f) {
  if (dtype == Dtype::kFloat) {
    f.template operator()<float>();
  } else if (dtype == Dtype::kHalf) {
    f.template operator()<half_t>();
  } else {
    f.template operator()<bfloat16_t>();
  }
}

// Fills the columns of map m: `rows` points at its first one.
template <typename H, typename S, int kPoints>
__device__ inline void gather_map(const RefineStep& step, int m, int chunks, const RefineTaps* taps,
                                  unsigned char* rows, int row_bytes) {
  if (m == 0 && step.scale != 0) {
    gather_upsampled<H, S, kPoints>(step.maps[0], subdivision::by_gaps(step), chunks, taps, rows, row_bytes);
  } else if (step.maps[m].vectors) {
    gather_vectors<H, S, kPoints>(step.maps[m], chunks, taps, rows, row_bytes);
  } else {
    gather_values<H, S, kPoints>(step.maps[m], chunks, taps, rows, row_bytes);
  }
}

__device__ inline void locate_upsampled(const RefineStep& step, int64_t image, int64_t row, int64_t column,
                                        RefineTaps& point) {
  const RefineMap& map = step.maps[0];
  const auto y = subdivision::neighbours<float>(row, map.height, step.scale, step.align_corners);
  const auto x = subdivision::neighbours<float>(column, map.width, step.scale, step.align_corners);
  point.weight[0] = y.near_weight, point.weight[1] = y.far_weight;
  point.weight[2] = x.near_weight, point.weight[3] = x.far_weight;
  point.offset = image * map.stride_n + y.near * map.stride_y + x.near * map.stride_x;
  point.down = static_cast<int16_t>(y.far - y.near);
  point.right = static_cast<int16_t>(x.far - x.near);
}

// Taps of every point of the block, from the first, at every map, and where its values go. Points past the last one
// repeat it; their values are not written.
template <int kPoints>
__device__ inline void locate_points(const RefineStep& step, int64_t first, RefineTaps* taps /*[maps][kPoints]*/,
                                     int64_t* targets /*[kPoints]*/) {
  const int64_t last = step.images * step.count - 1;
  for (int i = static_cast<int>(threadIdx.x); i < step.map_count * kPoints; i += kRefineThreads) {
    const int64_t at = first + i % kPoints < last ? first + i % kPoints : last;
    const int64_t image = at / step.count;
    const int64_t cell = step.indices != nullptr ? step.indices[at] : at - image * step.count;
    if (i < kPoints) targets[i] = image * step.target.stride_n + cell * step.target.stride_cell;
    const int64_t row = cell / step.width;
    const RefineMap& map = step.maps[i / kPoints];
    RefineTaps& point = taps[i];
    if (i < kPoints && step.scale != 0) {
      locate_upsampled(step, image, row, cell - row * step.width, point);
      continue;
    }
    float at_x = cell_centre(cell - row * step.width, step.width), at_y = cell_centre(row, step.height);
    int64_t from = image;
    if (step.boxes.image_index != nullptr && i >= kPoints) {
      at_x = step.boxes.place_x(image, at_x);
      at_y = step.boxes.place_y(image, at_y);
      from = step.boxes.image_of(image);
    }
    const AxisTaps<float> x = axis_taps(at_x, static_cast<int32_t>(map.width), step.border, false);
    const AxisTaps<float> y = axis_taps(at_y, static_cast<int32_t>(map.height), step.border, false);
    point.weight[0] = x.near * y.near;
    point.weight[1] = x.far * y.near;
    point.weight[2] = x.near * y.far;
    point.weight[3] = x.far * y.far;
    point.offset = from * map.stride_n + y.cell * map.stride_y + x.cell * map.stride_x;
    point.inside = static_cast<uint32_t>((x.has_near & y.has_near) | (x.has_far & y.has_near) << 1 |
                                         (x.has_near & y.has_far) << 2 | (x.has_far & y.has_far) << 3);
  }
}

// --- one layer

__device__ inline void multiply_slice(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], half_t tag) {
  mma_m16n8k16(d, a, b, tag);
}
__device__ inline void multiply_slice(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bfloat16_t tag) {
  mma_m16n8k16(d, a, b, tag);
}
__device__ inline void multiply_slice(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], float) {
  mma_m16n8k8_tf32(d, a, b);
}

// d[m][t] += rows m * 16 and on, times tile t, for kTiles adjacent tiles. `rows` and `words` are those of the lane.
template <typename H, int kRows, int kTiles>
__device__ inline void multiply(float (&d)[kRows][kRefineWarpTiles][4], const unsigned char* rows, int row_bytes,
                                const uint2* words, int slice_words, int slices) {
  constexpr int kAhead = kTiles == 4 ? (kRows > 4 ? 4 : 3) : 12 / kTiles;  // slices whose weights are under way
  uint2 ring[kAhead][kTiles];
  RENDSEG_UNROLL
  for (int s = 0; s < kAhead; ++s) {
    RENDSEG_UNROLL
    for (int t = 0; t < kTiles; ++t) {
      ring[s][t] = s < slices ? __ldg(words + s * slice_words + t * kWarp) : make_uint2(0, 0);
    }
  }
  for (int first = 0; first < slices; first += kAhead) {
    RENDSEG_UNROLL
    for (int s = 0; s < kAhead; ++s) {
      const int slice = first + s;
      if (slice < slices) {
        RENDSEG_UNROLL
        for (int m = 0; m < kRows; ++m) {
          uint32_t a[4];
          ldmatrix_x4(a, rows + m * 16 * row_bytes + slice * kSliceBytes);
          RENDSEG_UNROLL
          for (int t = 0; t < kTiles; ++t) {
            const uint32_t b[2] = {ring[s][t].x, ring[s][t].y};
            multiply_slice(d[m][t], a, b, H{});
          }
        }
        if (slice + kAhead < slices) {
          RENDSEG_UNROLL
          for (int t = 0; t < kTiles; ++t) ring[s][t] = __ldg(words + (slice + kAhead) * slice_words + t * kWarp);
        }
      }
    }
  }
}

// Biases, then the products of up to four tiles, `tiles` of them from `first` on.
template <typename H, int kRows>
__device__ inline void run_tiles(float (&d)[kRows][kRefineWarpTiles][4], const RefineHead& head,
                                 const RefineLayer& layer, const unsigned char* rows, int first, int tiles) {
  const int lane = lane_id();
  const float* biases = head.biases + layer.bias_word + first * 8 + 2 * (lane % 4);
  RENDSEG_UNROLL
  for (int t = 0; t < kRefineWarpTiles; ++t) {
    const Vec<float, 2> bias = t < tiles ? load_vec<2>(biases + t * 8) : Vec<float, 2>{};
    RENDSEG_UNROLL
    for (int m = 0; m < kRows; ++m) d[m][t][0] = d[m][t][2] = bias[0], d[m][t][1] = d[m][t][3] = bias[1];
  }
  const unsigned char* from =
      rows + layer.column * static_cast<int>(sizeof(H)) + lane % 16 * head.row_bytes + lane / 16 * kChunkBytes;
  const uint2* words = head.packed + layer.word + first * kWarp + lane;
  const int slice_words = layer.tiles * kWarp;
  switch (tiles) {
    case 4:
      return multiply<H, kRows, 4>(d, from, head.row_bytes, words, slice_words, layer.slices);
    case 3:
      return multiply<H, kRows, 3>(d, from, head.row_bytes, words, slice_words, layer.slices);
    case 2:
      return multiply<H, kRows, 2>(d, from, head.row_bytes, words, slice_words, layer.slices);
    case 1:
      return multiply<H, kRows, 1>(d, from, head.row_bytes, words, slice_words, layer.slices);
    default:
      return;
  }
}

__device__ inline float relu(float x) { return x < 0.0f ? 0.0f : x; }  // keeps NaN, as torch.relu

template <typename H>
__device__ inline void store_activations(unsigned char* to, float low, float high) {
  if constexpr (sizeof(H) == 4) {
    store_vec(reinterpret_cast<uint32_t*>(to), Vec<uint32_t, 2>{{to_tf32(low), to_tf32(high)}});
  } else {
    *reinterpret_cast<uint32_t*>(to) = pack_half2<H>(low, high);
  }
}

// The hidden activations of the next layer. Columns that pad them are zero, whatever was summed there: infinity times a
// weight of zero is not.
template <typename H, int kRows>
__device__ inline void store_hidden(const float (&d)[kRows][kRefineWarpTiles][4], const RefineHead& head,
                                    const RefineLayer& layer, unsigned char* rows, int first, int tiles) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  RENDSEG_UNROLL
  for (int t = 0; t < kRefineWarpTiles; ++t) {
    if (t >= tiles) continue;
    const int out = (first + t) * 8 + 2 * in_group;
    const bool has_low = out < layer.out, has_high = out + 1 < layer.out;
    unsigned char* to = rows + group * head.row_bytes + (head.hidden_column + out) * static_cast<int>(sizeof(H));
    RENDSEG_UNROLL
    for (int m = 0; m < kRows; ++m) {
      RENDSEG_UNROLL
      for (int half = 0; half < 2; ++half) {
        store_activations<H>(to + (m * 16 + half * 8) * head.row_bytes, has_low ? relu(d[m][t][2 * half]) : 0.0f,
                             has_high ? relu(d[m][t][2 * half + 1]) : 0.0f);
      }
    }
  }
}

// --- answers

// As a map of the dtype stores it.
__device__ inline float round_to(float x, Dtype dtype) {
  if (dtype == Dtype::kHalf) return widen(narrow<half_t>(x));
  if (dtype == Dtype::kBFloat16) return widen(narrow<bfloat16_t>(x));
  return x;
}

__device__ inline void store_rounded(void* data, int64_t at, float x, Dtype dtype) {
  if (dtype == Dtype::kFloat) {
    static_cast<float*>(data)[at] = x;
  } else if (dtype == Dtype::kHalf) {
    static_cast<half_t*>(data)[at] = narrow<half_t>(x);
  } else {
    static_cast<bfloat16_t*>(data)[at] = narrow<bfloat16_t>(x);
  }
}

// Grows with the logit and then with the smallness of the label, so the largest is that of argmax: NaN comes before all
// numbers, the lowest class wins a tie, zeros are equal. Never zero.
__device__ inline unsigned long long label_key(float logit, int label) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 becomes 0
  const uint32_t ordered = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<unsigned long long>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(label));
}
__device__ inline uint32_t label_of(unsigned long long key) { return 0xffffffffu - static_cast<uint32_t>(key); }

// Values to their cells, straight from the registers: eight ascending points of four channels in one store.
template <typename H, int kRows>
__device__ inline void write_logits(const float (&d)[kRows][kRefineWarpTiles][4], const RefineLayer& layer,
                                    const RefineTarget& target, const int64_t* targets /*[kPoints]*/,
                                    const unsigned long long* keys /*[kPoints]: the class of the point*/, int points,
                                    int first, int tiles) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  RENDSEG_UNROLL
  for (int m = 0; m < kRows; ++m) {
    RENDSEG_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int point = m * 16 + half * 8 + group;
      if (point >= points) continue;
      const int64_t cell = targets[point];
      RENDSEG_UNROLL
      for (int t = 0; t < kRefineWarpTiles; ++t) {
        RENDSEG_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = (first + t) * 8 + 2 * in_group + i;
          if (t >= tiles || c >= layer.out) continue;
          if (target.class_index != nullptr && static_cast<unsigned long long>(c) != keys[point]) continue;
          const int64_t at = target.class_index != nullptr ? cell : cell + c * target.stride_c;
          store_rounded(target.data, at, widen(narrow<H>(d[m][t][2 * half + i])), target.dtype);
        }
      }
    }
  }
}

// The best class so far of every point, over the tiles of this warp, into keys[kPoints] in shared memory.
template <typename H, int kRows>
__device__ inline void vote_labels(const float (&d)[kRows][kRefineWarpTiles][4], const RefineLayer& layer, Dtype dtype,
                                   unsigned long long* keys, int first, int tiles) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  RENDSEG_UNROLL
  for (int m = 0; m < kRows; ++m) {
    RENDSEG_UNROLL
    for (int half = 0; half < 2; ++half) {
      unsigned long long best = 0;
      RENDSEG_UNROLL
      for (int t = 0; t < kRefineWarpTiles; ++t) {
        RENDSEG_UNROLL
        for (int i = 0; i < 2; ++i) {
          const int c = (first + t) * 8 + 2 * in_group + i;
          if (t >= tiles || c >= layer.out) continue;
          const float value = round_to(widen(narrow<H>(d[m][t][2 * half + i])), dtype);
          best = max(best, label_key(value, c));
        }
      }
      RENDSEG_UNROLL
      for (int distance = 1; distance < 4; distance *= 2) {
        best = max(best, __shfl_xor_sync(kAllLanes, best, distance));
      }
      if (in_group == 0 && best != 0) atomicMax(keys + m * 16 + half * 8 + group, best);
    }
  }
}

__device__ inline void store_label(const RefineTarget& target, int64_t at, uint32_t label) {
  if (target.label_bytes == 1) {
    static_cast<uint8_t*>(target.data)[at] = static_cast<uint8_t>(label);
  } else {
    static_cast<int16_t*>(target.data)[at] = static_cast<int16_t>(label);
  }
}

// --- the fused step

template <typename H, int kRows>
__global__ void __launch_bounds__(kRefineThreads, kRows > 4 ? 1 : 2)
    refine_points_kernel(const RENDSEG_GRID_CONSTANT RefineHead head, const RENDSEG_GRID_CONSTANT RefineStep step) {
  constexpr int kPoints = 16 * kRows;
  RENDSEG_DYNAMIC_SHARED(memory);
  // What is needed to the end stands at fixed places, which cost no registers.
  int64_t* const targets = reinterpret_cast<int64_t*>(memory);
  unsigned long long* const keys = reinterpret_cast<unsigned long long*>(targets + kPoints);
  unsigned char* const rows = reinterpret_cast<unsigned char*>(keys + kPoints);
  RefineTaps* const taps = reinterpret_cast<RefineTaps*>(rows + kPoints * head.row_bytes);
  const int64_t first_point = static_cast<int64_t>(blockIdx.x) * kPoints;
  const int64_t left = step.images * step.count - first_point;
  const int points = left < kPoints ? static_cast<int>(left) : kPoints;

  locate_points<kPoints>(step, first_point, taps, targets);
  if (threadIdx.x < kPoints) {
    const int point = min(static_cast<int>(threadIdx.x), points - 1);
    keys[threadIdx.x] = step.target.class_index == nullptr
                            ? 0
                            : step.target.class_of((first_point + point) / step.count, step.maps[0].channels);
  }
  __syncthreads();
  for (int m = 0; m < step.map_count; ++m) {
    unsigned char* const to = rows + head.map_columns[m] * static_cast<int>(sizeof(H));
    const RefineTaps* const at = taps + m * kPoints;
    with_map_type(step.maps[m].dtype, [&]<typename S>() {
      gather_map<H, S, kPoints>(step, m, head.map_chunks[m], at, to, head.row_bytes);
    });
  }
  __syncthreads();

  const int warp = warp_id();
  for (int l = 0; l < head.layer_count; ++l) {
    const RefineLayer& layer = head.layers[l];
    const bool last = l + 1 == head.layer_count;
    for (int pass = 0; pass < layer.tiles; pass += kRefineTiles) {  // one, but for the last layer
      const int tiles = min(layer.tiles - pass, kRefineTiles);
      const int first = pass + warp * tiles / kRefineWarps;
      const int mine = pass + (warp + 1) * tiles / kRefineWarps - first;
      float d[kRows][kRefineWarpTiles][4];
      run_tiles<H, kRows>(d, head, layer, rows, first, mine);
      if (!last) {
        __syncthreads();  // all have read what is now replaced
        store_hidden<H, kRows>(d, head, layer, rows, first, mine);
      } else if (step.target.label_bytes == 0) {
        write_logits<H, kRows>(d, layer, step.target, targets, keys, points, first, mine);
      } else {
        vote_labels<H, kRows>(d, layer, step.target.dtype, keys, first, mine);
      }
    }
    __syncthreads();
  }
  const int thread = static_cast<int>(threadIdx.x);
  if (step.target.label_bytes != 0 && thread < points) {
    store_label(step.target, targets[thread], label_of(keys[thread]));
  }
}

// --- the two ends of a step whose middle runs through ATen

// coords[images, count, 2]: centres of the cells from `first` on.
__global__ void __launch_bounds__(256)
    cell_centres_kernel(float* coords, int64_t images, int64_t count, int64_t first, int64_t height, int64_t width) {
  for (int64_t i = global_thread(); i < images * count; i += global_threads()) {
    const int64_t cell = first + i % count, row = cell / width;
    store_vec(coords + 2 * i, Vec<float, 2>{{cell_centre(cell - row * width, width), cell_centre(row, height)}});
  }
}

// values[images, channels, count] of some points of each image: their cells are indices[image * index_stride + p], or
// `first` + p where `indices` is null.
struct RefineValues {
  void* data;
  int64_t images, channels, count;
  const int64_t* indices;
  int64_t index_stride, first;
};

__device__ inline int64_t cell_of(const RefineValues& values, int64_t image, int64_t p) {
  return values.indices != nullptr ? values.indices[image * values.index_stride + p] : values.first + p;
}

// The map that `source` is upsampled to by `scale`.
struct UpsampledMap {
  MapView source;
  int64_t scale;
  bool align_corners;
};

// values = the cells of the upsampled map. See gather_upsampled().
template <typename S>
__global__ void __launch_bounds__(256) read_upsampled_kernel(UpsampledMap map, RefineValues values) {
  using A = Acc<S>;
  const int64_t of_image = values.channels * values.count, width = map.source.width * map.scale;
  const bool quarters = subdivision::by_gaps(map);
  for (int64_t i = global_thread(); i < values.images * of_image; i += global_threads()) {
    const int64_t image = i / of_image, c = i % of_image / values.count;
    const int64_t cell = cell_of(values, image, i % values.count), row = cell / width;
    const auto y = subdivision::neighbours<A>(row, map.source.height, map.scale, map.align_corners);
    const auto x = subdivision::neighbours<A>(cell - row * width, map.source.width, map.scale, map.align_corners);
    const S* const near = map.source.at<const S>(image, c, y.near);
    const S* const far = map.source.at<const S>(image, c, y.far);
    const int64_t left = x.near * map.source.stride_x, right = x.far * map.source.stride_x;
    const A corner[4] = {widen(near[left]), widen(near[right]), widen(far[left]), widen(far[right])};
    static_cast<S*>(values.data)[i] = narrow<S>(subdivision::interpolate(corner, y, x, quarters));
  }
}

// values = the features of masks from `first` on at coords[images, count, 2] of their boxes.
template <typename S>
__global__ void __launch_bounds__(256) sample_boxes_kernel(MapView map, RefineBoxes boxes, int64_t first,
                                                           const float* coords, bool border, RefineValues values) {
  using A = Acc<S>;
  const int64_t of_image = values.channels * values.count;
  for (int64_t i = global_thread(); i < values.images * of_image; i += global_threads()) {
    const int64_t image = i / of_image, c = i % of_image / values.count, n = first + image;
    const float* const at = coords + 2 * (image * values.count + i % values.count);
    const auto x = axis_taps<A>(boxes.place_x(n, at[0]), static_cast<int32_t>(map.width), border, false);
    const auto y = axis_taps<A>(boxes.place_y(n, at[1]), static_cast<int32_t>(map.height), border, false);
    const S* const from = map.at<const S>(boxes.image_of(n), c);
    A sum = 0;
    RENDSEG_UNROLL
    for (int t = 0; t < 4; ++t) {
      if ((t % 2 ? x.has_far : x.has_near) == 0 || (t / 2 ? y.has_far : y.has_near) == 0) continue;
      const S value = from[(y.cell + t / 2) * map.stride_y + (x.cell + t % 2) * map.stride_x];
      sum += widen(value) * ((t % 2 ? x.far : x.near) * (t / 2 ? y.far : y.near));
    }
    static_cast<S*>(values.data)[i] = narrow<S>(sum);
  }
}

template <typename V>
__global__ void __launch_bounds__(256) write_values_kernel(RefineValues values, RefineTarget target) {
  const int64_t of_image = values.channels * values.count;
  for (int64_t i = global_thread(); i < values.images * of_image; i += global_threads()) {
    const int64_t image = i / of_image, c = i % of_image / values.count, p = i % values.count;
    const bool alone = target.class_index != nullptr;
    if (alone && c != target.class_of(image, values.channels)) continue;
    const int64_t at =
        image * target.stride_n + (alone ? 0 : c * target.stride_c) + cell_of(values, image, p) * target.stride_cell;
    const V value = static_cast<const V*>(values.data)[i];
    if constexpr (std::is_same_v<V, double>) {
      static_cast<double*>(target.data)[at] = value;
    } else {
      store_rounded(target.data, at, widen(value), target.dtype);
    }
  }
}

template <typename V>
__global__ void __launch_bounds__(256) write_labels_kernel(RefineValues values, RefineTarget target) {
  using A = Acc<V>;
  for (int64_t i = global_thread(); i < values.images * values.count; i += global_threads()) {
    const int64_t image = i / values.count, p = i % values.count;
    const V* from = static_cast<const V*>(values.data) + image * values.channels * values.count + p;
    uint32_t label = 0;
    A best{};
    for (int64_t c = 0; c < values.channels; ++c) {
      A value = widen(from[c * values.count]);
      if constexpr (!std::is_same_v<V, double>) value = round_to(value, target.dtype);
      // The lowest class wins a tie, the first NaN wins over all.
      if (c == 0 || (best == best && !(value <= best))) best = value, label = static_cast<uint32_t>(c);
    }
    store_label(target, image * target.stride_n + cell_of(values, image, p) * target.stride_cell, label);
  }
}

// --- launches

template <typename H, typename Launch>
void run_pack_head(Launch& launch, const RefineHead& head) {
  launch({blocks_for(head.words), 256}, pack_head_kernel<H>, head);
}

template <typename H, int kRows, typename Launch>
void run_refine_rows(Launch& launch, const RefineHead& head, const RefineStep& step) {
  const int64_t points = step.images * step.count, shared = refine_shared_bytes(head, step.map_count, 16 * kRows);
  launch({(points + 16 * kRows - 1) / (16 * kRows), kRefineThreads, shared}, refine_points_kernel<H, kRows>, head,
         step);
}

// Needs refine_points_per_block(...) > 0.
template <typename H, typename Launch>
void run_refine_points(Launch& launch, const RefineHead& head, const RefineStep& step) {
  switch (refine_points_per_block(head, step.map_count, step.images * step.count, launch.processors(),
                                  launch.shared_limit())) {
    case 128:
      return run_refine_rows<H, 8>(launch, head, step);
    case 80:
      return run_refine_rows<H, 5>(launch, head, step);
    case 64:
      return run_refine_rows<H, 4>(launch, head, step);
    default:
      return run_refine_rows<H, 2>(launch, head, step);
  }
}

template <typename Launch>
void run_cell_centres(Launch& launch, float* coords, int64_t images, int64_t count, int64_t first, int64_t height,
                      int64_t width) {
  launch({blocks_for(images * count), 256}, cell_centres_kernel, coords, images, count, first, height, width);
}

template <typename S, typename Launch>
void run_read_upsampled(Launch& launch, const UpsampledMap& map, const RefineValues& values) {
  launch({blocks_for(values.images * values.channels * values.count), 256}, read_upsampled_kernel<S>, map, values);
}

template <typename S, typename Launch>
void run_sample_boxes(Launch& launch, const MapView& map, const RefineBoxes& boxes, int64_t first, const float* coords,
                      bool border, const RefineValues& values) {
  launch({blocks_for(values.images * values.channels * values.count), 256}, sample_boxes_kernel<S>, map, boxes, first,
         coords, border, values);
}

template <typename V, typename Launch>
void run_write_values(Launch& launch, const RefineValues& values, const RefineTarget& target) {
  if (target.label_bytes != 0) {
    launch({blocks_for(values.images * values.count), 256}, write_labels_kernel<V>, values, target);
  } else {
    launch({blocks_for(values.images * values.channels * values.count), 256}, write_values_kernel<V>, values, target);
  }
}

}  // namespace rendseg
