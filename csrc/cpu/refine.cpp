// _refine_mlp on the CPU: the whole inference loop of PointRend (Kirillov et al. 2020), section 3.1, with a stock point
// head, in one call. Blocks of points are gathered, sent through every layer and scattered while they are in cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../refine_common.h"
#include "huge_pages.h"
#include "isa.h"
#include "point_sample.h"
#include "refine_args.h"
#include "select.h"
#include "subdivide.h"

#define RENDSEG_ISA 0
#include "isa_begin.h"
// The order of these matters.
#include "refine_simd.h"

#include "refine_kernels.h"

#include "isa_end.h"

namespace rendseg {

#if defined(__x86_64__)
namespace avx2 {
void mlp_layer(const MlpLayer& layer, bool wide, const void* x, int64_t x_stride, int64_t points, void* y,
               int64_t y_stride);
void round_values(float* values, int64_t count, c10::ScalarType dtype);
int64_t mlp_panel_bytes();
}  // namespace avx2
namespace avx512 {
void mlp_layer(const MlpLayer& layer, bool wide, const void* x, int64_t x_stride, int64_t points, void* y,
               int64_t y_stride);
void round_values(float* values, int64_t count, c10::ScalarType dtype);
int64_t mlp_panel_bytes();
}  // namespace avx512
#else
namespace avx2 = baseline;
namespace avx512 = baseline;
#endif

namespace {

// The head, packed for the instruction set in force. A is float or double.
template <typename A>
struct PackedHead {
  std::vector<at::Tensor> storage;
  std::vector<MlpLayer> layers;

  PackedHead(at::TensorList weights, at::TensorList biases) {
    const int64_t panel = pick(&baseline::mlp_panel_bytes, &avx2::mlp_panel_bytes, &avx512::mlp_panel_bytes)() /
                          static_cast<int64_t>(sizeof(A));
    const at::ScalarType dtype = sizeof(A) == 8 ? at::kDouble : at::kFloat;
    for (size_t l = 0; l < weights.size(); ++l) {
      const at::Tensor weight = weights[l].detach().to(dtype).contiguous(),
                       bias = biases[l].detach().to(dtype).contiguous();
      const int64_t out = weight.size(0), in = weight.size(1), panels = (out + panel - 1) / panel;
      at::Tensor packed = at::empty({panels, in, panel}, weight.options());
      at::Tensor padded = at::zeros({panels * panel}, weight.options());
      const A* from = weight.template const_data_ptr<A>();
      A* to = packed.template mutable_data_ptr<A>();
      std::copy_n(bias.template const_data_ptr<A>(), out, padded.template mutable_data_ptr<A>());
      at::parallel_for(0, panels, std::max<int64_t>(1, 32768 / (in * panel)), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) {
          A* block = to + b * in * panel;
          for (int64_t j = 0; j < panel; ++j) {
            const int64_t o = b * panel + j;
            for (int64_t i = 0; i < in; ++i) block[i * panel + j] = o < out ? from[o * in + i] : A(0);
          }
        }
      });
      layers.push_back({packed.const_data_ptr(), padded.const_data_ptr(), in, out, l + 1 < weights.size(),
                        weights[l].scalar_type()});
      storage.push_back(std::move(packed));
      storage.push_back(std::move(padded));
    }
  }
};

// Where the points of one step go: logits[N,C,H,W] or labels[N,H,W].
struct Target {
  void* data;
  at::ScalarType dtype;   // of the logits, also when labels are written
  at::ScalarType labels;  // Undefined for logits
  int64_t stride_n, stride_c, stride_cell;
};

