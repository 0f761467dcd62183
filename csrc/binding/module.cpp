// The extension as a Python module: what was built, and which instruction set runs. Importing it registers
// the operators.

// PyTorch 2.11's copy of pybind11 refuses the stable ABI, which this file has no part in.
#undef TORCH_TARGET_VERSION

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "../core/cpu.h"
#include "../core/kmeans.h"
#include "../core/reserve.h"

#ifndef WSCL_CUDA_ARCHITECTURES
#define WSCL_CUDA_ARCHITECTURES ""
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "wscl_fast's compiled kernels; see wscl_fast.build_info()";
  m.attr("cuda_architectures") = WSCL_CUDA_ARCHITECTURES;
  m.def("built_instruction_sets", &wscl::built_instruction_sets);
  m.def("supported_instruction_sets", &wscl::supported_instruction_sets);
  m.def("instruction_set", [] { return std::string(wscl::cpu_kernels().name); });
  m.def(
      "use_instruction_set",
      [](const std::string& name) {
        if (!wscl::use_instruction_set(name))
          throw std::invalid_argument(
              "name: expected an instruction set that was built and that this processor"
              " supports, got '" +
              name + "'");
      },
      pybind11::arg("name"));
  m.def("empty_reserve", &wscl::empty_reserve,
        "Give memory back to the system that the CPU's operators keep for their next call, 256 MiB at most");
  m.def("has_bfloat16_candidates", &wscl::has_bfloat16_candidates,
        "Whether k-means can find its candidates by products of bfloat16 here");
  m.def(
      "bfloat16_dot_peak",
      [](int threads, double seconds) {
        pybind11::gil_scoped_release release;
        return wscl::bfloat16_dot_peak(threads, seconds);
      },
      pybind11::arg("threads"), pybind11::arg("seconds") = 0.02,
      "The same of the instruction in use for products of bfloat16; 0 where there is none");
  m.def(
      "multiply_add_peak",
      [](int threads, double seconds) {
        if (threads < 1)
          throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
        pybind11::gil_scoped_release release;
        return wscl::multiply_add_peak(threads, seconds);
      },
      pybind11::arg("threads"), pybind11::arg("seconds") = 0.02,
      "Flops a second of independent float32 multiply-adds on that many threads, measured now");
}
