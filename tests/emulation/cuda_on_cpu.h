// The CUDA vocabulary for g++: the kernels of csrc/cuda/*.cuh compile with this header and run on the CPU.
//
// Each thread of a block is a fiber. Blocks run one after another, in an order shuffled by a seed. Within a block the
// thread that runs next is chosen at random (by the seed) among those that can; it runs until it waits for others: at a
// barrier, a warp shuffle or vote, or (sometimes) an atomic. Threads that ought to have waited and did not thus meet
// data that is not there yet. Shared memory holds garbage when a block starts.
//
// A barrier, shuffle or vote that some thread never reaches is reported, with its place, as are a failed device assert,
// a shuffle from a lane that takes no part, and limits of the device that a launch exceeds; the launch then throws
// std::runtime_error. What a weak memory model allows beyond that, and the speed, only a GPU shows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#ifndef __restrict__
#define __restrict__ __restrict
#endif
#define RENDSEG_EMULATED 1
#define RENDSEG_UNROLL
#define RENDSEG_SHARED(Type, name)                        \
  static const char name##_place_ = 0;                    \
  auto& name = *static_cast<std::type_identity_t<Type>*>( \
      ::emulation::static_shared(&name##_place_, sizeof(Type), alignof(Type)))
#define RENDSEG_DYNAMIC_SHARED(name) unsigned char* const name = ::emulation::dynamic_shared()
#define RENDSEG_DEVICE_ASSERT(condition, text) \
  do {                                         \
    if (!(condition)) ::emulation::fail(text); \
  } while (false)

// --- indices and vector types

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

#define RENDSEG_VECTOR_TYPES(base, type)                                                  \
  struct alignas(2 * sizeof(type)) base##2 { type x, y; };                                \
  struct base##3 { type x, y, z; };                                                       \
  struct alignas(sizeof(type) == 8 ? 16 : 4 * sizeof(type)) base##4 { type x, y, z, w; }; \
  inline base##2 make_##base##2(type x, type y) { return {x, y}; }                        \
  inline base##3 make_##base##3(type x, type y, type z) { return {x, y, z}; }             \
  inline base##4 make_##base##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define uint3 emulated_uint3  // there is one already
RENDSEG_VECTOR_TYPES(float, float)
RENDSEG_VECTOR_TYPES(double, double)
RENDSEG_VECTOR_TYPES(int, int)
RENDSEG_VECTOR_TYPES(uint, unsigned)
RENDSEG_VECTOR_TYPES(short, short)
RENDSEG_VECTOR_TYPES(ushort, unsigned short)
RENDSEG_VECTOR_TYPES(uchar, unsigned char)
#undef uint3
#undef RENDSEG_VECTOR_TYPES

// --- the machine

namespace emulation {

using Place = std::source_location;

void set_seed(uint64_t seed);  // of every launch from here on
uint64_t launches();           // so far
void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);
unsigned char* dynamic_shared();
[[noreturn]] void fail(const char* text, Place place = Place::current());

// Waits until every thread of the block is here. Returns the sum of the values.
int64_t block_barrier(int64_t value, const char* name, Place place);
// Waits until the lanes of `mask` are here, and gives the `bytes` (at most kLaneBytes) of each at out[lane * bytes].
constexpr int kLaneBytes = 64;
void warp_exchange(unsigned mask, const char* name, const void* mine, int bytes, unsigned char* out, Place place);
void maybe_switch();  // lets others go first, sometimes
int lane();

void run(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

struct Settings {
  int processors = 3;
  int64_t shared_limit = 101376;  // bytes per block
};
Settings& settings();

class Launch {
 public:
  template <typename... P, typename... A>
  void operator()(const rendseg::LaunchShape& shape, void (*kernel)(P...), A&&... args) {
    if (shape.blocks == 0) return;
    run(shape.blocks, shape.threads, shape.shared_bytes, [&] { kernel(static_cast<P>(args)...); });
  }
  void fill_zero(void* pointer, int64_t bytes) {
    if (bytes > 0) std::memset(pointer, 0, static_cast<std::size_t>(bytes));
  }
  int processors() const { return settings().processors; }
  int64_t shared_limit() const { return settings().shared_limit; }
};

template <typename T>
T value_of(const unsigned char* all, int lane) {
  T value;
  std::memcpy(&value, all + lane * sizeof(T), sizeof(T));
  return value;
}

template <typename T>
T shuffle(unsigned mask, T value, int source, const char* name, Place place) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  unsigned char all[32 * sizeof(T)];
  warp_exchange(mask, name, &value, sizeof(T), all, place);
  if (!(mask >> source & 1)) fail("shuffle from a lane that takes no part", place);
  return value_of<T>(all, source);
}

template <typename T, typename F>
T reduce(unsigned mask, T value, const char* name, Place place, F&& combine) {
  unsigned char all[32 * sizeof(T)];
  warp_exchange(mask, name, &value, sizeof(T), all, place);
  bool first = true;
  T result{};
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = value_of<T>(all, lane);
    result = first ? other : combine(result, other);
    first = false;
  }
  return result;
}

}  // namespace emulation

// --- barriers, shuffles, votes

using EmulatedPlace = emulation::Place;

