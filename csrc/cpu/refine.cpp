// _refine_mlp on the CPU: the whole inference loop of PointRend (Kirillov et al. 2020), section 3.1, with a stock point
// head, in one call. Blocks of points are gathered, sent through every layer and scattered while they are in cache.
// A map that only the next step reads is not stored: its subdivide makes the rows again.
#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "../math/upsample.h"
#include "../refine_common.h"
#include "gemm.h"
#include "huge_pages.h"
#include "point_sample.h"
#include "select.h"
#include "subdivide.h"

#define RENDSEG_KERNELS "refine_kernels.h"
#include "compile_kernels.h"

namespace rendseg {

namespace {

// One layer without some of its inputs, packed for the kernel in force. A is float or double.
template <typename A>
class PackedLayer {
 public:
  // weight[O,I], bias[O] or zero
  PackedLayer(const at::Tensor& weight, const at::Tensor& bias, bool relu, Gemm gemm) {
    const at::ScalarType dtype = sizeof(A) == 8 ? at::kDouble : at::kFloat;
    const at::Tensor full = weight.detach().to(dtype).contiguous();
    const int64_t out = full.size(0), in = full.size(1);
    const int64_t panel = gemm == Gemm::kAten ? 1 : RENDSEG_PICK(mlp_panel_bytes)() / static_cast<int64_t>(sizeof(A));
    const int64_t panels = (out + panel - 1) / panel;
    bias_ = at::zeros({panels * panel}, full.options());
    if (bias.defined()) bias_.narrow(0, 0, out).copy_(bias.detach());
    panels_ = gemm == Gemm::kAten ? full : pack(full, panel, panels);
    layer_ = {panels_.const_data_ptr(), bias_.const_data_ptr(), in, out, relu, dtype_of(weight.scalar_type())};
  }
  const MlpLayer& layer() const { return layer_; }
  // [O,I] for ATen's GEMM, else panels.
  const at::Tensor& weights() const { return panels_; }

 private:
  static at::Tensor pack(const at::Tensor& full, int64_t panel, int64_t panels) {
    const int64_t out = full.size(0), in = full.size(1);
    at::Tensor packed = at::empty({panels, in, panel}, full.options());
    const A* from = full.const_data_ptr<A>();
    A* to = packed.mutable_data_ptr<A>();
    at::parallel_for(0, panels, std::max<int64_t>(1, 32768 / (in * panel + 1)), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        A* block = to + b * in * panel;
        for (int64_t j = 0; j < panel; ++j) {
          const int64_t o = b * panel + j;
          for (int64_t i = 0; i < in; ++i) block[i * panel + j] = o < out ? from[o * in + i] : A(0);
        }
      }
    });
    return packed;
  }

  at::Tensor panels_, bias_;
  MlpLayer layer_;
};

// y = x W^T + b for a block of rows, by one thread; with `add`, what y holds takes the place of b.
template <typename A>
void run_layer(Gemm gemm, const PackedLayer<A>& packed, A* x, int64_t x_stride, int64_t points, A* y, int64_t y_stride,
               bool add) {
  const MlpLayer& layer = packed.layer();
  if (gemm == Gemm::kOwn) {
    const int64_t padded = (points + 11) / 12 * 12;  // whole blocks of rows; what lies beyond the points is ignored
    return RENDSEG_PICK(mlp_layer_of<A>)(layer, x, x_stride, padded, y, y_stride, add);
  }
  if (!add) {
    for (int64_t p = 0; p < points; ++p) std::copy_n(static_cast<const A*>(layer.bias), layer.out, y + p * y_stride);
  }
  if (layer.in > 0) {
    const at::AutoDispatchBelowADInplaceOrView guard;  // of this thread
    at::Tensor sums = at::from_blob(y, {points, layer.out}, {y_stride, 1}, packed.weights().options());
    const at::Tensor inputs = at::from_blob(x, {points, layer.in}, {x_stride, 1}, packed.weights().options());
    at::addmm_out(sums, sums, inputs, packed.weights().t());
  }
  for (int64_t p = 0; p < points; ++p) RENDSEG_PICK(finish_row<A>)(layer, y + p * y_stride);
}

