// rms_norm on the CPU, any rank: x * rsqrt(mean(x²) + eps) * weight in float, one rounding.
#include <vector>

#include "common/norm.h"
#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  Rows x;
  const float* weight;
  char* out;
  int64_t width;
  float eps;
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    const float mean = sum_of_squares(x, 0.0f, a.width) / static_cast<float>(a.width);
    scale_row(x, a.width, 1.0f / std::sqrt(mean + a.eps), a.weight, reinterpret_cast<T*>(a.out) + r * a.width);
  }
}

PYVIDEO_CLONES void run_f32(const Args& a, int64_t begin, int64_t end) { body<float>(a, begin, end); }

PYVIDEO_CLONES void run_bf16(const Args& a, int64_t begin, int64_t end) { body<bf16>(a, begin, end); }

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
  parallel_rows(row_count(shape), a.width,
                [&](int64_t begin, int64_t end) { (a.x.dtype == DType::f32 ? run_f32 : run_bf16)(a, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) { m.def("rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("rms_norm", TORCH_BOX(&rms_norm)); }

}  // namespace pyvideo
