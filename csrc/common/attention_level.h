// The functions of attention.h for one instruction set. Included once for each by attention_cpu.cpp, which defines
//   PYVIDEO_LEVEL        the namespace
//   PYVIDEO_LEVEL_FN     the attributes of every function: its target
//   PYVIDEO_LEVEL_WIDTH  floats of a vector
//   PYVIDEO_LEVEL_VECS   vectors of queries in a panel, at most
//   PYVIDEO_LEVEL_DOT    1 where pairs of bf16 are multiplied and summed by one instruction (AVX512-BF16)
// Hence no #pragma once. Vectors are the compilers' own, so one text serves them all.

namespace pyvideo::attention::PYVIDEO_LEVEL {

#define FN PYVIDEO_LEVEL_FN inline __attribute__((always_inline))

constexpr int kWidth = PYVIDEO_LEVEL_WIDTH;
constexpr int kVecs = PYVIDEO_LEVEL_VECS;

typedef float Floats __attribute__((vector_size(PYVIDEO_LEVEL_WIDTH * 4), may_alias));
typedef int32_t Ints __attribute__((vector_size(PYVIDEO_LEVEL_WIDTH * 4), may_alias));

// Words of 32 bits are what the products step over: a float, or two bf16 that follow each other in the sum.
template <class T>
constexpr int kPair = PYVIDEO_LEVEL_DOT && sizeof(T) == 2 ? 2 : 1;
// Rows of a block of products: with `vecs` columns of vectors enough sums to hide the latency, few enough for the
// registers.
template <int vecs>
constexpr int kRows = vecs < kVecs ? 8 : 4;
constexpr int kMostRows = 8;
// Past a row of values: rows a multiple of 4 KiB apart would share a few sets of the cache.
constexpr int kGap = 16;
// Products of a score that are summed one after another, before these sums are added: errors grow with the length. A
// level without fused multiply-add rounds each product too.
constexpr int64_t kChunk = kWidth >= 8 ? 128 : 32;

template <class T>
constexpr int kStep = 64 * kPair<T>;

FN int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

FN Floats splat(float x) { return Floats{} + x; }

template <bool dot>
FN void multiply_add(Floats& sum, float word, Floats b) {
#if PYVIDEO_LEVEL_DOT
  if constexpr (dot) {
    int32_t bits;
    std::memcpy(&bits, &word, sizeof bits);
    sum = (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(bits), (__m512bh)b);
    return;
  }
#endif
  sum += word * b;
}

// 2^x within 2 units in the last place, 0 below -125; NaN stays NaN.
FN Floats exp2(Floats x) {
  // Adding 1.5 * 2^23 + 127 rounds to an integer and leaves it, with the bias of an exponent, in the low bits.
  constexpr float kMagic = 12582912.0f + 127.0f;
  const Floats shifted = x + kMagic;
  const Floats r = x - (shifted - kMagic);
  Floats p = r * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;
  p = p * r + 0x1.3b2d4cp-7f;
  p = p * r + 0x1.c6aee8p-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  p = p * (Floats)((Ints)shifted << 23);
  return x < -125.0f ? Floats{} : p;
}

// sum[i][v] = the products of a[i * row + k * step] and b[k][v] over k.
template <int rows, int vecs, bool dot>
FN void products(const float* a, int64_t row, int64_t step, const float* b, int64_t steps, Floats (&sum)[rows][vecs]) {
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      sum[i][v] = Floats{};
    }
  }
  for (int64_t k = 0; k < steps; ++k) {
    Floats columns[vecs];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      columns[v] = *reinterpret_cast<const Floats*>(b + v * kWidth);
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const float word = a[i * row];
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        multiply_add<dot>(sum[i][v], word, columns[v]);
      }
    }
    a += step;
    b += vecs * kWidth;
  }
}

