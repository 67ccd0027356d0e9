// What the CPU and the CUDA encoding ops share: argument checks and questions about dtypes and layouts.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "checks.h"

namespace rendseg {

inline void check_codebook(const at::Tensor& x, int64_t channels, const at::Tensor& codewords,
                           const at::Tensor* scale) {
  check_strided(codewords, "codewords");
  check_rank(codewords, "codewords", "[K, D]", 2);
  check_feature_dtype(codewords, "codewords");
  TORCH_CHECK_VALUE(codewords.size(0) > 0, "codewords must hold at least one codeword, got shape ", codewords.sizes());
  TORCH_CHECK_VALUE(codewords.size(1) == channels, "codewords must have shape [K, D] with D = ", channels,
                    " as in x, got ", codewords.sizes());
  check_same_device(codewords, "codewords", x, "x");
  if (scale == nullptr) return;
  check_strided(*scale, "scale");
  check_feature_dtype(*scale, "scale");
  TORCH_CHECK_VALUE(scale->dim() == 1 && scale->size(0) == codewords.size(0),
                    "scale must have shape [K] with K = ", codewords.size(0), " as in codewords, got ", scale->sizes());
  check_same_device(*scale, "scale", x, "x");
}

inline void check_positions(const at::Tensor& x) {
  check_strided(x, "x");
  check_rank(x, "x", "[B, M, D]", 3);
  check_feature_dtype(x, "x");
}

inline void check_map(const at::Tensor& x) {
  check_strided(x, "x");
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, "x must have shape [B, D, H, W] or [B, D, M], got ", x.sizes());
  check_feature_dtype(x, "x");
}

inline void check_three(const at::Tensor& t, const char* name, const char* shape, int64_t a, int64_t b, int64_t c,
                        const at::Tensor& x) {
  check_strided(t, name);
  check_feature_dtype(t, name);
  TORCH_CHECK_VALUE(t.dim() == 3 && t.size(0) == a && t.size(1) == b && t.size(2) == c, name, " must have shape ",
                    shape, " = [", a, ", ", b, ", ", c, "], got ", t.sizes());
  check_same_device(t, name, x, "x");
}

inline bool any_double(std::initializer_list<const at::Tensor*> tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const at::Tensor* t) { return t->scalar_type() == at::kDouble; });
}

inline at::ScalarType promoted(const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
  return c10::promoteTypes(c10::promoteTypes(a.scalar_type(), b.scalar_type()), c.scalar_type());
}

// Whether the H and W of x[B,D,H,W] can be walked with one stride.
inline bool is_walkable(const at::Tensor& x) {
  return x.dim() == 3 || x.size(2) <= 1 || x.size(3) <= 1 || x.stride(2) == x.size(3) * x.stride(3);
}

inline int64_t positions_of(const at::Tensor& x) { return x.dim() == 3 ? x.size(2) : x.size(2) * x.size(3); }

}  // namespace rendseg
