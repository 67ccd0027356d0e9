// Vectors of one instruction set, for subdivide and refine. No include guard: include it between isa_begin.h and
// isa_end.h, after <immintrin.h>, Half.h and BFloat16.h; everything is static so that nothing leaks to the linker.
namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {

#if RENDSEG_ISA == 2
constexpr int kVectorBytes = 64;
#elif RENDSEG_ISA == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#define RENDSEG_INLINE static inline __attribute__((always_inline))

template <typename T>
struct Simd;
template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(kVectorBytes)));
  typedef int32_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t U __attribute__((vector_size(kVectorBytes)));
  using Index = int32_t;
  static constexpr int kLanes = kVectorBytes / 4;
};
template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(kVectorBytes)));
  typedef int64_t I __attribute__((vector_size(kVectorBytes)));
  typedef uint64_t U __attribute__((vector_size(kVectorBytes)));
  using Index = int64_t;
  static constexpr int kLanes = kVectorBytes / 8;
};

using VecF = Simd<float>::V;
using VecI = Simd<float>::I;
using VecU = Simd<float>::U;
constexpr int kFloatLanes = Simd<float>::kLanes;
typedef uint16_t VecHalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint8_t VecBytes __attribute__((vector_size(kVectorBytes / 4)));

template <typename V, typename T>
RENDSEG_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <typename V, typename T>
RENDSEG_INLINE void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}
template <typename A>
RENDSEG_INLINE typename Simd<A>::V splat(A x) {
  return typename Simd<A>::V{} + x;
}

// max and min of x86: the second operand when either is NaN.
RENDSEG_INLINE VecF vmax(VecF a, VecF b) {
#if RENDSEG_ISA == 2
  return (VecF)_mm512_max_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  return (VecF)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
RENDSEG_INLINE VecF vmin(VecF a, VecF b) {
#if RENDSEG_ISA == 2
  return (VecF)_mm512_min_ps((__m512)a, (__m512)b);
#elif RENDSEG_ISA == 1
  return (VecF)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}
RENDSEG_INLINE Simd<double>::V vmax(Simd<double>::V a, Simd<double>::V b) { return a > b ? a : b; }
RENDSEG_INLINE Simd<double>::V vmin(Simd<double>::V a, Simd<double>::V b) { return a < b ? a : b; }

// `label` becomes `channel` where a > b.
RENDSEG_INLINE VecI label_where_greater(VecF a, VecF b, VecI label, VecI channel) {
#if RENDSEG_ISA == 2
  return (VecI)_mm512_mask_mov_epi32((__m512i)label, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ),
                                     (__m512i)channel);
#else
  return a > b ? channel : label;
#endif
}
RENDSEG_INLINE Simd<double>::I label_where_greater(Simd<double>::V a, Simd<double>::V b, Simd<double>::I label,
                                                   Simd<double>::I channel) {
  return a > b ? channel : label;
}

// out[j] = v[index[j]], index in [0, lanes).
template <typename V, typename I>
RENDSEG_INLINE V permute(V v, I index) {
#if defined(__clang__)
  V out;
  for (unsigned j = 0; j < sizeof(V) / sizeof(v[0]); ++j) out[j] = v[index[j]];
  return out;
#else
  return __builtin_shuffle(v, index);
#endif
}

// float16 <-> float32, rounding to nearest even.
RENDSEG_INLINE VecF half_to_float(VecHalfBits h) {
#if RENDSEG_ISA == 2
  return (VecF)_mm512_cvtph_ps((__m256i)h);
#elif RENDSEG_ISA == 1
  return (VecF)_mm256_cvtph_ps((__m128i)h);
#else
  VecF out;
  for (int j = 0; j < kFloatLanes; ++j) out[j] = c10::detail::fp16_ieee_to_fp32_value(h[j]);
  return out;
#endif
}
RENDSEG_INLINE VecHalfBits float_to_half(VecF v) {
#if RENDSEG_ISA == 2
  return (VecHalfBits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif RENDSEG_ISA == 1
  return (VecHalfBits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  VecHalfBits out;
  for (int j = 0; j < kFloatLanes; ++j) out[j] = c10::detail::fp16_ieee_from_fp32_value(v[j]);
  return out;
#endif
}
RENDSEG_INLINE VecF bfloat_to_float(VecHalfBits h) { return (VecF)(__builtin_convertvector(h, VecU) << 16); }
RENDSEG_INLINE VecHalfBits float_to_bfloat(VecF v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU quiet = VecU{} + 0x7fc0u;
  return __builtin_convertvector((v != v) ? quiet : rounded, VecHalfBits);
}

// Loads and stores of `lanes` elements of the stored type T as the arithmetic type.
template <typename T>
struct Stored {  // float, double
  using Acc = T;
  using V = typename Simd<T>::V;
  RENDSEG_INLINE V load(const T* p) { return load_as<V>(p); }
  RENDSEG_INLINE V round(V v) { return v; }
  RENDSEG_INLINE void store(T* p, V v) { store_as(p, v); }
};
template <>
struct Stored<c10::Half> {
  using Acc = float;
  using V = VecF;
  RENDSEG_INLINE V load(const c10::Half* p) { return half_to_float(load_as<VecHalfBits>(p)); }
  RENDSEG_INLINE V round(V v) { return half_to_float(float_to_half(v)); }
  RENDSEG_INLINE void store(c10::Half* p, V v) { store_as(p, float_to_half(v)); }
};
template <>
struct Stored<c10::BFloat16> {
  using Acc = float;
  using V = VecF;
  RENDSEG_INLINE V load(const c10::BFloat16* p) { return bfloat_to_float(load_as<VecHalfBits>(p)); }
  RENDSEG_INLINE V round(V v) { return bfloat_to_float(float_to_bfloat(v)); }
  RENDSEG_INLINE void store(c10::BFloat16* p, V v) { store_as(p, float_to_bfloat(v)); }
};

// One element through the same conversions (borders, gathers).
template <typename T>
RENDSEG_INLINE typename Stored<T>::Acc widen(T x) {
  if constexpr (sizeof(T) == 2) {
    VecHalfBits h{};
    __builtin_memcpy(&h, &x, 2);
    return Stored<T>::load(reinterpret_cast<const T*>(&h))[0];
  } else {
    return x;
  }
}

// A store that bypasses the caches where `p` is aligned to it and the vector unit can; else an ordinary one.
template <typename T>
RENDSEG_INLINE void stream(T* p, typename Stored<T>::V v) {
#if RENDSEG_ISA == 2
  if constexpr (sizeof(T) == 4) {
    _mm512_stream_ps(reinterpret_cast<float*>(p), (__m512)v);
    return;
  }
#elif RENDSEG_ISA == 1
  if constexpr (sizeof(T) == 4) {
    _mm256_stream_ps(reinterpret_cast<float*>(p), (__m256)v);
    return;
  }
#endif
  Stored<T>::store(p, v);
}

}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
