// qk_norm_rope on the CPU: a token's heads are normalised and rotated in a float row that stays in cache, and rounded
// once. All of a token is read before any of it is written, so the result may go where the token came from.
#include <string>
#include <tuple>
#include <vector>

#include "common/avx512.h"
#include "common/norm.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

enum class Norm : int { none, across_heads, per_head };

struct Args {
  Rows x;    // one row a head
  Rows out;  // as x, and may be x
  Rows cos;
  Rows sin;
  const float* weight;
  const float* bias;
  int64_t heads;
  int64_t head_dim;
  int64_t tokens;  // in a batch entry
  int64_t start;   // tokens [start, stop) are rotated
  int64_t stop;
  Norm norm;
  bool centre;
  bool interleaved;
  bool packed;          // the heads of a token of x lie one after another
  bool angles_by_head;  // else all heads of a token share them
  float eps;
  bool past;  // results are written past the cache
};

// x <- (x - mean) * rstd * weight + bias over n values that share one statistic; `total` is their sum, or their sum of
// squares where they are not centred.
PYVIDEO_INLINE void normalise(float* __restrict x, float total, int64_t n, const float* __restrict weight,
                              const float* __restrict bias, bool centre, float eps) {
  const float mean = centre ? total / static_cast<float>(n) : 0.0f;
  const float variance = (centre ? sum_of_squares(x, mean, n) : total) / static_cast<float>(n);
  const float rstd = 1.0f / std::sqrt(variance + eps);
  if (weight == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x[i] = (x[i] - mean) * rstd;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x[i] = (x[i] - mean) * rstd * weight[i];
    }
  }
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x[i] += bias[i];
    }
  }
}

// Values widened, and their sum or sum of squares, in one pass.
template <class T>
PYVIDEO_INLINE float load_and_sum(const T* __restrict in, int64_t n, float* __restrict out, bool squares) {
  if (!squares) {
    return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA { return out[i] = to_float(in[i]); });
  }
  return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA {
    const float x = to_float(in[i]);
    out[i] = x;
    return x * x;
  });
}

// The angles of a head as rotation takes them: every pair's cosine twice, its sine once with a minus.
struct Angles {
  float* cos;
  float* sin;

  // Pairs (2i, 2i + 1): cos is read at even and sin at odd indices.
  PYVIDEO_INLINE void interleave(const float* __restrict c, const float* __restrict s, int64_t pairs) {
    float* __restrict cs = cos;
    float* __restrict sn = sin;
#pragma omp simd
    for (int64_t i = 0; i < pairs; ++i) {
      cs[2 * i] = c[2 * i];
      cs[2 * i + 1] = c[2 * i];
      sn[2 * i] = -s[2 * i + 1];
      sn[2 * i + 1] = s[2 * i + 1];
    }
  }
};

template <class T>
PYVIDEO_INLINE void rotate_interleaved(const float* __restrict x, const float* __restrict c, const float* __restrict s,
                                       int64_t pairs, T* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = x[2 * i];
    const float b = x[2 * i + 1];
    out[2 * i] = from_float<T>(a * c[2 * i] + b * s[2 * i]);
    out[2 * i + 1] = from_float<T>(b * c[2 * i + 1] + a * s[2 * i + 1]);
  }
}

// Pairs (i, i + half): both tables are read in their first half.
template <class T>
PYVIDEO_INLINE void rotate_half(const float* __restrict x, const float* __restrict c, const float* __restrict s,
                                int64_t half, T* __restrict out) {
  const float* __restrict high = x + half;
  T* __restrict out_high = out + half;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    out[i] = from_float<T>(x[i] * c[i] - high[i] * s[i]);
  }
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    out_high[i] = from_float<T>(x[i] * s[i] + high[i] * c[i]);
  }
}

