// The gated residual of one row.
#pragma once

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

}  // namespace pyvideo
