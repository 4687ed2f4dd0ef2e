// Online softmax over a warp's 16 rows: each thread holds two rows' share of the scores.
#pragma once

#include <cmath>

#include "attention/sm80/traits.h"

namespace sparseattn::sm80 {

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

/// State of a thread's rows: lane / 4 and lane / 4 + 8 of each of its warp's `kTiles` 16-row tiles.
/// Fragments are MMA accumulators, indexed ((column, row), tile, column / 8).
template <int kTiles>
struct OnlineSoftmax {
  float max[kTiles][2];  // of the raw scores
  float sum[kTiles][2];  // this thread's share, relative to max

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      max[i / 2][i % 2] = -INFINITY;
      sum[i / 2][i % 2] = 0.f;
    }
  }

  /// Turns scores into probabilities, rescales `acc` to the new maximum.
  template <class Scores, class Accumulator>
  __device__ __forceinline__ void step(Scores& scores, Accumulator& acc, float scale_log2) {
    using namespace cute;
    float rescale[kTiles][2];
    bool changed = false;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      rescale[i / 2][i % 2] = step_row(scores, scale_log2, i / 2, i % 2);
      changed = changed || rescale[i / 2][i % 2] != 1.f;
    }
    // Past the first steps of a tile a new maximum is rare.
    if (!__any_sync(~0u, changed)) return;
#pragma unroll
    for (int n = 0; n < size<2>(acc); ++n) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i) {
        acc(make_coord(0, i % 2), i / 2, n) *= rescale[i / 2][i % 2];
        acc(make_coord(1, i % 2), i / 2, n) *= rescale[i / 2][i % 2];
      }
    }
  }

 private:
  /// Returns the factor from the old maximum to the new one. It is exactly 1 where the maximum
  /// stays: a rounding error here would compound over the thousands of steps of a long row.
  template <class Scores>
  __device__ __forceinline__ float step_row(Scores& scores, float scale_log2, int tile, int row) {
    using namespace cute;
    const auto left = make_coord(0, row), right = make_coord(1, row);
    float high = max[tile][row];
#pragma unroll
    for (int n = 0; n < size<2>(scores); ++n) {
      high = fmaxf(high, fmaxf(scores(left, tile, n), scores(right, tile, n)));
    }
    high = quad_max(high);
    // A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it below.
    const float safe = high == -INFINITY ? 0.f : high;
    const float shift = safe * scale_log2;
    const float rescale = exp2_approx((max[tile][row] - safe) * scale_log2);
    max[tile][row] = high;
    float total = 0.f;
#pragma unroll
    for (int n = 0; n < size<2>(scores); ++n) {
      scores(left, tile, n) = exp2_approx(fmaf(scores(left, tile, n), scale_log2, -shift));
      scores(right, tile, n) = exp2_approx(fmaf(scores(right, tile, n), scale_log2, -shift));
      total += scores(left, tile, n) + scores(right, tile, n);
    }
    sum[tile][row] = fmaf(sum[tile][row], rescale, total);
    return rescale;
  }
};

}  // namespace sparseattn::sm80
