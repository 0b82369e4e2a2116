// group_norm_silu on the CPU: silu(((x - mean) * rstd * weight + bias) * scale + shift), channels-last.
//
// Statistics are taken of single channels over chunks of pixels whose size depends on the shape alone, and merged in
// double in a fixed order: the same bits with any number of threads. Deviations are from a mean of the chunk's first
// pixels, so that squares do not drown a small variance in a large mean.
#include <algorithm>
#include <cmath>
#include <vector>

#include "common/avx512.h"
#include "common/math.h"
#include "common/stream.h"
#include "glue.h"

namespace pyvideo {
namespace {

constexpr int64_t kChunkElements = 65536;
constexpr int64_t kPivotRows = 16;

struct Stats {
  Rows x;
  int64_t pixels;  // of a sample
  int64_t width;
  int64_t chunk;
  int64_t parts;   // of a sample
  float* partial;  // [samples * parts, 3, width]: pivot, mean minus pivot, sum of squared deviations
};

// Room for whole vectors of 32 sums.
PYVIDEO_INLINE int64_t up_to_vectors(int64_t n) { return (n + 31) / 32 * 32; }

// Eight rows at a time: the sums of the chunk are in double, as the order of a long sum in float would show, and eight
// rows make their additions cheap.
template <class T>
PYVIDEO_INLINE void add_eight(const T* const* rows, int64_t n, const float* __restrict pivot, double* __restrict total,
                              double* __restrict squares) {
  const T* __restrict x0 = rows[0];
  const T* __restrict x1 = rows[1];
  const T* __restrict x2 = rows[2];
  const T* __restrict x3 = rows[3];
  const T* __restrict x4 = rows[4];
  const T* __restrict x5 = rows[5];
  const T* __restrict x6 = rows[6];
  const T* __restrict x7 = rows[7];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float d0 = to_float(x0[i]) - pivot[i], d1 = to_float(x1[i]) - pivot[i];
    const float d2 = to_float(x2[i]) - pivot[i], d3 = to_float(x3[i]) - pivot[i];
    const float d4 = to_float(x4[i]) - pivot[i], d5 = to_float(x5[i]) - pivot[i];
    const float d6 = to_float(x6[i]) - pivot[i], d7 = to_float(x7[i]) - pivot[i];
    total[i] += ((d0 + d1) + (d2 + d3)) + ((d4 + d5) + (d6 + d7));
    squares[i] += ((d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)) + ((d4 * d4 + d5 * d5) + (d6 * d6 + d7 * d7));
  }
}

// Writes the mean less the pivot and the squared deviations behind the pivot.
PYVIDEO_INLINE void finish_stats(float* pivot, const double* sums, const double* squares, int64_t n, int64_t count) {
  const double elements = static_cast<double>(count);
  for (int64_t i = 0; i < n; ++i) {
    const double away = sums[i] / elements;
    pivot[n + i] = static_cast<float>(away);
    pivot[2 * n + i] = static_cast<float>(squares[i] - away * sums[i]);
  }
}

template <class T>
PYVIDEO_INLINE void stats_body(const Stats& a, int64_t begin, int64_t end, double* scratch) {
  const int64_t n = a.width;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.parts;
    const int64_t first = (unit - sample * a.parts) * a.chunk;
    const int64_t count = std::min(a.chunk, a.pixels - first);
    const int64_t row = sample * a.pixels + first;
    float* __restrict pivot = a.partial + unit * 3 * n;
    double* sums = scratch;  // of deviations, then of their squares
    std::fill(pivot, pivot + n, 0.0f);
    std::fill(sums, sums + 2 * n, 0.0);
    const int64_t early = std::min(count, kPivotRows);
    for (int64_t r = 0; r < early; ++r) {
      const T* __restrict x = reinterpret_cast<const T*>(a.x.row(row + r));
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        pivot[i] += to_float(x[i]);
      }
    }
    const float share = 1.0f / static_cast<float>(early);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      pivot[i] *= share;
    }
    int64_t r = 0;
    for (; r + 8 <= count; r += 8) {
      const T* rows[8];
      for (int64_t i = 0; i < 8; ++i) {
        rows[i] = reinterpret_cast<const T*>(a.x.row(row + r + i));
        // Rows read side by side are no stream that the hardware would fetch ahead.
        const char* ahead = a.x.row(row + std::min(r + 16 + i, count - 1));
        for (int64_t b = 0; b < n * static_cast<int64_t>(sizeof(T)); b += 64) {
          __builtin_prefetch(ahead + b);
        }
      }
      add_eight(rows, n, pivot, sums, sums + n);
    }
    for (; r < count; ++r) {
      const T* __restrict x = reinterpret_cast<const T*>(a.x.row(row + r));
      double* __restrict total = sums;
      double* __restrict squares = sums + n;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float d = to_float(x[i]) - pivot[i];
        total[i] += d;
        squares[i] += d * d;
      }
    }
    finish_stats(pivot, sums, sums + n, n, count);
  }
}

