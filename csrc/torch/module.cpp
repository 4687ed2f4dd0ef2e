// sparseattn._C: facts about the build. Knows neither torch nor CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu/kernels.h"
#include "sparseattn/build_facts.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of sparseattn.";
  m.def("build_info", [] {
    py::dict info;
    info["version"] = sparseattn::build::kVersion;
    info["cuda"] = sparseattn::build::kCuda;
    info["cuda_version"] = sparseattn::build::kCudaVersion;
    info["cuda_architectures"] = std::vector<std::string> SPARSEATTN_CUDA_ARCHITECTURES;
    info["cutlass_version"] = sparseattn::build::kCutlassVersion;
    info["compiler"] = sparseattn::build::kCompiler;
    info["cpu_isa"] = std::vector<std::string> SPARSEATTN_CPU_ISA;
    return info;
  });
  m.def("cpu_path", [] { return std::string(sparseattn::cpu::select_kernels().name); });
}
