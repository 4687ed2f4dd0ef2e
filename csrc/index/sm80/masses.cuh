// Second pass of the vertical-slash estimate: attention mass of every column and offset.
//
// Diagonals. Number a warp's keys from its chunk's first key and let diagonal = query row - key,
// so offset = origin - first_key + diagonal. In a 16-key tile T, a thread's value for key half h
// and row tile n lies on diagonal 8 (n - h - 2 T) + (2 t + c - g): values with equal J = n - h - 2
// T are added in registers. After step i (tiles 2 i and 2 i + 1) no later tile adds to J >= 4 - 4
// i. Those four J then go to shared memory as rows 8 J + 2 t + c (modulo 64) of eight arrays, one
// for each g, and diagonal d is the sum over g of row d + g of array g. Step i completes the
// diagonals [32 - 32 i, 64 - 32 i): rows up to 32 - 32 i + 38, the upper 7 of them left by step i
// - 1.
//
// Chunk c writes diagonals below 0 to offset_mass. Diagonals 0 .. 63 continue those that chunk
// c - 1 wrote last, and go to `spill`, which is added later (launch_select_indices); chunk 0 has no
// such neighbour and writes all. Each sum has one writer and a fixed order.
#pragma once

#include "common/cuda/launch.h"
#include "index/sm80/score_stream.cuh"

namespace sparseattn::index_sm80 {

/// A warp's shared memory: eight arrays of 64 rows, padded so that a half-warp's 8-byte stores hit
/// 32 banks, and what is left out of the masses, for which there are no registers.
struct DiagonalArrays {
  static constexpr int kStride = 72;
  float values[8 * kStride];
  int32_t late;  // query row i does not count keys beyond late + i
  int32_t sink;  // nor keys below sink
  int32_t padding[2];
};

struct Masses {
  const VerticalSlashJob& job;
  const ChunkScope& scope;
  int lane, g, t;
  DiagonalArrays& shared;
  float* arrays;
  float normalizer[8][2];
  float columns[2][2];     // [half of the step][key half]
  float diagonals[11][2];  // J = index - 3 - 4 step

  __device__ __forceinline__ Masses(const VerticalSlashJob& job, const ChunkScope& scope,
                                    DiagonalArrays& shared)
      : job(job),
        scope(scope),
        lane(threadIdx.x % 32),
        g(lane / 4),
        t(lane % 4),
        shared(shared),
        arrays(shared.values) {
    hide_forced();
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        normalizer[n][c] =
            scope.active ? job.normalizer[scope.row * 64 + 8 * n + 2 * t + c] : INFINITY;
      }
    }
#pragma unroll
    for (int j = 0; j < 11; ++j) diagonals[j][0] = diagonals[j][1] = 0.f;
    for (int i = lane; i < 8 * DiagonalArrays::kStride; i += 32) arrays[i] = 0.f;
    __syncwarp();
  }

  __device__ __forceinline__ void tile(int half, float (&scores)[8][4], int key) {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[n][i] = cuda::exp2_approx(fmaf(scores[n][i], job.scale_log2, -normalizer[n][i % 2]));
      }
    }
    if (key + 15 > shared.late || key < shared.sink) hide(scores, key);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = 0.f;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        sum += scores[n][2 * h] + scores[n][2 * h + 1];
        diagonals[n - h + 3 - 2 * half][0] += scores[n][2 * h];
        diagonals[n - h + 3 - 2 * half][1] += scores[n][2 * h + 1];
      }
      columns[half][h] = sum;
    }
  }

  __device__ __forceinline__ void end_step(int step) {
    write_columns(scope.first_key + step * kStepKeys);
    write_diagonals(step);
  }

  /// Hands out the diagonals that the last step left open.
  __device__ __forceinline__ void finish(int steps) {
    write_diagonals(steps);
    write_diagonals(steps + 1);
  }

 private:
  /// Where a share is asked for, the masses leave out what the forced columns and offsets hold.
  __device__ __forceinline__ void hide_forced() {
    const VerticalSlashEstimate& in = job.in;
    int late = scope.own.origin, sink = 0;
    const int ordinal = listed_ordinal(in.head_ids, in.heads, scope.head);
    if (ordinal >= 0 && share_of(in.shares, ordinal, in.share) > 0) {
      const int columns = budget_of(in.num_columns, ordinal, in.max_columns);
      const int offsets = budget_of(in.num_offsets, ordinal, in.max_offsets);
      sink = min(in.sink, columns);
      late -= min(min(in.local, offsets), scope.own.kv_len);
    }
    if (lane == 0) {
      shared.late = late;
      shared.sink = sink;
    }
    __syncwarp();
  }

  __device__ __forceinline__ void hide(float (&scores)[8][4], int key) const {
    const int late = shared.late, sink = shared.sink;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = key + g + i / 2 * 8;
        if (at > late + 8 * n + 2 * t + i % 2 || at < sink) scores[n][i] = 0.f;
      }
    }
  }

  /// Sums over t. Of the four columns of a thread, thread t ends up with the one at 8 t + g.
  __device__ __forceinline__ void write_columns(int key) {
    const bool upper = t / 2 != 0, odd = t % 2 != 0;
    float low = upper ? columns[1][0] : columns[0][0];
    float high = upper ? columns[1][1] : columns[0][1];
    low += __shfl_xor_sync(cuda::kFullWarp, upper ? columns[0][0] : columns[1][0], 2);
    high += __shfl_xor_sync(cuda::kFullWarp, upper ? columns[0][1] : columns[1][1], 2);
    float sum = odd ? high : low;
    sum += __shfl_xor_sync(cuda::kFullWarp, odd ? low : high, 1);
    const int column = key + 8 * t + g;
    if (column < scope.own.kv_len) job.column_mass[scope.row * job.mass_stride + column] = sum;
  }

  __device__ __forceinline__ void write_diagonals(int step) {
    const int base = step % 2 == 0 ? 32 : 0;  // row of diagonal 32 - 32 step
    __syncwarp();
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      *reinterpret_cast<float2*>(arrays + g * DiagonalArrays::kStride + base + 8 * j + 2 * t) =
          make_float2(diagonals[7 + j][0], diagonals[7 + j][1]);
    }
