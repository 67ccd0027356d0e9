// Vectors of one instruction set: load, store, round, gather, transpose, fma, max and min for the kernels of every op.
// No include guard: compile_kernels.h includes it once for the element types, then once per instruction set.
//
// A vector holds kLanes<A> values of A, the type of the arithmetic: float, or double for float64 tensors (Wide<T>). A
// load widens from the type T in memory, a store rounds to it (to nearest even, NaN stays NaN). All is inlined and has
// internal linkage, so that nothing of a wider set reaches the linker under a shared name.
#ifndef RENDSEG_ISA

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../strided.h"

namespace rendseg {

// Type of the arithmetic on elements of type T.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
constexpr bool kIsHalf = std::is_same_v<T, c10::Half> || std::is_same_v<T, c10::BFloat16>;

// f.operator()<T>() with the element type of a CPU tensor.
template <typename F>
decltype(auto) with_element(Dtype dtype, F&& f) {
  return with_dtype<c10::Half, c10::BFloat16>(dtype, static_cast<F&&>(f));
}

}  // namespace rendseg

#else

#if RENDSEG_ISA == 2 && defined(RENDSEG_EMULATE_AVX512)
#include "avx512_emulated.h"
#endif

namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

#undef RENDSEG_INLINE
#define RENDSEG_INLINE inline __attribute__((always_inline))

constexpr int kVectorBytes = RENDSEG_ISA == 2 ? 64 : RENDSEG_ISA == 1 ? 32 : 16;

template <typename A>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  using Lane = int32_t;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
  using Lane = int64_t;
};
template <typename A>
using Vec = typename Simd<A>::V;
template <typename A>
using Ints = typename Simd<A>::I;  // as wide as A; also what a comparison gives
template <typename A>
using Bits = typename Simd<A>::U;
template <typename A>
using Lane = typename Simd<A>::Lane;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));
typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));  // as many as floats in a vector

template <typename A>
RENDSEG_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}
template <typename V>
RENDSEG_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
template <typename V>
RENDSEG_INLINE void store_bits(void* p, V v) {
  __builtin_memcpy(p, &v, sizeof(v));
}

// ---- float16 and bfloat16

RENDSEG_INLINE Vec<float> widen_half(HalfBits h) {
#if RENDSEG_ISA == 2
  return (Vec<float>)_mm512_cvtph_ps((__m256i)h);
#elif RENDSEG_ISA == 1
  return (Vec<float>)_mm256_cvtph_ps((__m128i)h);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = c10::detail::fp16_ieee_to_fp32_value(h[i]);
  return v;
#endif
}
RENDSEG_INLINE HalfBits narrow_half(Vec<float> v) {
#if RENDSEG_ISA == 2
  return (HalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif RENDSEG_ISA == 1
  return (HalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  HalfBits h;
  for (int i = 0; i < kLanes<float>; ++i) h[i] = c10::detail::fp16_ieee_from_fp32_value(v[i]);
  return h;
#endif
}
RENDSEG_INLINE Vec<float> widen_bfloat(HalfBits h) {
  return (Vec<float>)(__builtin_convertvector(h, Bits<float>) << 16);
}
RENDSEG_INLINE HalfBits narrow_bfloat(Vec<float> v) {
  const Bits<float> bits = (Bits<float>)v;
  const Bits<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits<float> nan = Bits<float>{} + 0x7fc0u;
  return __builtin_convertvector(v == v ? rounded : nan, HalfBits);
}

// ---- Load, store, round

// kLanes elements in the type of the arithmetic.
template <typename T>
RENDSEG_INLINE Vec<Wide<T>> load(const T* p) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return widen_half(load_bits<HalfBits>(p));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return widen_bfloat(load_bits<HalfBits>(p));
  } else {
    return load_bits<Vec<T>>(p);
  }
}
template <typename T>
RENDSEG_INLINE void store(T* p, Vec<Wide<T>> v) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    store_bits(p, narrow_half(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    store_bits(p, narrow_bfloat(v));
  } else {
    store_bits(p, v);
  }
}
// The first `count` <= kLanes elements; a load fills with zeros.
template <typename T>
RENDSEG_INLINE Vec<Wide<T>> load_part(const T* p, int64_t count) {
  T padded[kLanes<Wide<T>>] = {};
  for (int64_t i = 0; i < count; ++i) padded[i] = p[i];
  return load(padded);
}
template <typename T>
RENDSEG_INLINE void store_part(T* p, Vec<Wide<T>> v, int64_t count) {
  T kept[kLanes<Wide<T>>];
  store(kept, v);
  __builtin_memcpy(p, kept, count * sizeof(T));
}
// Rounded to what a store in T would keep.
template <typename T>
RENDSEG_INLINE Vec<Wide<T>> round_to(Vec<Wide<T>> v) {
  if constexpr (std::is_same_v<T, c10::Half>) {
    return widen_half(narrow_half(v));
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const Bits<float> bits = (Bits<float>)v;
    const Bits<float> rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
    return (Vec<float>)(v == v ? rounded : Bits<float>{} + 0x7fc00000u);
  } else {
    return v;
  }
}
// A store that bypasses the caches. `p` must be aligned to the vector where T is float; other types, and the baseline,
// store as usual.
template <typename T>
RENDSEG_INLINE void stream(T* p, Vec<Wide<T>> v) {
#if RENDSEG_ISA == 2
  if constexpr (sizeof(T) == 4) return _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
#elif RENDSEG_ISA == 1
  if constexpr (sizeof(T) == 4) return _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
#endif
  store(p, v);
}

