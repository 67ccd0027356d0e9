#if defined(__x86_64__)
#include "uncertain_points_includes.h"

// GCC 12 takes the undefined operands inside its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define RENDSEG_ISA 2
#include "isa_begin.h"

#include "uncertain_points_kernels.h"

#include "isa_end.h"
#endif
