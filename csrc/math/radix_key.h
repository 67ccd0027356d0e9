// Sort keys of the selection: an unsigned integer that grows with certainty, so the k smallest keys are the k most
// uncertain cells.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace rendseg {

// Keys fill 31 bits, so they also compare correctly as int32_t (SSE2 and AVX2 have signed comparisons only).
// No margin has this key; a producer that knows a cell cannot be selected stores it and may leave the cell out of the
// first histogram.
constexpr uint32_t kNeverSelected = 0x7fffffffu;

constexpr int kHistogramShift = 20;
constexpr int kHistogramBins = 2048;

// Key of a margin (top-1 minus top-2, or |logit|): NaN is 0 (most uncertain, before a margin of zero), a margin m >= 0
// is its bits + 1. The sign bit is dropped, which makes -0 equal to +0.
RENDSEG_HD uint32_t margin_key(float margin) {
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(margin);
#else
  std::memcpy(&bits, &margin, sizeof(bits));
#endif
  return margin == margin ? (bits & 0x7fffffffu) + 1u : 0u;
}

// Bin of the first pass: sign-free exponent and three bits of mantissa, 12.5% wide.
RENDSEG_HD uint32_t histogram_bin(uint32_t key) { return key >> kHistogramShift; }

}  // namespace rendseg
