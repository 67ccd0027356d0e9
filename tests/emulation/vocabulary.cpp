// Words of the vocabulary by themselves, for tests/emulation/test_vocabulary.py: dtypes, matrix fragments, block
// primitives.
#include "../../csrc/cuda/mma.cuh"

namespace rendseg {
namespace {

template <typename Array>
struct alignas(16) alignas16 {
  Array at;
};

template <typename T>
__global__ void round_trip_kernel(const float* in, T* narrowed, float* widened, int64_t size) {
  for (int64_t i = global_thread(); i < size; i += global_threads()) {
    narrowed[i] = narrow<T>(in[i]);
    widened[i] = widen(narrowed[i]);
  }
}

// d[16,8] = a[16,16] * b[16,8] by one warp: a through ldmatrix from rows, b through ldmatrix from rows, transposed.
template <typename T>
__global__ void product_kernel(const float* a, const float* b, float* d) {
  RENDSEG_SHARED(alignas16<T[16][24]>, rows_a);
  RENDSEG_SHARED(alignas16<T[16][8]>, rows_b);
  const int lane = lane_id();
  for (int i = lane; i < 256; i += kWarp) rows_a.at[i / 16][i % 16] = narrow<T>(a[i]);
  for (int i = lane; i < 128; i += kWarp) rows_b.at[i / 8][i % 8] = narrow<T>(b[i]);
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[2];
  ldmatrix_x4(fragment_a, &rows_a.at[lane % 16][lane / 16 * 8]);
  ldmatrix_x2_trans(fragment_b, &rows_b.at[lane % 16][0]);
  float sums[4] = {0, 0, 0, 0};
  mma_m16n8k16(sums, fragment_a, fragment_b, T{});
  for (int i = 0; i < 4; ++i) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// d[16,8] = a[16,8] * b[8,8] in tf32.
__global__ void product_tf32_kernel(const float* a, const float* b, float* d) {
  const int group = lane_id() / 4, in_group = lane_id() % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) fragment_a[i] = to_tf32(a[(group + i % 2 * 8) * 8 + in_group + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(in_group + i * 4) * 8 + group]);
  float sums[4] = {0, 0, 0, 0};
  mma_m16n8k8_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + in_group * 2 + i % 2] = sums[i];
}

// Exclusive scan of in[blocks][blockDim]; the total of each block goes to totals, their sum to the last block's word.
__global__ void scan_kernel(const int* in, int* out, int* totals, int* grand_total, unsigned* counter) {
  RENDSEG_SHARED(int[33], scratch);
  const int64_t i = global_thread();
  int total;
  out[i] = block_exclusive_scan(in[i], total, scratch);
  if (threadIdx.x == 0) totals[blockIdx.x] = total;
  if (!last_block_to_arrive(counter, gridDim.x)) return;
  int sum = 0;
  for (int64_t b = threadIdx.x; b < gridDim.x; b += blockDim.x) sum += totals[b];
  block_exclusive_scan(sum, total, scratch);
  if (threadIdx.x == 0) *grand_total = total;
}

}  // namespace
}  // namespace rendseg

extern "C" {

void rendseg_round_trip(int bfloat, const float* in, void* narrowed, float* widened, int64_t size) {
  using namespace rendseg;
  emulation::Launch launch;
  if (bfloat != 0) {
    launch({4, 64}, round_trip_kernel<bfloat16_t>, in, static_cast<bfloat16_t*>(narrowed), widened, size);
  } else {
    launch({4, 64}, round_trip_kernel<half_t>, in, static_cast<half_t*>(narrowed), widened, size);
  }
}

void rendseg_product(int kind, const float* a, const float* b, float* d) {
  using namespace rendseg;
  emulation::Launch launch;
  if (kind == 2) return launch({1, 32}, product_tf32_kernel, a, b, d);
  launch({1, 32}, kind == 1 ? product_kernel<bfloat16_t> : product_kernel<half_t>, a, b, d);
}

void rendseg_scan(const int* in, int* out, int* totals, int* grand_total, unsigned* counter, int64_t blocks,
                  int threads) {
  emulation::Launch launch;
  launch({blocks, threads}, rendseg::scan_kernel, in, out, totals, grand_total, counter);
}
}