// One element.
RENDSEG_INLINE float widen(float x) { return x; }
RENDSEG_INLINE double widen(double x) { return x; }
RENDSEG_INLINE float widen(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  return load_bits<float>(&bits);
}
template <typename T>
RENDSEG_INLINE T narrow(Wide<T> x) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const uint32_t bits = load_bits<uint32_t>(&x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded), T::from_bits()};
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if RENDSEG_ISA > 0
    return {_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT), T::from_bits()};
#else
    return T(x);
#endif
  } else {
    return x;
  }
}
RENDSEG_INLINE float widen(c10::Half x) {
#if RENDSEG_ISA > 0
  return _cvtsh_ss(x.x);
#else
  return static_cast<float>(x);
#endif
}

// `count` adjacent elements.
template <typename T>
inline void widen_row(const T* from, int64_t count, Wide<T>* to) {
  int64_t i = 0;
  for (; i + kLanes<Wide<T>> <= count; i += kLanes<Wide<T>>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = widen(from[i]);
}
template <typename T>
inline void narrow_row(const Wide<T>* from, int64_t count, T* to) {
  int64_t i = 0;
  for (; i + kLanes<Wide<T>> <= count; i += kLanes<Wide<T>>) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = narrow<T>(from[i]);
}

// ---- Arithmetic

// a * b + c, rounded once; the baseline rounds twice.
RENDSEG_INLINE Vec<float> fused(Vec<float> a, Vec<float> b, Vec<float> c) {
#if RENDSEG_ISA == 2
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif RENDSEG_ISA == 1
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
RENDSEG_INLINE Vec<double> fused(Vec<double> a, Vec<double> b, Vec<double> c) {
#if RENDSEG_ISA == 2
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif RENDSEG_ISA == 1
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// a > b ? a : b and a < b ? a : b, b where either is NaN. (GCC 12 makes a comparison and a blend of the conditional.)
template <typename A>
RENDSEG_INLINE Vec<A> larger(Vec<A> a, Vec<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm512_max_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}
template <typename A>
RENDSEG_INLINE Vec<A> smaller(Vec<A> a, Vec<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm512_min_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Vec<A>)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}
template <typename A>
RENDSEG_INLINE Ints<A> larger_ints(Ints<A> a, Ints<A> b) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) return (Ints<A>)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) return (Ints<A>)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
  return a > b ? a : b;
}
// a > b ? yes : no
template <typename A>
RENDSEG_INLINE Ints<A> select_greater(Vec<A> a, Vec<A> b, Ints<A> yes, Ints<A> no) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) {
    return (Ints<A>)_mm512_mask_mov_epi32((__m512i)no, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ),
                                          (__m512i)yes);
  }
#endif
  return a > b ? yes : no;
}

