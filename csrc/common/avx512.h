// Vectors of AVX-512 for the kernels that spend more than a copy does. PYVIDEO_CLONES leaves vectors to the compiler,
// which does not find the exponential's own instructions nor those of bf16 (AVX512-BF16, which is asked for too), and
// cannot write past the cache. A kernel with this path chooses it at run time by avx512(); its other path serves
// everywhere.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtype.h"
#include "common/isa.h"
#include "common/rows.h"

#if defined(PYVIDEO_X86_LEVELS)
#define PYVIDEO_HAS_AVX512 1

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpragmas"
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // what gcc 12 says of its own undefined vectors
#include <immintrin.h>
#pragma GCC diagnostic pop

#define PYVIDEO_AVX512_TARGET target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
// A kernel, what it inlines, and after the parameters of its lambdas.
#define PYVIDEO_AVX512 __attribute__((PYVIDEO_AVX512_TARGET))
#define PYVIDEO_AVX512_INLINE inline __attribute__((PYVIDEO_AVX512_TARGET, always_inline))
#define PYVIDEO_AVX512_LAMBDA __attribute__((PYVIDEO_AVX512_TARGET, always_inline))

namespace pyvideo::v512 {

// 32 values: two registers of floats, or one of bf16.
struct V {
  __m512 a, b;
};

// Which of the 32 lanes there are: all, or the first few of a row's end.
struct All {};

struct First {
  __mmask16 a, b;
};

PYVIDEO_AVX512_INLINE First first(int64_t n) {
  const uint32_t mask = (uint32_t{1} << n) - 1;  // n < 32
  return {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> 16)};
}

// body(i, lanes) for i = 0, 32, ... over n values.
template <class Body>
PYVIDEO_AVX512_INLINE void each(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    body(i, All{});
  }
  if (i < n) {
    body(i, first(n - i));
  }
}

PYVIDEO_AVX512_INLINE V all(float x) { return {_mm512_set1_ps(x), _mm512_set1_ps(x)}; }

PYVIDEO_AVX512_INLINE V load(const float* p, All) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + 16)}; }

PYVIDEO_AVX512_INLINE V load(const float* p, First m) {
  return {_mm512_maskz_loadu_ps(m.a, p), _mm512_maskz_loadu_ps(m.b, p + 16)};
}

PYVIDEO_AVX512_INLINE __m512 widen(__m256i x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}

PYVIDEO_AVX512_INLINE V load(const bf16* p, All) {
  return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
          widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16)))};
}

PYVIDEO_AVX512_INLINE V load(const bf16* p, First m) {
  return {widen(_mm256_maskz_loadu_epi16(m.a, p)), widen(_mm256_maskz_loadu_epi16(m.b, p + 16))};
}

// The same values in any order, for sums: bf16 comes as even and odd elements, without a shuffle.
template <class T, class M>
PYVIDEO_AVX512_INLINE V load_unordered(const T* p, M m) {
  if constexpr (std::is_same_v<T, bf16> && std::is_same_v<M, All>) {
    const __m512i words = _mm512_loadu_si512(p);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))))};
  } else {
    return load(p, m);
  }
}

PYVIDEO_AVX512_INLINE V add(V x, V y) { return {_mm512_add_ps(x.a, y.a), _mm512_add_ps(x.b, y.b)}; }
PYVIDEO_AVX512_INLINE V sub(V x, V y) { return {_mm512_sub_ps(x.a, y.a), _mm512_sub_ps(x.b, y.b)}; }
PYVIDEO_AVX512_INLINE V mul(V x, V y) { return {_mm512_mul_ps(x.a, y.a), _mm512_mul_ps(x.b, y.b)}; }
// x * y + z
PYVIDEO_AVX512_INLINE V fma(V x, V y, V z) { return {_mm512_fmadd_ps(x.a, y.a, z.a), _mm512_fmadd_ps(x.b, y.b, z.b)}; }
// Zero in the lanes that are not there.
PYVIDEO_AVX512_INLINE V keep(V x, All) { return x; }
PYVIDEO_AVX512_INLINE V keep(V x, First m) { return {_mm512_maskz_mov_ps(m.a, x.a), _mm512_maskz_mov_ps(m.b, x.b)}; }
PYVIDEO_AVX512_INLINE float total(V x) { return _mm512_reduce_add_ps(_mm512_add_ps(x.a, x.b)); }

// from_float<bf16> without an instruction for it, its result in the high half of every word.
PYVIDEO_AVX512_INLINE __m512i rounded(__m512 x) {
  const __m512i word = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(sum, nan, word, _mm512_set1_epi32(0x400000));
}

