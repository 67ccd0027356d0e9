// Gathering at points on the CPU, for C++ callers: `point_sample` itself, and the point-major form that feeds a GEMM.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace rendseg {

// One image of a map[N,C,H,W] of any strides (in elements).
struct MapView {
  const void* data;
  at::ScalarType dtype;  // float, double, half or bfloat16
  int64_t channels, height, width;
  int64_t stride_c, stride_y, stride_x;
};

inline MapView map_view(const at::Tensor& map /*[N,C,H,W]*/, int64_t image) {
  const auto* data = static_cast<const char*>(map.const_data_ptr()) + image * map.stride(0) * map.element_size();
  return {data, map.scalar_type(), map.size(1), map.size(2), map.size(3), map.stride(1), map.stride(2), map.stride(3)};
}

// rows[p * row_stride + c] = bilinear sample of channel c at coords[p], for p < num_points and c < map.channels.
//
// `coords` holds (x, y) pairs in [0, 1]^2, float32 whatever the map; `rows` is of `rows_dtype` (any floating type where
// the map is not double, else double) and already points at the first channel to write, so maps are laid side by side
// by offsetting it. Both layouts are read in place; ascending points read an NCHW map in streams. Nothing is checked,
// nothing is threaded (call it from inside a parallel region, on blocks of a few hundred points), and no memory is
// allocated.
void gather_rows_cpu(const MapView& map, const float* coords, int64_t num_points, bool border, bool align_corners,
                     void* rows, at::ScalarType rows_dtype, int64_t row_stride);

// The op: [N,C,P] or [N,C,Hg,Wg], maps concatenated over channels.
at::Tensor point_sample_cpu(at::TensorList input,      // each [N,C,H,W]
                            const at::Tensor& coords,  // [N,P,2] or [N,Hg,Wg,2]
                            c10::string_view mode, c10::string_view padding_mode, bool align_corners);

at::Tensor point_labels_cpu(const at::Tensor& labels,  // [N,H,W] integer
                            const at::Tensor& coords,  // [N,P,2]
                            int64_t ignore_index);

}  // namespace rendseg
