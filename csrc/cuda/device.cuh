// The vocabulary of the CUDA kernels: what nvcc gives, and a little of ours. Without nvcc, the header cuda_on_cpu.h of
// tests/emulation/ gives the same words, so that g++ compiles every kernel and runs it on the CPU. No Torch headers.
#pragma once

#include <cstdint>
#include <type_traits>

namespace rendseg {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;  // dynamic
};

}  // namespace rendseg

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cassert>

// An array or struct in static shared memory: RENDSEG_SHARED(float[8][33], tile) declares float (&tile)[8][33].
#define RENDSEG_SHARED(Type, name) __shared__ std::type_identity_t<Type> name
// The dynamic shared memory of the launch.
#define RENDSEG_DYNAMIC_SHARED(name)                                 \
  extern __shared__ __align__(128) unsigned char rendseg_dynamic_[]; \
  unsigned char* const name = rendseg_dynamic_
#define RENDSEG_DEVICE_ASSERT(condition, text) assert((condition) && text)
#define RENDSEG_UNROLL _Pragma("unroll")
#define RENDSEG_NO_UNROLL _Pragma("unroll 1")

namespace rendseg {
using half_t = __half;
using bfloat16_t = __nv_bfloat16;
}  // namespace rendseg
#else
#include "cuda_on_cpu.h"  // found by -I tests/emulation
#define RENDSEG_NO_UNROLL
#endif

namespace rendseg {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// --- dtypes

// The type of arithmetic on T: double for double, else float.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(half_t x) { return __half2float(x); }
__device__ inline float widen(bfloat16_t x) { return __bfloat162float(x); }

// Rounds to nearest, halves to even.
template <typename T>
__device__ inline T narrow(Acc<T> x) {
  if constexpr (std::is_same_v<T, half_t>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
#if defined(__CUDACC__)
    return __floats2bfloat162_rn(x, 0.0f).x;  // converting two is an instruction of full rate, one is not
#else
    return __float2bfloat16_rn(x);
#endif
  } else {
    return x;
  }
}

// --- memory

// N values that move in one instruction where N * sizeof(T) is 2, 4, 8 or 16 bytes.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (N & (N - 1)) == 0, "at most 16 bytes, a power of two");
  T at[N];
  __host__ __device__ T& operator[](int i) { return at[i]; }
  __host__ __device__ const T& operator[](int i) const { return at[i]; }
};

// The widest vector of T: 16 bytes.
template <typename T>
constexpr int kVecWidth = 16 / static_cast<int>(sizeof(T));

template <int N, typename T>
__device__ inline Vec<T, N> load_vec(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}

template <typename T, int N>
__device__ inline void store_vec(T* to, const Vec<T, N>& values) {
  *reinterpret_cast<Vec<T, N>*>(to) = values;
}

// Both rounded as narrow() does.
template <typename T>
__device__ inline Vec<T, 2> narrow_pair(Acc<T> low, Acc<T> high) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, half_t>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return {{pair.x, pair.y}};
  } else if constexpr (std::is_same_v<T, bfloat16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return {{pair.x, pair.y}};
  }
#endif
  return {{narrow<T>(low), narrow<T>(high)}};
}

// For what nobody reads again soon: does not push other data out of L2.
template <typename T, int N>
__device__ inline void store_vec_streaming(T* to, const Vec<T, N>& values) {
#if defined(__CUDACC__)
  if constexpr (sizeof(values) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&values));
  } else if constexpr (sizeof(values) == 8) {
    __stcs(reinterpret_cast<uint2*>(to), *reinterpret_cast<const uint2*>(&values));
  } else if constexpr (sizeof(values) == 4) {
    __stcs(reinterpret_cast<unsigned*>(to), *reinterpret_cast<const unsigned*>(&values));
  } else {
    store_vec(to, values);
  }
#else
  store_vec(to, values);
#endif
}

__host__ __device__ inline bool is_aligned(const void* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// --- threads

__device__ inline int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// First index and step of a grid-stride loop.
__device__ inline int64_t global_thread() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// Sum over the warp, the same bits in every lane, in a fixed order. All lanes must take part.
template <typename T>
__device__ inline T warp_sum(T value) {
  RENDSEG_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance);
  return value;
}

// Largest over the warp; NaN is passed over unless every value is NaN.
__device__ inline float warp_max(float value) {
  RENDSEG_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}
__device__ inline double warp_max(double value) {
  RENDSEG_UNROLL
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = fmax(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// Sum of the values of the lower threads of the block; `total` receives the sum of all. `scratch` holds one entry per
// warp plus one, in shared memory, and may be used again after the next barrier. All threads must take part; blockDim.x
// is a multiple of 32, at most 1024.
template <typename T>
__device__ inline T block_exclusive_scan(T value, T& total, T* scratch) {
  const int lane = lane_id(), warp = warp_id(), warps = static_cast<int>(blockDim.x) / kWarp;
  T inclusive = value;
  RENDSEG_UNROLL
  for (int distance = 1; distance < kWarp; distance *= 2) {
    const T below = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += below;
  }
  __syncthreads();  // scratch may still be read by an earlier use
  if (lane == kWarp - 1) scratch[warp] = inclusive;
  __syncthreads();
  if (warp == 0) {
    const T of_warp = lane < warps ? scratch[lane] : T(0);
    T sum = of_warp;
    RENDSEG_UNROLL
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const T below = __shfl_up_sync(kAllLanes, sum, distance);
      if (lane >= distance) sum += below;
    }
    if (lane < warps) scratch[lane] = sum - of_warp;
    if (lane == kWarp - 1) scratch[warps] = sum;
  }
  __syncthreads();
  total = scratch[warps];
  return scratch[warp] + inclusive - value;
}

// Whether this block is the last of `blocks` to get here; the same answer in every thread. What the others wrote before
// is then visible. Leaves the counter at zero, as it must be before the first use.
__device__ inline bool last_block_to_arrive(unsigned* counter, unsigned blocks) {
  RENDSEG_SHARED(bool, is_last);
  __threadfence();  // what this thread wrote comes before the count
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  const bool last = is_last;
  if (last) __threadfence();
  return last;
}

// --- random numbers

// Seed and offset of a PyTorch CUDA generator: by value, or inside a CUDA graph behind pointers that each replay
// updates.
struct PhiloxSource {
  uint64_t seed, offset;
  const int64_t* seed_pointer;  // null when not captured
  const int64_t* offset_pointer;
};

struct PhiloxKey {
  uint64_t seed, offset;
};

__device__ inline PhiloxKey philox_key(const PhiloxSource& source) {
  if (source.seed_pointer == nullptr) return {source.seed, source.offset};
  return {static_cast<uint64_t>(*source.seed_pointer), static_cast<uint64_t>(*source.offset_pointer) + source.offset};
}

// --- launches

// Blocks of a grid-stride loop over `total` items: enough to fill any GPU, far from any limit of the grid.
inline int64_t blocks_for(int64_t total, int64_t threads = 256) {
  const int64_t blocks = (total + threads - 1) / threads;
  return blocks < (int64_t{1} << 16) ? blocks : int64_t{1} << 16;
}

}  // namespace rendseg
