// Argument checks shared by cpu/ and cuda/. Each names the argument, what was wanted and what arrived; wrong values and
// shapes raise ValueError, wrong dtypes TypeError, devices that differ RuntimeError, as rendseg/reference/_checks.py
// does.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

namespace rendseg {

inline bool is_feature_dtype(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf || dtype == at::kBFloat16;
}

inline void check_feature_dtype(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(is_feature_dtype(t.scalar_type()), name, " must be float32, float64, float16 or bfloat16, got ",
                   t.scalar_type());
}

inline void check_rank(const at::Tensor& t, const char* name, const char* shape, int64_t rank) {
  TORCH_CHECK_VALUE(t.dim() == rank, name, " must have shape ", shape, ", got ", t.sizes());
}

inline void check_strided(const at::Tensor& t, const char* name) {
  TORCH_CHECK_TYPE(t.layout() == at::kStrided, name, " must be a dense (strided) tensor, got layout ", t.layout());
}

inline void check_same_device(const at::Tensor& t, const char* name, const at::Tensor& other, const char* other_name) {
  TORCH_CHECK(t.device() == other.device(), name, " must be on the device of ", other_name, " (", other.device(),
              "), got ", t.device());
}

// logits[N,C,H,W]: a dense floating map with at least one channel and one cell.
inline void check_logits(const at::Tensor& logits, const char* name = "logits") {
  check_strided(logits, name);
  check_rank(logits, name, "[N, C, H, W]", 4);
  check_feature_dtype(logits, name);
  TORCH_CHECK_VALUE(logits.size(1) > 0, name, " must have at least one channel, got shape ", logits.sizes());
  TORCH_CHECK_VALUE(logits.size(2) > 0 && logits.size(3) > 0, name,
                    " must have at least one cell (H*W > 0), got shape ", logits.sizes());
}

// A map whose cells a position can count.
inline void check_sampled_map(const at::Tensor& map, const char* name) {
  check_logits(map, name);
  TORCH_CHECK_VALUE(
      map.size(2) < std::numeric_limits<int32_t>::max() && map.size(3) < std::numeric_limits<int32_t>::max(), name,
      " must have H and W below 2^31, got shape ", map.sizes());
}

// The channels of all maps together. Views that repeat one channel can have more than fit into an integer.
inline int64_t total_channels(at::TensorList maps, const char* name) {
  constexpr int64_t limit = int64_t{1} << 62;
  int64_t channels = 0;
  for (const at::Tensor& map : maps) {
    TORCH_CHECK_VALUE(map.size(1) < limit - channels, name, " must have fewer than 2^62 channels in all");
    channels += map.size(1);
  }
  return channels;
}

constexpr int64_t kMostSide = int64_t{1} << 31;

// Whether an upsampled map has sides below 2^31 and fewer than 2^32 cells.
inline bool countable(int64_t height, int64_t width) {
  return height < kMostSide && width < kMostSide && height * width < 2 * kMostSide;
}

inline void check_num_points(int64_t num_points) {
  TORCH_CHECK_VALUE(num_points > 0, "num_points must be positive, got ", num_points);
}

inline void check_class(int64_t value, int64_t image, int64_t classes) {
  TORCH_CHECK_INDEX(0 <= value && value < classes, "class_index must lie in [0, C) = [0, ", classes, "), got ", value,
                    " at position ", image);
}

inline void check_image(int64_t value, int64_t position, int64_t images) {
  TORCH_CHECK_INDEX(0 <= value && value < images, "image_index must lie in [0, B) = [0, ", images, "), got ", value,
                    " at position ", position);
}

// index[N]: int64 on the device of the logits, with the N of `like` where that is given.
inline void check_index(const at::Tensor& index, const char* name, const at::Tensor* like, const char* like_name,
                        const at::Tensor& logits) {
  check_strided(index, name);
  TORCH_CHECK_TYPE(index.scalar_type() == at::kLong, name, " must be int64, got ", index.scalar_type());
  TORCH_CHECK_VALUE(index.dim() == 1, name, " must have shape [N], got ", index.sizes());
  TORCH_CHECK_VALUE(like == nullptr || index.size(0) == like->size(0), name,
                    " must have shape [N] with N = ", like == nullptr ? 0 : like->size(0), " as in ", like_name,
                    ", got ", index.sizes());
  check_same_device(index, name, logits, "logits");
}

// The values of an index on the CPU. A kernel checks each again as it uses it, or takes a copy: another thread may
// write to the tensor.
template <typename Check>
void check_values(const at::Tensor& index, int64_t limit, const Check& check) {
  if (!index.is_cpu()) return;
  const int64_t* values = index.const_data_ptr<int64_t>();
  // A view that repeats one value may have more of them than can be counted to.
  const int64_t count = index.stride(0) == 0 ? std::min<int64_t>(1, index.size(0)) : index.size(0);
  for (int64_t n = 0; n < count; ++n) check(values[n * index.stride(0)], n, limit);
}

// class_index[N] of logits[N,C,H,W], or absent: int64 in [0, C). With image_index[N], mask n is in that image.
inline void check_class_index(const std::optional<at::Tensor>& class_index, const at::Tensor& logits,
                              const std::optional<at::Tensor>& image_index = std::nullopt) {
  if (image_index.has_value()) {
    check_index(*image_index, "image_index", nullptr, "", logits);
    check_values(*image_index, logits.size(0), check_image);
  }
  if (class_index.has_value()) {
    check_index(*class_index, "class_index", image_index.has_value() ? &*image_index : &logits,
                image_index.has_value() ? "image_index" : "logits", logits);
    check_values(*class_index, logits.size(1), check_class);
  }
}

}  // namespace rendseg
