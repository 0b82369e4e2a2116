// guidance_step on the device: out = latent + step * (uncond + guidance_scale * (cond - uncond)), elementwise.
#pragma once

#include "common/vec.cuh"

namespace pyvideo::device {

// Elements a thread handles: one 16-byte access of the narrower type, two of a 4-byte type beside it.
template <class L, class C>
constexpr int kGuidanceVector = 16 / (sizeof(L) < sizeof(C) ? sizeof(L) : sizeof(C));

constexpr int kGuidanceThreads = 256;

__device__ __forceinline__ float guidance_element(float latent, float cond, float uncond, float scale, float step) {
  return latent + step * (uncond + scale * (cond - uncond));
}

// One thread, one vector; the last thread also takes the tail. kGuided false: cond is the velocity. kVector false:
// some pointer is not 16-byte aligned and every element goes alone.
template <class L, class C, bool kGuided, bool kVector>
__global__ void __launch_bounds__(kGuidanceThreads)
    guidance_step_kernel(const L* __restrict__ latent, const C* __restrict__ cond, const C* __restrict__ uncond,
                         L* __restrict__ out, int64_t n, float scale, float step) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kGuidanceThreads + threadIdx.x;
  if constexpr (kVector) {
    constexpr int kN = kGuidanceVector<L, C>;
    const int64_t begin = thread * kN;
    if (begin + kN <= n) {
      float x[kN], c[kN], u[kN];
      load_vector<L, kN>(latent + begin, x);
      load_vector<C, kN>(cond + begin, c);
      if constexpr (kGuided) {
        load_vector<C, kN>(uncond + begin, u);
      }
#pragma unroll
      for (int i = 0; i < kN; ++i) {
        x[i] = kGuided ? guidance_element(x[i], c[i], u[i], scale, step) : x[i] + step * c[i];
      }
      store_vector<L, kN>(out + begin, x);
      return;
    }
#pragma unroll 1
    for (int64_t i = begin; i < n; ++i) {
      const float c = to_float(cond[i]);
      const float x = to_float(latent[i]);
      out[i] = from_float<L>(kGuided ? guidance_element(x, c, to_float(uncond[i]), scale, step) : x + step * c);
    }
  } else if (thread < n) {
    const float c = to_float(cond[thread]);
    const float x = to_float(latent[thread]);
    out[thread] = from_float<L>(kGuided ? guidance_element(x, c, to_float(uncond[thread]), scale, step) : x + step * c);
  }
}

}  // namespace pyvideo::device