PYVIDEO_CLONES void stats_f32(const Stats& a, int64_t begin, int64_t end, double* scratch) {
  stats_body<float>(a, begin, end, scratch);
}

PYVIDEO_CLONES void stats_bf16(const Stats& a, int64_t begin, int64_t end, double* scratch) {
  stats_body<bf16>(a, begin, end, scratch);
}

#if defined(PYVIDEO_HAS_AVX512)
// Adds the deviations of `count` rows, one after another `stride` bytes apart, and their squares. They are summed in
// float over kRowsAtOnce rows, in double beyond.
constexpr int64_t kRowsAtOnce = 16;

PYVIDEO_AVX512_INLINE void add_to(double* sums, __m512 x) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
  _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), low));
  _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), high));
}

template <class T>
PYVIDEO_AVX512 void stats_avx512(const Stats& a, int64_t begin, int64_t end, double* scratch) {
  using namespace v512;
  const int64_t n = a.width;
  double* sums = scratch;
  double* squares = scratch + up_to_vectors(n);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / a.parts;
    const int64_t first_row = (unit - sample * a.parts) * a.chunk;
    const int64_t count = std::min(a.chunk, a.pixels - first_row);
    const int64_t row = sample * a.pixels + first_row;
    float* pivot = a.partial + unit * 3 * n;
    const int64_t early = std::min(count, kPivotRows);
    const V share = all(1.0f / static_cast<float>(early));
    const T* rows[kRowsAtOnce];
    for (int64_t r = 0; r < early; ++r) {
      rows[r] = reinterpret_cast<const T*>(a.x.row(row + r));
    }
    each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
      V s = all(0.0f);
      for (int64_t r = 0; r < early; ++r) {
        s = add(s, load(rows[r] + i, m));
      }
      store(pivot + i, mul(s, share), m);
    });
    std::fill(scratch, scratch + 2 * up_to_vectors(n), 0.0);
    for (int64_t r = 0; r < count; r += kRowsAtOnce) {
      const int64_t some = std::min(kRowsAtOnce, count - r);
      for (int64_t k = 0; k < some; ++k) {
        rows[k] = reinterpret_cast<const T*>(a.x.row(row + r + k));
        // Rows read side by side are no stream that the hardware would fetch ahead.
        const T* ahead = reinterpret_cast<const T*>(a.x.row(row + std::min(r + kRowsAtOnce + k, count - 1)));
        for (int64_t i = 0; i < n; i += 32) {
          prefetch(ahead + i);
        }
      }
      each(n, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
        const V centre = load(pivot + i, m);
        V s = all(0.0f);
        V q = all(0.0f);
        for (int64_t k = 0; k < some; ++k) {
          const V d = sub(load(rows[k] + i, m), centre);
          s = add(s, d);
          q = fma(d, d, q);
        }
        add_to(sums + i, s.a);
        add_to(sums + i + 16, s.b);
        add_to(squares + i, q.a);
        add_to(squares + i + 16, q.b);
      });
    }
    finish_stats(pivot, sums, squares, n, count);
  }
}
#endif

// The mean of a group as a sum of two floats, and 1 / sqrt(var + eps).
struct Moments {
  float mean;
  float rest;
  float rstd;
};

