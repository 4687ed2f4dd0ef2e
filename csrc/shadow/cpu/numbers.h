// Single numbers of rows in fp32 or bf16.
#pragma once

#include <cstdint>
#include <cstring>

#include "sparseattn/types.h"

namespace sparseattn::cpu {

inline float load(const void* row, int64_t i, DType dtype) {
  if (dtype == DType::kFloat32) return static_cast<const float*>(row)[i];
  const uint32_t bits = uint32_t{static_cast<const uint16_t*>(row)[i]} << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

inline void save(void* row, int64_t i, DType dtype, float x) {
  if (dtype == DType::kFloat32) {
    static_cast<float*>(row)[i] = x;
    return;
  }
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = x == x ? bits + 0x7fffu + (bits >> 16 & 1) : bits | 0x400000u;
  static_cast<uint16_t*>(row)[i] = static_cast<uint16_t>(bits >> 16);
}

}  // namespace sparseattn::cpu