// at::parallel_for(0, tasks, 1, f), where f calls run_layer. A single task goes to a thread of a team too, since within
// one ATen's GEMM has no threads of its own, whose number its result could depend on.
template <typename F>
void for_each_task(int64_t tasks, const F& f) {
  at::parallel_for(0, std::max<int64_t>(tasks, 2), 1, [&](int64_t begin, int64_t end) {
    end = std::min(end, tasks);
    if (begin < end) f(begin, end);
  });
}

// Sampling commutes with a linear map. Where points outnumber the cells of a map, a layer's part of that map is taken
// once for every cell, and the points sample the products.
struct HoistPlan {
  bool fine, coarse;
};

// The layers without the inputs whose products are sampled, and the layers of those inputs alone.
template <typename A>
struct PackedHead {
  HoistPlan plan;
  Gemm gemm;
  std::vector<PackedLayer<A>> layers;
  std::vector<PackedLayer<A>> of_fine;    // the first layer, of each feature map
  std::vector<PackedLayer<A>> of_coarse;  // each layer that takes the coarse values

  PackedHead(at::TensorList weights, at::TensorList biases, at::TensorList features, int64_t classes,
             const RefineOptions& o, HoistPlan plan)
      : plan(plan), gemm(rendseg::gemm()) {
    const at::ScalarType wide = sizeof(A) == 8 ? at::kDouble : at::kFloat;  // products are not rounded
    for (size_t l = 0; l < weights.size(); ++l) {
      const bool joined = l == 0 || o.coarse_each_layer;
      const int64_t hidden = weights[l].size(1) - (joined ? classes : 0);
      const int64_t hidden_at = joined && o.coarse_first ? classes : 0, coarse_at = o.coarse_first ? 0 : hidden;
      at::Tensor kept = weights[l];
      if (joined && plan.coarse) {
        of_coarse.emplace_back(kept.narrow(1, coarse_at, classes).to(wide), at::Tensor(), false, gemm);
        kept = kept.narrow(1, hidden_at, hidden);
      }
      if (l == 0 && plan.fine) {
        int64_t at = hidden_at;
        for (const at::Tensor& feature : features) {
          of_fine.emplace_back(weights[0].narrow(1, at, feature.size(1)).to(wide), at::Tensor(), false, gemm);
          at += feature.size(1);
        }
        kept = plan.coarse ? kept.narrow(1, 0, 0) : kept.narrow(1, coarse_at, classes);
      }
      layers.emplace_back(kept, biases[l], l + 1 < weights.size(), gemm);
    }
  }
};

// Where the points of one step go: logits[N,C,H,W] or labels[N,H,W], by cell; or values[N,k,C], by point.
struct Target {
  PointsView map;       // its dtype is that of the logits, also when labels are written
  int64_t label_bytes;  // 0 for logits, else 1 (uint8) or 2 (int16)
  bool by_point;