template <typename T, typename A>
void write_points(const Target& target, int64_t image, const int64_t* cells, int64_t points, const A* values,
                  int64_t stride, int64_t classes) {
  if (target.labels == at::ScalarType::Undefined) {
    T* out = static_cast<T*>(target.data) + image * target.stride_n;
    for (int64_t c = 0; c < classes; ++c) {
      for (int64_t p = 0; p < points; ++p) {
        out[c * target.stride_c + cells[p] * target.stride_cell] = static_cast<T>(values[p * stride + c]);
      }
    }
    return;
  }
  for (int64_t p = 0; p < points; ++p) {  // the lowest class wins a tie, the first NaN wins over all
    const A* row = values + p * stride;
    int64_t label = 0;
    A best = static_cast<A>(static_cast<T>(row[0]));
    for (int64_t c = 1; c < classes && best == best; ++c) {
      const A value = static_cast<A>(static_cast<T>(row[c]));
      if (value > best || value != value) best = value, label = c;
    }
    const int64_t at = image * target.stride_n + cells[p];
    if (target.labels == at::kByte) {
      static_cast<uint8_t*>(target.data)[at] = static_cast<uint8_t>(label);
    } else {
      static_cast<int16_t*>(target.data)[at] = static_cast<int16_t>(label);
    }
  }
}

template <typename A>
void write_values(const Target& target, int64_t image, const int64_t* cells, int64_t points, const A* values,
                  int64_t stride, int64_t classes) {
  switch (target.dtype) {
    case at::kFloat:
      return write_points<float>(target, image, cells, points, values, stride, classes);
    case at::kDouble:
      return write_points<double>(target, image, cells, points, values, stride, classes);
    case at::kHalf:
      return write_points<c10::Half>(target, image, cells, points, values, stride, classes);
    default:
      return write_points<c10::BFloat16>(target, image, cells, points, values, stride, classes);
  }
}

// rows[p * row_stride + c] = planes[c * plane_stride + p]
template <typename T, typename A>
void transpose_into(const T* planes, int64_t plane_stride, int64_t channels, int64_t points, A* rows,
                    int64_t row_stride) {
  constexpr int64_t kGroup = 16;  // one cache line of a row
  for (int64_t c0 = 0; c0 < channels; c0 += kGroup) {
    const int64_t c1 = std::min(c0 + kGroup, channels);
    for (int64_t p = 0; p < points; ++p) {
      for (int64_t c = c0; c < c1; ++c) rows[p * row_stride + c] = static_cast<A>(planes[c * plane_stride + p]);
    }
  }
}

// A map to gather from. Where channels are apart, a plane is best read once for all points, so the points are sampled
// ahead, `values[N,C,P]`; where they are adjacent, each block of points reads the map itself.
struct Gatherable {
  at::Tensor map, values;
  int64_t channels() const { return map.size(1); }
};

template <typename A>
void gather_block(const Gatherable& from, int64_t image, int64_t first, const float* xy, int64_t points, bool border,
                  A* rows, int64_t row_stride) {
  if (!from.values.defined()) {
    gather_rows_cpu(map_view(from.map).image(image), xy, points, border, false, rows,
                    sizeof(A) == 8 ? Dtype::kDouble : Dtype::kFloat, row_stride);
    return;
  }
  const int64_t channels = from.channels(), stride = from.values.size(2), at = image * channels * stride + first;
  switch (from.values.scalar_type()) {
    case at::kFloat:
      return transpose_into(from.values.const_data_ptr<float>() + at, stride, channels, points, rows, row_stride);
    case at::kDouble:
      return transpose_into(from.values.const_data_ptr<double>() + at, stride, channels, points, rows, row_stride);
    case at::kHalf:
      return transpose_into(from.values.const_data_ptr<at::Half>() + at, stride, channels, points, rows, row_stride);
    default:
      return transpose_into(from.values.const_data_ptr<at::BFloat16>() + at, stride, channels, points, rows,
                            row_stride);
  }
}