Moments merge(const Stats& a, int64_t sample, int64_t group, int64_t group_width, double eps) {
  const int64_t n = a.width;
  const float* base = a.partial + sample * a.parts * 3 * n + group * group_width;
  const double elements = static_cast<double>(a.pixels) * static_cast<double>(group_width);
  double total = 0.0;
  for (int64_t p = 0; p < a.parts; ++p) {
    const float* pivot = base + p * 3 * n;
    double sum = 0.0;
    for (int64_t i = 0; i < group_width; ++i) {
      sum += static_cast<double>(pivot[i]) + static_cast<double>(pivot[n + i]);
    }
    total += sum * static_cast<double>(std::min(a.chunk, a.pixels - p * a.chunk));
  }
  const double mean = total / elements;
  double squares = 0.0;
  for (int64_t p = 0; p < a.parts; ++p) {
    const float* pivot = base + p * 3 * n;
    const double count = static_cast<double>(std::min(a.chunk, a.pixels - p * a.chunk));
    for (int64_t i = 0; i < group_width; ++i) {
      const double d = static_cast<double>(pivot[i]) + static_cast<double>(pivot[n + i]) - mean;
      squares += static_cast<double>(pivot[2 * n + i]) + d * d * count;
    }
  }
  Moments m;
  m.mean = static_cast<float>(mean);
  m.rest = static_cast<float>(mean - static_cast<double>(m.mean));
  m.rstd = static_cast<float>(1.0 / std::sqrt(squares / elements + eps));
  return m;
}

// A tensor [B, Tz, Hz, Wz, C] read at the pixels of a clip; a null `data` stands for one that was not given.
struct Latent {
  const char* data = nullptr;
  DType dtype = DType::f32;
  int64_t strides[4] = {};  // in bytes
};

// Walks the pixels of [B, T, H, W] in order and knows which latent each reads.
struct Walk {
  int64_t sizes[3];              // T, H, W
  const int64_t* places[3];      // of each frame, line and column
  int64_t at[4] = {0, 0, 0, 0};  // clip, frame, line, column

  PYVIDEO_INLINE void start(int64_t pixel) {
    for (int d = 2; d >= 0; --d) {
      const int64_t next = pixel / sizes[d];
      at[d + 1] = pixel - next * sizes[d];
      pixel = next;
    }
    at[0] = pixel;
  }

  PYVIDEO_INLINE void step() {
    for (int d = 3; d > 0; --d) {
      if (++at[d] < sizes[d - 1]) {
        return;
      }
      at[d] = 0;
    }
    ++at[0];
  }

  PYVIDEO_INLINE const char* find(const Latent& z) const {
    return z.data + at[0] * z.strides[0] + places[0][at[1]] * z.strides[1] + places[1][at[2]] * z.strides[2] +
           places[2][at[3]] * z.strides[3];
  }
};

struct LatentRow {
  float* scratch;
  const char* source = nullptr;

  // Neighbouring pixels read the same latent: it is converted once.
  PYVIDEO_INLINE const float* get(const Latent& z, const Walk& walk, int64_t n) {
    if (z.data == nullptr) {
      return scratch;
    }
    const char* row = walk.find(z);
    if (z.dtype == DType::f32) {
      return reinterpret_cast<const float*>(row);
    }
    if (row != source) {
      load_row(reinterpret_cast<const bf16*>(row), n, scratch);
      source = row;
    }
    return scratch;
  }
};

struct Apply {
  Rows x;
  const Moments* moments;  // [samples, groups]
  const float* weight;
  const float* bias;
  char* out;
  int64_t pixels;
  int64_t width;
  int64_t groups;
  bool silu;
  bool conditioned;
  bool past;  // results are written past the cache
  Latent scale;
  Latent shift;
  Walk walk;
  static constexpr int kScratch = 6;
};

// What is applied to a sample's channels.
struct Factors {
  float* mean;
  float* rest;  // of the mean, past a float
  float* mul;
  float* add;
};

// x less its mean. Of bf16, whose own steps are larger, one float is enough of it.
PYVIDEO_INLINE float centred(float x, float mean, float rest) { return (x - mean) - rest; }

PYVIDEO_INLINE float centred(bf16 x, float mean, float) { return to_float(x) - mean; }

