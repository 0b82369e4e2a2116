// rms_norm_silu on the CPU: silu(x / max(|x|, eps) * sqrt(C) * weight) over the channels of a channels-last tensor.
#include <vector>

#include "common/math.h"
#include "common/norm.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  Rows x;
  const float* weight;
  char* out;
  int64_t width;
  float eps;
  bool silu;
  bool past;  // results are written past the cache
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  const float root = std::sqrt(static_cast<float>(a.width));
  FloatRow x{scratch};
  for (int64_t r = begin; r < end; ++r) {
    x.source = nullptr;
    const float* __restrict values = x.get(a.x, r, a.width);
    const float norm = std::sqrt(sum_of_squares(values, 0.0f, a.width));
    const float factor = root / (norm < a.eps ? a.eps : norm);
    T* __restrict out = reinterpret_cast<T*>(a.out) + r * a.width;
    if (!a.silu) {
      scale_row(values, a.width, factor, a.weight, out);
      continue;
    }
    const float* __restrict weight = a.weight;
    const int64_t n = a.width;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_float<T>(silu(values[i] * factor * weight[i]));
    }
  }
}

PYVIDEO_CLONES void run_f32(const Args& a, int64_t begin, int64_t end, float* scratch) {
  body<float>(a, begin, end, scratch);
}

PYVIDEO_CLONES void run_bf16(const Args& a, int64_t begin, int64_t end, float* scratch) {
  body<bf16>(a, begin, end, scratch);
}

#if defined(PYVIDEO_HAS_AVX512)
template <class T>
PYVIDEO_AVX512_INLINE float factor_of(const Args& a, int64_t r) {
  const float norm = std::sqrt(v512::sum_of_squares(reinterpret_cast<const T*>(a.x.row(r)), a.width));
  return std::sqrt(static_cast<float>(a.width)) / (norm < a.eps ? a.eps : norm);
}

template <class T, bool kSilu>
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end) {
  using namespace v512;
  const int64_t n = a.width;
  float next = factor_of<T>(a, begin);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    T* out = reinterpret_cast<T*>(a.out) + r * n;
    const V factor = all(next);
    // The next row's sum, root and division run while this row is computed.
    next = r + 1 < end ? factor_of<T>(a, r + 1) : 0.0f;
    each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
      const V y = mul(mul(load(x + i, m), factor), load(a.weight + i, m));
      store(out + i, kSilu ? v512::silu<T>(y) : y, m, a.past);
    });
  }
  fence();
}
#endif

Tensor rms_norm_silu(Tensor x, Tensor weight, double eps, bool silu) {
  const char* op = "rms_norm_silu";
  const std::vector<int64_t> shape = shape_of(x);
  std::vector<float> weight_storage;
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.width = shape.back();
  a.weight = float_vector(op, "weight", weight, a.width, weight_storage);
  a.eps = static_cast<float>(eps);
  a.silu = silu;
  Tensor out = new_contiguous(x);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const bool f32 = a.x.dtype == DType::f32;
  a.past = past_cache(a.out, a.width * bytes_of(a.x.dtype), 2 * x.numel() * bytes_of(a.x.dtype));
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    auto* run = silu ? (f32 ? run_avx512<float, true> : run_avx512<bf16, true>)
                     : (f32 ? run_avx512<float, false> : run_avx512<bf16, false>);
    parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) { run(a, begin, end); });
    return out;
  }
#endif
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(a.width));
    (f32 ? run_f32 : run_bf16)(a, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def("rms_norm_silu(Tensor x, Tensor weight, float eps, bool silu) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("rms_norm_silu", TORCH_BOX(&rms_norm_silu)); }

}  // namespace pyvideo
