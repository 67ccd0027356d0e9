// A zero tensor in the layout of a map, for gradients of which little is written.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros_like.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#include "../point_sample_common.h"
#include "huge_pages.h"

namespace rendseg {

// A large one is memory that the system hands out already zero: filling it again would cost more than the whole
// scatter. It comes in huge pages where the system has them, unless only a few planes will be written.
inline at::Tensor zero_gradient(const at::Tensor& map, bool few_planes = false) {
  const at::MemoryFormat format = gradient_format(map);
  const int64_t bytes = map.numel() * map.element_size();
  constexpr int64_t kHuge = int64_t{2} << 20, kAlign = 64;
  if (bytes < 2 * kHuge) return at::zeros_like(map, map.options(), format);
  void* block = std::calloc(1, bytes + kAlign);
  if (block == nullptr) throw std::bad_alloc();
  const auto address = (reinterpret_cast<uintptr_t>(block) + kAlign - 1) / kAlign * kAlign;
  if (!few_planes) prefer_huge_pages(reinterpret_cast<void*>(address), bytes);
  std::vector<int64_t> strides(4, 1);
  if (format == at::MemoryFormat::ChannelsLast) {
    strides = {map.size(1) * map.size(2) * map.size(3), 1, map.size(3) * map.size(1), map.size(1)};
  } else {
    strides = {map.size(1) * map.size(2) * map.size(3), map.size(2) * map.size(3), map.size(3), 1};
  }
  return at::from_blob(
      reinterpret_cast<void*>(address), map.sizes(), strides, [block](void*) { std::free(block); }, map.options());
}

}  // namespace rendseg
