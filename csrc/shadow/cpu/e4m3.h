// Numbers in e4m3 on the CPU.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "sparseattn/shadow.h"

namespace sparseattn::cpu {

/// The number of every byte.
inline const std::array<float, 256>& e4m3_numbers() {
  static const std::array<float, 256> kNumbers = [] {
    std::array<float, 256> numbers{};
    for (int32_t byte = 0; byte < 256; ++byte) {
      const int32_t exponent = byte >> 3 & 15, mantissa = byte & 7;
      float number = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
      if ((byte & 0x7f) == 0x7f) number = NAN;
      numbers[byte] = byte < 128 ? number : -number;
    }
    return numbers;
  }();
  return kNumbers;
}

/// The nearest e4m3, ties to even, at most 448 in size; NaN for NaN.
inline uint8_t to_e4m3(float x) {
  constexpr uint32_t kSmallestNormal = 121u << 23;  // 2^-6
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const auto sign = static_cast<uint8_t>(bits >> 24 & 0x80);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7f;
  uint32_t code;
  if (bits >= kSmallestNormal) {
    code = ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120u << 3);
    if (code > 0x7e) code = 0x7e;
  } else {
    // Added to 2^14, a number is rounded to multiples of the smallest e4m3, 2^-9.
    const float sum = std::fabs(x) + 16384.0f;
    std::memcpy(&code, &sum, sizeof code);
    code &= 0xf;
  }
  return sign | static_cast<uint8_t>(code);
}

/// Rows of one head, in bytes.
inline uint8_t* e4m3_of_head(const View& view, int64_t sequence, int64_t head, int64_t row) {
  return static_cast<uint8_t*>(view.data) + sequence * view.batch_stride + head * view.head_stride +
         row * view.row_stride;
}

}  // namespace sparseattn::cpu
