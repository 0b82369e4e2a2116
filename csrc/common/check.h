// Host-side checks without torch types.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace pyvideo {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace pyvideo

#define PYVIDEO_CHECK(condition, ...) \
  do {                                \
    if (!(condition)) {               \
      ::pyvideo::fail(__VA_ARGS__);   \
    }                                 \
  } while (0)
