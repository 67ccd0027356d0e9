// A C++ program that uses rendseg without Python: it links rendseg_ops, finds an operator by name in the dispatcher,
// runs it and checks the answer. Built and run by ctest (see CMakeLists.txt).
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/full.h>

#include <cstdio>
#include <optional>
#include <tuple>

#include "cpu/isa.h"

int main() {
  // Naming a function of the library makes the linker keep it, and loading it registers the operators.
  std::printf("rendseg CPU kernels use: %s\n", rendseg::isa_name(rendseg::isa()));

  // logits[1, 2, 4, 5]: a margin of 4 everywhere, except for three cells whose two classes nearly tie.
  at::Tensor logits = at::full({1, 2, 4, 5}, 2.0f);
  logits.select(1, 1).fill_(-2.0f);
  const int64_t expected[] = {3, 11, 18};
  for (int64_t cell : expected) logits.mutable_data_ptr<float>()[20 + cell] = 1.5f;

  using Selection = std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, int64_t, const std::optional<at::Tensor>&);
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("rendseg::uncertain_points", "").typed<Selection>();
  const auto [indices, coords] = op.call(logits, 3, std::nullopt);

  bool right = indices.dim() == 2 && indices.size(0) == 1 && indices.size(1) == 3;
  for (int64_t p = 0; right && p < 3; ++p) {
    const int64_t cell = indices.const_data_ptr<int64_t>()[p];
    const float x = coords.const_data_ptr<float>()[2 * p], y = coords.const_data_ptr<float>()[2 * p + 1];
    std::printf("point %d: cell %d at (%.3f, %.3f)\n", static_cast<int>(p), static_cast<int>(cell), x, y);
    const float dx = x - (static_cast<float>(cell % 5) + 0.5f) / 5, dy = y - (static_cast<float>(cell / 5) + 0.5f) / 4;
    right = cell == expected[p] && dx * dx + dy * dy < 1e-10f;
  }
  std::puts(right ? "ok" : "WRONG: expected the cells 3, 11 and 18 and their centres");
  return right ? 0 : 1;
}
