// Gathering at points on the CPU, for C++ callers: `point_sample` itself, and the point-major form that feeds a GEMM.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "../strided.h"

namespace rendseg {

// rows[p * row_stride + c] = bilinear sample of channel c of the first image at coords[p], for p < num_points and
// c < map.channels.
//
// `coords` holds (x, y) pairs in [0, 1]^2, float32 whatever the map; `rows` is of `rows_dtype` (any floating type where
// the map is not double, else double) and already points at the first channel to write, so maps are laid side by side
// by offsetting it. Both layouts are read in place; ascending points read an NCHW map in streams. Nothing is checked,
// nothing is threaded (call it from inside a parallel region, on blocks of a few hundred points), and no memory is
// allocated.
void gather_rows_cpu(const MapView& map, const float* coords, int64_t num_points, bool border, bool align_corners,
                     void* rows, Dtype rows_dtype, int64_t row_stride);

// The op: [N,C,P] or [N,C,Hg,Wg], maps concatenated over channels.
at::Tensor point_sample_cpu(at::TensorList input,      // each [N,C,H,W]
                            const at::Tensor& coords,  // [N,P,2] or [N,Hg,Wg,2]
                            c10::string_view mode, c10::string_view padding_mode, bool align_corners);

at::Tensor point_labels_cpu(const at::Tensor& labels,  // [N,H,W] integer
                            const at::Tensor& coords,  // [N,P,2]
                            int64_t ignore_index);

}  // namespace rendseg