// `scratch` holds the token's row, a row of each table and its angles.
template <class T>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t width = a.heads * a.head_dim;
  FloatRow cos{scratch + width};
  FloatRow sin{scratch + width + a.head_dim};
  Angles angles{scratch + width + 2 * a.head_dim, scratch + width + 3 * a.head_dim};
  for (int64_t token = begin; token < end; ++token) {
    const int64_t first_head = token * a.heads;
    if (a.norm == Norm::across_heads && a.packed) {
      const float total = load_and_sum(reinterpret_cast<const T*>(a.x.row(first_head)), width, scratch, !a.centre);
      normalise(scratch, total, width, a.weight, a.bias, a.centre, a.eps);
    } else {
      float total = 0;
      for (int64_t h = 0; h < a.heads; ++h) {
        float* x = scratch + h * a.head_dim;
        const T* in = reinterpret_cast<const T*>(a.x.row(first_head + h));
        if (a.norm == Norm::none) {
          load_row(in, a.head_dim, x);
          continue;
        }
        const float head = load_and_sum(in, a.head_dim, x, !a.centre);
        total += head;
        if (a.norm == Norm::per_head) {
          normalise(x, head, a.head_dim, a.weight, a.bias, a.centre, a.eps);
        }
      }
      if (a.norm == Norm::across_heads) {
        normalise(scratch, total, width, a.weight, a.bias, a.centre, a.eps);
      }
    }
    const int64_t batch = token / a.tokens;
    const int64_t position = token - batch * a.tokens;
    const bool rotated = a.cos.data != nullptr && position >= a.start && position < a.stop;
    const int64_t first_angle = (batch * (a.stop - a.start) + position - a.start) * a.heads;
    const float* c = nullptr;
    const float* s = nullptr;
    for (int64_t h = 0; h < a.heads; ++h) {
      const float* x = scratch + h * a.head_dim;
      T* out = reinterpret_cast<T*>(a.out.mutable_row(first_head + h));
      if (!rotated) {
        store_row(x, a.head_dim, out);
        continue;
      }
      if (h == 0 || a.angles_by_head) {
        c = cos.get(a.cos, first_angle + h, a.head_dim);
        s = sin.get(a.sin, first_angle + h, a.head_dim);
        if (a.interleaved) {
          angles.interleave(c, s, a.head_dim / 2);
        }
      }
      if (a.interleaved) {
        rotate_interleaved(x, angles.cos, angles.sin, a.head_dim / 2, out);
      } else {
        rotate_half(x, c, s, a.head_dim / 2, out);
      }
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
// What one statistic covers, as it is applied: (x - mean) * rstd.
struct Statistic {
  float mean = 0.0f;
  float rstd = 1.0f;
};

template <class T>
PYVIDEO_AVX512_INLINE Statistic statistic(const Args& a, const T* x, int64_t n) {
  Statistic s;
  s.mean = a.centre ? v512::sum(x, n) / static_cast<float>(n) : 0.0f;
  const float squares = a.centre ? v512::sum_of_squares(x, s.mean, n) : v512::sum_of_squares(x, n);
  s.rstd = 1.0f / std::sqrt(squares / static_cast<float>(n) + a.eps);
  return s;
}

// Of the heads of a token, which lie apart, together.
template <class T>
PYVIDEO_AVX512_INLINE Statistic statistic_across(const Args& a, int64_t first_head) {
  const float width = static_cast<float>(a.heads * a.head_dim);
  Statistic s;
  if (a.centre) {
    for (int64_t h = 0; h < a.heads; ++h) {
      s.mean += v512::sum(reinterpret_cast<const T*>(a.x.row(first_head + h)), a.head_dim);
    }
    s.mean /= width;
  }
  float squares = 0.0f;
  for (int64_t h = 0; h < a.heads; ++h) {
    squares += v512::sum_of_squares(reinterpret_cast<const T*>(a.x.row(first_head + h)), s.mean, a.head_dim);
  }
  s.rstd = 1.0f / std::sqrt(squares / width + a.eps);
  return s;
}

// Whole vectors of pairs.
bool fits_avx512(const Args& a) { return a.head_dim % (a.interleaved || a.cos.data == nullptr ? 32 : 64) == 0; }

// As `body`: a head is read for its statistic, and once more, from the cache, to be normalised and rotated in
// registers.
template <class T>
PYVIDEO_AVX512 void run_avx512(const Args& a, int64_t begin, int64_t end, float* scratch) {
  using namespace v512;
  const int64_t n = a.head_dim;
  FloatRow cos{scratch};
  FloatRow sin{scratch + n};
  float* pair_cos = scratch + 2 * n;
  float* pair_sin = scratch + 3 * n;
  const __m512 minus_even = _mm512_castsi512_ps(_mm512_set1_epi64(0x80000000));
  for (int64_t token = begin; token < end; ++token) {
    const int64_t first_head = token * a.heads;
    const int64_t next_head = token + 1 < end ? first_head + a.heads : first_head;
    const int64_t batch = token / a.tokens;
    const int64_t position = token - batch * a.tokens;
    const bool rotated = a.cos.data != nullptr && position >= a.start && position < a.stop;
    const int64_t first_angle = (batch * (a.stop - a.start) + position - a.start) * a.heads;
    Statistic s;
    if (a.norm == Norm::across_heads) {
      s = a.packed ? statistic(a, reinterpret_cast<const T*>(a.x.row(first_head)), a.heads * n)
                   : statistic_across<T>(a, first_head);
    } else if (a.norm == Norm::per_head) {
      s = statistic(a, reinterpret_cast<const T*>(a.x.row(first_head)), n);
    }
    const float* c = nullptr;
    const float* d = nullptr;
    for (int64_t h = 0; h < a.heads; ++h) {
      const T* x = reinterpret_cast<const T*>(a.x.row(first_head + h));
      const T* next = reinterpret_cast<const T*>(a.x.row(next_head + h));
      T* out = reinterpret_cast<T*>(a.out.mutable_row(first_head + h));
      const int64_t at = a.norm == Norm::across_heads ? h * n : 0;
      const float* weight = a.weight == nullptr ? nullptr : a.weight + at;
      const float* bias = a.bias == nullptr ? nullptr : a.bias + at;
      const V mean = all(s.mean);
      const V rstd = all(s.rstd);
      if (a.norm == Norm::per_head && h + 1 < a.heads) {
        // The next head's, whose division runs while this head is computed.
        s = statistic(a, reinterpret_cast<const T*>(a.x.row(first_head + h + 1)), n);
      }
      const auto normalised = [&](int64_t i) PYVIDEO_AVX512_LAMBDA {
        V y = load(x + i, All{});
        if (a.norm == Norm::none) {
          return y;
        }
        y = a.centre ? mul(sub(y, mean), rstd) : mul(y, rstd);
        if (weight != nullptr) {
          y = mul(y, load(weight + i, All{}));
        }
        return bias == nullptr ? y : add(y, load(bias + i, All{}));
      };
      if (!rotated) {
        for (int64_t i = 0; i < n; i += 32) {
          prefetch(next + i);
          store(out + i, normalised(i), All{}, a.past);
        }
        continue;
      }
      if (h == 0 || a.angles_by_head) {
        c = cos.get(a.cos, first_angle + h, n);
        d = sin.get(a.sin, first_angle + h, n);
        if (a.interleaved) {
          // Every pair's cosine twice, its sine once with a minus: cos is read at even and sin at odd indices.
          for (int64_t i = 0; i < n; i += 16) {
            _mm512_storeu_ps(pair_cos + i, _mm512_moveldup_ps(_mm512_loadu_ps(c + i)));
            _mm512_storeu_ps(pair_sin + i, _mm512_xor_ps(_mm512_movehdup_ps(_mm512_loadu_ps(d + i)), minus_even));
          }
        }
      }
      if (a.interleaved) {
        for (int64_t i = 0; i < n; i += 32) {
          prefetch(next + i);
          const V y = normalised(i);
          const V swapped{_mm512_permute_ps(y.a, 0xb1), _mm512_permute_ps(y.b, 0xb1)};
          const V r = fma(y, load(pair_cos + i, All{}), mul(swapped, load(pair_sin + i, All{})));
          store(out + i, r, All{}, a.past);
        }
        continue;
      }
      const int64_t half = n / 2;
      for (int64_t i = 0; i < half; i += 32) {
        prefetch(next + i);
        prefetch(next + half + i);
        const V low = normalised(i);
        const V high = normalised(half + i);
        const V ci = load(c + i, All{});
        const V si = load(d + i, All{});
        store(out + i, sub(mul(low, ci), mul(high, si)), All{}, a.past);
        store(out + half + i, fma(low, si, mul(high, ci)), All{}, a.past);
      }
    }
  }
  fence();
}
#endif

// A table [S_rot, head_dim] or [1 or B, S_rot, 1 or heads, head_dim], one row a head of every rotated token.
Rows table_rows(const char* name, const std::optional<Tensor>& t, const std::vector<int64_t>& shape) {
  const char* op = "qk_norm_rope";
  if (!t.has_value() || t->dim() != 2) {
    return rows_like(op, name, t, shape);
  }
  Rows rows = rows_like(op, name, *t, {shape[1], shape[3]});
  const int64_t stride = t->stride(0) * static_cast<int64_t>(t->element_size());
  rows.dims = 0;
  rows.push(shape[0], 0);
  rows.push(shape[1], t->size(0) == 1 ? 0 : stride);
  rows.push(shape[2], 0);
  return rows;
}

// What q and k have in common.
struct Options {
  const std::optional<Tensor>& cos;
  const std::optional<Tensor>& sin;
  Norm norm;
  bool centre;
  bool interleaved;
  int64_t start;
  int64_t stop;
  float eps;
};

void one(const char* name, const Tensor& x, const char* weight_name, const std::optional<Tensor>& weight,
         const char* bias_name, const std::optional<Tensor>& bias, const Options& o, Tensor& out) {
  const char* op = "qk_norm_rope";
  const std::vector<int64_t> shape = shape_of(x);
  PYVIDEO_CHECK(shape.size() == 4, op, ": `", name, "` must have 4 dimensions; got ", shape.size());
  std::vector<float> weight_storage;
  std::vector<float> bias_storage;
  Args a;
  a.x = rows_like(op, name, x, shape);
  a.tokens = shape[1];
  a.heads = shape[2];
  a.head_dim = shape[3];
  a.start = o.start;
  a.stop = o.stop < 0 ? a.tokens : o.stop;
  const std::vector<int64_t> table{shape[0], a.stop - a.start, a.heads, a.head_dim};
  a.cos = table_rows("cos", o.cos, table);
  a.sin = table_rows("sin", o.sin, table);
  PYVIDEO_CHECK(a.cos.data == nullptr || a.head_dim % 2 == 0, op, ": `", name, "` must have an even head_dim");
  a.norm = o.norm;
  a.centre = o.centre;
  a.interleaved = o.interleaved;
  a.packed = a.heads == 1 || x.stride(2) == a.head_dim;
  const auto by_head = [](const std::optional<Tensor>& t) { return t.has_value() && t->dim() == 4 && t->size(2) > 1; };
  a.angles_by_head = by_head(o.cos) || by_head(o.sin);
  a.eps = o.eps;
  const int64_t values = o.norm == Norm::across_heads ? a.heads * a.head_dim : a.head_dim;
  a.weight = float_vector(op, weight_name, weight, values, weight_storage);
  a.bias = float_vector(op, bias_name, bias, values, bias_storage);
  a.out = rows_like(op, name, out, shape);
  if (x.numel() == 0) {
    return;  // tokens without heads have no row to find
  }
  const int64_t width = a.heads * a.head_dim;
  const bool f32 = a.x.dtype == DType::f32;
  // In place, the lines that are written are in the cache.
  a.past = x.const_data_ptr() != out.const_data_ptr() &&
           past_cache(a.out.data, a.head_dim * bytes_of(a.x.dtype), 2 * x.numel() * bytes_of(a.x.dtype));
  auto* run = f32 ? run_f32 : run_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512() && fits_avx512(a)) {
    run = f32 ? run_avx512<float> : run_avx512<bf16>;
  }
#endif
  parallel_rows(shape[0] * a.tokens, width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(width + 4 * a.head_dim));
    run(a, begin, end, scratch.data());
  });
}

