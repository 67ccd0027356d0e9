// Gathering at points on the GPU, for C++ callers.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace rendseg {

// The op: [N,C,P] or [N,C,Hg,Wg], maps concatenated over channels.
at::Tensor point_sample_cuda(at::TensorList input,      // each [N,C,H,W], any strides
                             const at::Tensor& coords,  // [N,P,2] or [N,Hg,Wg,2]
                             c10::string_view mode, c10::string_view padding_mode, bool align_corners);

}  // namespace rendseg
