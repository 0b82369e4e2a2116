// unipc_step on the CPU: every operand is read once and each of the three results written once. The sums are built in
// short blocks of floats that stay in L1, so that any number of past predictions, each of either dtype, takes one
// path.
#include <tuple>
#include <vector>

#include "glue.h"

namespace pyvideo {
namespace {

// Short, so that all the tensors advance together: a page of one after a page of another is new to the prefetcher each
// time, and three times as slow.
constexpr int64_t kBlock = 128;

struct Operand {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// A past value and its share in both sums.
struct Past {
  Operand value;
  float corrector;
  float predictor;
};

struct Args {
  Operand sample, cond, uncond, last;
  std::vector<Past> history;
  void* prev;
  void* x0;
  void* corrected;
  float guidance_scale;
  float sigma;
  float corrector[2];  // of last_sample and x0
  float predictor[2];  // of corrected and x0
};

// n values from `begin` on as floats: where they lie, or widened into `scratch`.
PYVIDEO_INLINE const float* floats(const Operand& o, int64_t begin, int64_t n, float* scratch) {
  if (o.dtype == DType::f32) {
    return static_cast<const float*>(o.data) + begin;
  }
  load_row(static_cast<const bf16*>(o.data) + begin, n, scratch);
  return scratch;
}

// S is the storage type of sample and of the results; n <= kBlock.
template <class S>
PYVIDEO_INLINE void block(const Args& a, int64_t at, int64_t n) {
  alignas(64) float x0[kBlock];
  alignas(64) float corrected[kBlock];
  alignas(64) float prev[kBlock];
  alignas(64) float widened[kBlock];
  // x0 = sample - sigma * v; `x0` holds v until the sample is read.
  const float* in = floats(a.cond, at, n, widened);
  if (a.uncond.data == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x0[i] = in[i];
    }
  } else {
    const float* base = floats(a.uncond, at, n, corrected);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      x0[i] = base[i] + a.guidance_scale * (in[i] - base[i]);
    }
  }
  in = floats(a.sample, at, n, widened);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x0[i] = in[i] - a.sigma * x0[i];
    prev[i] = a.predictor[1] * x0[i];
  }
  if (a.last.data == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      corrected[i] = in[i];
    }
  } else {
    in = floats(a.last, at, n, widened);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      corrected[i] = a.corrector[0] * in[i] + a.corrector[1] * x0[i];
    }
  }
  for (const Past& past : a.history) {
    in = floats(past.value, at, n, widened);
    // Without `last_sample` there is no corrector, and infinity times its share of 0 would be NaN.
    if (a.last.data != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        corrected[i] += past.corrector * in[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      prev[i] += past.predictor * in[i];
    }
  }
  S* __restrict to_x0 = static_cast<S*>(a.x0) + at;
  S* __restrict to_corrected = static_cast<S*>(a.corrected) + at;
  S* __restrict to_prev = static_cast<S*>(a.prev) + at;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    to_x0[i] = from_float<S>(x0[i]);
    to_corrected[i] = from_float<S>(corrected[i]);
    to_prev[i] = from_float<S>(prev[i] + a.predictor[0] * corrected[i]);
  }
}

template <class S>
PYVIDEO_INLINE void body(const Args& a, int64_t begin, int64_t end) {
  int64_t at = begin;
  for (; at + kBlock <= end; at += kBlock) {
    block<S>(a, at, kBlock);
  }
  block<S>(a, at, end - at);
}

PYVIDEO_CLONES void run_f32(const Args& a, int64_t begin, int64_t end) { body<float>(a, begin, end); }

PYVIDEO_CLONES void run_bf16(const Args& a, int64_t begin, int64_t end) { body<bf16>(a, begin, end); }

// An operand and the tensor that keeps its memory: contiguous, since a permuted latent is copied, once a step.
struct Operands {
  const std::vector<int64_t>& shape;
  std::vector<Tensor> alive;

  Operand operator()(const char* name, const Tensor& t) {
    const char* op = "unipc_step";
    PYVIDEO_CHECK(t.is_cpu(), op, ": `", name, "` must be a CPU tensor");
    PYVIDEO_CHECK(shape_of(t) == shape, op, ": `", name, "` must have the shape of `sample`");
    alive.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
    return {alive.back().const_data_ptr(), dtype_of(op, name, t)};
  }

  Operand operator()(const char* name, const std::optional<Tensor>& t) {
    return t.has_value() ? (*this)(name, *t) : Operand{};
  }
};

std::tuple<Tensor, Tensor, Tensor> unipc_step(Tensor sample, Tensor cond, std::optional<Tensor> uncond,
                                              std::optional<Tensor> last_sample, std::vector<Tensor> history,
                                              double guidance_scale, double sigma, std::vector<double> corrector,
                                              std::vector<double> predictor) {
  const char* op = "unipc_step";
  const size_t count = 2 + history.size();
  PYVIDEO_CHECK(predictor.size() == count, op, ": `predictor` must be ", count, " coefficients; got ",
                predictor.size());
  PYVIDEO_CHECK(corrector.size() == (last_sample.has_value() ? count : 0), op,
                ": `corrector` must be as long as `predictor` with `last_sample` and empty without; got ",
                corrector.size());
  corrector.resize(count);
  const std::vector<int64_t> shape = shape_of(sample);
  Operands operands{shape, {}};
  Args a;
  a.sample = operands("sample", sample);
  a.cond = operands("cond", cond);
  a.uncond = operands("uncond", uncond);
  a.last = operands("last_sample", last_sample);
  for (size_t k = 0; k < history.size(); ++k) {
    a.history.push_back(
        {operands("history", history[k]), static_cast<float>(corrector[2 + k]), static_cast<float>(predictor[2 + k])});
  }
  for (int i = 0; i < 2; ++i) {
    a.corrector[i] = static_cast<float>(corrector[i]);
    a.predictor[i] = static_cast<float>(predictor[i]);
  }
  a.guidance_scale = static_cast<float>(guidance_scale);
  a.sigma = static_cast<float>(sigma);
  Tensor prev = new_contiguous(sample);
  Tensor x0 = new_contiguous(sample);
  Tensor corrected = new_contiguous(sample);
  a.prev = prev.mutable_data_ptr();
  a.x0 = x0.mutable_data_ptr();
  a.corrected = corrected.mutable_data_ptr();
  const auto run = a.sample.dtype == DType::f32 ? run_f32 : run_bf16;
  parallel_rows(sample.numel(), 1, [&](int64_t begin, int64_t end) { run(a, begin, end); });
  return {prev, x0, corrected};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(pyvideo_native, m) {
  m.def(
      "unipc_step(Tensor sample, Tensor cond, Tensor? uncond, Tensor? last_sample, Tensor[] history, "
      "float guidance_scale, float sigma, float[] corrector, float[] predictor) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_native, CPU, m) { m.impl("unipc_step", TORCH_BOX(&unipc_step)); }

}  // namespace pyvideo
