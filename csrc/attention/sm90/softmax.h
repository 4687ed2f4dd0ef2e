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

/// Word i of lane j goes to word j of lane i, for the four lanes of each quad.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t low = words[i], high = words[i + step];
      const uint32_t other = __shfl_xor_sync(~0u, upper ? low : high, step);
      words[i] = upper ? other : low;
      words[i + step] = upper ? high : other;
    }
  }
}

/// Fragments are accumulators, element 4 n + 2 row + c: column 8 n + 2 (lane % 4) + c.
///
/// Probabilities are relative to a reference, a maximum of earlier scores that may be behind by
/// kSlack (base 2), so that it moves rarely and a step's maximum need not be known: it is enough
/// that no score exceeds a limit. As integers, floats above a positive one are those above it, so
/// three of them are compared in one instruction.
template <int kSlack>
struct OnlineSoftmax {
  float reference[2];  // base 2, scaled; 0 as long as the row has seen nothing
  float limit[2];      // of scores; -inf where their maximum must be known
  float sum[2];        // this thread's share, relative to the reference
  bool fresh[2];       // the row has seen nothing

  __device__ __forceinline__ void reset() {
    reference[0] = reference[1] = 0.f;
    limit[0] = limit[1] = -INFINITY;
    sum[0] = sum[1] = 0.f;
    fresh[0] = fresh[1] = true;
  }

  /// Whether scores exceed what a reference of the warp allows.
  template <class Scores>
  __device__ __forceinline__ bool exceeded_by(const Scores& scores) const {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
    int high[2][2] = {};
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        int& chain = high[row][n % 2];
        chain = max(chain, max(__float_as_int(scores(4 * n + 2 * row)),
                               __float_as_int(scores(4 * n + 2 * row + 1))));
      }
    }
    const bool above = max(high[0][0], high[0][1]) > __float_as_int(limit[0]) ||
                       max(high[1][0], high[1][1]) > __float_as_int(limit[1]);
    return __any_sync(~0u, above);
  }

  /// Turns the scores of one half into probabilities, in place.
  template <int kHalf, class Scores>
  __device__ __forceinline__ void exponentiate(Scores& scores, float scale_log2) const {
    constexpr int kCount = decltype(cute::size(scores))::value / 2;
#pragma unroll
    for (int i = kHalf * kCount; i < (kHalf + 1) * kCount; ++i) {
      scores(i) = cuda::exp2_approx(fmaf(scores(i), scale_log2, -reference[i / 2 % 2]));
    }
  }

  /// Adds probabilities to the sums.
  template <class Scores>
  __device__ __forceinline__ void add(const Scores& probabilities) {
    float total[2][2] = {};
#pragma unroll
    for (int i = 0; i < cute::size(probabilities); ++i) {
      total[i / 2 % 2][i % 2] += probabilities(i);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] += total[row][0] + total[row][1];
  }

  /// Lets the references follow the scores, if they must: then `rescale` receives the factors from
  /// the old ones to the new ones, exactly 1 where one stays. A row's reference depends on nothing
  /// but what the row sees.
  template <class Scores>
  __device__ __forceinline__ bool follow(const Scores& scores, float scale_log2,
                                         float (&rescale)[2]) {
    if (!exceeded_by(scores)) return false;
    move(scores, scale_log2, rescale);
    return true;
  }

 private:
  template <class Scores>
  __device__ __forceinline__ void move(const Scores& scores, float scale_log2,
                                       float (&rescale)[2]) {
    constexpr int kTiles = decltype(cute::size(scores))::value / 4;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float high = -INFINITY;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        high = fmaxf(high, fmaxf(scores(4 * n + 2 * row), scores(4 * n + 2 * row + 1)));
      }
#pragma unroll
      for (int lanes = 2; lanes >= 1; lanes /= 2) {
        high = fmaxf(high, __shfl_xor_sync(~0u, high, lanes));
      }
      const float top = high * scale_log2;
      const bool first = fresh[row] && top > -INFINITY;
      const bool above =
          limit[row] > 0.f ? high > limit[row] : !fresh[row] && top - reference[row] > kSlack;
      const float moved = first || above ? top : reference[row];
      rescale[row] = first ? 1.f : cuda::exp2_approx(reference[row] - moved);  // first: of nothing
      fresh[row] = fresh[row] && !first;
      reference[row] = moved;
      sum[row] *= rescale[row];
      const float allowed = __fdividef(moved + kSlack, scale_log2);
      limit[row] = !fresh[row] && allowed > 0.f ? allowed : -INFINITY;
    }
  }
};

}  // namespace sparseattn::sm90