struct Generic {
  template <class T, bool kSilu>
  PYVIDEO_INLINE static void rows(const Apply& a, const Factors& f, int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const T* __restrict x = reinterpret_cast<const T*>(a.x.row(r));
      const float* __restrict mean = f.mean;
      const float* __restrict rest = f.rest;
      const float* __restrict mul = f.mul;
      const float* __restrict add = f.add;
      T* __restrict out = reinterpret_cast<T*>(a.out) + r * a.width;
      const int64_t n = a.width;
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const float y = centred(x[i], mean[i], rest[i]) * mul[i] + add[i];
        out[i] = from_float<T>(kSilu ? silu(y) : y);
      }
    }
  }

  template <class T, bool kSilu>
  PYVIDEO_INLINE static void conditioned_row(const Apply& a, const Factors& f, int64_t r, const float* __restrict scale,
                                             const float* __restrict shift) {
    const T* __restrict x = reinterpret_cast<const T*>(a.x.row(r));
    const float* __restrict mean = f.mean;
    const float* __restrict rest = f.rest;
    const float* __restrict mul = f.mul;
    const float* __restrict add = f.add;
    T* __restrict out = reinterpret_cast<T*>(a.out) + r * a.width;
    const int64_t n = a.width;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float y = (centred(x[i], mean[i], rest[i]) * mul[i] + add[i]) * scale[i] + shift[i];
      out[i] = from_float<T>(kSilu ? silu(y) : y);
    }
  }
};

#if defined(PYVIDEO_HAS_AVX512)
struct Avx512 {
  // The mean goes first, also of a bf16: folded into the addend, a large one would leave its rounding in a flat group.
  template <class T, class M>
  PYVIDEO_AVX512_INLINE static v512::V normalised(const T* x, const Factors& f, int64_t i, M m) {
    using namespace v512;
    if constexpr (std::is_same_v<T, bf16>) {
      return fma(sub(load(x + i, m), load(f.mean + i, m)), load(f.mul + i, m), load(f.add + i, m));
    } else {
      const V centred = sub(sub(load(x + i, m), load(f.mean + i, m)), load(f.rest + i, m));
      return fma(centred, load(f.mul + i, m), load(f.add + i, m));
    }
  }

  template <class T, bool kSilu>
  PYVIDEO_AVX512 static void rows(const Apply& a, const Factors& f, int64_t begin, int64_t end) {
    using namespace v512;
    for (int64_t r = begin; r < end; ++r) {
      const T* x = reinterpret_cast<const T*>(a.x.row(r));
      T* out = reinterpret_cast<T*>(a.out) + r * a.width;
      each(a.width, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
        const V y = normalised(x, f, i, m);
        store(out + i, kSilu ? v512::silu<T>(y) : y, m, a.past);
      });
    }
    fence();
  }

  template <class T, bool kSilu>
  PYVIDEO_AVX512 static void conditioned_row(const Apply& a, const Factors& f, int64_t r, const float* scale,
                                             const float* shift) {
    using namespace v512;
    const T* x = reinterpret_cast<const T*>(a.x.row(r));
    T* out = reinterpret_cast<T*>(a.out) + r * a.width;
    each(a.width, [&](int64_t i, auto m) PYVIDEO_AVX512_LAMBDA {
      const V y = fma(normalised(x, f, i, m), load(scale + i, m), load(shift + i, m));
      store(out + i, kSilu ? v512::silu<T>(y) : y, m);
    });
  }
};
#endif

