// What the CPU and the CUDA mask_losses and mask_costs share: argument checks, and targets as views.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/OptionalArrayRef.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "mask_views.h"
#include "point_sample_common.h"

namespace rendseg {

inline MaskDtype mask_dtype(const at::Tensor& target, const std::string& name) {
  switch (target.scalar_type()) {
    case at::kBool:
    case at::kByte:
      return MaskDtype::kUint8;
    case at::kChar:
      return MaskDtype::kInt8;
    case at::kShort:
      return MaskDtype::kInt16;
    case at::kInt:
      return MaskDtype::kInt32;
    case at::kLong:
      return MaskDtype::kInt64;
    case at::kHalf:
      return MaskDtype::kHalf;
    case at::kBFloat16:
      return MaskDtype::kBFloat16;
    case at::kFloat:
      return MaskDtype::kFloat;
    case at::kDouble:
      return MaskDtype::kDouble;
    default:
      TORCH_CHECK_TYPE(false, name, " must be bool, integer or floating, got ", target.scalar_type());
  }
}

// Logits, targets and options of both operators; the targets as views.
struct MaskCall {
  MaskOptions options;
  std::vector<MaskView> targets;
  int64_t most_targets = 0;
};

inline MaskCall check_masks(const at::Tensor& logits, at::TensorList targets, const at::Tensor& coords,
                            c10::string_view label_mode, c10::string_view padding_mode,
                            at::OptionalIntArrayRef canvas) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_option(label_mode, "label_mode", "bilinear", "nearest");
  check_option(padding_mode, "padding_mode", "zeros", "border");
  check_logits(logits);
  TORCH_CHECK_VALUE(logits.size(2) + 4 < kMost / (logits.size(3) + 4), "logits must have fewer than 2^31 cells (H*W), ",
                    "got shape ", logits.sizes());
  TORCH_CHECK_VALUE(static_cast<int64_t>(targets.size()) == logits.size(0),
                    "targets must hold one tensor for each of the ", logits.size(0), " images of logits, got ",
                    targets.size());
  if (canvas.has_value()) {
    TORCH_CHECK_VALUE(canvas->size() == 2 && (*canvas)[0] > 0 && (*canvas)[1] > 0,
                      "canvas must be (height, width), both positive, got ", *canvas);
    TORCH_CHECK_VALUE((*canvas)[0] < kMost && (*canvas)[1] < kMost, "canvas must have sides below 2^31, got ", *canvas);
  }
  MaskCall call{{label_mode == "nearest", padding_mode == "border"}, {}, 0};
  for (size_t b = 0; b < targets.size(); ++b) {
    const at::Tensor& target = targets[b];
    const std::string name = "targets[" + std::to_string(b) + "]";
    check_strided(target, name.c_str());
    check_rank(target, name.c_str(), "[T, h, w]", 3);
    MaskView view;
    view.dtype = mask_dtype(target, name);
    TORCH_CHECK_VALUE(target.size(0) == 0 || target.size(1) * target.size(2) > 0, name,
                      " must have at least one cell (h*w > 0), got shape ", target.sizes());
    TORCH_CHECK_VALUE(target.size(1) < kMost && target.size(2) < kMost, name, " must have sides below 2^31, got shape ",
                      target.sizes());
    if (canvas.has_value()) {
      TORCH_CHECK_VALUE(target.size(1) <= (*canvas)[0] && target.size(2) <= (*canvas)[1], name,
                        " must fit on the canvas ", *canvas, ", got shape ", target.sizes());
    }
    check_same_device(target, name.c_str(), logits, "logits");
    view.data = target.const_data_ptr();
    view.count = target.size(0);
    view.height = static_cast<int32_t>(target.size(1));
    view.width = static_cast<int32_t>(target.size(2));
    view.canvas_height = canvas.has_value() ? static_cast<int32_t>((*canvas)[0]) : view.height;
    view.canvas_width = canvas.has_value() ? static_cast<int32_t>((*canvas)[1]) : view.width;
    view.stride_t = target.stride(0);
    view.stride_y = target.stride(1);
    view.stride_x = target.stride(2);
    call.targets.push_back(view);
    call.most_targets = std::max(call.most_targets, view.count);
  }
  check_strided(coords, "coords");
  return call;
}

inline MaskCall check_mask_costs(const at::Tensor& logits, at::TensorList targets, const at::Tensor& coords,
                                 c10::string_view label_mode, c10::string_view padding_mode,
                                 at::OptionalIntArrayRef canvas) {
  MaskCall call = check_masks(logits, targets, coords, label_mode, padding_mode, canvas);
  check_coords(coords, logits, "logits", false);
  return call;
}

// image_index[N], query_index[N] and target_index[N].
struct MaskPairs {
  const at::Tensor &image, &query, &target;
};

inline MaskCall check_mask_losses(const at::Tensor& logits, at::TensorList targets, const at::Tensor& coords,
                                  const MaskPairs& pairs, c10::string_view label_mode, c10::string_view padding_mode,
                                  at::OptionalIntArrayRef canvas) {
  MaskCall call = check_masks(logits, targets, coords, label_mode, padding_mode, canvas);
  check_index(pairs.image, "image_index", nullptr, "", logits);
  check_coords(coords, pairs.image, "image_index", false);
  check_index(pairs.query, "query_index", &pairs.image, "image_index", logits);
  check_index(pairs.target, "target_index", &pairs.image, "image_index", logits);
  return call;
}

inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_loss_grad(const at::Tensor& grad, const char* name, const at::Tensor& logits,
                            const at::Tensor& image_index) {
  check_strided(grad, name);
  TORCH_CHECK_VALUE(grad.sizes() == image_index.sizes(), name, " must have shape [N] with N = ", image_index.size(0),
                    " as in image_index, got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == loss_dtype(logits), name, " must be ", loss_dtype(logits), ", got ",
                   grad.scalar_type());
  check_same_device(grad, name, logits, "logits");
}

}  // namespace rendseg
