// Run-time choice of the instruction set of the CPU kernels.
//
// An op with vector kernels keeps them in `<op>_kernels.h`, written once, and compiles that header three times:
// in `<op>.cpp` (baseline), `<op>_avx2.cpp` and `<op>_avx512.cpp`, each of which includes "isa_begin.h" with
// RENDSEG_ISA defined (after every system and Torch header, so that no inline function of theirs is compiled for the
// wider set and then picked by the linker for all), the kernels, and "isa_end.h".
#pragma once

#include "../ops.h"

namespace rendseg {

// The widest instruction set that this build holds and this machine runs, or the narrower one forced by
// RENDSEG_CPU_ISA=default|avx2|avx512 or by set_isa.
Isa isa();
// Force `wanted` from now on (tests and benchmarks). Throws ValueError when this machine or build lacks it.
void set_isa(Isa wanted);
Isa widest_isa();
const char* isa_name(Isa value);

// Pick the function for the instruction set in force.
template <typename F>
F pick(F baseline, F avx2, F avx512) {
  switch (isa()) {
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace rendseg