Options options(const std::optional<Tensor>& cos, const std::optional<Tensor>& sin, const std::string& norm,
                const std::string& norm_type, const std::string& layout, int64_t start, int64_t stop, double eps) {
  const Norm kind = norm == "across_heads" ? Norm::across_heads : norm == "per_head" ? Norm::per_head : Norm::none;
  return {cos, sin, kind, norm_type == "layer", layout == "interleaved", start, stop, static_cast<float>(eps)};
}

std::tuple<Tensor, Tensor> qk_norm_rope(Tensor q, Tensor k, std::optional<Tensor> q_weight,
                                        std::optional<Tensor> k_weight, std::optional<Tensor> q_bias,
                                        std::optional<Tensor> k_bias, std::optional<Tensor> cos,
                                        std::optional<Tensor> sin, std::string norm, std::string norm_type,
                                        std::string layout, int64_t rotary_start, int64_t rotary_stop, double eps) {
  const Options o = options(cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps);
  Tensor new_q = new_contiguous(q);
  Tensor new_k = new_contiguous(k);
  one("q", q, "q_weight", q_weight, "q_bias", q_bias, o, new_q);
  one("k", k, "k_weight", k_weight, "k_bias", k_bias, o, new_k);
  return {new_q, new_k};
}

void qk_norm_rope_(Tensor q, Tensor k, std::optional<Tensor> q_weight, std::optional<Tensor> k_weight,
                   std::optional<Tensor> q_bias, std::optional<Tensor> k_bias, std::optional<Tensor> cos,
                   std::optional<Tensor> sin, std::string norm, std::string norm_type, std::string layout,
                   int64_t rotary_start, int64_t rotary_stop, double eps) {
  const Options o = options(cos, sin, norm, norm_type, layout, rotary_start, rotary_stop, eps);
  one("q", q, "q_weight", q_weight, "q_bias", q_bias, o, q);
  one("k", k, "k_weight", k_weight, "k_bias", k_bias, o, k);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "qk_norm_rope(Tensor q, Tensor k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
      "Tensor? cos, Tensor? sin, str norm, str norm_type, str layout, int rotary_start, int rotary_stop, float eps) "
      "-> (Tensor, Tensor)");
  m.def(
      "qk_norm_rope_(Tensor(a!) q, Tensor(b!) k, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
      "Tensor? cos, Tensor? sin, str norm, str norm_type, str layout, int rotary_start, int rotary_stop, float eps) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope));
  m.impl("qk_norm_rope_", TORCH_BOX(&qk_norm_rope_));
}

}  // namespace pyvideo
