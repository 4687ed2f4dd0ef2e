// Start and end of a panel's running softmax.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cpu/kernels.h"

namespace sparseattn::cpu {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr double kLn2 = 0.693147180559945309417;

inline void start(PanelState* state) {
  std::fill_n(state->max, kPanelRows, -INFINITY);
  std::fill_n(state->sum, kPanelRows, 0.0f);
}

/// By what the accumulated output of a row is multiplied at the end; 0 if it saw nothing.
inline float out_factor(const PanelState& state, int32_t row) {
  return state.sum[row] == 0.0f ? 0.0f : 1.0f / state.sum[row];
}

/// Natural log of the sum of exp(scaled scores) of a row.
inline float lse_of(const PanelState& state, int32_t row) {
  if (state.sum[row] == 0.0f) return -INFINITY;
  return static_cast<float>((state.max[row] + std::log2(double{state.sum[row]})) * kLn2);
}

}  // namespace sparseattn::cpu
