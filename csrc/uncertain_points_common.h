// What the CPU and the CUDA uncertainty, uncertain_points and sample_uncertain_points share: argument checks, and which
// maps the kernels read in place.
#pragma once

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "checks.h"
#include "strided_tensors.h"

namespace rendseg {

// Whether the kernels read these strides as they are: cells equally spaced in row order, and either the cells or the
// channels adjacent.
inline bool readable(const at::Tensor& logits) {
  const int64_t cell = cell_stride(logits);
  if (logits.size(2) > 1 && logits.stride(2) != cell * logits.size(3)) return false;
  return cell == 1 || (cell > 0 && (logits.size(1) == 1 || logits.stride(1) == 1));
}

// The logits, copied where the kernels could not read them.
inline at::Tensor readable_maps(const at::Tensor& logits) {
  return readable(logits) ? logits.detach() : logits.detach().contiguous();
}

struct DrawCounts {
  int64_t candidates;
  int64_t kept;
  int64_t uniform;
};

inline DrawCounts draw_counts(int64_t num_points, double oversample_ratio, double importance_ratio) {
  check_num_points(num_points);
  TORCH_CHECK_VALUE(oversample_ratio >= 1 && oversample_ratio < std::numeric_limits<double>::infinity(),
                    "oversample_ratio must be at least 1 and finite, got ", oversample_ratio);
  TORCH_CHECK_VALUE(importance_ratio >= 0 && importance_ratio <= 1, "importance_ratio must lie in [0, 1], got ",
                    importance_ratio);
  const double candidates = oversample_ratio * static_cast<double>(num_points);
  TORCH_CHECK_VALUE(candidates < 2147483648.0, "oversample_ratio * num_points must be less than 2**31, got ",
                    candidates);
  const int64_t kept = static_cast<int64_t>(importance_ratio * static_cast<double>(num_points));
  return {static_cast<int64_t>(candidates), kept, num_points - kept};
}

// logits[B,C,H,W], class_index[N], image_index[N], random_coords[N,Q,2] of sample_uncertain_points.
inline DrawCounts check_sample(const at::Tensor& logits, int64_t num_points, double oversample_ratio,
                               double importance_ratio, const std::optional<at::Tensor>& class_index,
                               const std::optional<at::Tensor>& image_index, c10::string_view padding_mode,
                               const std::optional<at::Generator>& generator,
                               const std::optional<at::Tensor>& random_coords) {
  check_logits(logits);
  check_class_index(class_index, logits, image_index);
  const DrawCounts counts = draw_counts(num_points, oversample_ratio, importance_ratio);
  TORCH_CHECK_VALUE(padding_mode == "zeros" || padding_mode == "border",
                    "padding_mode must be one of zeros, border, got '", padding_mode, "'");
  TORCH_CHECK_VALUE(logits.size(2) < (int64_t{1} << 31) / logits.size(3),
                    "logits must have fewer than 2**31 cells (H*W) for sampling, got shape ", logits.sizes());
  const int64_t images = image_index.has_value() ? image_index->size(0) : logits.size(0);
  const int64_t total = counts.candidates + counts.uniform;
  if (random_coords.has_value()) {
    const at::Tensor& given = *random_coords;
    check_strided(given, "random_coords");
    TORCH_CHECK_VALUE(given.dim() == 3 && given.size(0) == images && given.size(1) == total && given.size(2) == 2,
                      "random_coords must have shape [N, Q, 2] = [", images, ", ", total, ", 2], got ", given.sizes());
    TORCH_CHECK_TYPE(given.scalar_type() == at::kFloat, "random_coords must be float32, got ", given.scalar_type());
    check_same_device(given, "random_coords", logits, "logits");
  } else if (generator.has_value()) {
    TORCH_CHECK(generator->device() == logits.device(), "generator must be on the device of logits (", logits.device(),
                "), got ", generator->device());
  }
  return counts;
}

}  // namespace rendseg
