// Rows of a strided tensor, and what CPU kernels do with one row: load to float, reduce, store.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace pyvideo {

constexpr int kMaxDims = 8;

// Every dimension but the last, flattened in logical order; dimensions that are contiguous with each other are
// merged, so that a plain tensor needs no division. A null `data` stands for an argument that was not given.
struct Rows {
  const char* data = nullptr;
  DType dtype = DType::f32;
  int dims = 0;
  int64_t sizes[kMaxDims] = {};
  int64_t strides[kMaxDims] = {};  // in bytes

  void push(int64_t size, int64_t stride) {
    if (size == 1) {
      return;
    }
    if (dims > 0 && strides[dims - 1] == stride * size) {
      sizes[dims - 1] *= size;
      strides[dims - 1] = stride;
      return;
    }
    sizes[dims] = size;
    strides[dims] = stride;
    ++dims;
  }

  PYVIDEO_INLINE const char* row(int64_t index) const {
    int64_t offset = 0;
    for (int d = dims - 1; d > 0; --d) {
      const int64_t next = index / sizes[d];
      offset += (index - next * sizes[d]) * strides[d];
      index = next;
    }
    return data + offset + (dims > 0 ? index * strides[0] : 0);
  }

  // Of a tensor that is an output.
  PYVIDEO_INLINE char* mutable_row(int64_t index) const { return const_cast<char*>(row(index)); }
};

template <class T>
PYVIDEO_INLINE void load_row(const T* __restrict in, int64_t n, float* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = to_float(in[i]);
  }
}

template <class T>
PYVIDEO_INLINE void store_row(const float* __restrict in, int64_t n, T* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = from_float<T>(in[i]);
  }
}

// The row as floats: the row itself where it is float already, else `scratch`. The last source is remembered, since
// per-batch modulation gives thousands of rows the same one.
struct FloatRow {
  float* scratch;
  const char* source = nullptr;

  PYVIDEO_INLINE const float* get(const Rows& rows, int64_t index, int64_t n) {
    if (rows.data == nullptr) {
      return nullptr;
    }
    const char* row = rows.row(index);
    if (rows.dtype == DType::f32) {
      return reinterpret_cast<const float*>(row);
    }
    if (row != source) {
      load_row(reinterpret_cast<const bf16*>(row), n, scratch);
      source = row;
    }
    return scratch;
  }
};

// A row's sum, in kLanes partial sums: one addition would have to wait for the one before it. A compiler keeps them in
// registers on every instruction set (4 of 16 floats, 8 of 8, 16 of 4), and adds them as a tree, not one after another
// through memory as its own reductions do, which costs a short row more than the row.
constexpr int kLanes = 64;

template <int n>
PYVIDEO_INLINE float fold(const float* lanes) {
  if constexpr (n == 1) {
    return lanes[0];
  } else {
    float halves[n / 2];
#pragma omp simd
    for (int i = 0; i < n / 2; ++i) {
      halves[i] = lanes[i] + lanes[i + n / 2];
    }
    return fold<n / 2>(halves);
  }
}

// The sum of term(i) over 0 <= i < n. `term` must be PYVIDEO_INLINE_LAMBDA and may store what it computes on its way.
template <class Term>
PYVIDEO_INLINE float sum_of(int64_t n, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
#pragma omp simd
    for (int j = 0; j < kLanes; ++j) {
      lanes[j] += term(i + j);
    }
  }
  float total = fold<kLanes>(lanes);
  if (i < n) {
    float rest = 0;
#pragma omp simd reduction(+ : rest)
    for (int64_t j = i; j < n; ++j) {
      rest += term(j);
    }
    total += rest;
  }
  return total;
}

template <class T>
PYVIDEO_INLINE float sum(const T* __restrict x, int64_t n) {
  return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA { return to_float(x[i]); });
}

template <class T>
PYVIDEO_INLINE float sum_of_squares(const T* __restrict x, float centre, int64_t n) {
  return sum_of(n, [&](int64_t i) PYVIDEO_INLINE_LAMBDA {
    const float d = to_float(x[i]) - centre;
    return d * d;
  });
}

}  // namespace pyvideo
