// Host side of the CUDA scatter_points.
#include "launch.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "../scatter_points_common.h"
#include "../strided_tensors.h"
#include "scatter_points.cuh"

namespace rendseg {
namespace {

bool is_channels_last(const at::Tensor& map) { return map.size(1) > 1 && map.stride(1) == 1; }

void scatter(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  CudaLaunch launch(logits);
  const at::Tensor points = indices.contiguous();
  const at::Tensor source = values.contiguous();
  with_bits(logits.element_size(), [&](auto zero) {
    using Bits = decltype(zero);
    run_scatter_points(launch, mutable_map_view(logits), data<int64_t>(points), data<Bits>(source), points.size(1),
                       source.numel(), is_channels_last(logits));
  });
}

}  // namespace

// logits[N,C,H,W], indices[N,P], values[N,C,P]
void scatter_points_inplace_cuda(at::Tensor logits, const at::Tensor& indices, const at::Tensor& values) {
  check_scatter(logits, indices, values);
  at::assert_no_internal_overlap(logits);
  at::assert_no_overlap(logits, values);
  at::assert_no_overlap(logits, indices);
  scatter(logits, indices, values);
}

at::Tensor scatter_points_cuda(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  check_scatter(logits, indices, values);
  at::Tensor out = logits.clone();
  scatter(out, indices, values);
  return out;
}

// grad[N,C,H,W], indices[N,P] -> grad_logits[N,C,H,W], grad_values[N,C,P]
std::tuple<at::Tensor, at::Tensor> scatter_points_backward_cuda(const at::Tensor& grad, const at::Tensor& indices) {
  check_logits(grad, "grad");
  check_indices(indices, grad, "grad");
  CudaLaunch launch(grad);
  at::Tensor grad_logits = grad.clone();
  at::Tensor grad_values = at::empty({grad.size(0), grad.size(1), indices.size(1)}, grad.options());
  const at::Tensor points = indices.contiguous();
  with_bits(grad.element_size(), [&](auto zero) {
    using Bits = decltype(zero);
    run_scatter_points_backward(launch, map_view(grad), mutable_map_view(grad_logits), data<int64_t>(points),
                                mutable_data<Bits>(grad_values), points.size(1), grad_values.numel(),
                                is_channels_last(grad));
  });
  return {grad_logits, grad_values};
}

}  // namespace rendseg

RENDSEG_CUDA_IMPL(m) {
  m.impl("scatter_points", TORCH_FN(rendseg::scatter_points_cuda));
  m.impl("scatter_points_", TORCH_FN(rendseg::scatter_points_inplace_cuda));
  m.impl("_scatter_points_backward", TORCH_FN(rendseg::scatter_points_backward_cuda));
}
