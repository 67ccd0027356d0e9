// No include guard. Compiles the kernels of one op once per instruction set: `<op>.cpp` includes this file, after all
// others, with RENDSEG_KERNELS defined as "<op>_kernels.h".
//
// The kernels file is read once without RENDSEG_ISA, for its system headers and for what host and kernels share: no
// inline function of a system or Torch header may be compiled for a wider set, since the linker would then pick it for
// all. After that it is read once per set, with RENDSEG_ISA and RENDSEG_ISA_NAMESPACE defined and simd.h ahead of it.
#include "isa.h"
#include "simd.h"
#include RENDSEG_KERNELS

// GCC 12 takes the undefined operands inside its own intrinsics, and remainder loops that never run, for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Waggressive-loop-optimizations"
#endif

#define RENDSEG_ISA 0
#include "isa_begin.h"
#include "simd.h"
#include RENDSEG_KERNELS
#include "isa_end.h"

#if defined(__x86_64__)
#define RENDSEG_ISA 1
#include "isa_begin.h"
#include "simd.h"
#include RENDSEG_KERNELS
#include "isa_end.h"

#define RENDSEG_ISA 2
#include "isa_begin.h"
#include "simd.h"
#include RENDSEG_KERNELS
#include "isa_end.h"
#else
namespace rendseg {
namespace avx2 = baseline;
namespace avx512 = baseline;
}  // namespace rendseg
#endif
