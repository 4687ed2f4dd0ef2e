// Ranks of chunks as unsigned keys, the same order as on the CPU.
#pragma once

#include <cstdint>

#include "index/sm80/select.cuh"

namespace sparseattn::shadow_sm80 {

/// Key of a score: NaN is -inf, and +inf is the largest finite number.
__device__ __forceinline__ uint32_t rank_key(float score) {
  constexpr float kLargest = 3.402823466e+38f;
  return index_sm80::order_key(score != score ? -INFINITY : fminf(score, kLargest));
}

}  // namespace sparseattn::shadow_sm80
