// _refine_mlp on the CPU: the whole inference loop of PointRend (Kirillov et al. 2020), section 3.1, with a stock point
// head, in one call. Blocks of points are gathered, sent through every layer and scattered while they are in cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../math/upsample.h"
#include "../refine_common.h"
#include "huge_pages.h"
#include "point_sample.h"
#include "select.h"
#include "subdivide.h"

#define RENDSEG_KERNELS "refine_kernels.h"
#include "compile_kernels.h"

namespace rendseg {

namespace {

// The head, packed for the instruction set in force. A is float or double.
template <typename A>
struct PackedHead {
  std::vector<at::Tensor> storage;
  std::vector<MlpLayer> layers;

  PackedHead(at::TensorList weights, at::TensorList biases) {
    for (size_t l = 0; l < weights.size(); ++l) layers.push_back(pack(weights[l], biases[l], l + 1 < weights.size()));
  }

  MlpLayer pack(const at::Tensor& given_weight, const at::Tensor& given_bias, bool relu) {
    const int64_t panel = RENDSEG_PICK(mlp_panel_bytes)() / static_cast<int64_t>(sizeof(A));
    const at::ScalarType dtype = sizeof(A) == 8 ? at::kDouble : at::kFloat;
    const at::Tensor weight = given_weight.detach().to(dtype).contiguous(),
                     bias = given_bias.detach().to(dtype).contiguous();
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
    storage.push_back(packed);
    storage.push_back(padded);
    return {packed.const_data_ptr(), padded.const_data_ptr(), in, out, relu, dtype_of(given_weight.scalar_type())};
  }
};

// Where the points of one step go: logits[N,C,H,W] or labels[N,H,W].
struct Target {
  PointsView map;       // its dtype is that of the logits, also when labels are written
  int64_t label_bytes;  // 0 for logits, else 1 (uint8) or 2 (int16)

