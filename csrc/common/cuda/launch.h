// CUDA errors as Status.
#pragma once

#include <cuda_runtime_api.h>

#include "sparseattn/types.h"

namespace sparseattn::cuda {

inline Status to_status(cudaError_t error) {
  if (error == cudaSuccess) return {};
  return {static_cast<int32_t>(error), cudaGetErrorString(error)};
}

/// Status of the kernel launch just made.
inline Status launch_status() { return to_status(cudaGetLastError()); }

/// Grids are one-dimensional: x alone may exceed 65535.
inline bool grid_fits(int64_t ctas) { return ctas <= INT32_MAX; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sparseattn::cuda
