#include "isa.h"

#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace rendseg {
namespace {

std::atomic<int>& current() {
  static std::atomic<int> value{-1};
  return value;
}

Isa parse(const std::string& name) {
  for (Isa candidate : {Isa::kDefault, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(candidate)) return candidate;
  }
  TORCH_CHECK_VALUE(false, "RENDSEG_CPU_ISA must be one of default, avx2, avx512, got \"", name, "\"");
}

}  // namespace

const char* isa_name(Isa value) { return value == Isa::kAvx512 ? "avx512" : value == Isa::kAvx2 ? "avx2" : "default"; }

Isa widest_isa() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if defined(RENDSEG_EMULATE_AVX512)
  const bool avx512 = avx2;
#else
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kDefault;
#else
  return Isa::kDefault;
#endif
}

void set_isa(Isa wanted) {
  TORCH_CHECK_VALUE(static_cast<int>(wanted) <= static_cast<int>(widest_isa()), "the instruction set ",
                    isa_name(wanted), " is not available here; the widest is ", isa_name(widest_isa()));
  current().store(static_cast<int>(wanted), std::memory_order_relaxed);
}

Isa isa() {
  int value = current().load(std::memory_order_relaxed);
  if (value < 0) {
    const char* forced = std::getenv("RENDSEG_CPU_ISA");
    if (forced != nullptr && *forced != '\0') {
      set_isa(parse(forced));
    } else {
      set_isa(widest_isa());
    }
    value = current().load(std::memory_order_relaxed);
  }
  return static_cast<Isa>(value);
}

}  // namespace rendseg
