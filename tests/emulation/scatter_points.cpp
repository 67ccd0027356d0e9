// The CUDA kernels of scatter_points as a plain library for tests/emulation/test_scatter_points.py. Compiled with
// -DNDEBUG an index outside the map is passed over; without it the assert stops the program, as on the device.
#include "cuda_on_cpu.h"
// clang-format off
#include "../../csrc/cuda/scatter_points.cuh"
// clang-format on

namespace {

template <typename Bits>
void forward(void* logits, const int64_t* map, const int64_t* indices, const void* values, int64_t points,
             int64_t total, bool channels_last, unsigned blocks, unsigned threads) {
  const rendseg::MapLayout layout{map[0], map[1], map[2], map[3], map[4], map[5], map[6]};
  launch(blocks, threads, [&] {
    rendseg::scatter_points_kernel<Bits>(static_cast<Bits*>(logits), layout, indices, static_cast<const Bits*>(values),
                                         points, total, channels_last);
  });
}

template <typename Bits>
void backward(const void* grad, const int64_t* from, void* grad_logits, const int64_t* to, const int64_t* indices,
              void* grad_values, int64_t points, int64_t total, bool channels_last, unsigned blocks, unsigned threads) {
  const rendseg::MapLayout source{from[0], from[1], from[2], from[3], from[4], from[5], from[6]};
  const rendseg::MapLayout target{to[0], to[1], to[2], to[3], to[4], to[5], to[6]};
  launch(blocks, threads, [&] {
    rendseg::scatter_points_backward_kernel<Bits>(static_cast<const Bits*>(grad), source,
                                                  static_cast<Bits*>(grad_logits), target, indices,
                                                  static_cast<Bits*>(grad_values), points, total, channels_last);
  });
}

}  // namespace

extern "C" {

void scatter(int width, void* logits, const int64_t* map, const int64_t* indices, const void* values, int64_t points,
             int64_t total, bool channels_last, unsigned blocks, unsigned threads) {
  auto* run = width == 2 ? forward<uint16_t> : width == 4 ? forward<uint32_t> : forward<uint64_t>;
  run(logits, map, indices, values, points, total, channels_last, blocks, threads);
}

void scatter_backward(int width, const void* grad, const int64_t* from, void* grad_logits, const int64_t* to,
                      const int64_t* indices, void* grad_values, int64_t points, int64_t total, bool channels_last,
                      unsigned blocks, unsigned threads) {
  auto* run = width == 2 ? backward<uint16_t> : width == 4 ? backward<uint32_t> : backward<uint64_t>;
  run(grad, from, grad_logits, to, indices, grad_values, points, total, channels_last, blocks, threads);
}
}
