// What the CPU and the CUDA point_sample share: argument checks, sizes and layouts of the results.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/safe_numerics.h>

#include <cstdint>
#include <string>
#include <vector>

#include "checks.h"

namespace rendseg {

// What every map of a call shares.
struct SampleCall {
  bool nearest, border, align_corners;
  int64_t images, points;
};

inline void check_option(c10::string_view value, const char* name, c10::string_view first, c10::string_view second) {
  TORCH_CHECK_VALUE(value == first || value == second, name, " must be one of ", first, ", ", second, ", got '", value,
                    "'");
}

// coords[N,P,2], or where `grid` also [N,Hg,Wg,2].
inline void check_coords(const at::Tensor& coords, const at::Tensor& of, const char* of_name, bool grid) {
  check_strided(coords, "coords");
  TORCH_CHECK_VALUE(
      (coords.dim() == 3 || (grid && coords.dim() == 4)) && coords.size(-1) == 2 && coords.size(0) == of.size(0),
      "coords must have shape ", grid ? "[N, P, 2] or [N, Hg, Wg, 2]" : "[N, P, 2]", " with N = ", of.size(0),
      " as in ", of_name, ", got ", coords.sizes());
  TORCH_CHECK_TYPE(coords.scalar_type() == at::kFloat || coords.scalar_type() == at::kDouble,
                   "coords must be float32 or float64 (half precision cannot address a large map), got ",
                   coords.scalar_type());
  check_same_device(coords, "coords", of, of_name);
}

inline SampleCall check_point_sample(at::TensorList input, const at::Tensor& coords, c10::string_view mode,
                                     c10::string_view padding_mode, bool align_corners) {
  check_option(mode, "mode", "bilinear", "nearest");
  check_option(padding_mode, "padding_mode", "zeros", "border");
  TORCH_CHECK_VALUE(!input.empty(), "input must hold at least one tensor, got an empty list");
  for (size_t i = 0; i < input.size(); ++i) {
    const at::Tensor& map = input[i];
    const std::string name = input.size() == 1 ? "input" : "input[" + std::to_string(i) + "]";
    check_sampled_map(map, name.c_str());
    TORCH_CHECK_VALUE(map.size(0) == input[0].size(0), name, " must have N = ", input[0].size(0),
                      " as in input[0], got shape ", map.sizes());
    TORCH_CHECK_TYPE(map.scalar_type() == input[0].scalar_type(), name, " must have the dtype of input[0] (",
                     input[0].scalar_type(), "), got ", map.scalar_type());
    check_same_device(map, name.c_str(), input[0], "input[0]");
  }
  check_coords(coords, input[0], "input", true);
  int64_t points = coords.size(1);
  TORCH_CHECK_VALUE(coords.dim() == 3 || !c10::mul_overflows(points, coords.size(2), &points),
                    "coords must have fewer than 2^63 points, got shape ", coords.sizes());
  total_channels(input, "input");
  return {mode == "nearest", padding_mode == "border", align_corners, coords.size(0), points};
}

inline std::vector<int64_t> sample_sizes(at::TensorList input, const at::Tensor& coords) {
  std::vector<int64_t> sizes{coords.size(0), total_channels(input, "input")};
  for (int64_t d = 1; d + 1 < coords.dim(); ++d) sizes.push_back(coords.size(d));
  return sizes;
}

// `grad` is the gradient of the output.
inline void check_sample_grad(const at::Tensor& grad, at::TensorList input, const at::Tensor& coords) {
  check_strided(grad, "grad");
  const std::vector<int64_t> sizes = sample_sizes(input, coords);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef(sizes), "grad must have shape ", at::IntArrayRef(sizes),
                    " as the output, got ", grad.sizes());
  TORCH_CHECK_TYPE(grad.scalar_type() == input[0].scalar_type(), "grad must have the dtype of input (",
                   input[0].scalar_type(), "), got ", grad.scalar_type());
  check_same_device(grad, "grad", input[0], "input");
}

// Coordinates in the type of the arithmetic on `feature`.
inline at::Tensor coords_for(const at::Tensor& coords, at::ScalarType feature) {
  return coords.to(feature == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

// Layout of the gradient of a map: that of the map, where it is one of the two first-class layouts.
inline at::MemoryFormat gradient_format(const at::Tensor& map) {
  return !map.is_contiguous() && map.is_contiguous(at::MemoryFormat::ChannelsLast) ? at::MemoryFormat::ChannelsLast
                                                                                   : at::MemoryFormat::Contiguous;
}

// labels[N,H,W] and coords[N,P,2] of point_labels.
inline void check_point_labels(const at::Tensor& labels, const at::Tensor& coords) {
  check_strided(labels, "labels");
  check_rank(labels, "labels", "[N, H, W]", 3);
  const at::ScalarType dtype = labels.scalar_type();
  TORCH_CHECK_TYPE(
      dtype == at::kByte || dtype == at::kChar || dtype == at::kShort || dtype == at::kInt || dtype == at::kLong,
      "labels must be an integer tensor (labels never pass through float), got ", dtype);
  TORCH_CHECK_VALUE(labels.size(1) > 0 && labels.size(2) > 0,
                    "labels must have at least one cell (H*W > 0), got shape ", labels.sizes());
  check_coords(coords, labels, "labels", false);
}

}  // namespace rendseg