  Target(const at::Tensor& next, Dtype logits, bool labels) : label_bytes(labels ? next.element_size() : 0) {
    map.data = next.mutable_data_ptr();
    map.dtype = logits;
    map.stride_n = next.stride(0);
    map.stride_c = labels ? 0 : next.stride(1);
    map.stride_p = labels ? 1 : cell_stride(next);
  }
  // From image `n` on.
  Target from(int64_t n) const {
    Target part = *this;
    part.map.data =
        static_cast<char*>(map.data) + n * map.stride_n * (label_bytes != 0 ? label_bytes : element_size(map.dtype));
    return part;
  }
};

template <typename T, typename A>
void write_logits(const PointsView& map, int64_t image, const int64_t* cells, int64_t points, const A* values,
                  int64_t stride, int64_t classes) {
  for (int64_t c = 0; c < classes; ++c) {
    T* out = map.at<T>(image, c);
    for (int64_t p = 0; p < points; ++p) out[cells[p] * map.stride_p] = static_cast<T>(values[p * stride + c]);
  }
}

// The lowest class wins a tie, the first NaN wins over all.
template <typename T, typename Label, typename A>
void write_labels(const PointsView& map, int64_t image, const int64_t* cells, int64_t points, const A* values,
                  int64_t stride, int64_t classes) {
  Label* out = map.at<Label>(image);
  for (int64_t p = 0; p < points; ++p) {
    const A* row = values + p * stride;
    int64_t label = 0;
    A best = static_cast<A>(static_cast<T>(row[0]));
    for (int64_t c = 1; c < classes && best == best; ++c) {
      const A value = static_cast<A>(static_cast<T>(row[c]));
      if (value > best || value != value) best = value, label = c;
    }
    out[cells[p]] = static_cast<Label>(label);
  }
}

template <typename A>
void write_values(const Target& target, int64_t image, const int64_t* cells, int64_t points, const A* values,
                  int64_t stride, int64_t classes) {
  with_element(target.map.dtype, [&]<typename T>() {
    const auto write = target.label_bytes == 0   ? write_logits<T, A>
                       : target.label_bytes == 1 ? write_labels<T, uint8_t, A>
                                                 : write_labels<T, int16_t, A>;
    write(target.map, image, cells, points, values, stride, classes);
  });
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
  const PointsView values = points_view(from.values);
  with_element(values.dtype, [&]<typename T>() {
    transpose_into(values.at<const T>(image, 0, first), values.stride_c, values.channels, points, rows, row_stride);
  });
}

// rows[p * row_stride + c] = cell `cells[p]` of the map[C,h,w] upsampled as subdivide does it: its bits, before they
// are rounded to the type of the map.
template <typename A>
void upsample_cells(const MapView& map, const int64_t* cells, int64_t points, const RefineOptions& o, A* rows,
                    int64_t row_stride) {
  const int64_t width = map.width * o.scale_factor;
  with_element(map.dtype, [&]<typename T>() {
    for (int64_t p = 0; p < points; ++p) {
      const UpsampleTap<A> y = upsample_tap<A>(cells[p] / width, map.height, o.scale_factor, o.align_corners);
      const UpsampleTap<A> x = upsample_tap<A>(cells[p] % width, map.width, o.scale_factor, o.align_corners);
      for (int64_t c = 0; c < map.channels; ++c) {
        const auto along_x = [&](int64_t row) {
          const A lower = static_cast<A>(*map.at<const T>(0, c, row, x.lower));
          const A upper = static_cast<A>(*map.at<const T>(0, c, row, x.upper));
          return lower * x.lower_weight + upper * x.upper_weight;
        };
        rows[p * row_stride + c] = along_x(y.lower) * y.lower_weight + along_x(y.upper) * y.upper_weight;
      }
    }
  });
}

// Rounds rows[points][channels] as point_sample stores them, then as the head takes them.
template <typename A>
void round_rows(A* rows, int64_t row_stride, int64_t points, int64_t channels, Dtype stored, Dtype head) {
  if constexpr (sizeof(A) == 4) {
    const auto round = RENDSEG_PICK(round_values);
    for (const Dtype half : {stored, head}) {
      if (half != Dtype::kHalf && half != Dtype::kBFloat16) continue;
      for (int64_t p = 0; p < points; ++p) round(rows + p * row_stride, channels, half);
    }
  }
}

// The class of each mask, copied and checked.
std::vector<int64_t> classes_of(const at::Tensor& class_index, int64_t classes) {
  std::vector<int64_t> of;
  for (int64_t n = 0; n < class_index.size(0); ++n) {
    of.push_back(class_index.const_data_ptr<int64_t>()[n * class_index.stride(0)]);
    check_class(of.back(), n, classes);
  }
  return of;
}

// Masks of boxes: mask n reads the features of image[n] inside box[n], (x0, y0, x1, y1).
struct Boxes {
  std::vector<int64_t> image;
  std::vector<std::array<float, 4>> box;

  Boxes(const at::Tensor& image_index, const at::Tensor& boxes, int64_t images) {
    const int64_t count = image_index.size(0);
    const at::Tensor corners = boxes.detach().contiguous();
    for (int64_t n = 0; n < count; ++n) {
      image.push_back(image_index.const_data_ptr<int64_t>()[n * image_index.stride(0)]);
      check_image(image.back(), n, images);  // the copy, which nobody writes to
      std::copy_n(corners.const_data_ptr<float>() + 4 * n, 4, box.emplace_back().begin());
    }
  }

  // Points of box n in its image.
  void place(int64_t n, const float* xy, int64_t points, float* placed) const {
    const std::array<float, 4>& b = box[n];
    const float width = b[2] - b[0], height = b[3] - b[1];
    for (int64_t p = 0; p < points; ++p) {
      placed[2 * p] = b[0] + xy[2 * p] * width;
      placed[2 * p + 1] = b[1] + xy[2 * p + 1] * height;
    }
  }
};

// The first layer where a point is often on the same pixels: its part for the fine features is made once for every
// pixel of their map, since interpolating and multiplying may change places, and the points read that.
template <typename A>
struct MappedLayer {
  at::Tensor map;   // [B,O,Hf,Wf], channels_last
  MlpLayer coarse;  // the part for the coarse logits, with the bias

