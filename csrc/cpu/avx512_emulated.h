// No include guard: the AVX-512 operations of simd.h on a processor without them, for tests (RENDSEG_EMULATE_AVX512).
// Within their namespace these functions hide the compiler's own of the same name. Everything else in the kernels is
// vector types of 64 bytes, which the compiler splits in two.
namespace rendseg {
namespace RENDSEG_ISA_NAMESPACE {
namespace {

#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#undef _mm512_i32gather_ps
#undef _mm512_mask_i32gather_ps
#undef _mm512_mask_i64gather_pd
#undef _mm512_roundscale_ps
#undef _mm512_roundscale_pd

template <typename To, typename From>
inline __attribute__((always_inline)) To reinterpret(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}
struct FloatHalves {
  __m256 half[2];
};
struct DoubleHalves {
  __m256d half[2];
};
struct HalfHalves {
  __m128i half[2];
};
typedef int32_t Ints512 __attribute__((vector_size(64)));

#define RENDSEG_EMULATED inline __attribute__((always_inline))

RENDSEG_EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  FloatHalves x = reinterpret<FloatHalves>(a), y = reinterpret<FloatHalves>(b), z = reinterpret<FloatHalves>(c);
  for (int h = 0; h < 2; ++h) x.half[h] = _mm256_fmadd_ps(x.half[h], y.half[h], z.half[h]);
  return reinterpret<__m512>(x);
}
RENDSEG_EMULATED __m512d _mm512_fmadd_pd(__m512d a, __m512d b, __m512d c) {
  DoubleHalves x = reinterpret<DoubleHalves>(a), y = reinterpret<DoubleHalves>(b), z = reinterpret<DoubleHalves>(c);
  for (int h = 0; h < 2; ++h) x.half[h] = _mm256_fmadd_pd(x.half[h], y.half[h], z.half[h]);
  return reinterpret<__m512d>(x);
}
RENDSEG_EMULATED __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }
RENDSEG_EMULATED __m512 _mm512_min_ps(__m512 a, __m512 b) { return a < b ? a : b; }
RENDSEG_EMULATED __m512i _mm512_max_epi32(__m512i a, __m512i b) {
  return reinterpret<__m512i>((Ints512)a > (Ints512)b ? (Ints512)a : (Ints512)b);
}
RENDSEG_EMULATED __m512 _mm512_roundscale_ps(__m512 a, int) {  // down
  FloatHalves x = reinterpret<FloatHalves>(a);
  for (int h = 0; h < 2; ++h) x.half[h] = _mm256_floor_ps(x.half[h]);
  return reinterpret<__m512>(x);
}
RENDSEG_EMULATED __m512d _mm512_roundscale_pd(__m512d a, int) {
  DoubleHalves x = reinterpret<DoubleHalves>(a);
  for (int h = 0; h < 2; ++h) x.half[h] = _mm256_floor_pd(x.half[h]);
  return reinterpret<__m512d>(x);
}
RENDSEG_EMULATED __m512i _mm512_maskz_compress_epi32(__mmask16 mask, __m512i a) {
  Ints512 out = {};
  int count = 0;
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1) out[count++] = ((Ints512)a)[i];
  }
  return reinterpret<__m512i>(out);
}
RENDSEG_EMULATED __mmask16 _mm512_movepi32_mask(__m512i a) {
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(((Ints512)a)[i] < 0) << i;
  return static_cast<__mmask16>(mask);
}
RENDSEG_EMULATED __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int) {  // _CMP_GT_OQ
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= static_cast<unsigned>(a[i] > b[i]) << i;
  return static_cast<__mmask16>(mask);
}
RENDSEG_EMULATED __m512i _mm512_mul_epu32(__m512i a, __m512i b) {
  typedef uint64_t Words512 __attribute__((vector_size(64)));
  return reinterpret<__m512i>(((Words512)a & 0xffffffffu) * ((Words512)b & 0xffffffffu));
}
RENDSEG_EMULATED __m512i _mm512_mask_mov_epi32(__m512i from, __mmask16 mask, __m512i a) {
  Ints512 out = (Ints512)from;
  for (int i = 0; i < 16; ++i) out[i] = (mask >> i) & 1 ? ((Ints512)a)[i] : out[i];
  return reinterpret<__m512i>(out);
}
RENDSEG_EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  const HalfHalves from = reinterpret<HalfHalves>(a);
  return reinterpret<__m512>(FloatHalves{{_mm256_cvtph_ps(from.half[0]), _mm256_cvtph_ps(from.half[1])}});
}
RENDSEG_EMULATED __m256i _mm512_cvtps_ph(__m512 a, int) {  // to nearest even
  const FloatHalves from = reinterpret<FloatHalves>(a);
  return reinterpret<__m256i>(HalfHalves{{_mm256_cvtps_ph(from.half[0], _MM_FROUND_TO_NEAREST_INT),
                                          _mm256_cvtps_ph(from.half[1], _MM_FROUND_TO_NEAREST_INT)}});
}
RENDSEG_EMULATED void _mm512_stream_ps(float* p, __m512 a) {
  const FloatHalves from = reinterpret<FloatHalves>(a);
  for (int h = 0; h < 2; ++h) _mm256_stream_ps(p + 8 * h, from.half[h]);
}
RENDSEG_EMULATED __m512 _mm512_mask_i32gather_ps(__m512 from, __mmask16 mask, __m512i at, const void* p, int) {
  for (int i = 0; i < 16; ++i) {
    if ((mask >> i) & 1) from[i] = static_cast<const float*>(p)[((Ints512)at)[i]];
  }
  return from;
}
RENDSEG_EMULATED __m512 _mm512_i32gather_ps(__m512i at, const void* p, int scale) {
  return _mm512_mask_i32gather_ps(__m512{}, 0xffff, at, p, scale);
}
RENDSEG_EMULATED __m512d _mm512_mask_i64gather_pd(__m512d from, __mmask8 mask, __m512i at, const void* p, int scale) {
  for (int i = 0; i < 8; ++i) {
    double value;
    if (!((mask >> i) & 1)) continue;
    __builtin_memcpy(&value, static_cast<const char*>(p) + at[i] * scale, sizeof(value));
    from[i] = value;
  }
  return from;
}
RENDSEG_EMULATED __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  __m512 out;
  for (int i = 0; i < 16; ++i) {
    const int32_t at = ((Ints512)index)[i];
    out[i] = at & 16 ? b[at & 15] : a[at & 15];
  }
  return out;
}
RENDSEG_EMULATED __mmask16 _mm_cmpeq_epi8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(_mm_movemask_epi8(_mm_cmpeq_epi8(a, b)));
}

#undef RENDSEG_EMULATED

}  // namespace
}  // namespace RENDSEG_ISA_NAMESPACE
}  // namespace rendseg
