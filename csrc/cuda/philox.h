// The state of a PyTorch CUDA generator for a kernel that draws random numbers.
#pragma once

#include <ATen/core/Generator.h>

#include <mutex>
#include <optional>

#include "launch.h"

#if defined(__CUDACC__)
#include <ATen/cuda/CUDAGeneratorImpl.h>
#else
#include <ATen/CPUGeneratorImpl.h>
#endif

namespace rendseg {

// Takes `increment` numbers per thread from `generator` (none: the default one of the device of `tensor`), which moves
// on by as much; capturable in a CUDA graph.
inline PhiloxSource philox(const std::optional<at::Generator>& generator, const at::Tensor& tensor,
                           uint64_t increment) {
#if defined(__CUDACC__)
  TORCH_CHECK(!generator.has_value() || generator->device() == tensor.device(),
              "generator must be on the device of logits (", tensor.device(), "), got ", generator->device());
  const at::Generator& chosen =
      generator.has_value() ? *generator : at::cuda::detail::getDefaultCUDAGenerator(tensor.get_device());
  auto* cuda = chosen.get<at::CUDAGeneratorImpl>();
  const std::lock_guard<std::mutex> lock(cuda->mutex_);
  const at::PhiloxCudaState state = cuda->philox_cuda_state(increment);
  if (!state.captured_) return {state.seed_.val, state.offset_.val, nullptr, nullptr};
  return {0, state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
#else
  TORCH_CHECK(!generator.has_value() || generator->device() == tensor.device(),
              "generator must be on the device of logits (", tensor.device(), "), got ", generator->device());
  const at::Generator& chosen = generator.has_value() ? *generator : at::detail::getDefaultCPUGenerator();
  auto* cpu = chosen.get<at::CPUGeneratorImpl>();
  const std::lock_guard<std::mutex> lock(cpu->mutex_);
  const uint64_t offset = cpu->random64() & 0xffff;
  (void)increment;
  return {cpu->random64(), offset * 4, nullptr, nullptr};
#endif
}

}  // namespace rendseg
