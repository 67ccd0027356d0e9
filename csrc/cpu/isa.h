// Run-time choice of the instruction set of the CPU kernels.
//
// An op with vector kernels keeps them in `<op>_kernels.h`, written once. `<op>.cpp` compiles that file once per
// instruction set, in namespaces baseline, avx2 and avx512 (see compile_kernels.h), and takes a kernel with
// RENDSEG_PICK(kernel).
#pragma once

namespace rendseg {

// Instruction sets of the CPU kernels, in rising order.
enum class Isa : int { kDefault = 0, kAvx2 = 1, kAvx512 = 2 };

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

// A kernel of `<op>_kernels.h` (template arguments are welcome) for the instruction set in force.
#define RENDSEG_PICK(...) ::rendseg::pick(&baseline::__VA_ARGS__, &avx2::__VA_ARGS__, &avx512::__VA_ARGS__)