// One step of some images: gather, head and scatter of `count` points each, in blocks.
template <typename A>
void refine_points_kernel(const PackedHead<A>& head, const std::vector<Gatherable>& features, const Gatherable& source,
                          const int64_t* indices /*[N,count], null: every cell*/, int64_t count, int64_t height,
                          int64_t width, const RefineOptions& o, const Target& target) {
  const int64_t images = source.map.size(0), classes = source.map.size(1);
  const int64_t blocks = (count + kMlpPoints - 1) / kMlpPoints;
  const at::ScalarType dtype = head.layers[0].rounding;
  int64_t widest = 0;
  for (const MlpLayer& layer : head.layers) widest = std::max({widest, layer.in, layer.out});
  int64_t stride = (widest + 15) / 16 * 16;
  if (stride * sizeof(A) % 1024 == 0) stride += 16;  // rows of equal cache sets would evict each other
  const auto layer_kernel = pick(&baseline::mlp_layer, &avx2::mlp_layer, &avx512::mlp_layer);
  const auto round = pick(&baseline::round_values, &avx2::round_values, &avx512::round_values);
  const auto gather = [&](const Gatherable& from, int64_t image, int64_t first, const float* xy, int64_t points,
                          A* rows, int64_t row_stride) {
    gather_block<A>(from, image, first, xy, points, o.border, rows, row_stride);
    if constexpr (sizeof(A) == 4) {  // as stored by point_sample, then as the head takes it
      for (const at::ScalarType half : {from.map.scalar_type(), dtype}) {
        if (half != at::kHalf && half != at::kBFloat16) continue;
        for (int64_t p = 0; p < points; ++p) round(rows + p * row_stride, from.channels(), half);
      }
    }
  };
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> memory(new A[kMlpPoints * (2 * stride + classes) + 64 / sizeof(A)]());
    A* buffers[2];
    buffers[0] = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) & ~uintptr_t{63});
    buffers[1] = buffers[0] + kMlpPoints * stride;
    A* coarse = buffers[1] + kMlpPoints * stride;
    std::array<float, 2 * kMlpPoints> xy;
    std::array<int64_t, kMlpPoints> cells;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * kMlpPoints;
      const int64_t points = std::min(kMlpPoints, count - first);
      if (indices != nullptr) {
        std::copy_n(indices + image * count + first, points, cells.begin());
      } else {
        std::iota(cells.begin(), cells.begin() + points, first);
      }
      cell_centres(cells.data(), points, height, width, xy.data());
      gather(source, image, first, xy.data(), points, coarse, classes);
      // Rows are [hidden | coarse] or [coarse | hidden].
      const auto add_coarse = [&](A* rows, int64_t hidden) {
        A* to = rows + (o.coarse_first ? 0 : hidden);
        for (int64_t p = 0; p < points; ++p) std::copy_n(coarse + p * classes, classes, to + p * stride);
      };
      int64_t offset = o.coarse_first ? classes : 0;
      for (const Gatherable& feature : features) {
        gather(feature, image, first, xy.data(), points, buffers[0] + offset, stride);
        offset += feature.channels();
      }
      add_coarse(buffers[0], head.layers[0].in - classes);
      const int64_t padded = (points + 11) / 12 * 12;  // whole blocks of rows; what lies beyond the points is ignored
      int side = 0;
      for (size_t l = 0; l < head.layers.size(); ++l) {
        const MlpLayer& layer = head.layers[l];
        const bool joined = l + 1 < head.layers.size() && o.coarse_each_layer;
        A* out = buffers[1 - side] + (joined && o.coarse_first ? classes : 0);
        layer_kernel(layer, sizeof(A) == 8, buffers[side], stride, padded, out, stride);
        side = 1 - side;
        if (joined) add_coarse(buffers[side], layer.out);
      }
      write_values<A>(target, image, cells.data(), points, buffers[side], stride, classes);
    }
  });
}

