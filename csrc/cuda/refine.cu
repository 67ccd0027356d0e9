// Host side of the CUDA refine: the whole inference loop of PointRend with a stock point head in one call.
//
// Each step is subdivide and one fused kernel (refine.cuh) for heads in half types, and for float32 heads where PyTorch
// lets convolutions use tf32, as the head would when called. Anything else (float64, ieee float32, very wide heads)
// runs point_sample, matrix products of ATen and a scatter.
#include "launch.h"

#include <ATen/Context.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/relu.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../refine_common.h"
#include "../strided_tensors.h"
#include "point_sample.h"
#include "refine.cuh"
#include "subdivide.h"

namespace rendseg {
namespace {

// The flag that governs torch.nn.Conv1d, of which stock heads are made. Asked with the name of the operation it neither
// warns nor minds which of PyTorch's two interfaces set it; PyTorch 2.8 has one interface, and no name.
template <typename Operation>
bool ask_for_convolutions(bool (at::Context::*flag)(Operation) const) {
  return (at::globalContext().*flag)(Operation::value_type::CONV);
}
[[maybe_unused]] bool ask_for_convolutions(bool (at::Context::*flag)() const) { return (at::globalContext().*flag)(); }
bool head_may_use_tf32() { return ask_for_convolutions(&at::Context::allowTF32CuDNN); }

// map[N,C,H,W]; `width` channels fill 16 bytes of a row.
RefineMap refine_map(const at::Tensor& map, int64_t width) {
  const int64_t bytes = std::min<int64_t>(width * map.element_size(), 16);
  const auto steps_of = [&](int64_t dim) { return map.stride(dim) * map.element_size() % bytes == 0; };
  const bool vectors = (map.stride(1) == 1 || map.size(1) == 1) && map.size(1) % width == 0 &&
                       is_aligned(map.const_data_ptr(), bytes) && steps_of(0) && steps_of(2) && steps_of(3);
  return {map_view(map), vectors};
}

// Sizes that the fused kernel holds in 32 bits.
bool has_small_sizes(const at::Tensor& map) {
  return map.size(1) < (int64_t{1} << 20) && map.size(2) <= INT32_MAX && map.size(3) <= INT32_MAX;
}

RefineTarget refine_target(const at::Tensor& out /*[N,C,H,W] or [N,H,W]*/, at::ScalarType logits, bool labels) {
  if (labels) return {out.mutable_data_ptr(), dtype_of(logits), int32_t(out.element_size()), out.stride(0), 0, 1};
  return {out.mutable_data_ptr(), dtype_of(logits), 0, out.stride(0), out.stride(1), cell_stride(out)};
}

class Refiner {
 public:
  Refiner(const at::Tensor& coarse, at::TensorList features, at::TensorList weights, at::TensorList biases,
          const RefineOptions& options)
      : launch_(coarse), coarse_(coarse), features_(features), options_(options), dtype_(weights[0].scalar_type()) {
    for (size_t l = 0; l < weights.size(); ++l) {
      weights_.push_back(weights[l].detach().contiguous());
      biases_.push_back(biases[l].detach().contiguous());
    }
    if (options.single()) class_index_ = options.class_index->contiguous();
    if (options.boxes.has_value()) {
      image_index_ = options.image_index->contiguous();
      corners_ = options.boxes->detach().contiguous();
      boxes_ = {data<int64_t>(image_index_), data<float>(corners_), features[0].size(0)};
    }
  }