// The largest integers that are no larger.
template <typename A>
RENDSEG_INLINE Vec<A> round_down(Vec<A> v) {
#if RENDSEG_ISA == 2
  constexpr int kDown = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  if constexpr (std::is_same_v<A, float>) {
    return (Vec<A>)_mm512_roundscale_ps((__m512)v, kDown);
  } else {
    return (Vec<A>)_mm512_roundscale_pd((__m512d)v, kDown);
  }
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) {
    return (Vec<A>)_mm256_floor_ps((__m256)v);
  } else {
    return (Vec<A>)_mm256_floor_pd((__m256d)v);
  }
#else
  for (int i = 0; i < kLanes<A>; ++i) v[i] = std::floor(v[i]);
  return v;
#endif
}

// The lower 32 bits of each lane times `factor`, in 64 bits.
RENDSEG_INLINE Bits<double> wide_product(Bits<double> v, uint32_t factor) {
  const Bits<double> factors = Bits<double>{} + factor;
#if RENDSEG_ISA == 2
  return (Bits<double>)_mm512_mul_epu32((__m512i)v, (__m512i)factors);
#elif RENDSEG_ISA == 1
  return (Bits<double>)_mm256_mul_epu32((__m256i)v, (__m256i)factors);
#else
  return (v & 0xffffffffu) * factors;
#endif
}

// exp(x) for x <= 0 (or NaN), to about one unit in the last place; below the normal range it is 0.
RENDSEG_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using U = Bits<float>;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec<float> shifted = fused(x, splat(1.44269504f), splat(kShift));
  const Vec<float> n = shifted - kShift;
  Vec<float> r = fused(n, splat(-0.693145752f), x);  // ln 2 in two parts; the first has trailing zero bits
  r = fused(n, splat(-1.42860677e-6f), r);
  // Taylor to the seventh order: |r| <= ln(2) / 2, so the rest is below 6e-9.
  Vec<float> p = splat(1.0f / 5040);
  p = fused(p, r, splat(1.0f / 720));
  p = fused(p, r, splat(1.0f / 120));
  p = fused(p, r, splat(1.0f / 24));
  p = fused(p, r, splat(1.0f / 6));
  p = fused(p, r, splat(0.5f));
  p = fused(p, r, splat(1.0f));
  p = fused(p, r, splat(1.0f));
  const Vec<float> power = (Vec<float>)(((U)shifted << 23) + 0x3f800000u);
  return x < -87.3f ? Vec<float>{} : p * power;
}
RENDSEG_INLINE Vec<double> exp_nonpositive(Vec<double> x) {
  Vec<double> y;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
}

// ---- Across lanes

// 0, 1, 2, ...
template <typename A>
RENDSEG_INLINE Ints<A> lanes() {
  Ints<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = i;
  return v;
}
// Lane i is lane index[i] of v.
template <typename A>
RENDSEG_INLINE Vec<A> permute(Vec<A> v, Ints<A> index) {
#if defined(__clang__)
  Vec<A> out;
  for (int i = 0; i < kLanes<A>; ++i) out[i] = v[index[i]];
  return out;
#else
  return __builtin_shuffle(v, index);
#endif
}
// Lane i of the result is lane (i xor Step) of v.
template <typename A, int Step, int... Lane>
RENDSEG_INLINE Vec<A> exchange(Vec<A> v, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(v, v, (Lane ^ Step)...);
}
template <typename A, int Step>
RENDSEG_INLINE Vec<A> exchange(Vec<A> v) {
  return exchange<A, Step>(v, std::make_integer_sequence<int, kLanes<A>>{});
}
template <typename A, int Step = kLanes<A> / 2>
RENDSEG_INLINE A sum_lanes(Vec<A> v) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    return sum_lanes<A, Step / 2>(v + exchange<A, Step>(v));
  }
}
template <typename A, int Step = kLanes<A> / 2>
RENDSEG_INLINE A max_lanes(Vec<A> v) {
  if constexpr (Step == 0) {
    return v[0];
  } else {
    return max_lanes<A, Step / 2>(larger<A>(v, exchange<A, Step>(v)));
  }
}

