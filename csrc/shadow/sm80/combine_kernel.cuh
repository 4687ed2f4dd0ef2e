// Merges the splits of decode attention, in their order: one CTA a query row.
#pragma once

#include "shadow/sm80/attention_kernel.cuh"
#include "shadow/sm80/job.h"

namespace sparseattn::shadow_sm80 {

constexpr int kCombineThreads = kMostSplits;

/// Four columns a thread; groups of threads take the splits in turn, and are added in order.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const __grid_constant__ AttentionJob job) {
  constexpr int kQuads = kHeadDim / 4, kGroups = kCombineThreads / kQuads;
  __shared__ float2 states[kMostSplits];
  __shared__ float weights[kMostSplits];
  __shared__ float4 sums[kGroups][kQuads];
  const Shape& shape = job.in.shape;
  const int thread = threadIdx.x;
  const int32_t unit = blockIdx.x / job.rows, row = blockIdx.x % job.rows;
  const int32_t row_of_head = unit % job.row_blocks * kTileQueries + row;
  if (row_of_head >= shape.q_len * shape.group()) return;
  const int32_t item = unit / job.row_blocks;
  const int32_t sequence = item / shape.kv_heads;
  const int64_t part = int64_t{blockIdx.x} * job.splits;

  if (thread < job.splits) states[thread] = job.states[part + thread];
  __syncthreads();
  float max = -INFINITY;
  for (int split = thread % 32; split < job.splits; split += 32) {
    max = fmaxf(max, states[split].x);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    max = fmaxf(max, __shfl_xor_sync(~0u, max, distance));
  }
  if (thread < job.splits) {
    const float own = states[thread].x;
    weights[thread] = own == -INFINITY ? 0.0f : cuda::exp2_approx(own - max);
  }
  __syncthreads();

  const int group = thread / kQuads, quad = thread % kQuads;
  if (group < kGroups) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float* from = job.partial + part * kHeadDim + 4 * quad;
#pragma unroll 4
    for (int split = group; split < job.splits; split += kGroups) {
      const float weight = weights[split];
      if (weight == 0.0f) continue;  // such a split may have left nothing
      const float4 out = *reinterpret_cast<const float4*>(from + int64_t{split} * kHeadDim);
      sum.x = fmaf(weight, out.x, sum.x), sum.y = fmaf(weight, out.y, sum.y);
      sum.z = fmaf(weight, out.z, sum.z), sum.w = fmaf(weight, out.w, sum.w);
    }
    sums[group][quad] = sum;
  }
  __syncthreads();
  if (thread >= kQuads) return;

  float total = 0.0f;
  for (int split = 0; split < job.splits; ++split) {
    if (weights[split] > 0.0f) total = fmaf(weights[split], states[split].y, total);
  }
  float4 sum = sums[0][thread];
#pragma unroll
  for (int i = 1; i < kGroups; ++i) {
    const float4 other = sums[i][thread];
    sum.x += other.x, sum.y += other.y, sum.z += other.z, sum.w += other.w;
  }
  const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
  const QueryRow at(shape, item % shape.kv_heads, row_of_head);
  Element* out = head_rows<Element>(job.in.out, sequence, at.head) +
                 at.query * job.in.out.row_stride + 4 * thread;
  reinterpret_cast<uint32_t*>(out)[0] = round_pair<Element>(sum.x * inverse, sum.y * inverse);
  reinterpret_cast<uint32_t*>(out)[1] = round_pair<Element>(sum.z * inverse, sum.w * inverse);
  if (thread == 0 && job.in.lse != nullptr) {
    job.in.lse[(int64_t{sequence} * shape.q_heads + at.head) * shape.q_len + at.query] =
        lse_of(max, total);
  }
}

}  // namespace sparseattn::shadow_sm80
