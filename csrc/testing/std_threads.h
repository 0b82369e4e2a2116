// parallel_for of the build for ThreadSanitizer, which understands std::thread and no OpenMP runtime.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace pyvideo {

// Calls body(begin, end) for `threads` parts of the range, each in a thread of its own (the last in the caller's), and
// throws what the first of them threw.
template <class Body>
void split_over_threads(int64_t begin, int64_t end, int64_t threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min(threads, end - begin));
  const int64_t size = (end - begin + parts - 1) / parts;
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  const auto part = [&](int64_t i) {
    try {
      const int64_t from = begin + i * size;
      if (from < end) {
        body(from, std::min(from + size, end));
      }
    } catch (...) {
      errors[static_cast<size_t>(i)] = std::current_exception();
    }
  };
  std::vector<std::thread> started;
  for (int64_t i = 0; i + 1 < parts; ++i) {
    started.emplace_back(part, i);
  }
  part(parts - 1);
  for (std::thread& thread : started) {
    thread.join();
  }
  for (const std::exception_ptr& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace pyvideo
