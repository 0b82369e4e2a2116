// The levels of attention.h, and which of them this CPU runs.
#include <cmath>
#include <cstring>

#include "common/attention.h"
#include "common/isa.h"

#if defined(PYVIDEO_X86_LEVELS)
#include <immintrin.h>
#endif

// What the compiler was told to build for: SSE2, NEON, or with PYVIDEO_BASELINE its -march.
#define PYVIDEO_LEVEL generic
#define PYVIDEO_LEVEL_FN
#if defined(__AVX512F__)
#define PYVIDEO_LEVEL_WIDTH 16
#define PYVIDEO_LEVEL_VECS 4
#elif defined(__AVX__)
#define PYVIDEO_LEVEL_WIDTH 8
#define PYVIDEO_LEVEL_VECS 2
#else
#define PYVIDEO_LEVEL_WIDTH 4
#define PYVIDEO_LEVEL_VECS 2
#endif
#define PYVIDEO_LEVEL_DOT 0
#include "common/attention_level.h"

#if defined(PYVIDEO_X86_LEVELS)
#define PYVIDEO_LEVEL avx2
#define PYVIDEO_LEVEL_FN __attribute__((target("avx2,fma")))
#define PYVIDEO_LEVEL_WIDTH 8
#define PYVIDEO_LEVEL_VECS 2
#define PYVIDEO_LEVEL_DOT 0
#include "common/attention_level.h"

#define PYVIDEO_LEVEL avx512
#define PYVIDEO_LEVEL_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define PYVIDEO_LEVEL_WIDTH 16
#define PYVIDEO_LEVEL_VECS 4
#define PYVIDEO_LEVEL_DOT 0
#include "common/attention_level.h"

#define PYVIDEO_LEVEL avx512_bf16
#define PYVIDEO_LEVEL_FN __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")))
#define PYVIDEO_LEVEL_WIDTH 16
#define PYVIDEO_LEVEL_VECS 4
#define PYVIDEO_LEVEL_DOT 1
#include "common/attention_level.h"
#endif

namespace pyvideo::attention {
namespace {

bool supported(const char* name) {
#if defined(PYVIDEO_X86_LEVELS)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(name, "avx2") == 0) {
    return v3;
  }
  if (std::strcmp(name, "avx512") == 0) {
    return v4;
  }
  if (std::strcmp(name, "avx512_bf16") == 0) {
    return v4 && __builtin_cpu_supports("avx512bf16");
  }
#endif
  return std::strcmp(name, "generic") == 0;
}

// Best first.
template <class T>
const Level* find(const char* name) {
  static constexpr Level levels[] = {
#if defined(PYVIDEO_X86_LEVELS)
      // Of its functions for floats those of avx512 are the same.
      sizeof(T) == 2 ? avx512_bf16::level<T>("avx512_bf16") : avx512::level<T>("avx512"),
      avx512::level<T>("avx512"),
      avx2::level<T>("avx2"),
#endif
      generic::level<T>("generic"),
  };
  for (const Level& level : levels) {
    if ((*name == '\0' || std::strcmp(name, level.name) == 0) && supported(level.name)) {
      return &level;
    }
  }
  return nullptr;
}

}  // namespace

const Level* find_level(DType dtype, const char* name) {
  return dtype == DType::f32 ? find<float>(name) : find<bf16>(name);
}

}  // namespace pyvideo::attention