// out = a[0], b[0], a[1], b[1], ... in units of 64 bits.
template <int... Lane>
RENDSEG_INLINE void store_interleaved(Vec<double> a, Vec<double> b, float* out, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<double>;
  store_bits(out, __builtin_shufflevector(a, b, (Lane / 2 + Lane % 2 * n)...));
  store_bits(out + 2 * n, __builtin_shufflevector(a, b, (n / 2 + Lane / 2 + Lane % 2 * n)...));
}

// first[i], second[i] = p[2 * i], p[2 * i + 1]
template <typename A, int... Lane>
RENDSEG_INLINE void load_interleaved(const A* p, Vec<A>& first, Vec<A>& second, std::integer_sequence<int, Lane...>) {
  const Vec<A> a = load(p), b = load(p + kLanes<A>);
  first = __builtin_shufflevector(a, b, (2 * Lane)...);
  second = __builtin_shufflevector(a, b, (2 * Lane + 1)...);
}

// In place: v[i][j] becomes v[j][i], for a square of kLanes vectors. Each step swaps the off-diagonal blocks of size
// Step.
template <typename A, int Step, int... Lane>
RENDSEG_INLINE void swap_blocks(Vec<A>& a, Vec<A>& b, std::integer_sequence<int, Lane...>) {
  constexpr int n = kLanes<A>;
  const Vec<A> low = __builtin_shufflevector(a, b, ((Lane & Step) ? n + (Lane ^ Step) : Lane)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) ? n + Lane : (Lane ^ Step))...);
  a = low;
}
template <typename A, int Step = kLanes<A> / 2>
RENDSEG_INLINE void transpose(Vec<A>* v) {
  if constexpr (Step > 0) {
    constexpr int n = kLanes<A>;
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (!(i & Step)) swap_blocks<A, Step>(v[i], v[i | Step], std::make_integer_sequence<int, n>{});
    }
    transpose<A, Step / 2>(v);
  }
}

#if RENDSEG_ISA == 1
// The lanes whose bits are set in `mask`, in order.
struct LanesOf {
  uint8_t lane[256][8] = {};
  constexpr LanesOf() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if ((mask >> bit) & 1) lane[mask][count++] = static_cast<uint8_t>(bit);
      }
    }
  }
};
inline constexpr LanesOf kLanesOf;
#endif

// Stores the chosen lanes (-1, the others 0) side by side. Writes kLanes; returns how many were chosen.
RENDSEG_INLINE int store_chosen(uint32_t* p, Bits<float> v, Ints<float> chosen) {
#if RENDSEG_ISA == 2
  const __mmask16 mask = _mm512_movepi32_mask((__m512i)chosen);
  store_bits(p, (Bits<float>)_mm512_maskz_compress_epi32(mask, (__m512i)v));
  return __builtin_popcount(mask);
#elif RENDSEG_ISA == 1
  const int mask = _mm256_movemask_ps((__m256)chosen);
  const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kLanesOf.lane[mask])));
  store_bits(p, (Bits<float>)_mm256_permutevar8x32_epi32((__m256i)v, order));
  return __builtin_popcount(static_cast<unsigned>(mask));
#else
  int count = 0;
  for (int i = 0; i < kLanes<float>; ++i) {
    p[count] = v[i];
    count -= chosen[i];
  }
  return count;
#endif
}

// ---- Gather

// kLanes values `stride` apart, less than 2^31 elements in all.
template <typename A>
RENDSEG_INLINE Vec<A> load_strided(const A* p, int64_t stride) {
#if RENDSEG_ISA == 2
  if constexpr (std::is_same_v<A, float>) {
    return (Vec<A>)_mm512_i32gather_ps((__m512i)(lanes<A>() * static_cast<int32_t>(stride)), p, 4);
  }
#elif RENDSEG_ISA == 1
  if constexpr (std::is_same_v<A, float>) {
    return (Vec<A>)_mm256_i32gather_ps(p, (__m256i)(lanes<A>() * static_cast<int32_t>(stride)), 4);
  }
#endif
  Vec<A> v;
  for (int i = 0; i < kLanes<A>; ++i) v[i] = p[i * stride];
  return v;
}