  Target(const at::Tensor& next, Dtype logits, bool labels)
      : label_bytes(labels ? next.element_size() : 0), by_point(!labels && next.dim() == 3) {
    map.data = next.mutable_data_ptr();
    map.dtype = logits;
    map.stride_n = next.stride(0);
    map.stride_c = labels ? 0 : by_point ? 1 : next.stride(1);
    map.stride_p = labels ? 1 : by_point ? next.stride(1) : cell_stride(next);
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
  if (map.stride_c == 1) {
    for (int64_t p = 0; p < points; ++p) {
      T* out = map.at<T>(image) + cells[p] * map.stride_p;
      for (int64_t c = 0; c < classes; ++c) out[c] = static_cast<T>(values[p * stride + c]);
    }
    return;
  }
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

// rows[p * row_stride + c] = points `first` to `first + count` of one image of from[N,C,P].
template <typename A>
void read_points(const PointsView& from, int64_t image, int64_t first, int64_t count, A* rows, int64_t row_stride) {
  with_element(from.dtype, [&]<typename T>() {
    const T* at = from.at<const T>(image, 0, first);
    if constexpr (std::is_same_v<A, Wide<T>>) {
      if (from.stride_p == 1) {
        return RENDSEG_PICK(planes_to_rows<T, A>)(at, from.stride_c, from.channels, count, rows, row_stride);
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t c = 0; c < from.channels; ++c) {
        rows[p * row_stride + c] = static_cast<A>(at[p * from.stride_p + c * from.stride_c]);
      }
    }
  });
}

// map[N,C,H,W] with channels side by side.
at::Tensor channels_last(const at::Tensor& map) {
  constexpr int64_t kCells = 64;  // whose rows stay in the second-level cache while they are written
  const at::Tensor planes = map.flatten(2);
  if (map.stride(1) == 1 || planes.stride(2) != 1) return map.contiguous(at::MemoryFormat::ChannelsLast);
  const int64_t cells = planes.size(2), channels = planes.size(1), blocks = (cells + kCells - 1) / kCells;
  at::Tensor rows = at::empty({map.size(0), map.size(2), map.size(3), channels}, map.options());
  prefer_huge_pages(rows.mutable_data_ptr(), rows.nbytes());
  const PointsView from = points_view(planes);
  with_element(from.dtype, [&]<typename T>() {
    const auto turn = RENDSEG_PICK(planes_to_rows<T, T>);
    T* to = static_cast<T*>(rows.mutable_data_ptr());
    at::parallel_for(0, map.size(0) * blocks, 8, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / blocks, first = task % blocks * kCells;
        turn(from.at<const T>(image, 0, first), from.stride_c, channels, std::min(kCells, cells - first),
             to + (image * cells + first) * channels, channels);
      }
    });
  });
  return rows.permute({0, 3, 1, 2});
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
  read_points<A>(points_view(from.values), image, first, points, rows, row_stride);
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

// map[N,C,H,W] -> [N,O,H,W], channels last: the products of every cell.
template <typename A>
at::Tensor products_of(const at::Tensor& map, const PackedLayer<A>& packed, Gemm gemm) {
  const MlpLayer& layer = packed.layer();
  const int64_t cells = map.size(2) * map.size(3), blocks = (cells + kMlpPoints - 1) / kMlpPoints;
  const at::Tensor planes = map.flatten(2);
  const PointsView from = points_view(planes);
  at::Tensor out = at::empty({map.size(0), map.size(2), map.size(3), layer.out},
                             map.options().dtype(sizeof(A) == 8 ? at::kDouble : at::kFloat));
  const int64_t most = kMlpPoints;
  for_each_task(map.size(0) * blocks, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<A[]> x(new A[most * layer.in]()), y(new A[most * layer.out]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / blocks, first = task % blocks * most, count = std::min(most, cells - first);
      read_points<A>(from, image, first, count, x.get(), layer.in);
      run_layer<A>(gemm, packed, x.get(), layer.in, count, y.get(), layer.out, false);
      std::copy_n(y.get(), count * layer.out, out.mutable_data_ptr<A>() + (image * cells + first) * layer.out);
    }
  });
  return out.permute({0, 3, 1, 2});
}

// What every block of points of one step shares. N images, C classes, `count` points of each image.
template <typename A>
struct StepArgs {
  const PackedHead<A>& head;
  const RefineOptions& options;
  const RefineCells& cells;
  const Boxes* boxes;                       // null: the features are those of the images themselves
  const int64_t* classes;                   // null: every class is written; else that of each image of the whole call
  int64_t first;                            // image of the whole call that is image 0 here
  std::vector<Gatherable> features;         // or their products
  Gatherable source;                        // of the coarse values
  std::vector<Gatherable> coarse_products;  // of each layer that takes the coarse values
  const int64_t* indices;                   // [N,count], null: every cell
  Target target;
  int64_t block;  // points of one block
};

