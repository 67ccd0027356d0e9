// Kernels with one planted fault each, and the same kernels without it: what the emulation must catch.
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cuda/mma.cuh"

namespace rendseg {
namespace {

enum class Fault {
  kNone,
  kMissingBarrier,        // shared memory is read before all of it is written
  kMissingSecondBarrier,  // and written again before all of it is read
  kMissingWarpBarrier,
  kBarrierNotReached,
  kDifferentBarriers,
  kShuffleNotReached,
  kShuffleFromAbsentLane,
  kUninitializedShared,
  kStaticOverflow,
  kDynamicOverflow,
  kGlobalWrite,
  kGlobalRead,
  kMissingWait,
  kShift,
  kAssert,
};

constexpr int kBlock = 96, kBlocks = 5;

// out[block * kBlock + thread] = value(kBlock - 1 - thread) with value(t) = 2 * t + block, by way of shared memory.
template <Fault fault>
__global__ void reverse_kernel(const float* in, float* out, int shift) {
  RENDSEG_SHARED(float[kBlock], tile);
  RENDSEG_DYNAMIC_SHARED(memory);
  float* copies = reinterpret_cast<float*>(memory);  // [kBlock]
  const int t = static_cast<int>(threadIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlock;

  // A value that each thread writes and another thread reads.
  tile[fault == Fault::kStaticOverflow && t == kBlock - 1 ? kBlock : t] =
      in[fault == Fault::kGlobalRead && blockIdx.x == kBlocks - 1 ? first + t + 1 : first + t];
  if (fault == Fault::kBarrierNotReached && t == 40) return;
  if (fault == Fault::kDifferentBarriers && t >= 64) {
    __syncthreads();
  } else if (fault != Fault::kMissingBarrier) {
    __syncthreads();
  }
  float value = tile[kBlock - 1 - t];
  if (fault != Fault::kMissingSecondBarrier) __syncthreads();

  // The same array again, within each warp.
  tile[t] = value;
  if (fault != Fault::kMissingWarpBarrier) __syncwarp();
  value += tile[t ^ 1] - tile[t];
  value += fault == Fault::kUninitializedShared ? copies[t] : 0.0f;

  // Back to the value of this thread, by a shuffle.
  if (!(fault == Fault::kShuffleNotReached && t == 7)) {
    const unsigned mask = fault == Fault::kShuffleFromAbsentLane ? (lane_id() < 16 ? 0xffffu : 0xffff0000u) : kAllLanes;
    value = __shfl_sync(mask, value, fault == Fault::kShuffleFromAbsentLane ? (lane_id() + 16) % 32 : lane_id() ^ 1);
  }
  RENDSEG_DEVICE_ASSERT(!(fault == Fault::kAssert && blockIdx.x == 3 && t == 5), "a planted assert");

  // And through an asynchronous copy of four values by every fourth thread.
  out[first + t] = value;
  __syncthreads();
  if (t % 4 == 0) {
    cp_async_16(copies + t + (fault == Fault::kDynamicOverflow && t == kBlock - 4 ? 4 : 0), out + first + t);
    cp_async_commit();
    if (fault != Fault::kMissingWait) cp_async_wait<0>();
  }
  __syncthreads();
  const float scale = static_cast<float>(1 << (fault == Fault::kShift ? shift + 32 : shift));
  out[first + t + (fault == Fault::kGlobalWrite && blockIdx.x == kBlocks - 1 ? 1 : 0)] = copies[t] * scale;
}

template <int fault = 0>
void launch_fault(int wanted, emulation::Launch& launch, const float* in, float* out) {
  if constexpr (fault <= static_cast<int>(Fault::kAssert)) {
    if (wanted != fault) return launch_fault<fault + 1>(wanted, launch, in, out);
    launch({kBlocks, kBlock, kBlock * 4}, reverse_kernel<static_cast<Fault>(fault)>, in, out, 0);
  }
}

}  // namespace
}  // namespace rendseg

// Both arrays hold kBlocks * kBlock values.
extern "C" void rendseg_fault(int fault, const float* in, float* out) {
  emulation::Launch launch;
  rendseg::launch_fault(fault, launch, in, out);
}

// faults FAULT SEEDS: exit 0 when every result is right, 2 when one is wrong, 3 when the emulation complains.
int main(int argc, char** argv) {
  if (argc != 3) return 64;
  const int fault = std::atoi(argv[1]), seeds = std::atoi(argv[2]);
  constexpr int kSize = rendseg::kBlocks * rendseg::kBlock;
  for (int seed = 0; seed < seeds; ++seed) {
    emulation::set_seed(static_cast<uint64_t>(seed));
    std::vector<float> in(kSize), out(kSize, -1.0f);
    in.shrink_to_fit();
    for (int i = 0; i < kSize; ++i) in[i] = static_cast<float>(i);
    try {
      rendseg_fault(fault, in.data(), out.data());
    } catch (const std::runtime_error& error) {
      std::printf("seed %d: %s\n", seed, error.what());
      return 3;
    }
    for (int i = 0; i < kSize; ++i) {
      const int block = i / rendseg::kBlock, t = i % rendseg::kBlock;
      if (out[i] != static_cast<float>(block * rendseg::kBlock + rendseg::kBlock - 1 - t)) {
        std::printf("seed %d: wrong result at %d\n", seed, i);
        return 2;
      }
    }
  }
  return 0;
}