// scores[key][query] of a panel, and the highest of each query.
template <class T, int vecs, bool masked>
FN void score(Tile& t, int panel) {
  constexpr int rows = kRows<vecs>;
  constexpr int lanes = vecs * kWidth;
  const int64_t words = up(t.head_dim, kPair<T>) / kPair<T>;
  const float* queries = t.packed_queries + panel * words * lanes;
  float* out = t.scores + panel * static_cast<int64_t>(kStep<T>) * lanes;
  float* tops = t.top + panel * lanes;
  Floats top[vecs];
  for (int v = 0; v < vecs; ++v) {
    top[v] = splat(-__builtin_inff());
  }
  Ints bit;
  for (int i = 0; i < kWidth; ++i) {
    bit[i] = 1 << i;
  }
  for (int64_t key = 0; key < t.keys; key += rows) {
    Floats sum[rows][vecs];
    const float* keys = t.packed_keys + key * words;
    products<rows, vecs, kPair<T> == 2>(keys, words, 1, queries, words < kChunk ? words : kChunk, sum);
    for (int64_t k = kChunk; k < words; k += kChunk) {
      Floats more[rows][vecs];
      const int64_t left = words - k;
      products<rows, vecs, kPair<T> == 2>(keys + k, words, 1, queries + k * lanes, left < kChunk ? left : kChunk, more);
      for (int i = 0; i < rows; ++i) {
        for (int v = 0; v < vecs; ++v) {
          sum[i][v] += more[i][v];
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        Floats s = sum[i][v];
        if constexpr (masked) {
          const int32_t seen = static_cast<int32_t>(t.seen[key + i] >> (panel * lanes + v * kWidth));
          s = (bit & seen) != 0 ? s : splat(-__builtin_inff());
        }
        // A NaN is passed over here; its weight will be NaN.
        top[v] = s > top[v] ? s : top[v];
        *reinterpret_cast<Floats*>(out + (key + i) * lanes + v * kWidth) = s;
      }
    }
  }
  for (int v = 0; v < vecs; ++v) {
    *reinterpret_cast<Floats*>(tops + v * kWidth) = top[v];
  }
}

// Scores to weights, in place: words of one or two keys a query. Updates the running maximum and sum.
template <class T, int vecs>
FN void weigh(Tile& t, int panel) {
  constexpr int lanes = vecs * kWidth;
  float* scores = t.scores + panel * static_cast<int64_t>(kStep<T>) * lanes;
#if PYVIDEO_LEVEL_DOT
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#endif
  Floats base[vecs], sum[vecs], factor = splat(t.factor);
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    const int64_t at = panel * lanes + v * kWidth;
    Floats& highest = *reinterpret_cast<Floats*>(t.highest + at);
    const Floats top = *reinterpret_cast<const Floats*>(t.top + at);
    const Floats before = highest;
    highest = top > before ? top : before;
    // Where nothing was seen yet: exp(-inf - 0) = 0, not exp(-inf - -inf).
    base[v] = highest == -__builtin_inff() ? Floats{} : highest;
    *reinterpret_cast<Floats*>(t.shrink + at) = exp2((before - base[v]) * factor);
    sum[v] = Floats{};
  }
  for (int64_t key = 0; key < t.keys; key += kPair<T>) {
#pragma GCC unroll 4
    for (int v = 0; v < vecs; ++v) {
      const Floats s = *reinterpret_cast<const Floats*>(scores + key * lanes + v * kWidth);
      // Not s * factor - base * factor: the highest score has the weight 1, exactly.
      const Floats weight = exp2((s - base[v]) * factor);
      sum[v] += weight;
#if PYVIDEO_LEVEL_DOT
      if constexpr (kPair<T> == 2) {
        const Floats s1 = *reinterpret_cast<const Floats*>(scores + (key + 1) * lanes + v * kWidth);
        const Floats weight1 = exp2((s1 - base[v]) * factor);
        sum[v] += weight1;
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)weight1, (__m512)weight);
        *reinterpret_cast<Floats*>(scores + key / 2 * lanes + v * kWidth) =
            (Floats)_mm512_permutexvar_epi16(interleave, both);
        continue;
      }
#endif
      *reinterpret_cast<Floats*>(scores + key * lanes + v * kWidth) = weight;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    const int64_t at = panel * lanes + v * kWidth;
    Floats& total = *reinterpret_cast<Floats*>(t.total + at);
    total = total * *reinterpret_cast<const Floats*>(t.shrink + at) + sum[v];
  }
}