// One thread's share of a step, block by block: gather, head, scatter.
template <typename A>
class StepWorker {
 public:
  explicit StepWorker(const StepArgs<A>& args)
      : a_(args),
        classes_(args.source.map.size(1)),
        joined_(args.head.plan.coarse ? 0 : classes_),
        dtype_(args.head.layers[0].layer().rounding),
        xy_(2 * args.block),
        in_features_(args.boxes == nullptr ? 0 : 2 * args.block),
        indices_(args.block) {
    int64_t widest = joined_;
    for (const PackedLayer<A>& packed : a_.head.layers) {
      widest = std::max({widest, packed.layer().in, packed.layer().out + joined_});
    }
    stride_ = (widest + 15) / 16 * 16;
    if (stride_ * sizeof(A) % 1024 == 0) stride_ += 16;  // rows of equal cache sets would evict each other
    const int64_t rows = (a_.block + 11) / 12 * 12;
    memory_.reset(new A[rows * (3 * stride_ + classes_) + 64 / sizeof(A)]());
    buffers_[0] = reinterpret_cast<A*>((reinterpret_cast<uintptr_t>(memory_.get()) + 63) & ~uintptr_t{63});
    buffers_[1] = buffers_[0] + rows * stride_;
    sampled_ = buffers_[1] + rows * stride_;
    coarse_ = sampled_ + rows * stride_;
  }

  // The points from `first` on of one image: a block of them, or what is left.
  void run(int64_t image, int64_t first) {
    const RefineOptions& o = a_.options;
    const int64_t points = std::min(a_.block, a_.cells.count - first);
    if (a_.indices != nullptr) {
      std::copy_n(a_.indices + image * a_.cells.count + first, points, indices_.begin());
    } else {
      std::iota(indices_.begin(), indices_.begin() + points, first);
    }
    cell_centres(indices_.data(), points, a_.cells.height, a_.cells.width, xy_.data());
    Place features{image, xy_.data()};
    if (a_.boxes != nullptr) {
      a_.boxes->place(a_.first + image, xy_.data(), points, in_features_.data());
      features = {a_.boxes->image[a_.first + image], in_features_.data()};
    }
    const Place here{image, xy_.data()};
    if (o.current_source) {
      const MapView previous = map_view(a_.source.map).image(image);
      upsample_cells(previous, indices_.data(), points, o, coarse_, classes_);
      round_rows(coarse_, classes_, points, classes_, previous.dtype, dtype_);
    } else if (!a_.head.plan.coarse) {
      gather(a_.source, here, first, points, coarse_, classes_);
    }
    if (!a_.head.plan.fine) {
      int64_t offset = o.coarse_first ? joined_ : 0;
      for (const Gatherable& feature : a_.features) {
        gather(feature, features, first, points, buffers_[0] + offset, stride_);
        offset += feature.channels();
      }
    }
    const A* values = run_layers(here, features, first, points);
    const int64_t written = a_.classes == nullptr ? classes_ : 1;
    if (a_.classes != nullptr) values += a_.classes[a_.first + image];
    if (a_.target.by_point) std::iota(indices_.begin(), indices_.begin() + points, first);
    write_values<A>(a_.target, image, indices_.data(), points, values, stride_, written);
  }

 private:
  // Where the points of a block lie in a map.
  struct Place {
    int64_t image;
    const float* xy;
  };

  void gather(const Gatherable& from, Place at, int64_t first, int64_t points, A* rows, int64_t row_stride) {
    gather_block<A>(from, at.image, first, at.xy, points, a_.options.border, rows, row_stride);
    round_rows(rows, row_stride, points, from.channels(), dtype_of(from.map.scalar_type()), dtype_);
  }

  // Rows are [hidden | coarse] or [coarse | hidden].
  void add_coarse(A* rows, int64_t hidden, int64_t points) {
    if (joined_ == 0) return;
    A* to = rows + (a_.options.coarse_first ? 0 : hidden);
    for (int64_t p = 0; p < points; ++p) std::copy_n(coarse_ + p * classes_, classes_, to + p * stride_);
  }