  MappedLayer(PackedHead<A>& head, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& feature,
              bool coarse_first) {
    const int64_t fine = feature.size(1), classes = weight.size(1) - fine;
    coarse = head.pack(weight.narrow(1, coarse_first ? 0 : fine, classes), bias, false);
    const MlpLayer layer = head.pack(weight.narrow(1, coarse_first ? classes : 0, fine), at::zeros_like(bias), false);
    const at::TensorOptions options = weight.options().memory_format(at::MemoryFormat::ChannelsLast);
    map = at::empty({feature.size(0), layer.out, feature.size(2), feature.size(3)}, options);
    A* to = map.template mutable_data_ptr<A>();
    const MapView from = map_view(feature);
    const int64_t blocks = (from.cells() + kMlpPoints - 1) / kMlpPoints;
    const auto kernel = RENDSEG_PICK(mlp_layer);
    at::parallel_for(0, from.images * blocks, 1, [&](int64_t begin, int64_t end) {
      const int64_t in_stride = (fine + 15) / 16 * 16 + 16, out_stride = (layer.out + 15) / 16 * 16 + 16;
      const std::unique_ptr<A[]> memory(new A[kMlpPoints * (in_stride + out_stride)]());
      A *rows = memory.get(), *products = rows + kMlpPoints * in_stride;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks, first = task % blocks * kMlpPoints;
        const int64_t pixels = std::min(kMlpPoints, from.cells() - first);
        read_pixels(from, image, first, pixels, rows, in_stride);
        kernel(layer, sizeof(A) == 8, rows, in_stride, (pixels + 11) / 12 * 12, products, out_stride);
        for (int64_t p = 0; p < pixels; ++p) {
          std::copy_n(products + p * out_stride, layer.out, to + (image * from.cells() + first + p) * layer.out);
        }
      }
    });
  }

 private:
  // rows[p * stride + c] = channel c of pixel first + p
  static void read_pixels(const MapView& map, int64_t image, int64_t first, int64_t pixels, A* rows, int64_t stride) {
    constexpr int64_t kGroup = 16;  // one cache line of a row
    std::array<int64_t, kMlpPoints> offsets;
    for (int64_t p = 0; p < pixels; ++p) {
      offsets[p] = (first + p) / map.width * map.stride_y + (first + p) % map.width * map.stride_x;
    }
    for (int64_t c0 = 0; c0 < map.channels; c0 += kGroup) {
      const int64_t c1 = std::min(c0 + kGroup, map.channels);
      for (int64_t p = 0; p < pixels; ++p) {
        const A* from = map.at<const A>(image) + offsets[p];
        for (int64_t c = c0; c < c1; ++c) rows[p * stride + c] = from[c * map.stride_c];
      }
    }
  }
};

// What every block of points of one step shares. N images, C classes, `count` points of each image.
template <typename A>
struct StepArgs {
  const PackedHead<A>& head;
  const RefineOptions& options;
  const RefineCells& cells;
  const Boxes* boxes;            // null: the features are those of the images themselves
  const MappedLayer<A>* mapped;  // null: the features are read as they are
  const int64_t* classes;        // null: every class is written; else that of each image of the whole call
  int64_t first;                 // image of the whole call that is image 0 here
  std::vector<Gatherable> features;
  Gatherable source;       // of the coarse values
  const int64_t* indices;  // [N,count], null: every cell
  Target target;
};

// One thread's share of a step, block by block: gather, head, scatter.
template <typename A>
class StepWorker {
 public:
  explicit StepWorker(const StepArgs<A>& args)
      : a_(args), classes_(args.source.map.size(1)), dtype_(args.head.layers[0].rounding) {
    int64_t widest = 0;
    for (const MlpLayer& layer : a_.head.layers) widest = std::max({widest, layer.in, layer.out});
    stride_ = (widest + 15) / 16 * 16;
    if (stride_ * sizeof(A) % 1024 == 0) stride_ += 16;  // rows of equal cache sets would evict each other
    memory_.reset(new A[kMlpPoints * (2 * stride_ + classes_) + 64 / sizeof(A)]());
    buffers_[0] = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
    buffers_[1] = buffers_[0] + kMlpPoints * stride_;
    coarse_ = buffers_[1] + kMlpPoints * stride_;
  }

