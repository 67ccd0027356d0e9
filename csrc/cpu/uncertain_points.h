// What uncertain_points.cpp and its kernels share.
#pragma once

#include <cstdint>

namespace rendseg {

enum class LogitType : int { kFloat, kDouble, kHalf, kBFloat16 };

// Logits of one image: channel c of cell (row, col) is at base[c * channel_stride + (row * width + col) * cell_stride].
// Either cell_stride is 1 (planar: NCHW), or the channels are adjacent (interleaved: channels_last) or single.
struct LogitMap {
  const void* base;
  LogitType type;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t channel_stride;
  int64_t cell_stride;
};

struct SampleOptions {
  bool border;
  bool align_corners;
};

#define RENDSEG_DECLARE_UNCERTAIN_POINTS(NAMESPACE)                                                              \
  namespace NAMESPACE {                                                                                          \
  /* -margin of the cells [begin, end) into out[end - begin] */                                                  \
  void uncertainty_kernel(const LogitMap& map, int64_t begin, int64_t end, float* out);                          \
  /* keys of the cells [begin, end) into keys[end - begin], counted into histogram[kHistogramBins] */            \
  void margin_keys_kernel(const LogitMap& map, int64_t begin, int64_t end, uint32_t* keys, uint32_t* histogram); \
  /* the same at points xy[count][2] of [0, 1]^2, of the bilinear samples rounded to the type of the map */      \
  void sampled_margin_keys_kernel(const LogitMap& map, const float* xy, int64_t count, SampleOptions options,    \
                                  uint32_t* keys, uint32_t* histogram);                                          \
  }

RENDSEG_DECLARE_UNCERTAIN_POINTS(baseline)
RENDSEG_DECLARE_UNCERTAIN_POINTS(avx2)
RENDSEG_DECLARE_UNCERTAIN_POINTS(avx512)

#undef RENDSEG_DECLARE_UNCERTAIN_POINTS

}  // namespace rendseg