inline void __syncthreads(EmulatedPlace at = EmulatedPlace::current()) {
  emulation::block_barrier(0, "__syncthreads", at);
}
inline int __syncthreads_count(int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  return static_cast<int>(emulation::block_barrier(predicate != 0, "__syncthreads_count", at));
}
inline int __syncthreads_or(int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  return emulation::block_barrier(predicate != 0, "__syncthreads_or", at) > 0;
}
inline int __syncthreads_and(int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  return emulation::block_barrier(predicate != 0, "__syncthreads_and", at) == static_cast<int64_t>(blockDim.x);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, EmulatedPlace at = EmulatedPlace::current()) {
  emulation::warp_exchange(mask, "__syncwarp", nullptr, 0, nullptr, at);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, EmulatedPlace at = EmulatedPlace::current()) {
  const int lane = emulation::lane();
  return emulation::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), "__shfl_sync", at);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, EmulatedPlace at = EmulatedPlace::current()) {
  const int lane = emulation::lane(), source = lane ^ bits;
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emulation::shuffle(mask, value, inside ? source : lane, "__shfl_xor_sync", at);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EmulatedPlace at = EmulatedPlace::current()) {
  const int lane = emulation::lane(), source = lane - static_cast<int>(by);
  return emulation::shuffle(mask, value, source >= (lane & ~(width - 1)) ? source : lane, "__shfl_up_sync", at);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EmulatedPlace at = EmulatedPlace::current()) {
  const int lane = emulation::lane(), source = lane + static_cast<int>(by);
  const bool inside = source < (lane & ~(width - 1)) + width;
  return emulation::shuffle(mask, value, inside ? source : lane, "__shfl_down_sync", at);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  const unsigned mine = predicate != 0 ? 1u << emulation::lane() : 0u;
  return emulation::reduce(mask, mine, "__ballot_sync", at, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  return emulation::reduce(mask, int(predicate != 0), "__any_sync", at, [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, EmulatedPlace at = EmulatedPlace::current()) {
  return emulation::reduce(mask, int(predicate != 0), "__all_sync", at, [](int a, int b) { return a & b; });
}
#define RENDSEG_REDUCE(name, expression)                                                                             \
  inline unsigned name(unsigned mask, unsigned value, EmulatedPlace at = EmulatedPlace::current()) {                 \
    return emulation::reduce(mask, value, #name, at, [](unsigned a, unsigned b) -> unsigned { return expression; }); \
  }                                                                                                                  \
  inline int name(unsigned mask, int value, EmulatedPlace at = EmulatedPlace::current()) {                           \
    return emulation::reduce(mask, value, #name, at, [](int a, int b) -> int { return expression; });                \
  }
RENDSEG_REDUCE(__reduce_add_sync, a + b)
RENDSEG_REDUCE(__reduce_min_sync, a < b ? a : b)
RENDSEG_REDUCE(__reduce_max_sync, a > b ? a : b)
RENDSEG_REDUCE(__reduce_or_sync, a | b)
RENDSEG_REDUCE(__reduce_and_sync, a& b)
#undef RENDSEG_REDUCE
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, EmulatedPlace at = EmulatedPlace::current()) {
  unsigned char all[32 * sizeof(T)];
  emulation::warp_exchange(mask, "__match_any_sync", &value, sizeof(T), all, at);
  unsigned same = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && emulation::value_of<T>(all, lane) == value) same |= 1u << lane;
  }
  return same;
}
inline unsigned __activemask() { return 0xffffffffu; }
inline void __threadfence() {}
inline void __threadfence_block() {}

// --- atomics

#define RENDSEG_ATOMIC(name, type, expression)  \
  inline type name(type* address, type value) { \
    emulation::maybe_switch();                  \
    const type old = *address;                  \
    *address = static_cast<type>(expression);   \
    return old;                                 \
  }
#define RENDSEG_ATOMIC_INTEGERS(name, expression) \
  RENDSEG_ATOMIC(name, int, expression)           \
  RENDSEG_ATOMIC(name, unsigned, expression)      \
  RENDSEG_ATOMIC(name, unsigned long long, expression)
RENDSEG_ATOMIC_INTEGERS(atomicAdd, old + value)
RENDSEG_ATOMIC(atomicAdd, float, old + value)
RENDSEG_ATOMIC(atomicAdd, double, old + value)
RENDSEG_ATOMIC_INTEGERS(atomicMin, old < value ? old : value)
RENDSEG_ATOMIC_INTEGERS(atomicMax, old > value ? old : value)
RENDSEG_ATOMIC_INTEGERS(atomicOr, old | value)
RENDSEG_ATOMIC_INTEGERS(atomicAnd, old& value)
RENDSEG_ATOMIC_INTEGERS(atomicExch, value)
RENDSEG_ATOMIC(atomicExch, float, value)
RENDSEG_ATOMIC(atomicInc, unsigned, old >= value ? 0 : old + 1)
#undef RENDSEG_ATOMIC_INTEGERS
#undef RENDSEG_ATOMIC
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  emulation::maybe_switch();
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// --- arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1u) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
template <typename To, typename From>
To emulated_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return emulated_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return emulated_cast<float>(x); }
inline int __float_as_int(float x) { return emulated_cast<int>(x); }
inline float __int_as_float(int x) { return emulated_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_cast<double>(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <typename T>
  requires std::is_arithmetic_v<T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
  requires std::is_arithmetic_v<T>
T max(T a, T b) {
  return a < b ? b : a;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}

// --- half types

namespace rendseg {

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};

}  // namespace rendseg

float __half2float(rendseg::half_t x);
rendseg::half_t __float2half_rn(float x);
inline float __bfloat162float(rendseg::bfloat16_t x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline rendseg::bfloat16_t __float2bfloat16_rn(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

// --- asynchronous copies

namespace emulation {

// Copied when they are waited for, as late as the rules allow; until then the target keeps what it held.
void copy_async(void* shared, const void* global, int bytes, bool valid);
void copy_async_commit();
void copy_async_wait(int pending);  // until at most `pending` groups of this thread are under way

}  // namespace emulation
