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

PYVIDEO_INLINE float sum(const float* __restrict x, int64_t n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    total += x[i];
  }
  return total;
}

PYVIDEO_INLINE float sum_of_squares(const float* __restrict x, float centre, int64_t n) {
  float total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const float d = x[i] - centre;
    total += d * d;
  }
  return total;
}

}  // namespace pyvideo
