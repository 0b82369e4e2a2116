// Makes the extension believe that it runs on a lesser CPU, so that the tests reach the versions of its kernels that
// this machine would not choose. tests.build.levels links it to the objects of an ordinary build with
// --wrap=__cpu_indicator_init: the one function that __builtin_cpu_supports and the loader's choice between
// target_clones ask. Every library has that function and its answers to itself (hidden, from libgcc.a), so no other
// library is misled.
//
// PYVIDEO_LEVEL is 4 (AVX-512 as the first CPUs had it), 3 (AVX2 and FMA) or 1 (SSE2).
#if !defined(__x86_64__) || !defined(PYVIDEO_LEVEL)
#error "for x86-64, with PYVIDEO_LEVEL"
#endif

struct CpuModel {
  unsigned vendor, type, subtype, features[1];
};

extern "C" {
extern CpuModel __cpu_model __attribute__((visibility("hidden")));
extern unsigned __cpu_features2[] __attribute__((visibility("hidden")));
int __real___cpu_indicator_init();
int __wrap___cpu_indicator_init();
}

namespace {

// Length of __cpu_features2 in libgcc since GCC 11.
constexpr int kWords = 3;

// Clears the bit that makes `supports` true. Its place is found by trying: documented are the names alone.
template <class Supports>
void take_away(const Supports& supports) {
  for (int i = -1; i < kWords; ++i) {
    unsigned* word = i < 0 ? &__cpu_model.features[0] : &__cpu_features2[i];
    for (unsigned bit = 1; bit != 0 && supports(); bit <<= 1) {
      const unsigned before = *word;
      *word = before & ~bit;
      // The compiler does not know that the question below reads this word.
      __asm__ volatile("" ::: "memory");
      if (supports()) {
        *word = before;
        __asm__ volatile("" ::: "memory");
      }
    }
  }
}

}  // namespace

#define WITHOUT(feature) take_away([] { return __builtin_cpu_supports(feature) != 0; })

int __wrap___cpu_indicator_init() {
  const int result = __real___cpu_indicator_init();
  WITHOUT("avx512bf16");
  WITHOUT("avx512vnni");
  WITHOUT("avx512vbmi");
  WITHOUT("avx512vbmi2");
  WITHOUT("avx512ifma");
  WITHOUT("avx512bitalg");
  WITHOUT("avx512vpopcntdq");
#if PYVIDEO_LEVEL < 4
  WITHOUT("x86-64-v4");
  WITHOUT("avx512f");
  WITHOUT("avx512bw");
  WITHOUT("avx512cd");
  WITHOUT("avx512dq");
  WITHOUT("avx512vl");
#endif
#if PYVIDEO_LEVEL < 3
  WITHOUT("x86-64-v3");
  WITHOUT("x86-64-v2");
  WITHOUT("avx");
  WITHOUT("avx2");
  WITHOUT("fma");
  WITHOUT("bmi");
  WITHOUT("bmi2");
  WITHOUT("popcnt");
  WITHOUT("sse3");
  WITHOUT("ssse3");
  WITHOUT("sse4.1");
  WITHOUT("sse4.2");
#endif
  return result;
}
