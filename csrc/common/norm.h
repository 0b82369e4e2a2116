// The row arithmetic that the normalisation kernels share.
#pragma once

#include <cmath>

#include "common/avx512.h"
#include "common/rows.h"

namespace pyvideo {

// (norm * weight + bias) * (1 + scale) + shift as one multiply and one add: norm * mul + add. Recomputed only when the
// modulation row changes, which per-batch modulation does once a batch.
struct Modulation {
  Rows scale;
  Rows shift;
  const float* weight = nullptr;
  const float* bias = nullptr;
};

struct ModulationRow {
  float* mul;
  float* add;
  FloatRow scale;
  FloatRow shift;
  const char* scale_source = nullptr;
  const char* shift_source = nullptr;
  bool filled = false;

  // `scratch` holds kScratch * n floats.
  static constexpr int kScratch = 4;

  PYVIDEO_INLINE ModulationRow(float* scratch, int64_t n)
      : mul(scratch), add(scratch + n), scale{scratch + 2 * n}, shift{scratch + 3 * n} {}

  PYVIDEO_INLINE void prepare(const Modulation& m, int64_t row, int64_t n) {
    const char* new_scale = m.scale.data == nullptr ? nullptr : m.scale.row(row);
    const char* new_shift = m.shift.data == nullptr ? nullptr : m.shift.row(row);
    if (filled && new_scale == scale_source && new_shift == shift_source) {
      return;
    }
    filled = true;
    scale_source = new_scale;
    shift_source = new_shift;
    const float* s = scale.get(m.scale, row, n);
    const float* t = shift.get(m.shift, row, n);
    for (int64_t i = 0; i < n; ++i) {
      mul[i] = m.weight == nullptr ? 1.0f : m.weight[i];
    }
    for (int64_t i = 0; i < n; ++i) {
      add[i] = m.bias == nullptr ? 0.0f : m.bias[i];
    }
    if (s != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        mul[i] *= 1.0f + s[i];
        add[i] *= 1.0f + s[i];
      }
    }
    if (t != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        add[i] += t[i];
      }
    }
  }
};

// out = (x - mean) * rsqrt(var + eps) * mul + add for a row with that sum; the variance takes a second pass over a row
// that is in cache, so a large mean costs no accuracy.
template <class T>
PYVIDEO_INLINE void layer_norm_row(const T* __restrict x, float total, int64_t n, float eps,
                                   const float* __restrict mul, const float* __restrict add, T* __restrict out) {
  const float mean = total / static_cast<float>(n);
  const float variance = sum_of_squares(x, mean, n) / static_cast<float>(n);
  const float rstd = 1.0f / std::sqrt(variance + eps);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>((to_float(x[i]) - mean) * rstd * mul[i] + add[i]);
  }
}

// out = x * factor * weight; a null weight is 1.
template <class X, class T>
PYVIDEO_INLINE void scale_row(const X* __restrict x, int64_t n, float factor, const float* __restrict weight,
                              T* __restrict out) {
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      out[i] = from_float<T>(to_float(x[i]) * factor);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(to_float(x[i]) * factor * weight[i]);
  }
}

#if defined(PYVIDEO_HAS_AVX512)
namespace v512 {

// As above. `next` is a row that will be read soon; with `past`, out is written past the cache.
template <class T, class N>
PYVIDEO_AVX512_INLINE void layer_norm_row(const T* x, float total, int64_t n, float eps, const float* scale,
                                          const float* shift, const N* next, T* out, bool past) {
  const float mean = total / static_cast<float>(n);
  const float variance = v512::sum_of_squares(x, mean, n) / static_cast<float>(n);
  const V rstd = all(1.0f / std::sqrt(variance + eps));
  const V centre = all(mean);
  each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
    prefetch(next + i);
    const V y = mul(sub(load(x + i, m), centre), rstd);
    store(out + i, fma(y, load(scale + i, m), load(shift + i, m)), m, past);
  });
}

}  // namespace v512
#endif

}  // namespace pyvideo
