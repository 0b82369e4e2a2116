// rms_norm on the CPU, any rank: x * rsqrt(mean(x²) + eps) * weight in float, one rounding.
#include <vector>

#include "common/avx512.h"
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
  bool past;  // results are written past the cache
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    // In double: the whole row shares this factor, and would share three more roundings.
    const double mean = static_cast<double>(sum_of_squares(x, 0.0f, a.width)) / static_cast<double>(a.width);
    const float factor = static_cast<float>(1.0 / std::sqrt(mean + a.eps));
    scale_row(x, a.width, factor, a.weight, reinterpret_cast<T*>(a.out) + r * a.width);
  }
}

PYVIDEO_CLONES void run_f32(const Args& a, int64_t begin, int64_t end) { body<float>(a, begin, end); }

PYVIDEO_CLONES void run_bf16(const Args& a, int64_t begin, int64_t end) { body<bf16>(a, begin, end); }

#if defined(PYVIDEO_HAS_AVX512)
template <class T>
PYVIDEO_AVX512_INLINE float factor_of(const Args& a, int64_t r) {
  const T* x = reinterpret_cast<const T*>(a.x.row(r));
  // In double: the whole row shares this factor, and would share three more roundings.
  const double mean = static_cast<double>(v512::sum_of_squares(x, a.width)) / static_cast<double>(a.width);
  return static_cast<float>(1.0 / std::sqrt(mean + a.eps));
}

template <class T>
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end) {
  using namespace v512;
  const int64_t n = a.width;
  float next = factor_of<T>(a, begin);
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    T* out = reinterpret_cast<T*>(a.out) + r * n;
    const V factor = all(next);
    // The next row's sum, root and division run while this row is scaled.
    next = r + 1 < end ? factor_of<T>(a, r + 1) : 0.0f;
    each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
      V y = mul(load(x + i, m), factor);
      if (a.weight != nullptr) {
        y = mul(y, load(a.weight + i, m));
      }
      store(out + i, y, m, a.past);
    });
  }
  fence();
}
#endif

Tensor rms_norm(Tensor x, std::optional<Tensor> weight, double eps) {
  const char* op = "rms_norm";
  const std::vector<int64_t> shape = shape_of(x);
  std::vector<float> weight_storage;
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.width = shape.back();
  a.weight = float_vector(op, "weight", weight, a.width, weight_storage);
  a.eps = static_cast<float>(eps);
  Tensor out = new_contiguous(x);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const bool f32 = a.x.dtype == DType::f32;
  a.past = past_cache(a.out, a.width * bytes_of(a.x.dtype), 2 * x.numel() * bytes_of(a.x.dtype));
  auto* run = f32 ? run_f32 : run_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run = f32 ? run_avx512<float> : run_avx512<bf16>;
  }
#endif
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) { m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace pyvideo
