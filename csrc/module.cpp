// The Python module rendseg._C: loading it registers the operators; it holds
// build facts, and the switches of instruction set and matrix product.
#include <pybind11/pybind11.h>

#include "cpu/gemm.h"
#include "cpu/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of rendseg; the operators are under torch.ops.rendseg";
  m.attr("compiler") = py::str(
#if defined(__clang__)
      "clang " __clang_version__
#elif defined(__GNUC__)
      "g++ " __VERSION__
#else
      "unknown"
#endif
  );
  m.def(
      "isa", [] { return std::string(rendseg::isa_name(rendseg::isa())); },
      "Instruction set of the CPU kernels in force: default, avx2 or avx512.");
  m.def(
      "widest_isa", [] { return std::string(rendseg::isa_name(rendseg::widest_isa())); },
      "The widest instruction set this machine runs.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        for (rendseg::Isa candidate : {rendseg::Isa::kDefault, rendseg::Isa::kAvx2, rendseg::Isa::kAvx512}) {
          if (name == rendseg::isa_name(candidate)) {
            rendseg::set_isa(candidate);
            return;
          }
        }
        throw py::value_error("isa must be one of default, avx2, avx512, got \"" + name + "\"");
      },
      py::arg("name"), "Force an instruction set (tests and benchmarks).");
  m.def(
      "gemm", [] { return std::string(rendseg::gemm_name(rendseg::gemm())); },
      "Who multiplies the matrices of a point head on the CPU: own or aten.");
  m.def("set_gemm", &rendseg::set_gemm, py::arg("name"), "auto, own or aten (tests and benchmarks).");
}
