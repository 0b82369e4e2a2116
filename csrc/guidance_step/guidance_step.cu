// guidance_step: CUDA launcher.
#include "cuda_glue.h"
#include "guidance_step/guidance_step.cuh"
#include "guidance_step/guidance_step.h"

namespace pyvideo {
namespace {

struct Launch {
  const void* latent;
  const void* cond;
  const void* uncond;
  void* out;
  int64_t n;
  float scale;
  float step;
  cudaStream_t stream;
};

template <class L, class C, bool kGuided, bool kVector>
void launch_kernel(const Launch& a) {
  const int64_t per_block =
      static_cast<int64_t>(device::kGuidanceThreads) * (kVector ? device::kGuidanceVector<L, C> : 1);
  const int64_t blocks = (a.n + per_block - 1) / per_block;
  PYVIDEO_CHECK(blocks <= 0x7fffffff, "guidance_step: ", a.n, " elements are more than one launch can cover");
  device::guidance_step_kernel<L, C, kGuided, kVector>
      <<<static_cast<unsigned>(blocks), device::kGuidanceThreads, 0, a.stream>>>(
          static_cast<const L*>(a.latent), static_cast<const C*>(a.cond), static_cast<const C*>(a.uncond),
          static_cast<L*>(a.out), a.n, a.scale, a.step);
  check_launch("guidance_step");
}

template <class L, class C>
void launch(const Launch& a) {
  const bool vector = device::aligned16(a.latent) && device::aligned16(a.cond) && device::aligned16(a.uncond) &&
                      device::aligned16(a.out);
  if (a.uncond != nullptr) {
    vector ? launch_kernel<L, C, true, true>(a) : launch_kernel<L, C, true, false>(a);
  } else {
    vector ? launch_kernel<L, C, false, true>(a) : launch_kernel<L, C, false, false>(a);
  }
}

template <class L>
void launch_for_cond(const Launch& a, ScalarType cond) {
  switch (cond) {
    case ScalarType::Float:
      return launch<L, float>(a);
    case ScalarType::BFloat16:
      return launch<L, __nv_bfloat16>(a);
    case ScalarType::Half:
      return launch<L, __half>(a);
    default:
      fail("guidance_step: `cond` must be float32, bfloat16 or float16");
  }
}

Tensor guidance_step(Tensor latent, Tensor cond, std::optional<Tensor> uncond, double guidance_scale, double sigma,
                     double sigma_next) {
  const torch::stable::accelerator::DeviceGuard guard(latent.get_device_index());
  const GuidanceInputs in = guidance_inputs(latent, cond, uncond);
  Tensor out = new_contiguous(in.latent);
  const Launch a{in.latent.const_data_ptr(),
                 in.cond.const_data_ptr(),
                 in.uncond ? in.uncond->const_data_ptr() : nullptr,
                 out.mutable_data_ptr(),
                 in.latent.numel(),
                 static_cast<float>(guidance_scale),
                 static_cast<float>(sigma_next - sigma),
                 current_stream(in.latent)};
  if (a.n == 0) {
    return out;
  }
  switch (in.latent.scalar_type()) {
    case ScalarType::Float:
      launch_for_cond<float>(a, in.cond.scalar_type());
      break;
    case ScalarType::BFloat16:
      launch_for_cond<__nv_bfloat16>(a, in.cond.scalar_type());
      break;
    case ScalarType::Half:
      launch_for_cond<__half>(a, in.cond.scalar_type());
      break;
    default:
      fail("guidance_step: `latent` must be float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CUDA, m) { m.impl("guidance_step", TORCH_BOX(&guidance_step)); }

}  // namespace pyvideo