// The instruction for it rounds as from_float does, but makes denormals zero: they, and they are rare, take the long
// way.
PYVIDEO_AVX512_INLINE __m512i packed(V x) {
  constexpr int kDenormal = 0x20;
  const int denormal = _mm512_fpclass_ps_mask(x.a, kDenormal) | _mm512_fpclass_ps_mask(x.b, kDenormal);
  if (__builtin_expect(denormal != 0, 0)) {
    alignas(64) static constexpr uint16_t kHigh[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                       33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
    return _mm512_permutex2var_epi16(rounded(x.a), _mm512_load_si512(kHigh), rounded(x.b));
  }
  return (__m512i)_mm512_cvtne2ps_pbh(x.b, x.a);
}

PYVIDEO_AVX512_INLINE void store(bf16* p, V x, All) { _mm512_storeu_si512(p, packed(x)); }

PYVIDEO_AVX512_INLINE void store(bf16* p, V x, First m) {
  _mm512_mask_storeu_epi16(p, static_cast<__mmask32>(m.a) | static_cast<__mmask32>(m.b) << 16, packed(x));
}

PYVIDEO_AVX512_INLINE void store(float* p, V x, All) {
  _mm512_storeu_ps(p, x.a);
  _mm512_storeu_ps(p + 16, x.b);
}

PYVIDEO_AVX512_INLINE void store(float* p, V x, First m) {
  _mm512_mask_storeu_ps(p, m.a, x.a);
  _mm512_mask_storeu_ps(p + 16, m.b, x.b);
}

// A store that may go past the cache (stream.h): then p is on a line of its own.
template <class M>
PYVIDEO_AVX512_INLINE void store(bf16* p, V x, M m, bool past) {
  if constexpr (std::is_same_v<M, All>) {
    if (past) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), packed(x));
      return;
    }
  }
  store(p, x, m);
}

template <class M>
PYVIDEO_AVX512_INLINE void store(float* p, V x, M m, bool past) {
  if constexpr (std::is_same_v<M, All>) {
    if (past) {
      _mm512_stream_ps(p, x.a);
      _mm512_stream_ps(p + 16, x.b);
      return;
    }
  }
  store(p, x, m);
}

// After stores past the cache, before another thread may read them.
PYVIDEO_AVX512_INLINE void fence() { _mm_sfence(); }

// Asks for the 32 values at p, which the next row's first pass will want: its loads run while this row is computed.
template <class T>
PYVIDEO_AVX512_INLINE void prefetch(const T* p) {
  _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  if constexpr (sizeof(T) == 4) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + 64, _MM_HINT_T0);
  }
}

template <class T>
PYVIDEO_AVX512_INLINE float sum(const T* x, int64_t n) {
  V s = all(0.0f);
  each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA { s = add(s, load_unordered(x + i, m)); });
  return total(s);
}

template <class T>
PYVIDEO_AVX512_INLINE float sum_of_squares(const T* x, int64_t n) {
  V s = all(0.0f);
  each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
    const V v = load_unordered(x + i, m);
    s = fma(v, v, s);
  });
  return total(s);
}

template <class T>
PYVIDEO_AVX512_INLINE float sum_of_squares(const T* x, float centre, int64_t n) {
  V s = all(0.0f);
  const V c = all(centre);
  each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
    const V d = keep(sub(load_unordered(x + i, m), c), m);
    s = fma(d, d, s);
  });
  return total(s);
}

// x / (1 + e^-x) to be rounded to bf16: within 7e-5 of its size, a thirtieth of such a rounding. 2^t is
// 2^floor(t) * p(t - floor(t)), which are an instruction each; what overflows ends as -0, as it should.
PYVIDEO_AVX512_INLINE __m512 silu(__m512 x, bf16) {
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504f));
  const __m512 f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.013534168f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.05201146f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.24144276f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.69300383f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0000026f));
  const __m512 e = _mm512_scalef_ps(p, t);
  return _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(e, _mm512_set1_ps(1.0f))));
}

// The same within 3 units in the last place of float.
PYVIDEO_AVX512_INLINE __m512 silu(__m512 x, float) {
  // Bounds that e^-x is 0 or infinite beyond, in the order that lets a NaN pass.
  const __m512 y = _mm512_min_ps(_mm512_set1_ps(200.0f), _mm512_max_ps(_mm512_set1_ps(-200.0f), x));
  const __m512 high = _mm512_set1_ps(-1.44269502f);  // -1 / ln 2 in two parts
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(y, high), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmadd_ps(y, _mm512_set1_ps(-1.92596303e-8f), _mm512_fmsub_ps(y, high, n));
  __m512 p = _mm512_set1_ps(1.5345812e-4f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.3399931e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6184891e-3f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5503286e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022646e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_scalef_ps(p, n), _mm512_set1_ps(1.0f)));
}

// T is the type that the result is rounded to.
template <class T>
PYVIDEO_AVX512_INLINE V silu(V x) {
  return {silu(x.a, T{}), silu(x.b, T{})};
}

}  // namespace pyvideo::v512
#endif
