// Argument checks that the CPU and the CUDA subdivide share.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

#include "checks.h"

namespace rendseg {

// logits[N,C,h,w], class_index[N].
inline void check_subdivide(const at::Tensor& logits, int64_t num_points, const std::optional<at::Tensor>& class_index,
                            int64_t scale_factor) {
  check_logits(logits);
  check_num_points(num_points);
  check_class_index(class_index, logits);
  TORCH_CHECK_VALUE(scale_factor >= 1, "scale_factor must be at least 1, got ", scale_factor);
  TORCH_CHECK_VALUE(scale_factor < kMostSide && logits.size(2) < kMostSide && logits.size(3) < kMostSide &&
                        countable(logits.size(2) * scale_factor, logits.size(3) * scale_factor),
                    "scale_factor must give fewer than 2^32 cells, got ", scale_factor, " for shape ", logits.sizes());
}

inline void check_label_classes(const at::Tensor& logits) {
  TORCH_CHECK_VALUE(logits.size(1) <= 32768, "output=\"labels\" holds at most 32768 classes, got ", logits.size(1));
}

// The smallest type that holds every class.
inline at::ScalarType label_dtype(const at::Tensor& logits) { return logits.size(1) <= 256 ? at::kByte : at::kShort; }

enum class SubdivideWanted { kLogits, kNothing, kLabels };

}  // namespace rendseg
