// The Python module pyvideo_kernels._C. Importing it runs the static registrations of every op in this library, under
// the private namespace `pyvideo_native`; the public ops of namespace `pyvideo` are defined in Python and call these.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "common/isa.h"
#include "common/stream.h"

namespace {

std::string instruction_set() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl")) {
    return "x86-64-v4";
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? "x86-64-v3" : "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

std::map<std::string, std::string> build_info() {
  return {
      {"compiler",
#if defined(__clang__)
       "clang " __clang_version__
#else
       "gcc " __VERSION__
#endif
      },
      {"cuda_archs", PYVIDEO_CUDA_ARCHS},
      {"torch", PYVIDEO_TORCH_VERSION},
      {"cpu", instruction_set()},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pyvideo_kernels; importing this registers torch.ops.pyvideo_native.";
  m.def("build_info", &build_info,
        "Compiler, torch headers and CUDA architectures of this binary, and the instruction set it runs here.");
  m.def(
      "allow_avx512", &pyvideo::allow_avx512,
      "For tests: whether kernels may take their path for AVX-512, from now on in every thread. Returns what it was.");
  m.def("assume_cache_bytes", &pyvideo::assume_cache_bytes,
        "For tests: the size of the last cache, past which larger results are written; below 0: what the system says. "
        "Returns what was assumed before.");
}
