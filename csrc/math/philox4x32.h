// Philox4x32-10 (Salmon et al. 2011), the counter-based generator of PyTorch's CUDA streams: the four words of a
// counter are a function of it and of the key, so any draw can be made again anywhere.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace rendseg {

inline constexpr uint32_t kPhiloxFactor0 = 0xD2511F53u, kPhiloxFactor1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxStep0 = 0x9E3779B9u, kPhiloxStep1 = 0xBB67AE85u;

struct PhiloxWords {
  uint32_t x, y, z, w;
};

// The counter is `high` * 2^64 + `low`. In PyTorch's use the key is the seed, `low` a quarter of the generator's offset
// (which counts words) and `high` the thread or, as here, the item.
RENDSEG_HD constexpr PhiloxWords philox_4x32(uint64_t key, uint64_t low, uint64_t high) {
  PhiloxWords counter{static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                      static_cast<uint32_t>(high >> 32)};
  uint32_t key_0 = static_cast<uint32_t>(key), key_1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product_0 = uint64_t{kPhiloxFactor0} * counter.x;
    const uint64_t product_1 = uint64_t{kPhiloxFactor1} * counter.z;
    counter = {static_cast<uint32_t>(product_1 >> 32) ^ counter.y ^ key_0, static_cast<uint32_t>(product_1),
               static_cast<uint32_t>(product_0 >> 32) ^ counter.w ^ key_1, static_cast<uint32_t>(product_0)};
    key_0 += kPhiloxStep0;
    key_1 += kPhiloxStep1;
  }
  return counter;
}

// Uniform in [0, 1): the upper 24 bits, all that a float has.
RENDSEG_HD constexpr float uniform_from_bits(uint32_t bits) { return static_cast<float>(bits >> 8) * 0x1p-24f; }

// The known answers that come with Random123: zeros, ones, and the digits of pi.
namespace philox_test {
constexpr bool gives(PhiloxWords words, uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return words.x == x && words.y == y && words.z == z && words.w == w;
}
constexpr uint64_t kOnes = ~uint64_t{0};
static_assert(gives(philox_4x32(0, 0, 0), 0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u));
static_assert(gives(philox_4x32(kOnes, kOnes, kOnes), 0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu));
static_assert(gives(philox_4x32(0x299f31d0a4093822u, 0x85a308d3243f6a88u, 0x0370734413198a2eu), 0xd16cfe09u,
                    0x94fdccebu, 0x5001e420u, 0x24126ea1u));
}  // namespace philox_test

}  // namespace rendseg