  // The points from `first` on of one image: kMlpPoints of them, or what is left.
  void run(int64_t image, int64_t first) {
    const RefineOptions& o = a_.options;
    const int64_t points = std::min(kMlpPoints, a_.cells.count - first);
    int64_t image_of_features = image;
    if (a_.indices != nullptr) {
      std::copy_n(a_.indices + image * a_.cells.count + first, points, indices_.begin());
    } else {
      std::iota(indices_.begin(), indices_.begin() + points, first);
    }
    cell_centres(indices_.data(), points, a_.cells.height, a_.cells.width, xy_.data());
    if (o.current_source) {
      const MapView previous = map_view(a_.source.map).image(image);
      upsample_cells(previous, indices_.data(), points, o, coarse_, classes_);
      round_rows(coarse_, classes_, points, classes_, previous.dtype, dtype_);
    } else {
      gather(a_.source, image, first, points, coarse_, classes_);
    }
    if (a_.boxes != nullptr) {
      a_.boxes->place(a_.first + image, xy_.data(), points, xy_.data());
      image_of_features = a_.boxes->image[a_.first + image];
    }
    if (a_.mapped != nullptr) run_mapped(image_of_features, points);
    int64_t offset = o.coarse_first ? classes_ : 0;
    for (const Gatherable& feature : a_.features) {
      gather(feature, image_of_features, first, points, buffers_[0] + offset, stride_);
      offset += feature.channels();
    }
    const A* values = run_layers(points, a_.mapped != nullptr ? 1 : 0);
    const int64_t written = a_.classes == nullptr ? classes_ : 1;
    if (a_.classes != nullptr) values += a_.classes[a_.first + image];
    write_values<A>(a_.target, image, indices_.data(), points, values, stride_, written);
  }

 private:
  void gather(const Gatherable& from, int64_t image, int64_t first, int64_t points, A* rows, int64_t row_stride) {
    gather_block<A>(from, image, first, xy_.data(), points, a_.options.border, rows, row_stride);
    round_rows(rows, row_stride, points, from.channels(), dtype_of(from.map.scalar_type()), dtype_);
  }

  // Rows are [hidden | coarse] or [coarse | hidden].
  void add_coarse(A* rows, int64_t hidden, int64_t points) {
    A* to = rows + (a_.options.coarse_first ? 0 : hidden);
    for (int64_t p = 0; p < points; ++p) std::copy_n(coarse_ + p * classes_, classes_, to + p * stride_);
  }

  // The first layer, to the first buffer.
  void run_mapped(int64_t image, int64_t points) {
    const MappedLayer<A>& mapped = *a_.mapped;
    const int64_t out = mapped.coarse.out;
    const bool last = a_.head.layers.size() == 1;
    A* rows = buffers_[0] + (!last && a_.options.coarse_each_layer && a_.options.coarse_first ? classes_ : 0);
    gather_rows_cpu(map_view(mapped.map).image(image), xy_.data(), points, a_.options.border, false, rows,
                    sizeof(A) == 8 ? Dtype::kDouble : Dtype::kFloat, stride_);
    const auto kernel = RENDSEG_PICK(mlp_layer);
    kernel(mapped.coarse, sizeof(A) == 8, coarse_, classes_, (points + 11) / 12 * 12, buffers_[1], stride_);
    for (int64_t p = 0; p < points; ++p) {
      A* to = rows + p * stride_;
      const A* add = buffers_[1] + p * stride_;
      for (int64_t i = 0; i < out; ++i) {
        const A sum = to[i] + add[i];
        to[i] = !last && sum < A(0) ? A(0) : sum;
      }
    }
    if (!last && a_.options.coarse_each_layer) add_coarse(buffers_[0], out, points);
  }