// sums[channel][query] of a panel: what was there, shrunk, plus the weighted values of the step.
template <class T, int vecs>
FN void accumulate(Tile& t, int panel) {
  constexpr int rows = kRows<vecs>;
  constexpr int lanes = vecs * kWidth;
  const int64_t channels = up(t.head_dim, kMostRows);
  const int64_t words = (t.keys + kPair<T> - 1) / kPair<T>;
  const float* weights = t.scores + panel * static_cast<int64_t>(kStep<T>) * lanes;
  float* out = t.sums + panel * channels * lanes;
  Floats shrink[vecs];
#pragma GCC unroll 4
  for (int v = 0; v < vecs; ++v) {
    shrink[v] = *reinterpret_cast<const Floats*>(t.shrink + panel * lanes + v * kWidth);
  }
  for (int64_t c = 0; c < channels; c += rows) {
    Floats sum[rows][vecs];
    products<rows, vecs, kPair<T> == 2>(t.packed_values + c, 1, channels + kGap, weights, words, sum);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < vecs; ++v) {
        Floats& at = *reinterpret_cast<Floats*>(out + (c + i) * lanes + v * kWidth);
        at = at * shrink[v] + sum[i][v];
      }
    }
  }
}

// One row of keys as words.
template <class T>
FN void pack_key(const T* row, int64_t n, float* out) {
  if constexpr (kPair<T> == 2) {
    std::memcpy(out, row, n * sizeof(T));
    if (n % 2) {
      std::memset(reinterpret_cast<char*>(out) + n * sizeof(T), 0, sizeof(T));
    }
  } else {
    for (int64_t c = 0; c < n; ++c) {
      out[c] = to_float(row[c]);
    }
  }
}

// The values of one key, or of two side by side.
template <class T>
FN void pack_values(const T* even, const T* odd, int64_t n, int64_t channels, float* out) {
  if constexpr (kPair<T> == 2) {
    uint32_t* words = reinterpret_cast<uint32_t*>(out);
    for (int64_t c = 0; c < n; ++c) {
      words[c] = even[c].bits | static_cast<uint32_t>(odd == nullptr ? 0 : odd[c].bits) << 16;
    }
  } else {
    for (int64_t c = 0; c < n; ++c) {
      out[c] = to_float(even[c]);
    }
  }
  for (int64_t c = n; c < channels; ++c) {
    out[c] = 0.0f;
  }
}

template <class T, int vecs>
FN void run_panels(Tile& t) {
  for (int panel = 0; panel < t.panels; ++panel) {
    t.masked ? score<T, vecs, true>(t, panel) : score<T, vecs, false>(t, panel);
    weigh<T, vecs>(t, panel);
    accumulate<T, vecs>(t, panel);
  }
}

template <class T, int vecs>
PYVIDEO_LEVEL_FN void run(Tile& t) {
  run_panels<T, vecs>(t);
}

template <class T>
PYVIDEO_LEVEL_FN void step(Tile& t) {
  const int64_t words = up(t.head_dim, kPair<T>) / kPair<T>;
  const int64_t channels = up(t.head_dim, kMostRows);
  // Past the last key: keys of zeros that nobody sees, so that blocks of products are whole.
  const int real = t.keys;
  t.keys = static_cast<int>(up(real, kMostRows));
  t.masked |= t.keys != real;
  for (int i = 0; i < real; ++i) {
    pack_key(reinterpret_cast<const T*>(t.key[i]), t.head_dim, t.packed_keys + i * words);
  }
  std::memset(t.packed_keys + real * words, 0, (t.keys - real) * words * sizeof(float));
  for (int i = real; i < t.keys; ++i) {
    t.seen[i] = 0;
  }
  for (int i = 0; i < real; i += kPair<T>) {
    const T* even = reinterpret_cast<const T*>(t.value[i]);
    float* out = t.packed_values + i / kPair<T> * (channels + kGap);
    if (kPair<T> == 1 || i + 1 == real) {
      pack_values<T>(even, nullptr, t.head_dim, channels, out);
    } else {
      pack_values<T>(even, reinterpret_cast<const T*>(t.value[i + 1]), t.head_dim, channels, out);
    }
  }
  const int64_t filled = (real + kPair<T> - 1) / kPair<T>;
  std::memset(t.packed_values + filled * (channels + kGap), 0,
              (t.keys / kPair<T> - filled) * (channels + kGap) * sizeof(float));
  if constexpr (kVecs == 4) {
    if (t.vecs == 4) {
      return run<T, 4>(t);
    }
    if (t.vecs == 3) {
      return run<T, 3>(t);
    }
  }
  t.vecs == 2 ? run<T, 2>(t) : run<T, 1>(t);
}

