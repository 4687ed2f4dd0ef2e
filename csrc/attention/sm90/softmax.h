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
/// kSlack (base 2). So the maximum of a step need not be known: it is enough that no sum of a
/// thread's probabilities exceeds 2^kSlack, which they all would if one overflowed.
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
    if (!__any_sync(~0u, behind)) return false;
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

  /// Turns scores into probabilities, in place. Whether one may be too large for its reference:
  /// then the caller begins again with the scores, and raises the references first.
  template <class Scores>
  __device__ __forceinline__ bool exponentiate(Scores& scores, float scale_log2,
                                               float (&total)[2]) const {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
    const float shift[2] = {finite(max[0]) * scale_log2, finite(max[1]) * scale_log2};
    float part[2][4] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores(4 * n + 2 * row + c);
          x = cuda::exp2_approx(fmaf(x, scale_log2, -shift[row]));
          part[row][2 * (n % 2) + c] += x;
        }
      }
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      total[row] = (part[row][0] + part[row][1]) + (part[row][2] + part[row][3]);
    }
    constexpr float kLimit = static_cast<float>(uint64_t{1} << kSlack);
    return total[0] > kLimit || total[1] > kLimit;
  }

  __device__ __forceinline__ void add(const float (&total)[2]) {
    sum[0] += total[0];
    sum[1] += total[1];
  }

 private:
  /// A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it in differences.
  static __device__ __forceinline__ float finite(float x) { return x == -INFINITY ? 0.f : x; }
};

}  // namespace sparseattn::sm90
