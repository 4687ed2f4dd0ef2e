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
/// kSlack (base 2), so that it moves rarely and a step's maximum need not be known: it is enough
/// that no exponent exceeds kSlack. As integers, floats above a positive one are those above it, so
/// three of them are compared in one instruction.
template <int kSlack>
struct OnlineSoftmax {
  float reference[2];  // base 2, scaled; 0 as long as the row has seen nothing
  float sum[2];        // this thread's share, relative to the reference
  bool fresh[2];       // the row has seen nothing

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = 0.f;
    sum[0] = sum[1] = 0.f;
    fresh[0] = fresh[1] = true;
  }

  /// Turns scores into exponents of 2, in place. Whether a reference of the warp was moved; then
  /// `rescale` receives the factors from the old references to the new ones, exactly 1 where one
  /// stays. A row's reference depends on nothing but what the row sees.
  template <class Scores>
  __device__ __forceinline__ bool shift(Scores& scores, float scale_log2, float (&rescale)[2]) {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
    int high[4] = {0, 0, 0, 0};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        float& a = scores(4 * n + 2 * row);
        float& b = scores(4 * n + 2 * row + 1);
        a = fmaf(a, scale_log2, -reference[row]);
        b = fmaf(b, scale_log2, -reference[row]);
        int& chain = high[2 * (n % 2) + row];
        chain = max(chain, max(__float_as_int(a), __float_as_int(b)));
      }
    }
    const int top = max(max(high[0], high[1]), max(high[2], high[3]));
    const bool moves = top > __float_as_int(static_cast<float>(kSlack)) || fresh[0] || fresh[1];
    if (!__any_sync(~0u, moves)) return false;
    move(scores, rescale);
    return true;
  }

  /// Turns exponents into probabilities, in place.
  template <class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores) const {
#pragma unroll
    for (int i = 0; i < cute::size(scores); ++i) scores(i) = cuda::exp2_approx(scores(i));
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
  template <class Scores>
  __device__ __forceinline__ void move(Scores& exponents, float (&rescale)[2]) {
    constexpr int kTiles = decltype(cute::size(exponents))::value / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        top = fmaxf(top, fmaxf(exponents(4 * n + 2 * row), exponents(4 * n + 2 * row + 1)));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      const bool first = fresh[row] && top > -INFINITY;
      const float moved = first || top > kSlack ? reference[row] + top : reference[row];
      // What the reference moves by, its rounding included; 0 where it stays.
      const float by = moved - reference[row];
      rescale[row] = cuda::exp2_approx(-by);
      if (first) rescale[row] = 1.f;  // of nothing
      fresh[row] = fresh[row] && !first;
      reference[row] = moved;
      sum[row] *= rescale[row];
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        exponents(4 * n + 2 * row) -= by;
        exponents(4 * n + 2 * row + 1) -= by;
      }
    }
  }
};

}  // namespace sparseattn::sm90
