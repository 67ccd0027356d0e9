// scatter_points on the CPU: in place, out of place, and the gradient. Elements are moved as bits, in any strides.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

#include "../scatter_points_common.h"
#include "../strided_tensors.h"

namespace rendseg {
namespace {

// A copy of the indices, contiguous, in range: what is checked is what is used, also if another thread writes to them.
// Raises IndexError; nothing has been written yet.
at::Tensor checked_indices(const at::Tensor& given /*[N,P]*/, const at::Tensor& map /*[N,C,H,W]*/) {
  const at::Tensor indices = given.clone(at::MemoryFormat::Contiguous);
  const int64_t cells = map.size(2) * map.size(3);
  const int64_t* data = indices.const_data_ptr<int64_t>();
  const int64_t count = indices.numel();
  if (count == 0) return indices;
  int64_t lowest = data[0], highest = data[0];
  for (int64_t i = 1; i < count; ++i) {
    lowest = std::min(lowest, data[i]);
    highest = std::max(highest, data[i]);
  }
  TORCH_CHECK_INDEX(lowest >= 0 && highest < cells, "indices must lie in [0, H*W) = [0, ", cells, "), got values from ",
                    lowest, " to ", highest);
  return indices;
}

// Calls f(n, p_begin, p_end, c_begin, c_end) over blocks that no two threads share. Where channels are adjacent a block
// is some points with every channel, else every point of some planes.
template <typename F>
void for_blocks(const MapView& map, int64_t points, F&& f) {
  const int64_t images = map.images, channels = map.channels;
  const bool adjacent = map.stride_c == 1 && channels > 1;
  const int64_t length = adjacent ? points : channels;
  const int64_t other = adjacent ? channels : points;
  const int64_t block = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, other));
  const int64_t blocks = (length + block - 1) / block;
  at::parallel_for(0, images * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / blocks, first = task % blocks * block, last = std::min(first + block, length);
      adjacent ? f(n, first, last, 0, channels) : f(n, 0, points, first, last);
    }
  });
}

// f(cell of the map, value) for every (point, channel), as elements of types M and V.
template <typename M, typename V, typename F>
void visit(const MapView& map, const PointsView& values, const int64_t* indices, F&& f) {
  const int64_t points = values.points, width = map.width, map_c = map.stride_c, map_y = map.stride_y,
                map_x = map.stride_x, value_c = values.stride_c, value_p = values.stride_p;
  const bool flat = map.flat();  // an index is then an offset, without a division
  for_blocks(map, points, [&](int64_t n, int64_t p_begin, int64_t p_end, int64_t c_begin, int64_t c_end) {
    const auto offset = [&](int64_t p) {
      const int64_t index = indices[n * points + p];
      return flat ? index * map_x : index / width * map_y + index % width * map_x;
    };
    M* image = map.at<M>(n);
    V* rows = values.at<V>(n);
    if (p_end - p_begin == points && c_end - c_begin < points) {
      for (int64_t c = c_begin; c < c_end; ++c) {
        for (int64_t p = p_begin; p < p_end; ++p) f(image[offset(p) + c * map_c], rows[c * value_c + p * value_p]);
      }
    } else {
      for (int64_t p = p_begin; p < p_end; ++p) {
        M* cell = image + offset(p);
        for (int64_t c = c_begin; c < c_end; ++c) f(cell[c * map_c], rows[c * value_c + p * value_p]);
      }
    }
  });
}

void scatter_kernel(at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  with_bits(logits.element_size(), [&](auto tag) {
    using B = decltype(tag);
    visit<B, const B>(mutable_map_view(logits), points_view(values), indices.const_data_ptr<int64_t>(),
                      [](B& cell, const B& value) { cell = value; });
  });
}

}  // namespace

void scatter_points_cpu_(at::Tensor& logits,          // [N,C,H,W], any strides without overlap
                         const at::Tensor& indices,   // [N,P]
                         const at::Tensor& values) {  // [N,C,P]
  check_scatter(logits, indices, values);
  at::assert_no_internal_overlap(logits);
  at::assert_no_overlap(logits, values);
  at::assert_no_overlap(logits, indices);
  const at::Tensor cells = checked_indices(indices, logits);
  if (values.numel() == 0) return;
  scatter_kernel(logits, cells, values);
}

at::Tensor scatter_points_cpu(const at::Tensor& logits,    // [N,C,H,W]
                              const at::Tensor& indices,   // [N,P]
                              const at::Tensor& values) {  // [N,C,P]
  check_scatter(logits, indices, values);
  const at::Tensor cells = checked_indices(indices, logits);
  at::Tensor out = at::empty_like(logits).copy_(logits);
  if (values.numel() != 0) scatter_kernel(out, cells, values);
  return out;
}

// The gradients of logits (that of the output, zero at replaced cells) and of values (that of the output, gathered).
std::tuple<at::Tensor, at::Tensor> scatter_points_backward_cpu(const at::Tensor& grad,       // [N,C,H,W]
                                                               const at::Tensor& indices) {  // [N,P]
  check_logits(grad, "grad");
  check_indices(indices, grad, "grad");
  const at::Tensor cells = checked_indices(indices, grad);
  at::Tensor rest = at::empty_like(grad).copy_(grad);
  at::Tensor values = at::empty({grad.size(0), grad.size(1), cells.size(1)},
                                grad.options().memory_format(at::MemoryFormat::Contiguous));
  if (values.numel() == 0) return {rest, values};
  with_bits(grad.element_size(), [&](auto tag) {
    using B = decltype(tag);
    const int64_t* at = cells.const_data_ptr<int64_t>();
    visit<const B, B>(map_view(grad), points_view(values), at, [](const B& cell, B& value) { value = cell; });
    visit<B, B>(mutable_map_view(rest), points_view(values), at, [](B& cell, B&) { cell = 0; });
  });
  return {rest, values};
}

}  // namespace rendseg

TORCH_LIBRARY_IMPL(rendseg, CPU, m) {
  m.impl("scatter_points", &rendseg::scatter_points_cpu);
  m.impl("scatter_points_", [](at::Tensor logits, const at::Tensor& indices, const at::Tensor& values) {
    rendseg::scatter_points_cpu_(logits, indices, values);
  });
  m.impl("_scatter_points_backward", &rendseg::scatter_points_backward_cpu);
}
