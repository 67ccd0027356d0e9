// What the CPU and the CUDA refine share: options, argument checks, what a step recomputes and the map that it fills.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/argmax.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>
#include <string>

#include "checks.h"
#include "strided_tensors.h"

namespace rendseg {

struct RefineOptions {
  int64_t steps, num_points;
  bool current_source;  // the coarse features are cells of the step's upsampled map, not samples of the original one
  int64_t scale_factor;
  bool align_corners, border, coarse_each_layer, coarse_first, labels;
  std::optional<at::Tensor> class_index;         // [N]: the uncertainty is that of one class
  bool class_only;                               // the result holds that class alone
  std::optional<at::Tensor> image_index, boxes;  // [N], [N,4]: the maps are masks of boxes of the feature maps
  // Whether the maps of the loop hold one class: unless the head reads them.
  bool single() const { return class_only && !current_source; }
};

// Every step must be a map that subdivide takes.
inline void check_growth(int64_t height, int64_t width, int64_t steps, int64_t scale) {
  TORCH_CHECK_VALUE(scale < kMostSide, "scale_factor must be less than 2^31, got ", scale);
  TORCH_CHECK_VALUE(height < kMostSide && width < kMostSide, "coarse must have H and W below 2^31, got ", height, " x ",
                    width);
  int64_t h = height, w = width;
  for (int64_t step = 1; step <= steps; ++step) {
    h *= scale, w *= scale;
    TORCH_CHECK_VALUE(countable(h, w), "steps must give fewer than 2^32 cells, got ", steps, " steps of ", scale,
                      " from ", height, " x ", width, ": step ", step, " has ", h, " x ", w);
  }
}

// boxes[N,4] in images[N], and the class of each.
inline void check_rois(const at::Tensor& coarse, const at::Tensor& feature, const RefineOptions& o) {
  if (o.class_index.has_value()) {
    TORCH_CHECK_VALUE(!o.labels, "output must be \"logits\" or \"class\" with class_index: labels compare all classes");
    check_same_device(*o.class_index, "class_index", coarse, "coarse");
    check_index(*o.class_index, "class_index", &coarse, "coarse", coarse);
    check_values(*o.class_index, coarse.size(1), check_class);
  }
  TORCH_CHECK_VALUE(!o.class_only || o.class_index.has_value(),
                    "class_index must be given with output=\"class\", got None");
  if (!o.boxes.has_value()) return;
  check_same_device(*o.image_index, "image_index", coarse, "coarse");
  check_index(*o.image_index, "image_index", &coarse, "coarse", coarse);
  check_values(*o.image_index, feature.size(0), check_image);
  check_strided(*o.boxes, "boxes");
  TORCH_CHECK_TYPE(o.boxes->scalar_type() == at::kFloat, "boxes must be float32, got ", o.boxes->scalar_type());
  TORCH_CHECK_VALUE(o.boxes->dim() == 2 && o.boxes->size(0) == coarse.size(0) && o.boxes->size(1) == 4,
                    "boxes must have shape [N, 4] with N = ", coarse.size(0), " as in coarse, got ", o.boxes->sizes());
  check_same_device(*o.boxes, "boxes", coarse, "coarse");
}

inline void check_refine(const at::Tensor& coarse, at::TensorList features, at::TensorList weights,
                         at::TensorList biases, const RefineOptions& o, c10::string_view coarse_source,
                         c10::string_view padding_mode) {
  check_logits(coarse, "coarse");
  check_num_points(o.num_points);
  TORCH_CHECK_VALUE(coarse_source == "original" || coarse_source == "current",
                    "coarse_source must be one of original, current, got '", coarse_source, "'");
  TORCH_CHECK_VALUE(padding_mode == "zeros" || padding_mode == "border",
                    "padding_mode must be one of zeros, border, got '", padding_mode, "'");
  TORCH_CHECK_VALUE(o.scale_factor >= 2, "scale_factor must be at least 2, got ", o.scale_factor);
  TORCH_CHECK_VALUE(o.steps >= 0, "steps must not be negative, got ", o.steps);
  check_growth(coarse.size(2), coarse.size(3), o.steps, o.scale_factor);
  const int64_t classes = coarse.size(1);
  TORCH_CHECK_VALUE(!o.labels || classes <= 32768, "output=\"labels\" holds at most 32768 classes, got ", classes);
  TORCH_CHECK_VALUE(!features.empty(), "features must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < features.size(); ++i) {
    const std::string name = "features[" + std::to_string(i) + "]";
    check_sampled_map(features[i], name.c_str());
    const at::Tensor& like = o.boxes.has_value() ? features[0] : coarse;
    TORCH_CHECK_VALUE(features[i].size(0) == like.size(0), name, " must have N = ", like.size(0), " as in ",
                      o.boxes.has_value() ? "features[0]" : "coarse", ", got shape ", features[i].sizes());
    TORCH_CHECK_TYPE(features[i].scalar_type() == features[0].scalar_type(), name,
                     " must have the dtype of features[0] (", features[0].scalar_type(), "), got ",
                     features[i].scalar_type());
    check_same_device(features[i], name.c_str(), coarse, "coarse");
  }
  const int64_t channels = total_channels(features, "features");
  check_rois(coarse, features[0], o);
  TORCH_CHECK_VALUE(!weights.empty() && weights.size() == biases.size(),
                    "weights and biases must hold one tensor per layer, got ", weights.size(), " and ", biases.size());
  const at::ScalarType dtype = weights[0].scalar_type();
  for (size_t i = 0; i < weights.size(); ++i) {
    const std::string name = "weights[" + std::to_string(i) + "]", bias = "biases[" + std::to_string(i) + "]";
    const int64_t in = i == 0                ? channels + classes
                       : o.coarse_each_layer ? weights[i - 1].size(0) + classes
                                             : weights[i - 1].size(0);
    check_strided(weights[i], name.c_str());
    check_feature_dtype(weights[i], name.c_str());
    TORCH_CHECK_VALUE(weights[i].dim() == 2 && weights[i].size(1) == in && weights[i].size(0) > 0, name,
                      " must have shape [O, I] with I = ", in, ", got ", weights[i].sizes());
    TORCH_CHECK_VALUE(i + 1 < weights.size() || weights[i].size(0) == classes, name,
                      " must have shape [C, I] with C = ", classes, " as in coarse, got ", weights[i].sizes());
    TORCH_CHECK_VALUE(biases[i].dim() == 1 && biases[i].size(0) == weights[i].size(0), bias,
                      " must have shape [O] with O = ", weights[i].size(0), ", got ", biases[i].sizes());
    TORCH_CHECK_TYPE(weights[i].scalar_type() == dtype && biases[i].scalar_type() == dtype, name, " and ", bias,
                     " must have the dtype of weights[0] (", dtype, "), got ", weights[i].scalar_type(), " and ",
                     biases[i].scalar_type());
    check_same_device(weights[i], name.c_str(), coarse, "coarse");
    check_same_device(biases[i], bias.c_str(), coarse, "coarse");
  }
}

// The arguments of _refine_mlp, checked; its options as one thing.
inline RefineOptions refine_options(const at::Tensor& coarse, at::TensorList features, at::TensorList weights,
                                    at::TensorList biases, int64_t steps, int64_t num_points,
                                    c10::string_view coarse_source, int64_t scale_factor, bool align_corners,
                                    c10::string_view padding_mode, bool coarse_each_layer, bool coarse_first,
                                    bool labels, const std::optional<at::Tensor>& class_index, bool class_only,
                                    const std::optional<at::Tensor>& image_index,
                                    const std::optional<at::Tensor>& boxes) {
  TORCH_CHECK_VALUE(image_index.has_value() == boxes.has_value(),
                    "image_index and boxes must be given together, got one of them");
  const bool current = coarse_source == "current", border = padding_mode == "border";
  const RefineOptions options{steps,      num_points,        current,      scale_factor, align_corners,
                              border,     coarse_each_layer, coarse_first, labels,       class_index,
                              class_only, image_index,       boxes};
  check_refine(coarse, features, weights, biases, options, coarse_source, padding_mode);
  return options;
}

// What one step recomputes: `count` cells of each image of a map of height x width.
struct RefineCells {
  int64_t height, width, count;
  bool every;   // all of them: nothing is upsampled or selected
  bool needed;  // false: the next step replaces every cell, and reads none
  bool labels;  // the step is the last, and writes labels
};

inline RefineCells refine_cells(const at::Tensor& coarse, int64_t step, const RefineOptions& o) {
  int64_t height = coarse.size(2), width = coarse.size(3);
  for (int64_t i = 0; i <= step; ++i) height *= o.scale_factor, width *= o.scale_factor;
  const bool every = o.num_points >= height * width, last = step + 1 == o.steps;
  // Divided, since a step that does not come need not fit into an integer.
  const bool next = !last && o.num_points / o.scale_factor / o.scale_factor >= height * width;
  return {height, width, every ? height * width : o.num_points, every, o.current_source || !next, o.labels && last};
}

// Whether the loop runs in float64.
inline bool refine_is_wide(const at::Tensor& coarse, at::TensorList features, at::TensorList weights) {
  const bool wide = features[0].scalar_type() == at::kDouble;
  TORCH_CHECK_TYPE((weights[0].scalar_type() == at::kDouble) == wide && (coarse.scalar_type() == at::kDouble) == wide,
                   "coarse, features and weights must all be float64 or none, got ", coarse.scalar_type(), ", ",
                   features[0].scalar_type(), " and ", weights[0].scalar_type());
  return wide;
}

inline at::ScalarType label_dtype(int64_t classes) { return classes <= 256 ? at::kByte : at::kShort; }

// map[N,C,H,W] -> [N,1,H,W], the class of each mask.
inline at::Tensor of_class(const at::Tensor& map, const at::Tensor& class_index) {
  return map.gather(1, class_index.view({-1, 1, 1, 1}).expand({-1, 1, map.size(2), map.size(3)}));
}

// The result of no step at all.
inline at::Tensor unrefined(const at::Tensor& coarse, bool labels, const RefineOptions& o) {
  if (o.class_only) return of_class(coarse, *o.class_index);
  return labels ? coarse.argmax(1).to(label_dtype(coarse.size(1))) : coarse.clone();
}

// The map of a step that recomputes every cell, not yet filled: logits[N,C,H,W] or labels[N,H,W].
inline at::Tensor empty_step(const at::Tensor& coarse, bool labels, int64_t height, int64_t width,
                             const RefineOptions& o) {
  const int64_t n = coarse.size(0), classes = o.single() ? 1 : coarse.size(1);
  if (labels) return at::empty({n, height, width}, coarse.options().dtype(label_dtype(classes)));
  return at::empty({n, classes, height, width}, coarse.options().memory_format(coarse.suggest_memory_format()));
}

}  // namespace rendseg
