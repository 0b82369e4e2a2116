// layer_norm_modulate on the CPU: every row is read once from memory and written once.
#include <vector>

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
  bool past;  // results are written past the cache
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  ModulationRow modulation(scratch, a.width);
  for (int64_t r = begin; r < end; ++r) {
    modulation.prepare(a.modulation, r, a.width);
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    layer_norm_row(x, sum(x, a.width), a.width, a.eps, modulation.mul, modulation.add,
                   reinterpret_cast<T*>(a.out) + r * a.width);
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
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end, float* scratch) {
  ModulationRow modulation(scratch, a.width);
  for (int64_t r = begin; r < end; ++r) {
    modulation.prepare(a.modulation, r, a.width);
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    v512::layer_norm_row(x, v512::sum(x, a.width), a.width, a.eps, modulation.mul, modulation.add,
                         reinterpret_cast<const T*>(a.x.row(r + 1 < end ? r + 1 : r)),
                         reinterpret_cast<T*>(a.out) + r * a.width, a.past);
  }
  v512::fence();
}
#endif

Tensor layer_norm_modulate(Tensor x, std::optional<Tensor> scale, std::optional<Tensor> shift,
                           std::optional<Tensor> weight, std::optional<Tensor> bias, double eps) {
  const char* op = "layer_norm_modulate";
  const std::vector<int64_t> shape = shape_of(x);
  std::vector<float> weight_storage, bias_storage;
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.width = shape.back();
  a.modulation.scale = rows_like(op, "scale", scale, shape);
  a.modulation.shift = rows_like(op, "shift", shift, shape);
  a.modulation.weight = float_vector(op, "weight", weight, a.width, weight_storage);
  a.modulation.bias = float_vector(op, "bias", bias, a.width, bias_storage);
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
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(ModulationRow::kScratch * a.width));
    run(a, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "layer_norm_modulate(Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, float eps) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("layer_norm_modulate", TORCH_BOX(&layer_norm_modulate)); }

}  // namespace pyvideo
