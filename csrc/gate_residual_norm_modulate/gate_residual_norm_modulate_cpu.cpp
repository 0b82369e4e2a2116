// gate_residual_norm_modulate on the CPU: the residual stream is read once and written once, and its row is still in
// cache when it is normalised.
#include <tuple>
#include <vector>

#include "common/norm.h"
#include "common/residual.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  Rows x, y, gate;
  Modulation modulation;
  char* residual;
  char* normed;
  int64_t width;
  float eps;
  bool past;  // results are written past the cache
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  FloatRow gate{scratch};
  ModulationRow modulation(scratch + a.width, a.width);
  for (int64_t r = begin; r < end; ++r) {
    T* residual = reinterpret_cast<T*>(a.residual) + r * a.width;
    modulation.prepare(a.modulation, r, a.width);
    // The next sub-layer sees the residual stream as stored, so it is normalised as stored.
    const float total = gate_residual_row<T>(a.x.row(r), a.y, r, gate.get(a.gate, r, a.width), a.width, residual);
    layer_norm_row(residual, total, a.width, a.eps, modulation.mul, modulation.add,
                   reinterpret_cast<T*>(a.normed) + r * a.width);
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
  FloatRow gate{scratch};
  ModulationRow modulation(scratch + a.width, a.width);
  T* copy = reinterpret_cast<T*>(scratch + (1 + ModulationRow::kScratch) * a.width);
  for (int64_t r = begin; r < end; ++r) {
    modulation.prepare(a.modulation, r, a.width);
    const float total = v512::gate_residual_row<T>(a.x.row(r), a.y, r, gate.get(a.gate, r, a.width), a.width,
                                                   reinterpret_cast<T*>(a.residual) + r * a.width, copy, a.past);
    v512::layer_norm_row(copy, total, a.width, a.eps, modulation.mul, modulation.add,
                         reinterpret_cast<const T*>(a.x.row(r + 1 < end ? r + 1 : r)),
                         reinterpret_cast<T*>(a.normed) + r * a.width, a.past);
  }
  v512::fence();
}
#endif

std::tuple<Tensor, Tensor> gate_residual_norm_modulate(Tensor x, Tensor y, std::optional<Tensor> gate,
                                                       std::optional<Tensor> scale, std::optional<Tensor> shift,
                                                       std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                       double eps) {
  const char* op = "gate_residual_norm_modulate";
  const std::vector<int64_t> shape = shape_of(x);
  std::vector<float> weight_storage, bias_storage;
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.y = rows_like(op, "y", y, shape);
  a.gate = rows_like(op, "gate", gate, shape);
  a.width = shape.back();
  a.modulation.scale = rows_like(op, "scale", scale, shape);
  a.modulation.shift = rows_like(op, "shift", shift, shape);
  a.modulation.weight = float_vector(op, "weight", weight, a.width, weight_storage);
  a.modulation.bias = float_vector(op, "bias", bias, a.width, bias_storage);
  a.eps = static_cast<float>(eps);
  Tensor residual = new_contiguous(x);
  Tensor normed = new_contiguous(x);
  a.residual = static_cast<char*>(residual.mutable_data_ptr());
  a.normed = static_cast<char*>(normed.mutable_data_ptr());
  const bool f32 = a.x.dtype == DType::f32;
  const int64_t row_bytes = a.width * bytes_of(a.x.dtype);
  const int64_t touched = x.numel() * (3 * bytes_of(a.x.dtype) + bytes_of(a.y.dtype));
  a.past = past_cache(a.residual, row_bytes, touched) && past_cache(a.normed, row_bytes, touched);
  auto* run = f32 ? run_f32 : run_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run = f32 ? run_avx512<float> : run_avx512<bf16>;
  }
#endif
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>((2 + ModulationRow::kScratch) * a.width));
    run(a, begin, end, scratch.data());
  });
  return {residual, normed};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "gate_residual_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor? scale, Tensor? shift, Tensor? weight, "
      "Tensor? bias, float eps) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) {
  m.impl("gate_residual_norm_modulate", TORCH_BOX(&gate_residual_norm_modulate));
}

}  // namespace pyvideo
