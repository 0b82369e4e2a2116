// One source, several instruction sets: the wheel runs on any CPU of its architecture and uses what the machine has.
#pragma once

// A function marked PYVIDEO_CLONES is compiled once per level and chosen when the library is loaded (an ifunc, so the
// call costs nothing extra). Everything it calls must be PYVIDEO_INLINE: an out-of-line helper would keep the
// baseline instruction set. PYVIDEO_BASELINE leaves one version, for the compiler's own -march; so does
// PYVIDEO_SANITIZED, for a sanitizer's runtime is not there yet when the loader asks which version to take, and that
// code asks it.
#if defined(PYVIDEO_BASELINE) || defined(PYVIDEO_SANITIZED)
#define PYVIDEO_CLONES
#elif defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__) && !defined(__clang__) && __GNUC__ >= 12
#define PYVIDEO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__ELF__) && defined(__GLIBC__) && defined(__clang__) && __clang_major__ >= 16
#define PYVIDEO_CLONES __attribute__((target_clones("avx512f,avx512bw,avx512vl", "avx2,fma", "default")))
#else
#define PYVIDEO_CLONES
#endif

// Whether code for AVX-512 and AVX512-BF16 is compiled beside the rest and chosen at run time: by compilers that have
// all of its instructions and names.
#if defined(__x86_64__) && !defined(PYVIDEO_BASELINE)
#if (defined(__clang__) && __clang_major__ >= 16) || (!defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 12)
#define PYVIDEO_X86_LEVELS 1
#endif
#endif

#define PYVIDEO_INLINE inline __attribute__((always_inline))

// After the parameters of a lambda that such a function calls: a lambda too is a function of its own.
#define PYVIDEO_INLINE_LAMBDA __attribute__((always_inline))

namespace pyvideo {

// Whether kernels take their path for AVX-512 (avx512.h): this CPU has it, AVX512-BF16 included, and
// allow_avx512(false) did not forbid it, as tests do to reach the path of other CPUs.
bool avx512();
// Returns what it was.
bool allow_avx512(bool allow);

}  // namespace pyvideo
