// The selection on raw keys, for test_select.py.
#include "../../csrc/cuda/select.cuh"

#include <memory>

namespace rendseg {
namespace {

// indices[k] of keys[count] by one block that reads them where they are.
__global__ void block_select_kernel(const uint32_t* keys, uint32_t count, uint32_t k, int64_t* indices) {
  RENDSEG_SHARED(BlockSelectScratch, scratch);
  const auto key_at = [&](uint32_t i) { return keys[i]; };
  const KeyThreshold threshold = block_radix_threshold(key_at, count, k, scratch);
  block_emit(key_at, count, threshold, scratch, [&](uint32_t position, uint32_t i) { indices[position] = i; });
}

}  // namespace
}  // namespace rendseg

extern "C" {

void rendseg_block_select(const uint32_t* keys, int64_t count, int64_t k, int threads, int64_t* indices) {
  emulation::Launch launch;
  launch({1, threads}, rendseg::block_select_kernel, keys, static_cast<uint32_t>(count), static_cast<uint32_t>(k),
         indices);
}

// `histograms` may be null, and so may `bounds` and `limits`. The memory of the workspace is exact, so that a write
// beyond it is seen.
void rendseg_select(const uint32_t* keys, uint32_t* histograms, int64_t images, int64_t height, int64_t width,
                    int64_t k, const uint16_t* bounds, const uint32_t* limits, int64_t* indices, float* coords) {
  using namespace rendseg;
  const int64_t cells = height * width, bytes = select_workspace_bytes(images, cells);
  const std::unique_ptr<unsigned char[]> zeroed(new unsigned char[select_zeroed_bytes(images, cells)]());
  const std::unique_ptr<unsigned char[]> workspace(new unsigned char[bytes]);
  std::memset(workspace.get(), 0xa5, bytes);
  emulation::Launch launch;
  run_select(launch, {keys, histograms, zeroed.get(), workspace.get(), images, cells, k, height, width, bounds, limits,
                      indices, coords});
}
}