template <class T>
PYVIDEO_LEVEL_FN int64_t scratch(int64_t head_dim) {
  const int64_t words = up(head_dim, kPair<T>) / kPair<T>;
  const int64_t channels = up(head_dim, kMostRows);
  return up(words * kQueries, 16) + up(words * kStep<T>, 16) + up((channels + kGap) * (kStep<T> / kPair<T>), 16) +
         static_cast<int64_t>(kStep<T>) * kQueries + channels * kQueries + 4 * kQueries;
}

template <class T>
PYVIDEO_LEVEL_FN void place(Tile& t, float* at) {
  const int64_t words = up(t.head_dim, kPair<T>) / kPair<T>;
  const int64_t channels = up(t.head_dim, kMostRows);
  t.packed_queries = at;
  t.packed_keys = t.packed_queries + up(words * kQueries, 16);
  t.packed_values = t.packed_keys + up(words * kStep<T>, 16);
  t.scores = t.packed_values + up((channels + kGap) * (kStep<T> / kPair<T>), 16);
  t.sums = t.scores + static_cast<int64_t>(kStep<T>) * kQueries;
  t.highest = t.sums + channels * kQueries;
  t.total = t.highest + kQueries;
  t.shrink = t.total + kQueries;
  t.top = t.shrink + kQueries;
}

template <class T>
PYVIDEO_LEVEL_FN void begin(Tile& t) {
  const int vectors = (t.queries + kWidth - 1) / kWidth;
  t.vecs = vectors < kVecs ? vectors : kVecs;
  const int lanes = t.vecs * kWidth;
  t.panels = (t.queries + lanes - 1) / lanes;
  const int64_t words = up(t.head_dim, kPair<T>) / kPair<T>;
  for (int q = 0; q < t.panels * lanes; ++q) {
    float* out = t.packed_queries + q / lanes * words * lanes + q % lanes;
    if (q >= t.queries) {
      for (int64_t c = 0; c < words; ++c) {
        out[c * lanes] = 0.0f;
      }
      continue;
    }
    const T* row = reinterpret_cast<const T*>(t.query[q]);
    if constexpr (kPair<T> == 2) {
      for (int64_t c = 0; c < t.head_dim / 2; ++c) {
        std::memcpy(out + c * lanes, row + 2 * c, sizeof(float));
      }
      if (t.head_dim % 2) {
        const uint32_t last = row[t.head_dim - 1].bits;
        std::memcpy(out + (words - 1) * lanes, &last, sizeof last);
      }
    } else {
      for (int64_t c = 0; c < words; ++c) {
        out[c * lanes] = to_float(row[c]);
      }
    }
  }
  std::memset(t.sums, 0, up(t.head_dim, kMostRows) * t.panels * lanes * sizeof(float));
  for (int q = 0; q < kQueries; ++q) {
    t.highest[q] = -__builtin_inff();
    t.total[q] = 0.0f;
  }
}

template <class T>
PYVIDEO_LEVEL_FN void finish(Tile& t) {
  const int64_t channels = up(t.head_dim, kMostRows);
  const int lanes = t.vecs * kWidth;
  for (int q = 0; q < t.queries; ++q) {
    const float* sums = t.sums + q / lanes * channels * lanes + q % lanes;
    const float total = t.total[q];
    const float scale = total == 0.0f ? 0.0f : 1.0f / total;
    T* out = reinterpret_cast<T*>(t.out[q]);
    for (int64_t c = 0; c < t.head_dim; ++c) {
      float y = sums[c * lanes] * scale;
      if (t.coarse != nullptr) {
        const int64_t at = c * t.gate_step;
        const float gate = t.gate_dtype == DType::f32 ? reinterpret_cast<const float*>(t.gate[q])[at]
                                                      : to_float(reinterpret_cast<const bf16*>(t.gate[q])[at]);
        y += gate * t.coarse[c];
      }
      out[c] = from_float<T>(y);
    }
    // NaN, where a score was NaN, is in the total.
    t.lse[q] = total == 0.0f ? -__builtin_inff() : (t.highest[q] * t.factor + std::log2(total)) * 0.693147180559945f;
  }
}

template <class T>
constexpr Level level(const char* name) {
  return {name, kStep<T>, scratch<T>, place<T>, begin<T>, step<T>, finish<T>};
}

#undef FN

}  // namespace pyvideo::attention::PYVIDEO_LEVEL

#undef PYVIDEO_LEVEL
#undef PYVIDEO_LEVEL_FN
#undef PYVIDEO_LEVEL_WIDTH
#undef PYVIDEO_LEVEL_VECS
#undef PYVIDEO_LEVEL_DOT
