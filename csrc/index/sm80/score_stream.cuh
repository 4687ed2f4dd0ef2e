// Scores of up to 64 query rows against a chunk of keys, on the tensor cores, tile by tile.
//
// A CTA streams one chunk through a ring of stages of 32 keys. Each of its warps works for one
// query head of the same key/value head and holds all its query rows in registers, so a key is
// loaded once for all heads. Keys are the rows of a tile (16), query rows its columns (64): thread
// (g, t) = (lane / 4, lane % 4) holds keys g and g + 8, query rows 8 n + 2 t and 8 n + 2 t + 1.
//
// Ring. At the barrier of step n every thread has waited for its own copies of step n and has
// finished computing step n - 1, so step n may be read and the stage of step n - 1 may be filled.
#pragma once

#include <cstdint>

#include "common/cuda/ptx.cuh"
#include "index/sm80/head_list.cuh"
#include "index/sm80/vertical_slash_job.h"

namespace sparseattn::index_sm80 {

template <class Element_, int kHeadDim_>
struct StreamTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kDepth = kHeadDim / 16;  // mma steps along head_dim
  static constexpr int kPieces = kHeadDim / 8;  // 16-byte pieces of a row
  static constexpr int kStages = 3;
  static constexpr int kRowBytes = 2 * kHeadDim;
  static constexpr int kStageBytes = kStepKeys * kRowBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;

  /// Pieces of a row are permuted within groups of kGroup, by an exclusive or with swizzle(row), so
  /// that ldmatrix reads eight neighbouring rows without a bank conflict.
  static constexpr int kGroup = kHeadDim % 64 == 0 ? 8 : 4;
  static __device__ __forceinline__ int swizzle(int row) {
    return kGroup == 8 ? row % 8 : row / 2 % 4;
  }
  /// From where pieces 0 and 1 of a row lie (in bytes) to where pieces 2 d and 2 d + 1 do.
  static __device__ __forceinline__ int advance(int at, int d) {
    return (at ^ (32 * (d % (kGroup / 2)))) + 16 * kGroup * (d / (kGroup / 2));
  }
};

/// What a CTA works on; `head` differs between its warps.
struct ChunkScope {
  const SequenceScope& own;  // in shared memory: the streams have no registers for it
  int64_t sequence;
  int32_t kv_head;
  int32_t head;
  int32_t chunk;
  int32_t first_key;
  int32_t steps;
  int64_t row;  // of the intermediates
  bool active;  // the chunk has keys, the warp's head exists and was asked for; warp-uniform

  /// All threads of the CTA call; `shared` receives the scope of the CTA's sequence.
  __device__ ChunkScope(const VerticalSlashJob& job, SequenceScope& shared) : own(shared) {
    const Shape& shape = job.in.shape;
    const int group = shape.q_heads / shape.kv_heads;
    const int cta = blockIdx.x;
    const int member = cta % job.ctas_per_chunk * job.heads_per_cta + threadIdx.x / 32;
    chunk = cta / job.ctas_per_chunk % job.chunks;
    const int local_unit = cta / job.ctas_per_chunk / job.chunks;
    const int unit = job.first_unit + local_unit;
    sequence = unit / shape.kv_heads;
    kv_head = unit % shape.kv_heads;
    head = kv_head * group + member;
    first_key = chunk * job.chunk_keys;
    if (threadIdx.x == 0) shared = sequence_scope(job, sequence);
    __syncthreads();
    const int keys = min(job.chunk_keys, own.kv_len - first_key);
    steps = (keys + kStepKeys - 1) / kStepKeys;
    row = static_cast<int64_t>(local_unit) * group + member;
    active = keys > 0 && member < group && is_listed(job.in.head_ids, job.in.heads, head);
  }
};

/// Query rows as the second operand of the mma: [depth, row tile, register]. Rows past query_rows
/// are zero.
template <class Traits>
__device__ __forceinline__ void load_queries(const VerticalSlashJob& job, const ChunkScope& scope,
                                             uint32_t (&queries)[Traits::kDepth][8][2]) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const View& q = job.in.q;
  const Element* base = static_cast<const Element*>(q.data) + scope.sequence * q.batch_stride +
                        scope.head * q.head_stride + scope.own.first_query * q.row_stride + 2 * t;
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const int row = 8 * n + g;
    const bool valid = scope.active && row < scope.own.query_rows;
    const Element* from = base + row * q.row_stride;
