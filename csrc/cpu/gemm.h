// Who multiplies matrices in the ops that have a large product: our micro-kernel, or the GEMM of ATen (MKL, OpenBLAS,
// or what PyTorch was built with). Results of the two differ by rounding; each is the same for any number of threads.
#pragma once

#include <string>

namespace rendseg {

enum class Gemm : int { kOwn = 0, kAten = 1 };

// The one in force: that of RENDSEG_CPU_GEMM=auto|own|aten, or of set_gemm. `auto` goes by the processor, not by a
// measurement, so that results are the same in every process: MKL on processors of Intel, ATen's where there is no
// vector code of ours (not x86-64), else our own.
Gemm gemm();
// Throws ValueError for another name.
void set_gemm(const std::string& name);
// "own" or "aten".
const char* gemm_name(Gemm value);

}  // namespace rendseg
