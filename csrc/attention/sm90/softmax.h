// Online softmax over the rows of a consumer warpgroup: each thread holds a quarter of the scores of
// two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
#pragma once

#include <cmath>
#include <cute/tensor.hpp>

#include "common/cuda/ptx.cuh"

namespace sparseattn::sm90 {

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

/// Fragments are accumulators, element 4 n + 2 row + c: column 8 n + 2 (lane % 4) + c.
struct OnlineSoftmax {
  float max[2];  // of the raw scores
  float sum[2];  // this thread's share, relative to max

  __device__ __forceinline__ void reset() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }

  /// Turns the scores of two boxes into probabilities. `rescale` receives the factors from the old
  /// maxima to the new ones, exactly 1 where a maximum stays: a rounding error here would compound
  /// over the thousands of steps of a long row. Returns whether any row of the warp needs them.
  template <class Scores>
  __device__ __forceinline__ bool step(Scores& first, Scores& second, float scale_log2,
                                       float (&rescale)[2]) {
    constexpr int kTiles = decltype(cute::size(first))::value / 4;
    bool changed = false;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float high = max[row];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          high = fmaxf(high, fmaxf(first(4 * n + 2 * row + c), second(4 * n + 2 * row + c)));
        }
      }
      high = quad_max(high);
      // A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it below.
      const float safe = high == -INFINITY ? 0.f : high;
      const float shift = safe * scale_log2;
      rescale[row] = cuda::exp2_approx((max[row] - safe) * scale_log2);
      changed = changed || rescale[row] != 1.f;
      max[row] = high;
      float total[2] = {0.f, 0.f};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& a = first(4 * n + 2 * row + c);
          float& b = second(4 * n + 2 * row + c);
          a = cuda::exp2_approx(fmaf(a, scale_log2, -shift));
          b = cuda::exp2_approx(fmaf(b, scale_log2, -shift));
          total[0] += a;
          total[1] += b;
        }
      }
      sum[row] = fmaf(sum[row], rescale[row], total[0] + total[1]);
    }
    return __any_sync(~0u, changed);
  }
};

}  // namespace sparseattn::sm90
