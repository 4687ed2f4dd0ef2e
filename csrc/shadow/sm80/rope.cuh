// Rotary position embedding of rebuilt keys in MMA accumulators.
//
// Two accumulator tiles of 8 columns hold the pairs: where they lie `half` columns apart, a pair is
// the same element of both tiles; where they are neighbours, it is in one tile. The columns of the
// shared basis are chosen so that one of the two always holds (see layout.h).
#pragma once

#include <cstdint>

#include "shadow/sm80/layout.h"
#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

/// The dim in column `column` of a scattered basis.
__device__ __forceinline__ int scattered_dim(int column, int half) {
  return column >= 2 * half ? column : column / 2 + column % 2 * half;
}

/// The columns of the 16 that step i of a contraction over head_dim takes: two groups of 8.
struct Columns {
  int blocks;  // leading steps that take groups `half` apart
  int half;

  __device__ static Columns in_order() { return {0, 0}; }
  __device__ explicit Columns(const Rope& rope)
      : Columns(pairing_of(rope) == Pairing::kBlocks ? rope.rotary_dim / 16 : 0,
                rope.rotary_dim / 2) {}
  __device__ Columns(int leading, int apart) : blocks(leading), half(apart) {}

  /// First column of group `group` (0, 1).
  __device__ __forceinline__ int operator()(int i, int group) const {
    return i < blocks ? 8 * i + group * half : 16 * i + 8 * group;
  }
};

/// Sine and cosine without branches. The angle is brought down by whole turns, then by quarters;
/// constants are in pieces, and the products with the first pieces are exact. The error is below
/// 2e-7 for angles from -2^24 to 2^24, and 1e-5 up to 2^31.
__device__ __forceinline__ void sin_cos(float angle, float& sine, float& cosine) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float turns = __fadd_rn(__fmaf_rn(angle, 0.15915494309189535f, kRound), -kRound);
  float rest = __fmaf_rn(turns, -0x1.921fb6p+2f, angle);
  rest = __fmaf_rn(turns, 0x1.777a5cp-23f, rest);
  rest = __fmaf_rn(turns, 0x1.ee59dap-48f, rest);
  const float rounded = __fmaf_rn(rest, 0.6366197723675814f, kRound);
  const float quarters = __fadd_rn(rounded, -kRound);
  rest = __fmaf_rn(quarters, -0x1.921fb6p+0f, rest);
  rest = __fmaf_rn(quarters, 0x1.777a5cp-25f, rest);

  const float square = __fmul_rn(rest, rest);
  float odd = __fmaf_rn(square, -0.000194817909f, 0.00833186765f);
  odd = __fmaf_rn(square, odd, -0.166666487f);
  odd = __fmaf_rn(__fmul_rn(square, odd), rest, rest);
  float even = __fmaf_rn(square, 2.4423888e-05f, -0.00138872427f);
  even = __fmaf_rn(square, even, 0.0416666444f);
  even = __fmaf_rn(square, even, -0.5f);
  even = __fmaf_rn(square, even, 1.0f);

  const uint32_t quadrant = __float_as_uint(rounded);  // its low bits count the quarters
  const uint32_t s = __float_as_uint(quadrant & 1 ? even : odd);
  const uint32_t c = __float_as_uint(quadrant & 1 ? odd : even);
  sine = __uint_as_float(s ^ (quadrant & 2) << 30);
  cosine = __uint_as_float(c ^ ((quadrant + 1) & 2) << 30);
}

/// Adds the mean and rotates. acc [head_dim / 8] are MMA accumulators of 16 keys: elements 0 and 1
/// are columns 2 * (lane % 4) + {0, 1} of key lane / 4, elements 2 and 3 those of key lane / 4 + 8.
/// Tiles 2 i and 2 i + 1 hold the two groups of columns(i). `mean` [head_dim] is in column order;
/// `inv_freq` [head_dim / 2] has zeros from `half` on. Operations are named, so that every kernel
/// rounds alike.
template <int kHeadDim>
__device__ __forceinline__ void finish_keys(float (&acc)[kHeadDim / 8][4], const Columns& columns,
                                            const Rope& rope, const float* mean,
                                            const float* inv_freq, float position_low,
                                            float position_high) {
  const int quad = threadIdx.x % 4;
  const int half = rope.rotary_dim / 2;
  const bool adjacent = columns.blocks == 0;
  const int first = adjacent ? quad : 2 * quad, second = adjacent ? quad + 4 : 2 * quad + 1;
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    float (&a)[4] = acc[2 * i];
    float (&b)[4] = acc[2 * i + 1];
    const float2 mean_a = *reinterpret_cast<const float2*>(mean + columns(i, 0) + 2 * quad);
    const float2 mean_b = *reinterpret_cast<const float2*>(mean + columns(i, 1) + 2 * quad);
    a[0] = __fadd_rn(a[0], mean_a.x), a[1] = __fadd_rn(a[1], mean_a.y);
    a[2] = __fadd_rn(a[2], mean_a.x), a[3] = __fadd_rn(a[3], mean_a.y);
    b[0] = __fadd_rn(b[0], mean_b.x), b[1] = __fadd_rn(b[1], mean_b.y);
    b[2] = __fadd_rn(b[2], mean_b.x), b[3] = __fadd_rn(b[3], mean_b.y);
    if (8 * i >= half) continue;

    const int pair[2] = {8 * i + first, 8 * i + second};
    const float frequency[2] = {inv_freq[pair[0]], inv_freq[pair[1]]};
    const float scale[2] = {pair[0] < half ? rope.scale : 1.0f, pair[1] < half ? rope.scale : 1.0f};
    // Neighbours: bring pairs to the same element of both tiles, and back below.
    const auto exchange = [&](int low, int high) {
      const float x = a[high], y = b[low];
      a[high] = adjacent ? y : x;
      b[low] = adjacent ? x : y;
    };
    exchange(0, 1);
    exchange(2, 3);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      float sine, cosine;
      sin_cos(__fmul_rn(j < 2 ? position_low : position_high, frequency[j % 2]), sine, cosine);
      sine = __fmul_rn(sine, scale[j % 2]);
      cosine = __fmul_rn(cosine, scale[j % 2]);
      const float x = a[j], y = b[j];
      a[j] = __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
      b[j] = __fmaf_rn(y, cosine, __fmul_rn(x, sine));
    }
    exchange(0, 1);
    exchange(2, 3);
  }
}

}  // namespace sparseattn::shadow_sm80
