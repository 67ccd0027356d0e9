// Host side of the CUDA scatter_points: check, guard, return if empty, allocate, dispatch, launch, launch check.
#include "launch.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

#include "../scatter_points_common.h"
#include "scatter_points.cuh"

namespace rendseg {
namespace {

MapLayout layout_of(const at::Tensor& map) {
  return {map.size(1), map.size(2), map.size(3), map.stride(0), map.stride(1), map.stride(2), map.stride(3)};
}

bool is_channels_last(const at::Tensor& map) { return map.size(1) > 1 && map.stride(1) == 1; }

void launch_scatter(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  if (values.numel() == 0) return;
  const at::Tensor points = indices.contiguous();
  const at::Tensor source = values.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  with_bits(logits.element_size(), [&](auto zero) {
    using Bits = decltype(zero);
    scatter_points_kernel<Bits><<<blocks_for(source.numel()), kThreads, 0, stream>>>(
        static_cast<Bits*>(logits.mutable_data_ptr()), layout_of(logits), points.const_data_ptr<int64_t>(),
        static_cast<const Bits*>(source.const_data_ptr()), points.size(1), source.numel(), is_channels_last(logits));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

}  // namespace

// logits[N,C,H,W], indices[N,P], values[N,C,P]
void scatter_points_inplace_cuda(at::Tensor logits, const at::Tensor& indices, const at::Tensor& values) {
  check_scatter(logits, indices, values);
  at::assert_no_internal_overlap(logits);
  at::assert_no_overlap(logits, values);
  const c10::cuda::CUDAGuard guard(logits.device());
  launch_scatter(logits, indices, values);
}

at::Tensor scatter_points_cuda(const at::Tensor& logits, const at::Tensor& indices, const at::Tensor& values) {
  check_scatter(logits, indices, values);
  const c10::cuda::CUDAGuard guard(logits.device());
  at::Tensor out = logits.clone();
  launch_scatter(out, indices, values);
  return out;
}

// grad[N,C,H,W], indices[N,P] -> grad_logits[N,C,H,W], grad_values[N,C,P]
std::tuple<at::Tensor, at::Tensor> scatter_points_backward_cuda(const at::Tensor& grad, const at::Tensor& indices) {
  check_logits(grad, "grad");
  check_indices(indices, grad, "grad");
  const c10::cuda::CUDAGuard guard(grad.device());
  at::Tensor grad_logits = grad.clone();
  at::Tensor grad_values = at::empty({grad.size(0), grad.size(1), indices.size(1)}, grad.options());
  if (grad_values.numel() == 0) return {grad_logits, grad_values};
  const at::Tensor points = indices.contiguous();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  with_bits(grad.element_size(), [&](auto zero) {
    using Bits = decltype(zero);
    scatter_points_backward_kernel<Bits><<<blocks_for(grad_values.numel()), kThreads, 0, stream>>>(
        static_cast<const Bits*>(grad.const_data_ptr()), layout_of(grad),
        static_cast<Bits*>(grad_logits.mutable_data_ptr()), layout_of(grad_logits), points.const_data_ptr<int64_t>(),
        static_cast<Bits*>(grad_values.mutable_data_ptr()), points.size(1), grad_values.numel(),
        is_channels_last(grad));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {grad_logits, grad_values};
}

}  // namespace rendseg

TORCH_LIBRARY_IMPL(rendseg, CUDA, m) {
  m.impl("scatter_points", rendseg::scatter_points_cuda);
  m.impl("scatter_points_", rendseg::scatter_points_inplace_cuda);
  m.impl("_scatter_points_backward", rendseg::scatter_points_backward_cuda);
}
