// Online softmax over the rows of a consumer warpgroup: each thread holds a quarter of the scores
// of two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
#pragma once

#include <cmath>
#include <cute/tensor.hpp>

#include "common/cuda/ptx.cuh"

namespace sparseattn::sm90 {

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

/// Fragments are accumulators, element 4 n + 2 row + c: column 8 n + 2 (lane % 4) + c.
///
/// Probabilities are relative to a reference, a maximum of earlier scores that may be behind by
/// kSlack (base 2), so that outputs are rescaled rarely.
template <int kSlack>
struct OnlineSoftmax {
  float max[2];  // the reference, a raw score
  float sum[2];  // this thread's share, relative to the reference

  __device__ __forceinline__ void reset() {
    max[0] = max[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
  }

  /// Raises references that are behind by more than kSlack to the maxima of the scores. Whether one
  /// of the warp was; then `rescale` receives the factors from the old references to the new ones,
  /// exactly 1 where one stays. A row's reference depends on nothing but what the row sees.
  template <class Scores>
  __device__ __forceinline__ bool raise(const Scores& scores, float scale_log2,
                                        float (&rescale)[2]) {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
    // Four chains a row: fewer would wait on their own latency.
    float high[2][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float x = scores(4 * n + 2 * row + c);
          float& chain = high[row][2 * (n % 2) + c];
          chain = n < 2 ? x : fmaxf(chain, x);
        }
      }
    }
    float top[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      top[row] = fmaxf(fmaxf(high[row][0], high[row][1]), fmaxf(high[row][2], high[row][3]));
    }
    // With nothing seen yet the reference is -inf: any score is above it. -inf - -inf compares
    // false.
    const bool behind =
        (top[0] - max[0]) * scale_log2 > kSlack || (top[1] - max[1]) * scale_log2 > kSlack;
    if (__builtin_expect(!__any_sync(~0u, behind), true)) return false;
#pragma unroll
    for (int lanes = 2; lanes > 0; lanes /= 2) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        top[row] = fmaxf(top[row], __shfl_xor_sync(~0u, top[row], lanes));
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      if (!((top[row] - max[row]) * scale_log2 > kSlack)) top[row] = max[row];
      rescale[row] = cuda::exp2_approx((max[row] - finite(top[row])) * scale_log2);
      max[row] = top[row];
      sum[row] *= rescale[row];
    }
    return true;
  }

  /// Turns scores into probabilities, in place.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2) const {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
    const float shift[2] = {finite(max[0]) * scale_log2, finite(max[1]) * scale_log2};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores(4 * n + 2 * row + c);
          x = cuda::exp2_approx(fmaf(x, scale_log2, -shift[row]));
        }
      }
    }
  }

  /// Adds probabilities to the sums. Apart from the exponentials, whose pace an addition that has
  /// to wait for one of them would disturb.
  template <class Scores>
  __device__ __forceinline__ void add(const Scores& probabilities) {
    constexpr int kTiles = decltype(cute::size(probabilities))::value / 4;
    float total[2][4] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        total[row][2 * (n % 2)] += probabilities(4 * n + 2 * row);
        total[row][2 * (n % 2) + 1] += probabilities(4 * n + 2 * row + 1);
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      sum[row] += (total[row][0] + total[row][1]) + (total[row][2] + total[row][3]);
    }
  }

 private:
  /// A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it in differences.
  static __device__ __forceinline__ float finite(float x) { return x == -INFINITY ? 0.f : x; }
};

}  // namespace sparseattn::sm90
