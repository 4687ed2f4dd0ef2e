// First pass of the vertical-slash estimate: softmax statistics of the query rows over a chunk.
#pragma once

#include "common/cuda/launch.h"
#include "index/sm80/score_stream.cuh"

namespace sparseattn::index_sm80 {

/// Every thread keeps a reference and a sum for its 16 query rows, over the keys it sees. The
/// reference follows the maximum loosely: a sum is rescaled only when a score exceeds it by
/// kSlack, so the usual tile needs one exponential for each score and no other.
struct RowSums {
  static constexpr float kSlack = 32.f;
  static constexpr float kNone = -1e30f;

  const VerticalSlashJob& job;
  const SequenceScope& own;
  int g, t;
  float reference[8][2];
  float sum[8][2];

  __device__ __forceinline__ RowSums(const VerticalSlashJob& job, const SequenceScope& own)
      : job(job), own(own), g(threadIdx.x % 32 / 4), t(threadIdx.x % 4) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        reference[n][c] = kNone;
        sum[n][c] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void tile(int, float (&scores)[8][4], int key) {
    float excess = kNone;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= job.scale_log2;
    }
    if (key + 15 > own.origin) hide_future(scores, key);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        excess = fmaxf(excess, fmaxf(scores[n][c], scores[n][2 + c]) - reference[n][c]);
      }
    }
    if (excess > kSlack) raise_references(scores);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        sum[n][c] += cuda::exp2_approx(scores[n][c] - reference[n][c]) +
                     cuda::exp2_approx(scores[n][2 + c] - reference[n][c]);
      }
    }
  }

  __device__ __forceinline__ void end_step(int) {}

  /// Combines the threads that share query rows and writes this chunk's row of `partial`.
  __device__ __forceinline__ void finish(float2* partial) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float top = reference[n][c];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          top = fmaxf(top, __shfl_xor_sync(cuda::kFullWarp, top, lanes));
        }
        float total = sum[n][c] * cuda::exp2_approx(reference[n][c] - top);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          total += __shfl_xor_sync(cuda::kFullWarp, total, lanes);
        }
        if (g == 0) partial[8 * n + 2 * t + c] = make_float2(top, total);
      }
    }
  }

 private:
  __device__ __forceinline__ void hide_future(float (&scores)[8][4], int key) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int position = own.origin + 8 * n + 2 * t + i % 2;
        if (key + g + i / 2 * 8 > position) scores[n][i] = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ void raise_references(const float (&scores)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float raised = fmaxf(reference[n][c], fmaxf(scores[n][c], scores[n][2 + c]));
        sum[n][c] *= cuda::exp2_approx(reference[n][c] - raised);
        reference[n][c] = raised;
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(32 * kMaxHeadsPerCta, 2)
    row_sums_kernel(const __grid_constant__ VerticalSlashJob job) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ SequenceScope own;
  const ChunkScope scope(job, own);
  if (__syncthreads_or(scope.active) == 0) return;
  RowSums sums(job, own);
  stream_scores<Traits>(job, scope, smem, sums);
  if (scope.active) {
    sums.finish(job.partial + (scope.row * job.max_chunks + scope.chunk) * 64);
  }
}

template <class Traits>
Status launch_row_sums_as(const VerticalSlashJob& job, cudaStream_t stream) {
  const int64_t ctas = static_cast<int64_t>(job.units) * job.chunks * job.ctas_per_chunk;
  row_sums_kernel<Traits>
      <<<static_cast<unsigned>(ctas), 32 * job.heads_per_cta, Traits::kRingBytes, stream>>>(job);
  return cuda::launch_status();
}

template <int kHeadDim>
Status launch_row_sums(const VerticalSlashJob& job, cudaStream_t stream) {
  return job.in.dtype == DType::kFloat16
             ? launch_row_sums_as<StreamTraits<__half, kHeadDim>>(job, stream)
             : launch_row_sums_as<StreamTraits<__nv_bfloat16, kHeadDim>>(job, stream);
}

}  // namespace sparseattn::index_sm80