#pragma unroll
    for (int d = 0; d < Traits::kDepth; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        queries[d][n][i] = valid ? *reinterpret_cast<const uint32_t*>(from + 16 * d + 8 * i) : 0;
      }
    }
  }
}

/// Keys [first, first + 32) of the key/value head to a stage; keys at kv_len and beyond are zero.
template <class Traits>
__device__ __forceinline__ void load_keys(const VerticalSlashJob& job, const ChunkScope& scope,
                                          const typename Traits::Element* keys, int first,
                                          unsigned char* stage) {
  const int kv_len = scope.own.kv_len;
#pragma unroll 1
  for (int piece = threadIdx.x; piece < kStepKeys * Traits::kPieces; piece += blockDim.x) {
    const int row = piece / Traits::kPieces, column = piece % Traits::kPieces;
    const bool valid = first + row < kv_len;
    const auto* from = keys + (valid ? first + row : 0) * job.in.k.row_stride + 8 * column;
    cuda::cp_async_16(stage + row * Traits::kRowBytes + 16 * (column ^ Traits::swizzle(row)), from,
                      valid);
  }
}

/// Calls consumer.tile(half, scores, key) with the unscaled scores of keys key .. key + 15, for
/// both halves of every step, then consumer.end_step(step). `scores[n][2 h + c]` is key g + 8 h,
/// query row 8 n + 2 t + c; the consumer may overwrite them.
template <class Traits, class Consumer>
__device__ __forceinline__ void stream_scores(const VerticalSlashJob& job, const ChunkScope& scope,
                                              unsigned char* ring, Consumer& consumer) {
  using Element = typename Traits::Element;
  const View& k = job.in.k;
  const Element* keys = static_cast<const Element*>(k.data) + scope.sequence * k.batch_stride +
                        scope.kv_head * k.head_stride;
#pragma unroll
  for (int step = 0; step < Traits::kStages - 1; ++step) {
    if (step < scope.steps) {
      load_keys<Traits>(job, scope, keys, scope.first_key + step * kStepKeys,
                        ring + step * Traits::kStageBytes);
    }
    cuda::cp_async_commit();
  }
  uint32_t queries[Traits::kDepth][8][2];
  load_queries<Traits>(job, scope, queries);

  const int lane = threadIdx.x % 32;
  const int lane_offset =
      lane % 16 * Traits::kRowBytes + 16 * (lane / 16 ^ Traits::swizzle(lane % 16));
  int stage = 0, free_stage = Traits::kStages - 1;
  for (int step = 0; step < scope.steps; ++step) {
    cuda::cp_async_wait<Traits::kStages - 2>();
    __syncthreads();
    const int ahead = step + Traits::kStages - 1;
    if (ahead < scope.steps) {
      load_keys<Traits>(job, scope, keys, scope.first_key + ahead * kStepKeys,
                        ring + free_stage * Traits::kStageBytes);
    }
    cuda::cp_async_commit();

    if (scope.active) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int tile = (2 * stage + half) * 16 * Traits::kRowBytes + lane_offset;
        float scores[8][4] = {};
#pragma unroll
        for (int d = 0; d < Traits::kDepth; ++d) {
          uint32_t fragment[4];
          cuda::ldmatrix_x4(fragment, ring + Traits::advance(tile, d));
#pragma unroll
          for (int n = 0; n < 8; ++n) {
            cuda::mma_16x8x16<Element>(scores[n], fragment, queries[d][n]);
          }
        }
        consumer.tile(half, scores, scope.first_key + step * kStepKeys + 16 * half);
      }
      consumer.end_step(step);
    }
    stage = stage + 1 == Traits::kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == Traits::kStages ? 0 : free_stage + 1;
  }
}

}  // namespace sparseattn::index_sm80