  // From the inputs of layer `first` in the first buffer to the logits, rows of stride_.
  const A* run_layers(int64_t points, size_t first) {
    const std::vector<MlpLayer>& layers = a_.head.layers;
    const auto kernel = RENDSEG_PICK(mlp_layer);
    const int64_t padded = (points + 11) / 12 * 12;  // whole blocks of rows; what lies beyond the points is ignored
    if (first == 0) add_coarse(buffers_[0], layers[0].in - classes_, points);
    int side = 0;
    for (size_t l = first; l < layers.size(); ++l) {
      const bool joined = l + 1 < layers.size() && a_.options.coarse_each_layer;
      A* out = buffers_[1 - side] + (joined && a_.options.coarse_first ? classes_ : 0);
      kernel(layers[l], sizeof(A) == 8, buffers_[side], stride_, padded, out, stride_);
      side = 1 - side;
      if (joined) add_coarse(buffers_[side], layers[l].out, points);
    }
    return buffers_[side];
  }

  const StepArgs<A>& a_;
  int64_t classes_, stride_ = 0;
  Dtype dtype_;  // of the head
  std::unique_ptr<A[]> memory_;
  A* buffers_[2];  // [kMlpPoints][stride_]
  A* coarse_;      // [kMlpPoints][classes_]
  std::array<float, 2 * kMlpPoints> xy_;
  std::array<int64_t, kMlpPoints> indices_;
};

// Every image of one step. Images go in groups, so that what is sampled ahead stays small.
template <typename A>
void refine_points(const PackedHead<A>& head, at::TensorList features, const Boxes* boxes, const MappedLayer<A>* mapped,
                   const int64_t* classes, const at::Tensor& source, const at::Tensor& indices,
                   const at::Tensor& coords, const RefineCells& cells, const RefineOptions& o, const Target& target) {
  constexpr int64_t kAheadBytes = int64_t{32} << 20;
  const int64_t images = source.size(0), bytes = cells.count * head.layers[0].in * static_cast<int64_t>(sizeof(A));
  const int64_t group = std::clamp<int64_t>(kAheadBytes / bytes, 1, images);
  const int64_t blocks = (cells.count + kMlpPoints - 1) / kMlpPoints;
  for (int64_t first = 0; first < images; first += group) {
    const int64_t size = std::min(group, images - first);
    const auto prepare = [&](const at::Tensor& map, bool sampled) {
      Gatherable from{map.narrow(0, first, size), {}};
      if (sampled && coords.defined() && map.stride(1) != 1) {
        from.values = point_sample_cpu({from.map}, coords.narrow(0, first, size), "bilinear",
                                       o.border ? "border" : "zeros", false);
      }
      return from;
    };
    StepArgs<A> args{head,
                     o,
                     cells,
                     boxes,
                     mapped,
                     classes,
                     first,
                     {},
                     prepare(source, !o.current_source),
                     nullptr,
                     target.from(first)};
    for (const at::Tensor& feature : features) {
      if (mapped != nullptr) break;
      args.features.push_back(boxes != nullptr ? Gatherable{feature, {}} : prepare(feature, true));
    }
    if (indices.defined()) args.indices = indices.const_data_ptr<int64_t>() + first * cells.count;
    at::parallel_for(0, size * blocks, 1, [&](int64_t begin, int64_t end) {
      StepWorker<A> worker(args);
      for (int64_t task = begin; task < end; ++task) worker.run(task / blocks, task % blocks * kMlpPoints);
    });
  }
}

// Whether boxes have more points than their maps have pixels, and the first layer may thus be made for the pixels. Not
// in half types, which are rounded after they are interpolated.
bool worth_mapping(const at::Tensor& coarse, at::TensorList features, at::TensorList weights, const RefineOptions& o) {
  const at::ScalarType dtype = weights[0].scalar_type();
  if (features.size() != 1 || features[0].scalar_type() != dtype || (dtype != at::kFloat && dtype != at::kDouble)) {
    return false;
  }
  double points = 0;  // doubles, since maps that repeat one cell have any size
  for (int64_t step = 0; step < o.steps; ++step) {
    const RefineCells cells = refine_cells(coarse, step, o);
    if (cells.needed) points += static_cast<double>(cells.count) * coarse.size(0);
  }
  const double pixels = static_cast<double>(features[0].size(0)) * features[0].size(2) * features[0].size(3);
  return points > 1.25 * pixels;  // the map is written and read too
}

template <typename A>
at::Tensor refine_loop(const at::Tensor& coarse, at::TensorList features, at::TensorList weights, at::TensorList biases,
                       const RefineOptions& o) {
  PackedHead<A> head(weights, biases);
  std::optional<Boxes> boxes;
  std::optional<MappedLayer<A>> mapped;
  std::vector<at::Tensor> maps = features.vec();
  if (o.boxes.has_value()) {
    boxes.emplace(*o.image_index, *o.boxes, features[0].size(0));
    // A block of points lies in one box, so planes cannot be read in streams: channels side by side, once for all
    // steps.
    if (worth_mapping(coarse, features, weights, o)) {
      mapped.emplace(head, weights[0], biases[0], features[0], o.coarse_first);
    } else {
      for (at::Tensor& map : maps) map = map.contiguous(at::MemoryFormat::ChannelsLast);
    }
  }
  std::vector<int64_t> classes;
  at::Tensor current = coarse;
  std::optional<at::Tensor> class_index = o.class_index;
  if (o.single()) {
    classes = classes_of(*o.class_index, coarse.size(1));
    current = of_class(coarse, *o.class_index);
    class_index.reset();  // of one class
  }
  for (int64_t step = 0; step < o.steps; ++step) {
    const RefineCells cells = refine_cells(coarse, step, o);
    if (!cells.needed) continue;
    at::Tensor next, indices, coords;
    if (cells.every) {
      next = empty_step(coarse, cells.labels, cells.height, cells.width, o);
    } else {
      std::tie(next, indices, coords) =
          cells.labels ? subdivide_labels_cpu(current, o.num_points, o.scale_factor, o.align_corners)
                       : subdivide_cpu(current, o.num_points, o.scale_factor, o.align_corners, class_index, true);
    }
    if (coarse.size(0) > 0) {
      refine_points<A>(head, maps, boxes.has_value() ? &*boxes : nullptr, mapped.has_value() ? &*mapped : nullptr,
                       o.single() ? classes.data() : nullptr, o.current_source ? current : coarse, indices, coords,
                       cells, o, Target(next, dtype_of(coarse.scalar_type()), cells.labels));
    }
    current = std::move(next);
  }
  return o.class_only && !o.single() ? of_class(current, *o.class_index) : current;
}

}  // namespace

