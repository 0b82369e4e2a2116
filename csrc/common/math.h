// Vectorisable elementary functions: plain arithmetic, so that a compiler turns a loop over them into SIMD code
// without relaxed floating point and without a vector maths library.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/isa.h"

namespace pyvideo {

// e^x within 2 units in the last place for -87 <= x <= 88; clamped outside; NaN stays NaN.
PYVIDEO_INLINE float fast_exp(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves that integer in the low mantissa bits.
  const float shifted = x * 1.44269504088896f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  // ln 2 in two parts: the high one has few enough bits that n * high is exact.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  const uint32_t bits = static_cast<uint32_t>(exponent - 0x4b400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// Below -88 the result is under 1e-36 in size; the clamped exponential would make it proportional to x instead.
PYVIDEO_INLINE float silu(float x) {
  const float y = x / (1.0f + fast_exp(-x));
  return x < -88.0f ? x * 0.0f : y;
}

}  // namespace pyvideo