// p[at[i]] and p[at[i] + 1], each pair fetched as one word. (A gather of the hardware is slower on many processors.)
typedef float Quad __attribute__((vector_size(16)));
typedef double Words __attribute__((vector_size(16)));
RENDSEG_INLINE void four_pairs(const float* p, const int32_t* at, Quad& first, Quad& second) {
  const Words low = {load_bits<double>(p + at[0]), load_bits<double>(p + at[1])};
  const Words high = {load_bits<double>(p + at[2]), load_bits<double>(p + at[3])};
  first = __builtin_shufflevector((Quad)low, (Quad)high, 0, 2, 4, 6);
  second = __builtin_shufflevector((Quad)low, (Quad)high, 1, 3, 5, 7);
}
template <typename V, int... Lane>
RENDSEG_INLINE auto joined(V low, V high, std::integer_sequence<int, Lane...>) {
  return __builtin_shufflevector(low, high, Lane...);
}
RENDSEG_INLINE void gather_pairs(const float* p, const int32_t* at, Vec<float>& first, Vec<float>& second) {
  Quad a[kLanes<float> / 4], b[kLanes<float> / 4];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes<float> / 4; ++i) four_pairs(p, at + 4 * i, a[i], b[i]);
  constexpr auto eight = std::make_integer_sequence<int, 8>{};
#if RENDSEG_ISA == 2
  constexpr auto sixteen = std::make_integer_sequence<int, 16>{};
  first = joined(joined(a[0], a[1], eight), joined(a[2], a[3], eight), sixteen);
  second = joined(joined(b[0], b[1], eight), joined(b[2], b[3], eight), sixteen);
#elif RENDSEG_ISA == 1
  first = joined(a[0], a[1], eight);
  second = joined(b[0], b[1], eight);
#else
  first = a[0];
  second = b[0];
  (void)eight;
#endif
}
RENDSEG_INLINE void gather_pairs(const double* p, const int32_t* at, Vec<double>& first, Vec<double>& second) {
  for (int i = 0; i < kLanes<double>; ++i) first[i] = p[at[i]], second[i] = p[at[i] + 1];
}

// Halves: two fill a word of 32 bits.
template <typename T>
RENDSEG_INLINE void gather_pairs(const T* p, const int32_t* at, Vec<float>& first, Vec<float>& second) {
  Bits<float> words;
  for (int i = 0; i < kLanes<float>; ++i) words[i] = load_bits<uint32_t>(p + at[i]);
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    first = (Vec<float>)(words << 16);
    second = (Vec<float>)(words & 0xffff0000u);
  } else {
    first = widen_half(__builtin_convertvector(words & 0xffffu, HalfBits));
    second = widen_half(__builtin_convertvector(words >> 16, HalfBits));
  }
}

#if RENDSEG_ISA == 2
// The sixteen pairs p[at[i]], p[at[i] + 1], fetched as one word each; 0 where bit i of `wanted` is not set.
RENDSEG_INLINE void gather_pairs(const float* p, const int64_t* at, uint32_t wanted, Vec<float>& first,
                                 Vec<float>& second) {
  const __m512i low_at = (__m512i)load_bits<Ints<double>>(at), high_at = (__m512i)load_bits<Ints<double>>(at + 8);
  const __m512 low =
      (__m512)_mm512_mask_i64gather_pd((__m512d)Vec<double>{}, static_cast<__mmask8>(wanted), low_at, p, 4);
  const __m512 high =
      (__m512)_mm512_mask_i64gather_pd((__m512d)Vec<double>{}, static_cast<__mmask8>(wanted >> 8), high_at, p, 4);
  const Ints<float> even = 2 * lanes<float>();
  first = (Vec<float>)_mm512_permutex2var_ps(low, (__m512i)even, high);
  second = (Vec<float>)_mm512_permutex2var_ps(low, (__m512i)(even + 1), high);
}
// Bit i: whether p[i] == value, for sixteen bytes.
RENDSEG_INLINE uint32_t equal_bytes(const uint8_t* p, char value) {
  return _mm_cmpeq_epi8_mask(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), _mm_set1_epi8(value));
}
#endif

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg

#endif
