// The kernels of subdivide for AVX2; see isa.h.
#if defined(__x86_64__)
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <immintrin.h>

#include "../math/radix_key.h"
#include "../math/upsample.h"
#include "subdivide_args.h"

// GCC 12 takes the undefined operands inside its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define RENDSEG_ISA 1
#include "isa_begin.h"
// The order of these matters.
#include "refine_simd.h"

#include "subdivide_kernels.h"

#include "isa_end.h"
#endif
