// The kernels of the encoding ops for AVX-512; see isa.h.
#include "encode_includes.h"

#define RENDSEG_ISA 2
#include "isa_begin.h"
#include "encode_kernels.h"
#include "isa_end.h"