  at::Tensor run() {
    const bool fused = plan_fused();
    const at::Tensor zeros = clear_for_steps();
    auto* zeroed = static_cast<unsigned char*>(zeros.mutable_data_ptr());
    at::Tensor current = coarse_;
    std::optional<at::Tensor> class_index = options_.class_index;
    if (options_.single()) {
      current = of_class(coarse_, *options_.class_index);
      class_index.reset();  // of one class
    }
    for (int64_t step = 0; step < options_.steps; ++step) {
      Cells cells{refine_cells(coarse_, step, options_), {}, {}};
      if (!cells.needed) continue;
      at::Tensor next;
      if (cells.every) {
        next = empty_step(coarse_, cells.labels, cells.height, cells.width, options_);
      } else {
        std::tie(next, cells.indices, cells.coords) =
            subdivide_step(current, options_.num_points, options_.scale_factor, options_.align_corners, class_index,
                           cells.labels, zeroed);
        zeroed += subdivide_zeroed_bytes(current.size(0), current.size(1), cells.height * cells.width, cells.labels);
      }
      RefineTarget target = refine_target(next, coarse_.scalar_type(), cells.labels);
      if (options_.single()) target.class_index = data<int64_t>(class_index_);
      if (next.numel() > 0) fused ? run_fused(current, cells, target) : run_aten(current, cells, target);
      current = std::move(next);
    }
    return options_.class_only && !options_.single() ? of_class(current, *options_.class_index) : current;
  }

 private:
  // What the steps that select want to find at zero, one step after the other: one call clears it for all.
  at::Tensor clear_for_steps() {
    constexpr int64_t kMost = int64_t{1} << 31;  // a step beyond is an error when its turn comes
    int64_t bytes = 0, height = coarse_.size(2), width = coarse_.size(3);
    for (int64_t step = 0; step < options_.steps && options_.scale_factor < kMost; ++step) {
      height *= options_.scale_factor, width *= options_.scale_factor;
      if (height >= kMost || width >= kMost) break;
      const bool labels = options_.labels && step + 1 == options_.steps;
      if (options_.num_points < height * width) {
        bytes += subdivide_zeroed_bytes(coarse_.size(0), coarse_.size(1), height * width, labels);
      }
    }
    at::Tensor zeros = allocate_bytes(bytes, coarse_);
    launch_.fill_zero(zeros.mutable_data_ptr(), bytes);
    return zeros;
  }

  // indices[N,count] and their coords[N,count,2]; undefined for every cell.
  struct Cells : RefineCells {
    at::Tensor indices, coords;
  };

  // f.operator()<H>() with the type of the head: half_t, bfloat16_t or float, which stands for tf32.
  template <typename F>
  void with_head_type(F&& f) const {
    if (dtype_ == at::kHalf) return f.template operator()<half_t>();
    if (dtype_ == at::kBFloat16) return f.template operator()<bfloat16_t>();
    return f.template operator()<float>();
  }

  // Whether the fused kernel takes it; then the head is packed.
  bool plan_fused() {
    if (dtype_ == at::kDouble || (dtype_ == at::kFloat && !head_may_use_tf32())) return false;
    std::vector<int64_t> channels, outs;
    for (const at::Tensor& map : features_) {
      if (!has_small_sizes(map)) return false;
      channels.push_back(map.size(1));
    }
    for (const at::Tensor& weight : weights_) outs.push_back(weight.size(0));
    if (!has_small_sizes(coarse_) ||
        !plan_refine(head_, c10::elementSize(dtype_), coarse_.size(1), channels.data(), std::ssize(channels),
                     outs.data(), std::ssize(outs), options_.coarse_each_layer, options_.coarse_first)) {
      return false;
    }
    // The coarse map of a later step is larger.
    const int64_t longest = std::max(coarse_.size(2), coarse_.size(3));
    int64_t grown = longest;
    for (int64_t step = 0; step < options_.steps && grown <= INT32_MAX; ++step) grown *= options_.scale_factor;
    if (grown > INT32_MAX) return false;
    if (refine_points_per_block(head_, maps(), 1, launch_.processors(), launch_.shared_limit()) == 0) return false;
    if (coarse_.size(0) == 0) return true;
    Scratch scratch;
    scratch.add(head_.packed, head_.words);
    scratch.add(head_.biases, head_.bias_words);
    packed_ = allocate(scratch, coarse_);
    for (size_t l = 0; l < weights_.size(); ++l) {
      head_.layers[l].weight = weights_[l].const_data_ptr();
      head_.layers[l].bias = biases_[l].const_data_ptr();
    }
    with_head_type([&]<typename H>() { run_pack_head<H>(launch_, head_); });
    return true;
  }

  int64_t maps() const { return static_cast<int64_t>(features_.size()) + 1; }

