// The current stream and launch checks, in a form that also loads beside a torch without CUDA.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include "glue.h"

// torch's CPU build does not define this symbol. Weak, the extension still loads there (its CUDA ops are registered
// and never reached), so one binary serves both builds.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace pyvideo {

inline cudaStream_t current_stream(const Tensor& t) {
  PYVIDEO_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  PYVIDEO_CHECK(error == cudaSuccess, op, ": kernel launch failed: ", cudaGetErrorString(error));
}

}  // namespace pyvideo
