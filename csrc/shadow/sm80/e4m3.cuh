// Numbers in e4m3 to 16-bit elements, which hold all of them exactly, and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

namespace sparseattn::shadow_sm80 {

/// The two numbers in the lower bytes as neighbouring elements, the first one in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t widen_e4m3(uint32_t bytes) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;\n" : "=r"(halves) : "h"(static_cast<uint16_t>(bytes)));
  if constexpr (kHalf) return halves;
  const float2 numbers = __half22float2(*reinterpret_cast<const __half2*>(&halves));
  const __nv_bfloat162 pair = __floats2bfloat162_rn(numbers.x, numbers.y);
  return *reinterpret_cast<const uint32_t*>(&pair);
#else
  // Exponent and mantissa where an element has them, the exponent's bias made up by a product that
  // is exact, for subnormal numbers, too. NaN, all ones, carries into the sign's place.
  const uint32_t spread = __byte_perm(bytes, 0, 0x1404);  // into the upper byte of each half
  const uint32_t sizes = spread & 0x7f007f00u;
  const uint32_t nan = (sizes + 0x01000100u) & 0x80008000u;
  const uint32_t bits = (spread & 0x80008000u) | sizes >> (kHalf ? 1 : 4);
  uint32_t numbers;
  if constexpr (kHalf) {
    const uint32_t factor = 0x5c005c00u;  // 2^8, twice
    const __half2 product = __hmul2(*reinterpret_cast<const __half2*>(&bits),
                                    *reinterpret_cast<const __half2*>(&factor));
    numbers = *reinterpret_cast<const uint32_t*>(&product);
  } else {
    const uint32_t factor = 0x7b807b80u;  // 2^120, twice
    const __nv_bfloat162 product = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits),
                                           *reinterpret_cast<const __nv_bfloat162*>(&factor));
    numbers = *reinterpret_cast<const uint32_t*>(&product);
  }
  return numbers | (nan - (nan >> 15));
#endif
}

/// The nearest e4m3 of both, ties to even, at most 448 in size; NaN for NaN. The first one is in
/// the lower byte.
__device__ __forceinline__ uint32_t round_e4m3(float first, float second) {
  return __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
}

}  // namespace sparseattn::shadow_sm80
