// No include guard: opens one instruction set for the code that follows, until isa_end.h.
// RENDSEG_ISA is 0 (baseline), 1 (AVX2 + FMA) or 2 (AVX-512 F, BW, VL, DQ) and RENDSEG_ISA_NAMESPACE names its
// namespace. A build with RENDSEG_EMULATE_AVX512 compiles set 2 for AVX2, with vectors of 64 bytes in two halves.
#if RENDSEG_ISA == 2
#define RENDSEG_ISA_NAMESPACE avx512
#elif RENDSEG_ISA == 1
#define RENDSEG_ISA_NAMESPACE avx2
#else
#define RENDSEG_ISA_NAMESPACE baseline
#endif

#if defined(__x86_64__) && defined(__clang__)
#if RENDSEG_ISA == 2 && !defined(RENDSEG_EMULATE_AVX512)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq"))), \
                             apply_to = function)
#elif RENDSEG_ISA != 0
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#endif
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC push_options
#if RENDSEG_ISA == 2 && !defined(RENDSEG_EMULATE_AVX512)
#pragma GCC target("avx2,fma,f16c,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#elif RENDSEG_ISA != 0
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#endif
