// Between torch's stable ABI and the kernels' raw pointers. Only launchers include this.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"
#include "common/rows.h"
#if defined(PYVIDEO_STD_THREADS)
#include "testing/std_threads.h"
#endif

namespace pyvideo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_float_or_bf16(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16;
}

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      fail(op, ": `", name, "` must be float32 or bfloat16 for the compiled CPU kernel");
  }
}

inline std::vector<int64_t> shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

// A new contiguous tensor; empty_like would copy permuted strides.
inline Tensor new_contiguous(const Tensor& like) {
  const std::vector<int64_t> shape = shape_of(like);
  return torch::stable::new_empty(like, shape);
}

// `t` seen as rows of the leading dimensions of `shape`, its dimensions of size 1 repeated. Ranks must agree.
inline Rows rows_like(const char* op, const char* name, const Tensor& t, const std::vector<int64_t>& shape) {
  const int64_t rank = static_cast<int64_t>(shape.size());
  PYVIDEO_CHECK(rank >= 1 && rank <= kMaxDims, op, ": `", name, "` must have 1 to ", kMaxDims, " dimensions; got ",
                rank);
  PYVIDEO_CHECK(t.is_cpu(), op, ": `", name, "` must be a CPU tensor");
  PYVIDEO_CHECK(t.dim() == rank, op, ": `", name, "` must have ", rank, " dimensions; got ", t.dim());
  PYVIDEO_CHECK(t.size(rank - 1) == shape.back(), op, ": `", name, "` must have a last dimension of ", shape.back(),
                "; got ", t.size(rank - 1));
  PYVIDEO_CHECK(t.size(rank - 1) <= 1 || t.stride(rank - 1) == 1, op, ": `", name,
                "` must have a contiguous last dimension");
  Rows rows;
  rows.data = static_cast<const char*>(t.const_data_ptr());
  rows.dtype = dtype_of(op, name, t);
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  for (int64_t d = 0; d + 1 < rank; ++d) {
    const int64_t size = t.size(d);
    PYVIDEO_CHECK(size == shape[d] || size == 1, op, ": `", name, "` dimension ", d, " must be ", shape[d],
                  " or 1; got ", size);
    rows.push(shape[d], size == 1 ? 0 : t.stride(d) * bytes);
  }
  return rows;
}

inline Rows rows_like(const char* op, const char* name, const std::optional<Tensor>& t,
                      const std::vector<int64_t>& shape) {
  return t.has_value() ? rows_like(op, name, *t, shape) : Rows{};
}

// A vector [n] as float: itself, or converted once per call into `storage`.
inline const float* float_vector(const char* op, const char* name, const std::optional<Tensor>& t, int64_t n,
                                 std::vector<float>& storage) {
  if (!t.has_value()) {
    return nullptr;
  }
  PYVIDEO_CHECK(t->is_cpu(), op, ": `", name, "` must be a CPU tensor");
  PYVIDEO_CHECK(t->dim() == 1 && t->size(0) == n && (n <= 1 || t->stride(0) == 1), op, ": `", name,
                "` must be a contiguous vector of ", n);
  if (dtype_of(op, name, *t) == DType::f32) {
    return static_cast<const float*>(t->const_data_ptr());
  }
  storage.resize(static_cast<size_t>(n));
  load_row(static_cast<const bf16*>(t->const_data_ptr()), n, storage.data());
  return storage.data();
}

inline int64_t row_count(const std::vector<int64_t>& shape) {
  int64_t rows = 1;
  for (size_t d = 0; d + 1 < shape.size(); ++d) {
    rows *= shape[d];
  }
  return rows;
}

// Calls body(begin, end) on torch's own thread pool, so torch.set_num_threads holds; a thread gets at least `grain` of
// the range. In the build for ThreadSanitizer the threads are plain ones and every range is split: the barriers of an
// OpenMP runtime that was not built for it look like none, and nothing would be learnt from what one thread does.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) {
    return;
  }
#if defined(PYVIDEO_STD_THREADS)
  split_over_threads(begin, end, torch::stable::get_num_threads(), body);
#else
  torch::stable::parallel_for(begin, end, grain, body);
#endif
}

// parallel_for over rows of `width` elements. A thread gets at least about 32 k of them: below that waking it costs
// more than it saves.
template <class Body>
void parallel_rows(int64_t rows, int64_t width, const Body& body) {
  parallel_for(0, rows, 32768 / (width > 0 ? width : 1) + 1, body);
}

}  // namespace pyvideo
