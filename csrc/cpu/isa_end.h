// Closes what isa_begin.h opened.
#if defined(__x86_64__) && defined(__clang__)
#if RENDSEG_ISA != 0
#pragma clang attribute pop
#endif
#elif defined(__x86_64__) && defined(__GNUC__)
#pragma GCC pop_options
#endif
#undef RENDSEG_ISA_NAMESPACE
#undef RENDSEG_ISA
