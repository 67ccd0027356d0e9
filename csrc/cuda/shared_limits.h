// How much dynamic shared memory each kernel may be launched with, by device. No CUDA headers: tests/emulation/ drives
// it with threads and a device of its own.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <utility>

namespace rendseg {

// A limit of a kernel belongs to the device, not to a launch: whoever lowers it breaks a launch that another thread is
// about to make, and a captured graph that is not instantiated yet. So limits only ever rise.
class SharedLimits {
 public:
  // Returns when `kernel` may be launched on `device` with `bytes`. raise(bytes) is called where that is not known yet,
  // by one thread at a time; it raises the limit to `bytes` or more, and returns the new one. If it throws, the next
  // launch tries again.
  template <typename Raise>
  void ensure(const void* kernel, int device, int64_t bytes, Raise&& raise) {
    const std::pair<const void*, int> key{kernel, device};
    {
      const std::shared_lock lock(mutex_);
      if (allows(key, bytes)) return;
    }
    const std::unique_lock lock(mutex_);
    if (allows(key, bytes)) return;  // another thread was first
    const int64_t limit = raise(bytes);
    limits_[key] = limit;
  }

 private:
  bool allows(const std::pair<const void*, int>& key, int64_t bytes) const {
    const auto found = limits_.find(key);
    return found != limits_.end() && bytes <= found->second;
  }

  std::shared_mutex mutex_;
  std::map<std::pair<const void*, int>, int64_t> limits_;
};

}  // namespace rendseg
