// The point head's kernels for AVX512; see isa.h.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include "refine_args.h"

// GCC 12 takes the undefined operands inside its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define RENDSEG_ISA 2
#include "isa_begin.h"
// The order of these matters.
#include "refine_simd.h"

#include "refine_kernels.h"

#include "isa_end.h"
#endif
