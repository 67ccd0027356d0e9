#include "gemm.h"

#include <ATen/Context.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <cstdlib>

namespace rendseg {
namespace {

constexpr int kAuto = 2;

std::atomic<int>& wanted() {
  static std::atomic<int> value{-1};
  return value;
}

int parse(const std::string& name) {
  if (name == "auto") return kAuto;
  for (Gemm candidate : {Gemm::kOwn, Gemm::kAten}) {
    if (name == gemm_name(candidate)) return static_cast<int>(candidate);
  }
  TORCH_CHECK_VALUE(false, "RENDSEG_CPU_GEMM must be one of auto, own, aten, got \"", name, "\"");
}

Gemm by_processor() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel") && at::globalContext().hasMKL() ? Gemm::kAten : Gemm::kOwn;
#else
  return Gemm::kAten;
#endif
}

}  // namespace

const char* gemm_name(Gemm value) { return value == Gemm::kAten ? "aten" : "own"; }

void set_gemm(const std::string& name) { wanted().store(parse(name), std::memory_order_relaxed); }

Gemm gemm() {
  int value = wanted().load(std::memory_order_relaxed);
  if (value < 0) {
    const char* forced = std::getenv("RENDSEG_CPU_GEMM");
    set_gemm(forced != nullptr && *forced != '\0' ? forced : "auto");
    value = wanted().load(std::memory_order_relaxed);
  }
  static const Gemm automatic = by_processor();
  return value == kAuto ? automatic : static_cast<Gemm>(value);
}

}  // namespace rendseg