  // rows[points] = bias, then += the products of layer `l` sampled at the points. Whether there were any.
  bool start_rows(size_t l, Place here, Place features, int64_t first, int64_t points, A* rows) {
    const MlpLayer& layer = a_.head.layers[l].layer();
    const bool fine = l == 0 && a_.head.plan.fine, coarse = a_.head.plan.coarse && l < a_.coarse_products.size();
    if (!fine && !coarse) return false;
    for (int64_t p = 0; p < points; ++p) {
      std::copy_n(static_cast<const A*>(layer.bias), layer.out, rows + p * stride_);
    }
    const auto add = [&](const Gatherable& product, Place at) {
      gather_block<A>(product, at.image, first, at.xy, points, a_.options.border, sampled_, stride_);
      for (int64_t p = 0; p < points; ++p) {
        RENDSEG_PICK(add_row<A>)(rows + p * stride_, sampled_ + p * stride_, layer.out);
      }
    };
    if (fine) {
      for (const Gatherable& product : a_.features) add(product, features);
    }
    if (coarse) add(a_.coarse_products[l], here);
    return true;
  }

  // From the fine values in the first buffer to the logits, rows of stride_.
  const A* run_layers(Place here, Place features, int64_t first, int64_t points) {
    const std::vector<PackedLayer<A>>& layers = a_.head.layers;
    add_coarse(buffers_[0], layers[0].layer().in - joined_, points);
    int side = 0;
    for (size_t l = 0; l < layers.size(); ++l) {
      const MlpLayer& layer = layers[l].layer();
      const bool joined = l + 1 < layers.size() && a_.options.coarse_each_layer;
      A* out = buffers_[1 - side] + (joined && a_.options.coarse_first ? joined_ : 0);
      const bool started = start_rows(l, here, features, first, points, out);
      run_layer<A>(a_.head.gemm, layers[l], buffers_[side], stride_, points, out, stride_, started);
      side = 1 - side;
      if (joined) add_coarse(buffers_[side], layer.out, points);
    }
    return buffers_[side];
  }

  const StepArgs<A>& a_;
  int64_t classes_, joined_, stride_ = 0;  // joined_: coarse values in a row
  Dtype dtype_;                            // of the head
  std::vector<float> xy_, in_features_;
  std::vector<int64_t> indices_;
  std::unique_ptr<A[]> memory_;
  A* buffers_[2];  // [block][stride_]
  A* sampled_;     // [block][stride_]
  A* coarse_;      // [block][classes_]
};

// Every image of one step. Images go in groups, so that what is sampled ahead stays small.
template <typename A>
void refine_points(const PackedHead<A>& head, at::TensorList features, const Boxes* boxes, const int64_t* classes,
                   const at::Tensor& source, at::TensorList coarse_products, const at::Tensor& indices,
                   const at::Tensor& coords, const RefineCells& cells, const RefineOptions& o, const Target& target) {
  constexpr int64_t kAheadBytes = int64_t{32} << 20;
  const int64_t images = source.size(0), widest = std::max<int64_t>(1, head.layers[0].layer().in);
  const int64_t group =
      std::clamp<int64_t>(kAheadBytes / (cells.count * widest * static_cast<int64_t>(sizeof(A))), 1, images);
  // Blocks of about equal size.
  const int64_t most = head.gemm == Gemm::kAten ? kAtenPoints : kMlpPoints;
  const int64_t least = (cells.count + most - 1) / most, block = ((cells.count + least - 1) / least + 11) / 12 * 12;
  const int64_t blocks = (cells.count + block - 1) / block;
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
                     classes,
                     first,
                     {},
                     prepare(source, !o.current_source && !head.plan.coarse),
                     {},
                     nullptr,
                     target.from(first),
                     block};
    for (const at::Tensor& feature : features) {
      args.features.push_back(boxes != nullptr ? Gatherable{feature, {}} : prepare(feature, true));
    }
    for (const at::Tensor& product : coarse_products) args.coarse_products.push_back(prepare(product, false));
    if (indices.defined()) args.indices = indices.const_data_ptr<int64_t>() + first * cells.count;
    for_each_task(size * blocks, [&](int64_t begin, int64_t end) {
      StepWorker<A> worker(args);
      for (int64_t task = begin; task < end; ++task) worker.run(task / blocks, task % blocks * block);
    });
  }
}

