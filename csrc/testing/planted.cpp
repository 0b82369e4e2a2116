// Faults on purpose, in sanitizer builds alone: tests.build.sanitize calls them first, to know that its build, its
// runtime and its way of reading reports would show such a fault in a kernel.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <limits>
#include <thread>

#include "glue.h"

namespace pyvideo {
namespace {

// Reads the value after the last one, in memory that torch allocated.
double heap_overflow(Tensor x) { return static_cast<const float*>(x.const_data_ptr())[x.numel()]; }

// Writes there.
void heap_overflow_write(Tensor x) { static_cast<float*>(x.mutable_data_ptr())[x.numel()] = 1.0f; }

// Reads a workspace that is gone.
double use_after_free(Tensor x) {
  const float* data = nullptr;
  {
    const Tensor workspace = new_contiguous(x);
    data = static_cast<const float*>(workspace.const_data_ptr());
  }
  return *data;
}

// Adds to the largest int32.
int64_t signed_overflow(Tensor x) { return std::numeric_limits<int32_t>::max() + static_cast<int32_t>(x.numel()); }

// Reads a float at an address that is no multiple of four.
double misaligned(Tensor x) {
  return *reinterpret_cast<const float*>(static_cast<const char*>(x.const_data_ptr()) + 1);
}

// Every thread of one call adds to the same value.
void race(Tensor x) {
  float* data = static_cast<float*>(x.mutable_data_ptr());
  parallel_for(0, x.numel(), 1, [&](int64_t begin, int64_t end) { data[0] += static_cast<float>(end - begin); });
}

// Calls from two threads share a value that each thinks its own. Waits, without ordering the threads, until the other
// call is inside too: calls one after the other are ordered by Python's lock, and no race.
double race_between_calls(Tensor x) {
  static std::atomic<int> inside{0};
  static float kept = 0.0f;
  inside.fetch_add(1, std::memory_order_relaxed);
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (inside.load(std::memory_order_relaxed) < 2 && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  kept += static_cast<const float*>(x.const_data_ptr())[0];
  return kept;
}

}  // namespace

STABLE_TORCH_LIBRARY(pyvideo_planted, m) {
  m.def("heap_overflow(Tensor x) -> float");
  m.def("heap_overflow_write(Tensor x) -> ()");
  m.def("use_after_free(Tensor x) -> float");
  m.def("signed_overflow(Tensor x) -> int");
  m.def("misaligned(Tensor x) -> float");
  m.def("race(Tensor x) -> ()");
  m.def("race_between_calls(Tensor x) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(pyvideo_planted, CPU, m) {
  m.impl("heap_overflow", TORCH_BOX(&heap_overflow));
  m.impl("heap_overflow_write", TORCH_BOX(&heap_overflow_write));
  m.impl("use_after_free", TORCH_BOX(&use_after_free));
  m.impl("signed_overflow", TORCH_BOX(&signed_overflow));
  m.impl("misaligned", TORCH_BOX(&misaligned));
  m.impl("race", TORCH_BOX(&race));
  m.impl("race_between_calls", TORCH_BOX(&race_between_calls));
}

}  // namespace pyvideo
