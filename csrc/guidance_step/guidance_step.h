// What the CPU and CUDA launchers of guidance_step share.
#pragma once

#include "glue.h"

namespace pyvideo {

struct GuidanceInputs {
  Tensor latent;
  Tensor cond;
  std::optional<Tensor> uncond;
};

// Checked and contiguous. The sampler's latents are contiguous already; a view is copied, once a step.
inline GuidanceInputs guidance_inputs(const Tensor& latent, const Tensor& cond, const std::optional<Tensor>& uncond) {
  const char* op = "guidance_step";
  const std::vector<int64_t> shape = shape_of(latent);
  const auto plain = [](const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); };
  PYVIDEO_CHECK(shape_of(cond) == shape, op, ": `cond` must have the shape of `latent`");
  GuidanceInputs in{plain(latent), plain(cond), std::nullopt};
  if (uncond.has_value()) {
    PYVIDEO_CHECK(shape_of(*uncond) == shape, op, ": `uncond` must have the shape of `latent`");
    PYVIDEO_CHECK(uncond->scalar_type() == cond.scalar_type(), op, ": `uncond` must have the dtype of `cond`");
    in.uncond = plain(*uncond);
  }
  return in;
}

}  // namespace pyvideo