// A sampled product costs about as much as kFewClasses inputs.
HoistPlan plan_hoist(const at::Tensor& coarse, at::TensorList features, const RefineOptions& o) {
  constexpr int64_t kFewClasses = 32;
  // Doubles, since maps that repeat one cell have any size.
  const auto cells_of = [](const at::Tensor& map) {
    return static_cast<double>(map.size(0)) * static_cast<double>(map.size(2)) * static_cast<double>(map.size(3));
  };
  double points = 0, pixels = 0;
  for (int64_t step = 0; step < o.steps; ++step) {
    const RefineCells cells = refine_cells(coarse, step, o);
    if (cells.needed) points += static_cast<double>(cells.count) * static_cast<double>(coarse.size(0));
  }
  if (points == 0) return {false, false};
  for (const at::Tensor& feature : features) pixels = std::max(pixels, cells_of(feature));
  const bool many = points >= 2 * cells_of(coarse);
  return {points >= 2 * pixels, many && !o.current_source && coarse.size(1) >= kFewClasses};
}

template <typename A>
at::Tensor refine_loop(const at::Tensor& coarse, at::TensorList features, at::TensorList weights, at::TensorList biases,
                       const RefineOptions& o) {
  const PackedHead<A> head(weights, biases, features, coarse.size(1), o, plan_hoist(coarse, features, o));
  std::vector<at::Tensor> maps(features.begin(), features.end()), coarse_products;
  for (size_t i = 0; i < head.of_fine.size(); ++i) maps[i] = products_of<A>(maps[i], head.of_fine[i], head.gemm);
  for (const PackedLayer<A>& layer : head.of_coarse) {
    coarse_products.push_back(products_of<A>(coarse, layer, head.gemm));
  }
  std::optional<Boxes> boxes;
  if (o.boxes.has_value()) {
    boxes.emplace(*o.image_index, *o.boxes, features[0].size(0));
    // A block of points lies in one box, so planes cannot be read in streams: channels side by side, once for all
    // steps.
    for (at::Tensor& map : maps) map = channels_last(map);
  }
  std::vector<int64_t> classes;
  // The map so far. One that only the next step reads is not stored: a fresh one costs more than to make it again.
  RefinedMap current{coarse, {}};
  std::optional<at::Tensor> class_index = o.class_index;
  if (o.single()) {
    classes = classes_of(*o.class_index, coarse.size(1));
    current.base = of_class(coarse, *o.class_index);
    class_index.reset();  // of one class
  }
  for (int64_t step = 0; step < o.steps; ++step) {
    const RefineCells cells = refine_cells(coarse, step, o);
    if (!cells.needed) continue;
    const bool stored = cells.every || o.current_source || step + 1 == o.steps;
    at::Tensor next, indices, coords;
    if (cells.every) {
      next = empty_step(coarse, cells.labels, cells.height, cells.width, o);
    } else {
      const SubdivideWanted wanted = cells.labels ? SubdivideWanted::kLabels
                                     : stored     ? SubdivideWanted::kLogits
                                                  : SubdivideWanted::kNothing;
      std::tie(next, indices, coords) = subdivide_refined_cpu(current, o.num_points, o.scale_factor, o.align_corners,
                                                              cells.labels ? std::nullopt : class_index, wanted);
      if (!stored) next = at::empty({coarse.size(0), cells.count, current.base.size(1)}, coarse.options());
    }
    if (coarse.size(0) > 0) {
      refine_points<A>(head, maps, boxes.has_value() ? &*boxes : nullptr, o.single() ? classes.data() : nullptr,
                       o.current_source ? current.base : coarse, coarse_products, indices, coords, cells, o,
                       Target(next, dtype_of(coarse.scalar_type()), cells.labels));
    }
    if (stored) {
      current = {std::move(next), {}};
    } else {
      current.steps.push_back({std::move(indices), std::move(next)});
    }
  }
  return o.class_only && !o.single() ? of_class(current.base, *o.class_index) : current.base;
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
