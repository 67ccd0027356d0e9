// Several tables in one piece of memory. Where each lies is plain arithmetic, made once: for the scratch memory of the
// launches, and for the shared memory of a block. No Torch headers.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../math/host_device.h"

namespace rendseg {

// `count` values of T, from `offset` bytes on.
template <typename T>
struct Part {
  int64_t offset = 0, count = 0;

  RENDSEG_HD constexpr int64_t bytes() const { return count * static_cast<int64_t>(sizeof(T)); }
  RENDSEG_HD T* in(void* memory) const { return reinterpret_cast<T*>(static_cast<unsigned char*>(memory) + offset); }
};

// Gives parts their places, one after the other, each at a multiple of kAlignment bytes.
template <int64_t kAlignment>
class Layout {
 public:
  template <typename T>
  RENDSEG_HD constexpr Part<T> add(int64_t count) {
    const Part<T> part{bytes_, count};
    bytes_ += (part.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    return part;
  }
  RENDSEG_HD constexpr int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

// Scratch memory on the GPU: add() each pointer, allocate bytes(), then place() sets the pointers.
class Scratch {
 public:
  template <typename T>
  void add(T*& pointer, int64_t count) {
    const Part<T> part = layout_.add<T>(count);
    places_.push_back([&pointer, part](void* memory) { pointer = part.in(memory); });
  }
  void add_bytes(void*& pointer, int64_t bytes) {
    const auto part = layout_.add<unsigned char>(bytes);
    places_.push_back([&pointer, part](void* memory) { pointer = part.in(memory); });
  }
  int64_t bytes() const { return layout_.bytes(); }
  void place(void* memory) const {
    for (const auto& place : places_) place(memory);
  }

 private:
  Layout<256> layout_;
  std::vector<std::function<void(void*)>> places_;
};

}  // namespace rendseg