  // Where the coarse logits come from: the original map, or the one that this step upsamples.
  const at::Tensor& source_of(const at::Tensor& current) const { return options_.current_source ? current : coarse_; }

  void run_fused(const at::Tensor& current, const Cells& cells, const RefineTarget& target) {
    const int64_t width = kChunkBytes / static_cast<int64_t>(c10::elementSize(dtype_));
    const at::Tensor indices = cells.indices.defined() ? cells.indices.contiguous() : at::Tensor();
    RefineStep step{};
    step.maps[0] = refine_map(source_of(current), width);
    for (size_t m = 0; m < features_.size(); ++m) step.maps[m + 1] = refine_map(features_[m], width);
    step.map_count = static_cast<int32_t>(maps());
    step.border = options_.border;
    step.scale = options_.current_source ? options_.scale_factor : 0;
    step.align_corners = options_.align_corners;
    step.indices = indices.defined() ? data<int64_t>(indices) : nullptr;
    step.images = coarse_.size(0);
    step.count = cells.count;
    step.height = cells.height;
    step.width = cells.width;
    step.boxes = boxes_;
    step.target = target;
    with_head_type([&]<typename H>() { run_refine_points<H>(launch_, head_, step); });
  }

  // In parts whose activations stay within 32 MB, and which thus never hold the logits of a large map.
  void run_aten(const at::Tensor& current, const Cells& cells, const RefineTarget& target) {
    std::optional<at::NoTF32Guard> ieee;
    if (dtype_ == at::kFloat && !head_may_use_tf32()) ieee.emplace();
    int64_t widest = 1;
    for (const at::Tensor& weight : weights_) widest = std::max({widest, weight.size(0), weight.size(1)});
    const int64_t budget = (int64_t{32} << 20) / static_cast<int64_t>(c10::elementSize(dtype_)) / widest;
    const int64_t points = std::clamp<int64_t>(budget, 1, cells.count);
    const int64_t images = std::clamp<int64_t>(budget / cells.count, 1, coarse_.size(0));
    for (int64_t image = 0; image < coarse_.size(0); image += images) {
      for (int64_t first = 0; first < cells.count; first += points) {
        run_part(current, cells, target, image, std::min(images, coarse_.size(0) - image), first,
                 std::min(points, cells.count - first));
      }
    }
  }

  // `points` points from `first` on of `images` images from `image` on.
  void run_part(const at::Tensor& current, const Cells& cells, RefineTarget target, int64_t image, int64_t images,
                int64_t first, int64_t points) {
    const at::TensorOptions options = coarse_.options().memory_format(at::MemoryFormat::Contiguous);
    const at::Tensor indices = cells.indices.defined() ? cells.indices.contiguous() : at::Tensor();
    RefineValues values{nullptr, images, coarse_.size(1), points, nullptr, 0, first};
    if (indices.defined()) {
      values.indices = data<int64_t>(indices) + image * cells.count + first;
      values.index_stride = cells.count;
    }
    at::Tensor coords;  // [images,points,2]
    if (cells.coords.defined()) {
      coords = cells.coords.narrow(0, image, images).narrow(1, first, points);
    } else {
      coords = at::empty({images, points, 2}, options.dtype(at::kFloat));
      run_cell_centres(launch_, mutable_data<float>(coords), images, points, first, cells.height, cells.width);
    }
    const auto sample_boxes = [&](const at::Tensor& map) {
      const at::Tensor samples = at::empty({images, map.size(1), points}, options.dtype(map.scalar_type()));
      const at::Tensor placed = coords.contiguous();
      const RefineValues to{samples.mutable_data_ptr(), images, map.size(1), points, nullptr, 0, 0};
      dispatch_floating(map.scalar_type(), "features", [&]<typename S>() {
        run_sample_boxes<S>(launch_, map_view(map), boxes_, image, data<float>(placed), options_.border, to);
      });
      return samples;
    };
    const auto sample = [&](std::vector<at::Tensor> maps) {
      for (at::Tensor& map : maps) map = map.narrow(0, image, images);
      return point_sample_cuda(maps, coords, "bilinear", options_.border ? "border" : "zeros", false).to(dtype_);
    };
    const auto read_upsampled = [&] {
      const at::Tensor samples = at::empty({images, coarse_.size(1), points}, options);
      values.data = samples.mutable_data_ptr();
      const UpsampledMap map{map_view(current.narrow(0, image, images)), options_.scale_factor, options_.align_corners};
      dispatch_floating(samples.scalar_type(), "coarse",
                        [&]<typename S>() { run_read_upsampled<S>(launch_, map, values); });
      return samples.to(dtype_);
    };
    const at::Tensor coarse = options_.current_source ? read_upsampled() : sample({coarse_});
    const auto sample_features = [&] {
      if (!corners_.defined()) return sample(features_.vec());
      std::vector<at::Tensor> samples;
      for (const at::Tensor& map : features_) samples.push_back(sample_boxes(map));
      return at::cat(samples, 1).to(dtype_);
    };
    const at::Tensor logits = run_layers(sample_features(), coarse);
    values.data = logits.mutable_data_ptr();
    target.data = static_cast<char*>(target.data) + image * target.stride_n * bytes_of_value(target);
    if (target.class_index != nullptr) target.class_index += image;
    dispatch_floating(dtype_, "weights", [&]<typename V>() { run_write_values<V>(launch_, values, target); });
  }