at::Tensor refine_mlp_cpu(const at::Tensor& coarse /*[N,C,h,w]*/, at::TensorList features /*each [N,Cf,Hf,Wf]*/,
                          at::TensorList weights /*each [O,I]*/, at::TensorList biases /*each [O]*/, int64_t steps,
                          int64_t num_points, c10::string_view coarse_source, int64_t scale_factor, bool align_corners,
                          c10::string_view padding_mode, bool coarse_each_layer, bool coarse_first, bool labels,
                          const std::optional<at::Tensor>& class_index /*[N]*/, bool class_only,
                          const std::optional<at::Tensor>& image_index /*[N]*/,
                          const std::optional<at::Tensor>& boxes /*[N,4]*/) {
  const RefineOptions options = refine_options(coarse, features, weights, biases, steps, num_points, coarse_source,
                                               scale_factor, align_corners, padding_mode, coarse_each_layer,
                                               coarse_first, labels, class_index, class_only, image_index, boxes);
  if (steps == 0) return unrefined(coarse, labels, options);
  return refine_is_wide(coarse, features, weights) ? refine_loop<double>(coarse, features, weights, biases, options)
                                                   : refine_loop<float>(coarse, features, weights, biases, options);
}

TORCH_LIBRARY_IMPL(rendseg, CPU, m) { m.impl("_refine_mlp", TORCH_FN(refine_mlp_cpu)); }

}  // namespace rendseg