template <class Kernel, class T, bool kSilu>
PYVIDEO_INLINE void apply_body(const Apply& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t n = a.width;
  const int64_t group_width = n / a.groups;
  const Factors f{scratch, scratch + n, scratch + 2 * n, scratch + 3 * n};
  LatentRow scale{scratch + 4 * n};
  LatentRow shift{scratch + 5 * n};
  std::fill(scale.scratch, scale.scratch + n, 1.0f);
  std::fill(shift.scratch, shift.scratch + n, 0.0f);
  Walk walk = a.walk;
  int64_t first = 0;  // the rows of the sample whose factors are there
  int64_t last = 0;
  // Blocks from the last to the first: what the statistics read last is still in a cache.
  const int64_t block = std::max<int64_t>(1, kChunkElements / n);
  for (int64_t stop = end; stop > begin;) {
    const int64_t start = std::max(begin, stop - block);
    if (a.conditioned) {
      walk.start(start);
    }
    for (int64_t r = start; r < stop;) {
      if (r < first || r >= last) {
        const int64_t sample = r / a.pixels;
        first = sample * a.pixels;
        last = first + a.pixels;
        for (int64_t g = 0; g < a.groups; ++g) {
          const Moments m = a.moments[sample * a.groups + g];
          for (int64_t i = g * group_width; i < (g + 1) * group_width; ++i) {
            f.mean[i] = m.mean;
            f.rest[i] = m.rest;
            f.mul[i] = a.weight == nullptr ? m.rstd : m.rstd * a.weight[i];
            f.add[i] = a.bias == nullptr ? 0.0f : a.bias[i];
          }
        }
      }
      const int64_t until = std::min(stop, last);
      if (!a.conditioned) {
        Kernel::template rows<T, kSilu>(a, f, r, until);
        r = until;
        continue;
      }
      for (; r < until; ++r) {
        Kernel::template conditioned_row<T, kSilu>(a, f, r, scale.get(a.scale, walk, n), shift.get(a.shift, walk, n));
        walk.step();
      }
    }
    stop = start;
  }
}

PYVIDEO_CLONES void apply_f32(const Apply& a, int64_t begin, int64_t end, float* scratch) {
  a.silu ? apply_body<Generic, float, true>(a, begin, end, scratch)
         : apply_body<Generic, float, false>(a, begin, end, scratch);
}

PYVIDEO_CLONES void apply_bf16(const Apply& a, int64_t begin, int64_t end, float* scratch) {
  a.silu ? apply_body<Generic, bf16, true>(a, begin, end, scratch)
         : apply_body<Generic, bf16, false>(a, begin, end, scratch);
}

#if defined(PYVIDEO_HAS_AVX512)
template <class T, bool kSilu>
void apply_avx512(const Apply& a, int64_t begin, int64_t end, float* scratch) {
  apply_body<Avx512, T, kSilu>(a, begin, end, scratch);
}
#endif

Latent latent_of(const char* op, const char* name, const Tensor& x, const std::optional<Tensor>& z) {
  Latent out;
  if (!z.has_value()) {
    return out;
  }
  PYVIDEO_CHECK(z->is_cpu() && x.dim() == 5 && z->dim() == 5 && z->size(0) == x.size(0) && z->size(4) == x.size(4) &&
                    (z->size(4) <= 1 || z->stride(4) == 1),
                op, ": `", name, "` must be a CPU tensor [B, Tz, Hz, Wz, C] with a contiguous last dimension");
  out.data = static_cast<const char*>(z->const_data_ptr());
  out.dtype = dtype_of(op, name, *z);
  for (int d = 0; d < 4; ++d) {
    out.strides[d] = z->stride(d) * static_cast<int64_t>(z->element_size());
  }
  return out;
}

// Where nearest-neighbour interpolation reads: torch multiplies in float.
void nearest(int64_t size, int64_t source, int64_t first, std::vector<int64_t>& places) {
  const float ratio = static_cast<float>(source) / static_cast<float>(size);
  for (int64_t i = 0; i < size; ++i) {
    const int64_t at = size == source ? i : static_cast<int64_t>(std::floor(static_cast<float>(i) * ratio));
    places.push_back(first + std::min(at, source - 1));
  }
}