  static int64_t bytes_of_value(const RefineTarget& target) {
    return target.label_bytes != 0 ? target.label_bytes : element_size(target.dtype);
  }

  // fine[N,Cf,P], coarse[N,C,P] -> [N,C,P]
  at::Tensor run_layers(const at::Tensor& fine, const at::Tensor& coarse) const {
    const auto join = [&](const at::Tensor& x) {
      return options_.coarse_first ? at::cat({coarse, x}, 1) : at::cat({x, coarse}, 1);
    };
    at::Tensor x = join(fine);
    for (size_t l = 0; l < weights_.size(); ++l) {
      const at::Tensor weight = weights_[l].unsqueeze(0).expand({x.size(0), -1, -1});
      x = at::baddbmm(biases_[l].view({1, -1, 1}), weight, x);
      if (l + 1 == weights_.size()) break;
      at::relu_(x);
      if (options_.coarse_each_layer) x = join(x);
    }
    return x.contiguous();
  }

  CudaLaunch launch_;
  const at::Tensor coarse_;  // [N,C,h,w]
  at::TensorList features_;
  const RefineOptions options_;
  const at::ScalarType dtype_;  // of the head
  std::vector<at::Tensor> weights_, biases_;
  RefineHead head_{};
  at::Tensor packed_;
  at::Tensor class_index_, image_index_, corners_;  // of masks
  RefineBoxes boxes_{};
};

}  // namespace

at::Tensor refine_mlp_cuda(const at::Tensor& coarse /*[N,C,h,w]*/, at::TensorList features /*each [N,Cf,Hf,Wf]*/,
                           at::TensorList weights /*each [O,I]*/, at::TensorList biases /*each [O]*/, int64_t steps,
                           int64_t num_points, c10::string_view coarse_source, int64_t scale_factor, bool align_corners,
                           c10::string_view padding_mode, bool coarse_each_layer, bool coarse_first, bool labels,
                           const std::optional<at::Tensor>& class_index /*[N]*/, bool class_only,
                           const std::optional<at::Tensor>& image_index /*[N]*/,
                           const std::optional<at::Tensor>& boxes /*[N,4]*/) {
  const RefineOptions options = refine_options(coarse, features, weights, biases, steps, num_points, coarse_source,
                                               scale_factor, align_corners, padding_mode, coarse_each_layer,
                                               coarse_first, labels, class_index, class_only, image_index, boxes);
  if (steps == 0) {
    CudaLaunch guard(coarse);
    return unrefined(coarse, labels, options);
  }
  refine_is_wide(coarse, features, weights);
  return Refiner(coarse, features, weights, biases, options).run();
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) { m.impl("_refine_mlp", TORCH_FN(rendseg::refine_mlp_cuda)); }
