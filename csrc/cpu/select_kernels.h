// The kernels of select.cpp. Compiled once per instruction set, see compile_kernels.h.
#ifndef RENDSEG_ISA

#include <cstdint>

#include "../math/radix_key.h"

namespace rendseg {

constexpr int64_t kSelectRoom = 16;  // beyond its last value, of what the kernels write

}  // namespace rendseg

#else

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

// The offsets of those of keys[count] that are <= bound, in order; their number. Keys are below 2^31.
int64_t offsets_at_most(const uint32_t* keys, int64_t count, uint32_t bound, uint32_t* offsets) {
  constexpr int n = kLanes<float>;
  const auto most = static_cast<int32_t>(bound);
  int64_t found = 0, i = 0;
  for (; i + n <= count; i += n) {
    const Bits<float> at = (Bits<float>)lanes<float>() + static_cast<uint32_t>(i);
    found += store_chosen(offsets + found, at, load_bits<Ints<float>>(keys + i) <= most);
  }
  for (; i < count; ++i) {
    offsets[found] = static_cast<uint32_t>(i);
    found += keys[i] <= bound;
  }
  return found;
}

// Those of keys[count] that fall into a bin of the first histogram; their number.
int64_t keys_of_bin(const uint32_t* keys, int64_t count, uint32_t bin, uint32_t* out) {
  constexpr int n = kLanes<float>;
  int64_t found = 0, i = 0;
  for (; i + n <= count; i += n) {
    const auto at = load_bits<Bits<float>>(keys + i);
    found += store_chosen(out + found, at, (at >> kHistogramShift) == bin);
  }
  for (; i < count; ++i) {
    out[found] = keys[i];
    found += histogram_bin(keys[i]) == bin;
  }
  return found;
}

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