Tensor group_norm_silu(Tensor x, std::optional<Tensor> weight, std::optional<Tensor> bias, std::optional<Tensor> scale,
                       std::optional<Tensor> shift, int64_t groups, double eps, bool silu, bool per_frame) {
  const char* op = "group_norm_silu";
  const std::vector<int64_t> shape = shape_of(x);
  PYVIDEO_CHECK(shape.size() >= 3 && groups > 0 && shape.back() % groups == 0 && (!per_frame || shape.size() == 5), op,
                ": `x` must be [B, ..., C] with a multiple of ", groups, " channels, 5-D for `per_frame`");
  Tensor out = new_contiguous(x);
  std::vector<float> weight_storage, bias_storage;
  Apply apply;
  apply.x = rows_like(op, "x", x, shape);
  apply.width = shape.back();
  apply.weight = float_vector(op, "weight", weight, apply.width, weight_storage);
  apply.bias = float_vector(op, "bias", bias, apply.width, bias_storage);
  apply.scale = latent_of(op, "scale", x, scale);
  apply.shift = latent_of(op, "shift", x, shift);
  apply.conditioned = scale.has_value() || shift.has_value();
  const int64_t rows = row_count(shape);
  if (rows == 0 || apply.width == 0) {
    return out;
  }
  std::vector<int64_t> places[3];
  if (apply.conditioned) {
    const Tensor& z = scale.has_value() ? *scale : *shift;
    PYVIDEO_CHECK(!scale.has_value() || !shift.has_value() || shape_of(*scale) == shape_of(*shift), op,
                  ": `scale` and `shift` must have one shape");
    // An odd number of several frames: the first reads the first latent frame, the rest the rest.
    const bool apart = shape[1] > 1 && shape[1] % 2 == 1;
    PYVIDEO_CHECK(z.size(1) >= 1 + apart && z.size(2) >= 1 && z.size(3) >= 1, op, ": `scale` and `shift` lack latents");
    if (apart) {
      places[0].push_back(0);
    }
    nearest(shape[1] - apart, z.size(1) - apart, apart, places[0]);
    nearest(shape[2], z.size(2), 0, places[1]);
    nearest(shape[3], z.size(3), 0, places[2]);
    for (int d = 0; d < 3; ++d) {
      apply.walk.sizes[d] = shape[d + 1];
      apply.walk.places[d] = places[d].data();
    }
  }
  const int64_t samples = shape[0] * (per_frame ? shape[1] : 1);
  Stats stats;
  stats.x = apply.x;
  stats.pixels = rows / samples;
  stats.width = apply.width;
  stats.chunk = std::max<int64_t>(kPivotRows, kChunkElements / apply.width);
  stats.parts = (stats.pixels + stats.chunk - 1) / stats.chunk;
  std::vector<float> partial(static_cast<size_t>(samples * stats.parts * 3 * stats.width));
  stats.partial = partial.data();
  const bool f32 = apply.x.dtype == DType::f32;
  auto* run_stats = f32 ? stats_f32 : stats_bf16;
  auto* run_apply = f32 ? apply_f32 : apply_bf16;
#if defined(PYVIDEO_HAS_AVX512)
  if (avx512()) {
    run_stats = f32 ? stats_avx512<float> : stats_avx512<bf16>;
    run_apply = silu ? (f32 ? apply_avx512<float, true> : apply_avx512<bf16, true>)
                     : (f32 ? apply_avx512<float, false> : apply_avx512<bf16, false>);
  }
#endif
  parallel_rows(samples * stats.parts, std::min(stats.chunk, stats.pixels) * stats.width,
                [&](int64_t begin, int64_t end) {
                  std::vector<double> scratch(static_cast<size_t>(2 * up_to_vectors(stats.width)));
                  run_stats(stats, begin, end, scratch.data());
                });
  std::vector<Moments> moments(static_cast<size_t>(samples * groups));
  parallel_rows(samples * groups, stats.parts * (stats.width / groups), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      moments[static_cast<size_t>(i)] = merge(stats, i / groups, i % groups, stats.width / groups, eps);
    }
  });
  apply.moments = moments.data();
  apply.out = static_cast<char*>(out.mutable_data_ptr());
  apply.pixels = stats.pixels;
  apply.groups = groups;
  apply.silu = silu;
  apply.past = past_cache(apply.out, apply.width * bytes_of(apply.x.dtype), 2 * x.numel() * bytes_of(apply.x.dtype));
  parallel_rows(rows, apply.width, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(Apply::kScratch * apply.width));
    run_apply(apply, begin, end, scratch.data());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "group_norm_silu(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, float eps, "
      "bool silu, bool per_frame) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("group_norm_silu", TORCH_BOX(&group_norm_silu)); }

}  // namespace pyvideo
