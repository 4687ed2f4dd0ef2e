// Random inputs of the examples.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "sparseattn/types.h"

namespace example {

inline std::vector<float> random_values(int64_t count, uint32_t seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

/// Rounded to nearest even. Finite values only.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_bf16(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

/// A contiguous tensor [batch, heads, rows, head_dim].
inline sparseattn::View contiguous(void* data, int64_t heads, int64_t rows, int64_t head_dim) {
  return {data, heads * rows * head_dim, rows * head_dim, head_dim};
}

}  // namespace example
