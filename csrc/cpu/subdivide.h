// Host function of subdivide, for refine.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../subdivide_common.h"

namespace rendseg {

// A map in the loop of PointRend that is not stored: `base`, upsampled once for each of `steps`, whose cells then take
// the values of the head.
struct RefinedMap {
  struct Step {
    at::Tensor indices, values;  // [N,k] ascending, [N,k,C] of the dtype of base
  };
  at::Tensor base;  // [N,C,h,w]
  std::vector<Step> steps;
};

// map[N,C,h,w] -> (fine[N,C,H,W], labels[N,H,W] uint8 or int16, or empty; indices[N,k]; coords[N,k,2]). Nothing is
// checked but class_index.
std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_refined_cpu(const RefinedMap& map, int64_t num_points,
                                                                     int64_t scale_factor, bool align_corners,
                                                                     const std::optional<at::Tensor>& class_index,
                                                                     SubdivideWanted wanted);

}  // namespace rendseg
