// Host functions of the CUDA subdivide, for refine.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace rendseg {

// Bytes that a step from logits[N,C,h,w] to `cells` = H * W outputs wants to find at zero, a multiple of 256: a caller
// of several clears those of all at once.
int64_t subdivide_zeroed_bytes(int64_t images, int64_t channels, int64_t cells, bool labels);

// logits[N,C,h,w] -> (fine[N,C,H,W], or labels[N,H,W] in uint8 or int16; indices[N,k]; coords[N,k,2]). `zeroed` are the
// bytes above, at a multiple of 16.
std::tuple<at::Tensor, at::Tensor, at::Tensor> subdivide_step(const at::Tensor& logits, int64_t num_points,
                                                              int64_t scale_factor, bool align_corners,
                                                              const std::optional<at::Tensor>& class_index, bool labels,
                                                              unsigned char* zeroed);

}  // namespace rendseg
