// Host functions of the CUDA subdivide, for refine.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace rendseg {

// logits[N,C,h,w] -> (fine[N,C,H,W] or empty, indices[N,k], coords[N,k,2])
std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_cuda(const at::Tensor& logits, int64_t num_points,
                                                              int64_t scale_factor, bool align_corners,
                                                              const std::optional<at::Tensor>& class_index,
                                                              bool return_logits);

// logits[N,C,h,w] -> (labels[N,H,W] uint8 or int16, indices[N,k], coords[N,k,2])
std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_labels_cuda(const at::Tensor& logits, int64_t num_points,
                                                                     int64_t scale_factor, bool align_corners);

// grad[N,C,H,W] -> [N,C,height,width]
at::Tensor subdivide_backward_cuda(const at::Tensor& grad, int64_t height, int64_t width, bool align_corners);

}  // namespace rendseg
