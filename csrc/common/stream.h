// When a result is written past the cache.
#pragma once

#include <cstdint>

namespace pyvideo {

// Of the last level; 32 MiB where the system does not say.
int64_t last_cache_bytes();
// For tests: from now on as many, or as the system says if less than 0. Returns what was assumed before.
int64_t assume_cache_bytes(int64_t bytes);

// A plain store first reads the line that it overwrites, a third of a copy's traffic. A store past the cache does not,
// but leaves nothing there for the next reader: so only where inputs and outputs together are more than the cache
// holds, and lines are written whole.
inline bool past_cache(const void* out, int64_t row_bytes, int64_t touched_bytes) {
  return touched_bytes > last_cache_bytes() && row_bytes % 64 == 0 && reinterpret_cast<uintptr_t>(out) % 64 == 0;
}

}  // namespace pyvideo
