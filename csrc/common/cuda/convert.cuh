// 16-byte pieces of 16-bit elements as floats, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sparseattn::cuda {

/// Adds the eight elements of `piece` to `sum`.
template <class Element>
__device__ __forceinline__ void add_elements(float (&sum)[8], const uint4& piece) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t low = words[i] & 0xffff, high = words[i] >> 16;
    if constexpr (std::is_same_v<Element, __half>) {
      sum[2 * i] += __half2float(__ushort_as_half(low));
      sum[2 * i + 1] += __half2float(__ushort_as_half(high));
    } else {
      sum[2 * i] += __bfloat162float(__ushort_as_bfloat16(low));
      sum[2 * i + 1] += __bfloat162float(__ushort_as_bfloat16(high));
    }
  }
}

/// The eight elements of `piece`.
template <class Element>
__device__ __forceinline__ void unpack(const uint4& piece, float (&numbers)[8]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 pair;
    if constexpr (std::is_same_v<Element, __half>) {
      pair = __half22float2(*reinterpret_cast<const __half2*>(words + i));
    } else {
      pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(words + i));
    }
    numbers[2 * i] = pair.x;
    numbers[2 * i + 1] = pair.y;
  }
}

/// The piece of eight elements nearest to `values`.
template <class Element>
__device__ __forceinline__ uint4 round_elements(const float (&values)[8]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t low, high;
    if constexpr (std::is_same_v<Element, __half>) {
      low = __half_as_ushort(__float2half_rn(values[2 * i]));
      high = __half_as_ushort(__float2half_rn(values[2 * i + 1]));
    } else {
      low = __bfloat16_as_ushort(__float2bfloat16_rn(values[2 * i]));
      high = __bfloat16_as_ushort(__float2bfloat16_rn(values[2 * i + 1]));
    }
    words[i] = high << 16 | low;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace sparseattn::cuda