#pragma unroll
    for (int j = 10; j >= 4; --j) {
      diagonals[j][0] = diagonals[j - 4][0];
      diagonals[j][1] = diagonals[j - 4][1];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) diagonals[j][0] = diagonals[j][1] = 0.f;
    __syncwarp();
    // A tree that any rotation of its leaves leaves alone: which array holds a diagonal's first row
    // depends on the diagonal, its sum does not.
    float part[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      part[i] = arrays[i * DiagonalArrays::kStride + (base + lane + i) % 64];
    }
    const float sum =
        ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
    const int diagonal = 32 - 32 * step + lane;
    if (diagonal >= 0 && scope.chunk > 0) {
      job.spill[(scope.row * job.max_chunks + scope.chunk) * 64 + diagonal] = sum;
    } else {
      const int offset = scope.own.origin - scope.first_key + diagonal;
      if (offset >= 0 && offset < scope.own.kv_len) {
        job.offset_mass[scope.row * job.mass_stride + offset] = sum;
      }
    }
  }
};

template <class Traits>
__global__ void __launch_bounds__(32 * kMaxHeadsPerCta, 2)
    masses_kernel(const __grid_constant__ VerticalSlashJob job) {
  extern __shared__ __align__(128) unsigned char smem[];
  __shared__ SequenceScope own;
  const ChunkScope scope(job, own);
  if (__syncthreads_or(scope.active) == 0) return;
  auto* arrays = reinterpret_cast<DiagonalArrays*>(smem + Traits::kRingBytes);
  Masses masses(job, scope, arrays[threadIdx.x / 32]);
  stream_scores<Traits>(job, scope, smem, masses);
  if (scope.active) masses.finish(scope.steps);
}

template <class Traits>
Status launch_masses_as(const VerticalSlashJob& job, cudaStream_t stream) {
  const int64_t ctas = static_cast<int64_t>(job.units) * job.chunks * job.ctas_per_chunk;
  const size_t bytes = Traits::kRingBytes + job.heads_per_cta * sizeof(DiagonalArrays);
  masses_kernel<Traits>
      <<<static_cast<unsigned>(ctas), 32 * job.heads_per_cta, bytes, stream>>>(job);
  return cuda::launch_status();
}

template <int kHeadDim>
Status launch_masses(const VerticalSlashJob& job, cudaStream_t stream) {
  return job.in.dtype == DType::kFloat16
             ? launch_masses_as<StreamTraits<__half, kHeadDim>>(job, stream)
             : launch_masses_as<StreamTraits<__nv_bfloat16, kHeadDim>>(job, stream);
}

}  // namespace sparseattn::index_sm80