// Every image of one step. Images go in groups, so that what is sampled ahead stays small.
template <typename A>
void refine_points(const PackedHead<A>& head, at::TensorList features, const at::Tensor& source,
                   const at::Tensor& indices, const at::Tensor& coords, int64_t count, int64_t height, int64_t width,
                   const RefineOptions& o, const Target& target) {
  constexpr int64_t kAheadBytes = int64_t{32} << 20;
  const int64_t images = source.size(0), bytes = count * head.layers[0].in * static_cast<int64_t>(sizeof(A));
  const int64_t group = std::clamp<int64_t>(kAheadBytes / bytes, 1, images);
  const int64_t cell_bytes =
      target.labels == at::ScalarType::Undefined ? c10::elementSize(target.dtype) : c10::elementSize(target.labels);
  for (int64_t first = 0; first < images; first += group) {
    const int64_t size = std::min(group, images - first);
    const auto prepare = [&](const at::Tensor& map) {
      Gatherable from{map.narrow(0, first, size), {}};
      if (coords.defined() && map.stride(1) != 1) {
        from.values = point_sample_cpu({from.map}, coords.narrow(0, first, size), "bilinear",
                                       o.border ? "border" : "zeros", false);
      }
      return from;
    };
    std::vector<Gatherable> maps;
    for (const at::Tensor& feature : features) maps.push_back(prepare(feature));
    Target part = target;
    part.data = static_cast<char*>(target.data) + first * target.stride_n * cell_bytes;
    refine_points_kernel<A>(head, maps, prepare(source),
                            indices.defined() ? indices.const_data_ptr<int64_t>() + first * count : nullptr, count,
                            height, width, o, part);
  }
}

template <typename A>
at::Tensor refine_loop(const at::Tensor& coarse, at::TensorList features, at::TensorList weights, at::TensorList biases,
                       const RefineOptions& o) {
  const PackedHead<A> head(weights, biases);
  const int64_t n = coarse.size(0);
  at::Tensor current = coarse;
  for (int64_t step = 0; step < o.steps; ++step) {
    const bool labels = o.labels && step + 1 == o.steps;
    const int64_t height = current.size(2) * o.scale_factor, width = current.size(3) * o.scale_factor;
    const int64_t cells = height * width, count = std::min(o.num_points, cells);
    const bool every = o.num_points >= cells;  // all is recomputed: nothing is upsampled or selected
    at::Tensor next, indices, coords;
    if (!every) {
      std::tie(next, indices, coords) =
          labels ? subdivide_labels_cpu(current, o.num_points, o.scale_factor, o.align_corners)
                 : subdivide_cpu(current, o.num_points, o.scale_factor, o.align_corners, std::nullopt, true);
    } else {
      next = empty_step(coarse, labels, height, width);
    }
    Target target{next.mutable_data_ptr(), coarse.scalar_type(), at::ScalarType::Undefined, next.stride(0), 0, 1};
    if (labels) {
      target.labels = next.scalar_type();
    } else {
      target.stride_c = next.stride(1);
      target.stride_cell = cell_stride(next);
    }
    if (n > 0) {
      refine_points<A>(head, features, o.current_source ? current : coarse, indices, coords, count, height, width, o,
                       target);
    }
    current = std::move(next);
  }
  return current;
}

}  // namespace

at::Tensor refine_mlp_cpu(const at::Tensor& coarse /*[N,C,h,w]*/, at::TensorList features /*each [N,Cf,Hf,Wf]*/,
                          at::TensorList weights /*each [O,I]*/, at::TensorList biases /*each [O]*/, int64_t steps,
                          int64_t num_points, c10::string_view coarse_source, int64_t scale_factor, bool align_corners,
                          c10::string_view padding_mode, bool coarse_each_layer, bool coarse_first, bool labels) {
  const RefineOptions options{steps,
                              num_points,
                              coarse_source == "current",
                              scale_factor,
                              align_corners,
                              padding_mode == "border",
                              coarse_each_layer,
                              coarse_first,
                              labels};
  check_refine(coarse, features, weights, biases, options, coarse_source, padding_mode);
  if (steps == 0) return unrefined(coarse, labels);
  return refine_is_wide(coarse, features, weights) ? refine_loop<double>(coarse, features, weights, biases, options)
                                                   : refine_loop<float>(coarse, features, weights, biases, options);
}

TORCH_LIBRARY_IMPL(rendseg, CPU, m) { m.impl("_refine_mlp", TORCH_FN(refine_mlp_cpu)); }

}  // namespace rendseg
