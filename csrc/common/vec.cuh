// 16-byte loads and stores of device data, converted to float; no torch types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyvideo::device {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

// N consecutive elements as floats, in 16-byte accesses; `address` must be 16-byte aligned and N * sizeof(T) a
// multiple of 16.
template <class T, int N>
__device__ __forceinline__ void load_vector(const T* __restrict__ address, float (&out)[N]) {
  constexpr int kPer = 16 / sizeof(T);
  static_assert(N % kPer == 0, "a vector is a whole number of 16-byte accesses");
#pragma unroll
  for (int part = 0; part < N / kPer; ++part) {
    const uint4 word = __ldg(reinterpret_cast<const uint4*>(address) + part);
    const T* values = reinterpret_cast<const T*>(&word);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      out[part * kPer + i] = to_float(values[i]);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void store_vector(T* __restrict__ address, const float (&in)[N]) {
  constexpr int kPer = 16 / sizeof(T);
  static_assert(N % kPer == 0, "a vector is a whole number of 16-byte accesses");
#pragma unroll
  for (int part = 0; part < N / kPer; ++part) {
    uint4 word;
    T* values = reinterpret_cast<T*>(&word);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      values[i] = from_float<T>(in[part * kPer + i]);
    }
    reinterpret_cast<uint4*>(address)[part] = word;
  }
}

inline bool aligned16(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace pyvideo::device
