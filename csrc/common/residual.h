// The gated residual of one row.
#pragma once

#include "common/avx512.h"
#include "common/rows.h"

namespace pyvideo {

// out = x + y * gate, and the sum of out as stored; a null gate is 1. T and Y are the storage types of x (and out) and
// of y.
template <class T, class Y>
PYVIDEO_INLINE float gate_residual_row(const T* __restrict x, const Y* __restrict y, const float* __restrict gate,
                                       int64_t n, T* __restrict out) {
  if (gate == nullptr) {
    return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA {
      out[i] = from_float<T>(to_float(x[i]) + to_float(y[i]));
      return to_float(out[i]);
    });
  }
  return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA {
    out[i] = from_float<T>(to_float(x[i]) + to_float(y[i]) * gate[i]);
    return to_float(out[i]);
  });
}

// The same with y as rows of either storage type.
template <class T>
PYVIDEO_INLINE float gate_residual_row(const char* x, const Rows& y, int64_t row, const float* gate, int64_t n,
                                       T* out) {
  const T* xs = reinterpret_cast<const T*>(x);
  if (y.dtype == DType::f32) {
    return gate_residual_row<T, float>(xs, reinterpret_cast<const float*>(y.row(row)), gate, n, out);
  }
  return gate_residual_row<T, bf16>(xs, reinterpret_cast<const bf16*>(y.row(row)), gate, n, out);
}

#if defined(PYVIDEO_HAS_AVX512)
namespace v512 {

// As above, and out once more into `copy`, if that is not null: what is written past the cache cannot be read back.
template <class T, class Y>
PYVIDEO_AVX512_INLINE float gate_residual_row(const T* x, const Y* y, const float* gate, int64_t n, T* out, T* copy,
                                              bool past) {
  V s = all(0.0f);
  each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
    const V a = load(x + i, m);
    const V b = load(y + i, m);
    const V r = gate == nullptr ? add(a, b) : fma(b, load(gate + i, m), a);
    store(out + i, r, m, past);
    if (copy != nullptr) {
      store(copy + i, r, m);
      s = add(s, load_unordered(copy + i, m));
    }
  });
  return total(s);
}

template <class T>
PYVIDEO_AVX512_INLINE float gate_residual_row(const char* x, const Rows& y, int64_t row, const float* gate, int64_t n,
                                              T* out, T* copy, bool past) {
  const T* xs = reinterpret_cast<const T*>(x);
  if (y.dtype == DType::f32) {
    return v512::gate_residual_row(xs, reinterpret_cast<const float*>(y.row(row)), gate, n, out, copy, past);
  }
  return v512::gate_residual_row(xs, reinterpret_cast<const bf16*>(y.row(row)), gate, n, out, copy, past);
}

}  // namespace v512
#endif

}  // namespace pyvideo
