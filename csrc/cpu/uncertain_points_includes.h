// Everything the kernels include, before the instruction set is switched.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/bilinear.h"
#include "../math/radix_key.h"
#include "uncertain_points.h"
