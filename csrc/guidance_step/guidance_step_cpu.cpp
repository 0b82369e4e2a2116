// guidance_step on the CPU: guidance and the Euler update in one pass over the latent.
#include "common/avx512.h"
#include "common/stream.h"
#include "glue.h"
#include "guidance_step/guidance_step.h"

namespace pyvideo {
namespace {

struct Args {
  const void* latent;
  const void* cond;
  const void* uncond;
  void* out;
  float guidance_scale;
  float step;
  bool past;  // results are written past the cache
};

// Threads take whole blocks, so that each begins where a line of the results does.
constexpr int64_t kBlock = 1024;

template <class L, class C>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end) {
  const L* __restrict latent = static_cast<const L*>(a.latent);
  const C* __restrict cond = static_cast<const C*>(a.cond);
  const C* __restrict uncond = static_cast<const C*>(a.uncond);
  L* __restrict out = static_cast<L*>(a.out);
  if (uncond == nullptr) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      out[i] = from_float<L>(to_float(latent[i]) + a.step * to_float(cond[i]));
    }
    return;
  }
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float base = to_float(uncond[i]);
    const float velocity = base + a.guidance_scale * (to_float(cond[i]) - base);
    out[i] = from_float<L>(to_float(latent[i]) + a.step * velocity);
  }
}

PYVIDEO_CLONES void run_f32_f32(const Args& a, int64_t begin, int64_t end) { body<float, float>(a, begin, end); }
PYVIDEO_CLONES void run_f32_bf16(const Args& a, int64_t begin, int64_t end) { body<float, bf16>(a, begin, end); }
PYVIDEO_CLONES void run_bf16_f32(const Args& a, int64_t begin, int64_t end) { body<bf16, float>(a, begin, end); }
PYVIDEO_CLONES void run_bf16_bf16(const Args& a, int64_t begin, int64_t end) { body<bf16, bf16>(a, begin, end); }

#if defined(PYVIDEO_HAS_AVX512)
template <class L, class C>
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end) {
  using namespace v512;
  const L* latent = static_cast<const L*>(a.latent) + begin;
  const C* cond = static_cast<const C*>(a.cond) + begin;
  const C* uncond = a.uncond == nullptr ? nullptr : static_cast<const C*>(a.uncond) + begin;
  L* out = static_cast<L*>(a.out) + begin;
  const V step = all(a.step);
  const V guidance = all(a.guidance_scale);
  each(end - begin, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
    V velocity = load(cond + i, m);
    if (uncond != nullptr) {
      const V base = load(uncond + i, m);
      velocity = fma(guidance, sub(velocity, base), base);
    }
    store(out + i, fma(step, velocity, load(latent + i, m)), m, a.past);
  });
  fence();
}
#endif

Tensor guidance_step(Tensor latent, Tensor cond, std::optional<Tensor> uncond, double guidance_scale, double sigma,
                     double sigma_next) {
  const char* op = "guidance_step";
  const GuidanceInputs in = guidance_inputs(latent, cond, uncond);
  Tensor out = new_contiguous(in.latent);
  const bool f32_latent = dtype_of(op, "latent", in.latent) == DType::f32;
  const bool f32_cond = dtype_of(op, "cond", in.cond) == DType::f32;
  const int64_t count = in.latent.numel();
  const int64_t touched = count * (2 * bytes_of(f32_latent ? DType::f32 : DType::bf16) +
                                   (in.uncond ? 2 : 1) * bytes_of(f32_cond ? DType::f32 : DType::bf16));
  const Args a{in.latent.const_data_ptr(),
               in.cond.const_data_ptr(),
               in.uncond ? in.uncond->const_data_ptr() : nullptr,
               out.mutable_data_ptr(),
               static_cast<float>(guidance_scale),
               static_cast<float>(sigma_next - sigma),
               past_cache(out.const_data_ptr(), kBlock, touched)};
  auto* run = f32_latent ? (f32_cond ? run_f32_f32 : run_f32_bf16) : (f32_cond ? run_bf16_f32 : run_bf16_bf16);
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run = f32_latent ? (f32_cond ? run_avx512<float, float> : run_avx512<float, bf16>)
                     : (f32_cond ? run_avx512<bf16, float> : run_avx512<bf16, bf16>);
  }
#endif
  parallel_rows((count + kBlock - 1) / kBlock, kBlock, [&](int64_t begin, int64_t end) {
    run(a, begin * kBlock, end * kBlock < count ? end * kBlock : count);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "guidance_step(Tensor latent, Tensor cond, Tensor? uncond, float guidance_scale, float sigma, float sigma_next) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("guidance_step", TORCH_BOX(&guidance_step)); }

}  // namespace pyvideo
