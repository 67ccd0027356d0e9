// CUDA kernels of scatter_points.
//
// Values are moved, never computed with, so the kernels are written for the width of a value (uint16_t, uint32_t or
// uint64_t) and serve every dtype.
#pragma once

#include "device.cuh"

#include "../strided.h"

namespace rendseg {

// The work item `i` of n * channels * points as (image, channel, point). With channels_last maps the channels of one
// point are neighbours in memory, else the points of one channel are: neighbouring threads take neighbours.
struct ScatterItem {
  int64_t n, c, p;
};

__device__ inline ScatterItem scatter_item(int64_t i, int64_t channels, int64_t points, bool channels_last) {
  const int64_t inner = channels_last ? channels : points;
  const int64_t outer = channels_last ? points : channels;
  const int64_t fast = i % inner;
  const int64_t rest = i / inner;
  const int64_t slow = rest % outer;
  const int64_t n = rest / outer;
  return channels_last ? ScatterItem{n, fast, slow} : ScatterItem{n, slow, fast};
}

// Offset of the cell, or -1 (never returned where asserts are on) for an index outside the map.
__device__ inline int64_t cell_offset(const MapView& map, const ScatterItem& item, int64_t index) {
  const bool inside = index >= 0 && index < map.height * map.width;
  RENDSEG_DEVICE_ASSERT(inside, "scatter_points: indices must lie in [0, H*W)");
  if (!inside) return -1;
  return item.n * map.stride_n + item.c * map.stride_c + (index / map.width) * map.stride_y +
         (index % map.width) * map.stride_x;
}

// logits[n, c, indices[n, p]] = values[n, c, p]. indices[N,P] and values[N,C,P] are contiguous.
template <typename Bits>
__global__ void __launch_bounds__(256) scatter_points_kernel(MapView logits, const int64_t* indices, const Bits* values,
                                                             int64_t points, int64_t total, bool channels_last) {
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const ScatterItem item = scatter_item(i, logits.channels, points, channels_last);
    const int64_t offset = cell_offset(logits, item, indices[item.n * points + item.p]);
    if (offset < 0) continue;
    static_cast<Bits*>(logits.data)[offset] = values[(item.n * logits.channels + item.c) * points + item.p];
  }
}

// grad_values[n, c, p] = grad[n, c, indices[n, p]], and zero there in grad_logits, which holds a copy of grad.
template <typename Bits>
__global__ void __launch_bounds__(256)
    scatter_points_backward_kernel(MapView grad, MapView grad_logits, const int64_t* indices, Bits* grad_values,
                                   int64_t points, int64_t total, bool channels_last) {
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const ScatterItem item = scatter_item(i, grad.channels, points, channels_last);
    const int64_t index = indices[item.n * points + item.p];
    const int64_t source = cell_offset(grad, item, index);
    if (source < 0) continue;
    grad_values[(item.n * grad.channels + item.c) * points + item.p] = static_cast<const Bits*>(grad.data)[source];
    static_cast<Bits*>(grad_logits.data)[cell_offset(grad_logits, item, index)] =
        Bits{0};  // all bits zero is 0.0 in every dtype
  }
}

// `total` is N * C * P.
template <typename Bits, typename Launch>
void run_scatter_points(Launch& launch, const MapView& logits, const int64_t* indices, const Bits* values,
                        int64_t points, int64_t total, bool channels_last) {
  launch({blocks_for(total), 256}, scatter_points_kernel<Bits>, logits, indices, values, points, total, channels_last);
}

template <typename Bits, typename Launch>
void run_scatter_points_backward(Launch& launch, const MapView& grad, const MapView& grad_logits,
                                 const int64_t* indices, Bits* grad_values, int64_t points, int64_t total,
                                 bool channels_last) {
  launch({blocks_for(total), 256}, scatter_points_backward_kernel<Bits>, grad, grad_logits, indices, grad_values,
         points, total, channels_last);
}

}  // namespace rendseg
