// Element types of CPU kernels: storage in T, arithmetic in float.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace pyvideo {

struct bf16 {
  uint16_t bits;
};

enum class DType : int { f32, bf16 };

PYVIDEO_INLINE int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

PYVIDEO_INLINE float to_float(float value) { return value; }

PYVIDEO_INLINE float to_float(bf16 value) {
  const uint32_t word = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &word, sizeof out);
  return out;
}

template <class T>
T from_float(float value);

template <>
PYVIDEO_INLINE float from_float<float>(float value) {
  return value;
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
template <>
PYVIDEO_INLINE bf16 from_float<bf16>(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  const uint32_t rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
  const uint32_t quiet = (word >> 16) | 0x40u;
  const bool nan = (word & 0x7fffffffu) > 0x7f800000u;
  return bf16{static_cast<uint16_t>(nan ? quiet : rounded)};
}

}  // namespace pyvideo
