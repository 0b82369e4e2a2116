// What this CPU is, asked once.
#include <atomic>
#include <cstdint>

#if defined(__linux__)
#include <unistd.h>
#endif

#include "common/isa.h"
#include "common/stream.h"

namespace pyvideo {
namespace {

bool has_avx512() {
#if defined(PYVIDEO_X86_LEVELS)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::atomic<bool> allowed{true};
std::atomic<int64_t> cache{-1};  // less than 0: ask the system

}  // namespace

bool avx512() {
  static const bool has = has_avx512();
  return has && allowed.load(std::memory_order_relaxed);
}

bool allow_avx512(bool allow) { return allowed.exchange(allow); }

int64_t last_cache_bytes() {
  const int64_t told = cache.load(std::memory_order_relaxed);
  if (told >= 0) {
    return told;
  }
  static const int64_t bytes = [] {
    int64_t found = 0;
#if defined(_SC_LEVEL3_CACHE_SIZE)
    found = sysconf(_SC_LEVEL3_CACHE_SIZE);
#endif
    return found > 0 ? found : int64_t{32} << 20;
  }();
  return bytes;
}

int64_t assume_cache_bytes(int64_t bytes) { return cache.exchange(bytes); }

}  // namespace pyvideo
