// Threads that launch kernels with different amounts of shared memory, for test_shared_limits.py. The device is a table
// of limits that refuses a launch beyond them, as CUDA does; it permits nothing at first.
#include "../../csrc/cuda/shared_limits.h"

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

namespace {

constexpr int kKernels = 3, kDevices = 2;

struct Device {
  std::atomic<int64_t> limits[kKernels];
  std::atomic<int64_t> raises[kKernels];
};

struct Machine {
  rendseg::SharedLimits limits;
  Device devices[kDevices];
  const char kernels[kKernels] = {};  // their addresses stand for kernels

  explicit Machine() {
    for (Device& device : devices) {
      for (auto& limit : device.limits) limit = 0;
      for (auto& raises : device.raises) raises = 0;
    }
  }

  // Whether the device takes a launch. `at_least` is what the limit is raised to.
  bool launch(int device, int kernel, int64_t bytes, int64_t at_least) {
    Device& on = devices[device];
    limits.ensure(&kernels[kernel], device, bytes, [&](int64_t wanted) {
      ++on.raises[kernel];
      const int64_t limit = wanted > at_least ? wanted : at_least;
      on.limits[kernel] = limit;
      return limit;
    });
    std::this_thread::yield();  // time for another thread to lower the limit, if it can
    return bytes <= on.limits[kernel];
  }
};

}  // namespace

extern "C" {

// Launches refused of `threads` threads, each with sizes of its own, on all kernels and devices.
// raises[device][kernel].
int64_t rendseg_limits_race(int threads, int rounds, int64_t at_least, int64_t* raises) {
  Machine machine;
  std::atomic<int64_t> refused = 0;
  std::atomic<int> waiting = threads;
  std::vector<std::thread> all;
  for (int thread = 0; thread < threads; ++thread) {
    all.emplace_back([&, thread] {
      --waiting;
      while (waiting > 0) std::this_thread::yield();  // all begin together
      for (int round = 0; round < rounds; ++round) {
        for (int device = 0; device < kDevices; ++device) {
          for (int kernel = 0; kernel < kKernels; ++kernel) {
            const int64_t bytes = 1024 * (1 + (thread * 37 + round * 11 + kernel) % 200);
            if (!machine.launch(device, kernel, bytes, at_least)) ++refused;
          }
        }
      }
    });
  }
  for (std::thread& thread : all) thread.join();
  for (int i = 0; i < kDevices * kKernels; ++i) raises[i] = machine.devices[i / kKernels].raises[i % kKernels];
  return refused;
}

// Launches of one thread on one kernel and device, with sizes[count]; raised[i]: whether launch i raised the limit.
void rendseg_limits_sequence(const int64_t* sizes, int64_t count, int64_t at_least, int64_t* raised) {
  Machine machine;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t before = machine.devices[0].raises[0];
    if (!machine.launch(0, 0, sizes[i], at_least))
      raised[i] = -1;
    else
      raised[i] = machine.devices[0].raises[0] - before;
  }
}

// How often the setter was called by two launches of the same size, the first of which it refuses.
int64_t rendseg_limits_refused_once() {
  rendseg::SharedLimits limits;
  const char kernel = 0;
  int64_t calls = 0, caught = 0;
  for (int i = 0; i < 3; ++i) {
    try {
      limits.ensure(&kernel, 0, 1000, [&](int64_t wanted) {
        if (++calls == 1) throw std::runtime_error("refused");
        return wanted;
      });
    } catch (const std::runtime_error&) {
      ++caught;
    }
  }
  return caught == 1 ? calls : -1;
}
}
