// CUDA kernels of scatter_points.
//
// Values are moved, never computed with, so the kernels are written for the width of a value (uint16_t, uint32_t or
// uint64_t) and serve every dtype.
#pragma once

#include "device.cuh"

namespace rendseg {

// Where cell (row, col) of channel c of image n sits in a map[N,C,H,W] of any strides, in elements.
struct MapLayout {
  int64_t channels, height, width;
  int64_t stride_n, stride_c, stride_h, stride_w;
};

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
__device__ inline int64_t cell_offset(const MapLayout& map, const ScatterItem& item, int64_t index) {
  const bool inside = index >= 0 && index < map.height * map.width;
  RENDSEG_DEVICE_ASSERT(inside, "scatter_points: indices must lie in [0, H*W)");
  if (!inside) return -1;
  return item.n * map.stride_n + item.c * map.stride_c + (index / map.width) * map.stride_h +
         (index % map.width) * map.stride_w;
}

// logits[n, c, indices[n, p]] = values[n, c, p]. indices[N,P] and values[N,C,P] are contiguous.
template <typename Bits>
__global__ void __launch_bounds__(256)
    scatter_points_kernel(Bits* logits, MapLayout map, const int64_t* indices, const Bits* values, int64_t points,
                          int64_t total, bool channels_last) {
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const ScatterItem item = scatter_item(i, map.channels, points, channels_last);
    const int64_t offset = cell_offset(map, item, indices[item.n * points + item.p]);
    if (offset >= 0) logits[offset] = values[(item.n * map.channels + item.c) * points + item.p];
  }
}

// grad_values[n, c, p] = grad[n, c, indices[n, p]], and zero there in grad_logits, which holds a copy of grad.
template <typename Bits>
__global__ void __launch_bounds__(256)
    scatter_points_backward_kernel(const Bits* grad, MapLayout from, Bits* grad_logits, MapLayout to,
                                   const int64_t* indices, Bits* grad_values, int64_t points, int64_t total,
                                   bool channels_last) {
  for (int64_t i = global_thread(); i < total; i += global_threads()) {
    const ScatterItem item = scatter_item(i, from.channels, points, channels_last);
    const int64_t index = indices[item.n * points + item.p];
    const int64_t source = cell_offset(from, item, index);
    if (source < 0) continue;
    grad_values[(item.n * from.channels + item.c) * points + item.p] = grad[source];
    grad_logits[cell_offset(to, item, index)] = Bits{0};  // all bits zero is 0.0 in every dtype
  }
}

// `total` is N * C * P.
template <typename Launch, typename Bits>
void run_scatter_points(Launch& launch, Bits* logits, const MapLayout& map, const int64_t* indices, const Bits* values,
                        int64_t points, int64_t total, bool channels_last) {
  launch({blocks_for(total), 256}, scatter_points_kernel<Bits>, logits, map, indices, values, points, total,
         channels_last);
}

template <typename Launch, typename Bits>
void run_scatter_points_backward(Launch& launch, const Bits* grad, const MapLayout& from, Bits* grad_logits,
                                 const MapLayout& to, const int64_t* indices, Bits* grad_values, int64_t points,
                                 int64_t total, bool channels_last) {
  launch({blocks_for(total), 256}, scatter_points_backward_kernel<Bits>, grad, from, grad_logits, to, indices,
         grad_values, points, total, channels_last);
}

}  // namespace rendseg
