// What the CPU registrations share.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <functional>

#include "torch/arguments.h"

namespace sparseattn::torch_layer {

inline const Support& support() {
  static const Support kSupport{
      "cpu", {ScalarType::Float, ScalarType::BFloat16}, {16, 32, 64, 96, 128}};
  return kSupport;
}

inline void run_parallel(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  torch::stable::parallel_for(0, n, 1, body);
}

}  // namespace sparseattn::torch_layer
