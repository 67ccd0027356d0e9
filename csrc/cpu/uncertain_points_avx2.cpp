#if defined(__x86_64__)
#include "uncertain_points_includes.h"

#define RENDSEG_ISA 1
#include "isa_begin.h"

#include "uncertain_points_kernels.h"

#include "isa_end.h"
#endif
