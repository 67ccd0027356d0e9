#include <cmath>
#include <cstdint>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/bilinear.h"
#include "point_sample_types.h"

#define RENDSEG_ISA 1
#include "isa_begin.h"
#include "point_sample_kernels.h"
#include "isa_end.h"
#include "point_sample_table.h"
