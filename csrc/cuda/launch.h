// What the host side of every CUDA op shares: the launcher, dispatch on dtype, typed pointers, registration. Lean on
// purpose: no torch/extension.h and no ATen/cuda/CUDAContext.h, whose cuBLAS and cuSPARSE headers a small toolkit
// lacks.
//
// Under emulation (g++ instead of nvcc) the ops are registered as rendseg_emulated::* for CPU tensors, and a launch
// runs the threads of the kernel as fibers: tests/emulation/.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <torch/library.h>

#include "device.cuh"
#include "scratch.h"
#include "shared_limits.h"

#if defined(__CUDACC__)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#define RENDSEG_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(rendseg, CUDA, m)
#else
#define RENDSEG_CUDA_IMPL(m) TORCH_LIBRARY_IMPL(rendseg_emulated, CPU, m)
#endif

#include <algorithm>
#include <cstdint>

namespace rendseg {

#if defined(__CUDACC__)
inline SharedLimits& shared_limits() {
  static SharedLimits limits;
  return limits;
}

// Launches kernels on the device of a tensor and its current stream; that device is current as long as this lives.
class CudaLaunch {
 public:
  explicit CudaLaunch(const at::Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.get_device())) {}

  template <typename... P, typename... A>
  void operator()(const LaunchShape& shape, void (*kernel)(P...), A&&... args) {
    if (shape.blocks == 0) return;
    TORCH_INTERNAL_ASSERT(shape.blocks > 0 && shape.blocks <= INT32_MAX, "grid of ", shape.blocks, " blocks");
    if (shape.shared_bytes > 0) permit(reinterpret_cast<const void*>(kernel), shape.shared_bytes);
    kernel<<<static_cast<unsigned>(shape.blocks), static_cast<unsigned>(shape.threads),
             static_cast<size_t>(shape.shared_bytes), stream_>>>(static_cast<P>(args)...);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }

  void fill_zero(void* pointer, int64_t bytes) {
    if (bytes > 0) C10_CUDA_CHECK(cudaMemsetAsync(pointer, 0, static_cast<size_t>(bytes), stream_));
  }

  // Multiprocessors of the device.
  int processors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Shared memory that one block may have, static and dynamic together, in bytes.
  int64_t shared_limit() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

 private:
  int attribute(cudaDeviceAttr what) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, guard_.current_device().index()));
    return value;
  }

  // A kernel must opt in to more than 48 KB, static and dynamic together. It does so once, for all that the device has:
  // a permission costs nothing, what a launch asks for decides how many blocks fit. No call of this touches a stream,
  // so all of it is allowed while one is captured.
  void permit(const void* kernel, int64_t bytes) const {
    shared_limits().ensure(kernel, guard_.current_device().index(), bytes, [&](int64_t wanted) {
      cudaFuncAttributes attributes{};
      C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, kernel));
      const int64_t limit = std::max(wanted, shared_limit() - static_cast<int64_t>(attributes.sharedSizeBytes));
      C10_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)));
      return limit;
    });
  }

  c10::cuda::CUDAGuard guard_;
  cudaStream_t stream_;
};
#else
class CudaLaunch : public emulation::Launch {
 public:
  explicit CudaLaunch(const at::Tensor&) {}
};
#endif

// f.operator()<T>() with T = float, double, half_t or bfloat16_t.
template <typename F>
decltype(auto) dispatch_floating(at::ScalarType dtype, const char* name, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    case at::kHalf:
      return f.template operator()<half_t>();
    case at::kBFloat16:
      return f.template operator()<bfloat16_t>();
    default:
      TORCH_CHECK_TYPE(false, name, " must be float32, float64, float16 or bfloat16, got ", dtype);
  }
}

// Typed pointers; half_t and bfloat16_t have the bits of PyTorch's types.
template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Memory on the device of `like`.
inline at::Tensor allocate_bytes(int64_t bytes, const at::Tensor& like) {
  return at::empty({bytes}, like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
}
// The memory of all parts, to which their pointers now point.
inline at::Tensor allocate(const Scratch& scratch, const at::Tensor& like) {
  at::Tensor memory = allocate_bytes(scratch.bytes(), like);
  scratch.place(memory.mutable_data_ptr());
  return memory;
}

}  // namespace rendseg
