// pixel_norm_silu on the CPU: silu(x * rsqrt(mean(x^2) + eps) * weight * (1 + scale) + shift) over the channels of a
// channels-last tensor, scale and shift by clip.
#include <vector>

#include "common/math.h"
#include "common/norm.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  Rows x;
  Modulation modulation;
  char* out;
  int64_t width;
  float eps;
  bool silu;
  bool past;  // results are written past the cache
};

template <class T, bool kSilu>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.width;
  ModulationRow modulation(scratch + n, n);
  FloatRow x{scratch};
  for (int64_t r = begin; r < end; ++r) {
    modulation.prepare(a.modulation, r, n);
    x.source = nullptr;
    const float* __restrict values = x.get(a.x, r, n);
    const float factor = 1.0f / std::sqrt(sum_of_squares(values, 0.0f, n) / static_cast<float>(n) + a.eps);
    const float* __restrict mul = modulation.mul;
    const float* __restrict add = modulation.add;
    T* __restrict out = reinterpret_cast<T*>(a.out) + r * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float y = values[i] * factor * mul[i] + add[i];
      out[i] = from_float<T>(kSilu ? silu(y) : y);
    }
  }
}

PYVIDEO_CLONES void run_f32(const Args& a, int64_t begin, int64_t end, float* scratch) {
  a.silu ? body<float, true>(a, begin, end, scratch) : body<float, false>(a, begin, end, scratch);
}

PYVIDEO_CLONES void run_bf16(const Args& a, int64_t begin, int64_t end, float* scratch) {
  a.silu ? body<bf16, true>(a, begin, end, scratch) : body<bf16, false>(a, begin, end, scratch);
}

#if defined(PYVIDEO_HAS_AVX512)
template <class T>
PYVIDEO_AVX512_INLINE float factor_of(const Args& a, int64_t r) {
  const T* x = reinterpret_cast<const T*>(a.x.row(r));
  return 1.0f / std::sqrt(v512::sum_of_squares(x, a.width) / static_cast<float>(a.width) + a.eps);
}

template <class T, bool kSilu>
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end, float* scratch) {
  using namespace v512;
  const int64_t n = a.width;
  ModulationRow modulation(scratch, n);
  float next = factor_of<T>(a, begin);
  for (int64_t r = begin; r < end; ++r) {
    modulation.prepare(a.modulation, r, n);
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    T* out = reinterpret_cast<T*>(a.out) + r * n;
    const V factor = all(next);
    // The next row's sum, root and division run while this row is computed.
    next = r + 1 < end ? factor_of<T>(a, r + 1) : 0.0f;
    each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
      const V y = fma(mul(load(x + i, m), factor), load(modulation.mul + i, m), load(modulation.add + i, m));
      store(out + i, kSilu ? v512::silu<T>(y) : y, m, a.past);
    });
  }
  fence();
}
#endif

// [B or 1, C] as the row of every pixel of a clip.
Rows by_clip(const char* op, const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& shape) {
  if (!t.has_value()) {
    return Rows{};
  }
  Rows rows = rows_like(op, name, *t, {shape.front(), shape.back()});
  for (size_t d = 1; d + 1 < shape.size(); ++d) {
    rows.push(shape[d], 0);
  }
  return rows;
}

Tensor pixel_norm_silu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> scale, std::optional<Tensor> shift,
                       double eps, bool silu) {
  const char* op = "pixel_norm_silu";
  const std::vector<int64_t> shape = shape_of(x);
  PYVIDEO_CHECK(shape.size() >= 2, op, ": `x` must be [B, ..., C]");
  std::vector<float> weight_storage;
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.width = shape.back();
  a.modulation.scale = by_clip(op, "scale", scale, shape);
  a.modulation.shift = by_clip(op, "shift", shift, shape);
  a.modulation.weight = float_vector(op, "weight", weight, a.width, weight_storage);
  a.eps = static_cast<float>(eps);
  a.silu = silu;
  Tensor out = new_contiguous(x);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const bool f32 = a.x.dtype == DType::f32;
  a.past = past_cache(a.out, a.width * bytes_of(a.x.dtype), 2 * x.numel() * bytes_of(a.x.dtype));
  auto* run = f32 ? run_f32 : run_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run = silu ? (f32 ? run_avx512<float, true> : run_avx512<bf16, true>)
               : (f32 ? run_avx512<float, false> : run_avx512<bf16, false>);
  }
#endif
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>((1 + ModulationRow::kScratch) * a.width));
    run(a, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def("pixel_norm_silu(Tensor x, Tensor? weight, Tensor? scale, Tensor? shift, float eps, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("pixel_norm_silu", TORCH_BOX(&pixel_norm_silu)); }

}  // namespace pyvideo
