// gate_residual on the CPU: x + y * gate in float, one rounding.
#include <vector>

#include "common/residual.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

struct Args {
  Rows x, y, gate;
  char* out;
  int64_t width;
  bool past;  // results are written past the cache
};

template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  FloatRow gate{scratch};
  for (int64_t r = begin; r < end; ++r) {
    gate_residual_row<T>(a.x.row(r), a.y, r, gate.get(a.gate, r, a.width), a.width,
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
  FloatRow gate{scratch};
  for (int64_t r = begin; r < end; ++r) {
    v512::gate_residual_row<T>(a.x.row(r), a.y, r, gate.get(a.gate, r, a.width), a.width,
                               reinterpret_cast<T*>(a.out) + r * a.width, nullptr, a.past);
  }
  v512::fence();
}
#endif

Tensor gate_residual(Tensor x, Tensor y, std::optional<Tensor> gate) {
  const char* op = "gate_residual";
  const std::vector<int64_t> shape = shape_of(x);
  Args a;
  a.x = rows_like(op, "x", x, shape);
  a.y = rows_like(op, "y", y, shape);
  a.gate = rows_like(op, "gate", gate, shape);
  a.width = shape.back();
  Tensor out = new_contiguous(x);
  a.out = static_cast<char*>(out.mutable_data_ptr());
  const bool f32 = a.x.dtype == DType::f32;
  a.past =
      past_cache(a.out, a.width * bytes_of(a.x.dtype), x.numel() * (2 * bytes_of(a.x.dtype) + bytes_of(a.y.dtype)));
  auto* run = f32 ? run_f32 : run_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run = f32 ? run_avx512<float> : run_avx512<bf16>;
  }
#endif
  parallel_rows(row_count(shape), a.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(a.width));
    run(a, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) { m.def("gate_residual(Tensor x, Tensor y, Tensor? gate) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("gate_residual", TORCH_BOX(&gate_residual)); }

}  // namespace pyvideo
