// Keys from their low-rank factor, 16 at a time by one warp, as MMA accumulators.
//
// The basis of the head lies in shared memory and serves all warps; where only pieces of it fit,
// the warps of a CTA take them in step. Sums run over the rank in the same order either way, so the
// keys do not depend on the device's shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <climits>
#include <cstdint>
#include <type_traits>

#include "common/cuda/ptx.cuh"
#include "shadow/sm80/e4m3.cuh"
#include "shadow/sm80/launch.h"
#include "shadow/sm80/layout.h"
#include "shadow/sm80/rope.cuh"
#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

constexpr int kNever = INT_MAX;

template <class Element>
__device__ __forceinline__ Element* head_rows(const View& view, int64_t sequence, int64_t head) {
  return static_cast<Element*>(view.data) + sequence * view.batch_stride + head * view.head_stride;
}

/// Two floats as neighbouring elements, the first one in the lower half.
template <class Element>
__device__ __forceinline__ uint32_t round_pair(float first, float second) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

/// One of a warp's 16 keys; lane i knows key i % 16.
struct KeyRef {
  int32_t source;  // row of the factor, or of the exact keys
  int32_t value;   // row of the values
  int32_t first;   // query row of the group that sees it first; kNever: there is no such key

  __device__ bool exists() const { return first != kNever; }
  static __device__ KeyRef none() { return {0, 0, kNever}; }
};

/// Token `within` of chunk `id`, if all of the chunk's tokens have a factor.
__device__ __forceinline__ KeyRef token_of(const LowRankKeys& keys, int32_t id, int32_t within) {
  if (id < 0 || (int64_t{id} + 1) * keys.chunk > keys.rows) return KeyRef::none();
  return {id * keys.chunk + within, 0, 0};
}

/// Starts copies of a warp's 16 rows of `pieces` * 16 bytes: row i is that of the lanes i % 16
/// with `row` and `exists`; others become zeros. Four lanes copy a row, 64 bytes at a time.
template <class Element>
__device__ __forceinline__ void copy_rows(Element* to, int to_row, const Element* from,
                                          int64_t from_row, int pieces, int32_t row, bool exists) {
  constexpr int kPiece = 16 / sizeof(Element);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int key = lane / 4 + 8 * i;
    const int64_t source_row = __shfl_sync(~0u, row, key);
    const bool valid = __shfl_sync(~0u, static_cast<int>(exists), key) != 0;
    const Element* source = from + source_row * from_row;
    Element* target = to + key * to_row;
    for (int piece = lane % 4; piece < pieces; piece += 4) {
      cuda::cp_async_16(target + kPiece * piece, source + kPiece * piece, valid);
    }
  }
}

/// What the rebuilding of one head's keys needs. All threads of the CTA make it.
template <int kHeadDim, class Element, class Factor>
struct Rebuilder {
  static constexpr int kRow = kHeadDim + kRowPad;
  static constexpr bool kQuantised = std::is_same_v<Factor, E4m3>;

  const LowRankKeys& keys;
  const Layout& layout;
  const Element* basis_rows;  // global, [rank] rows
  Element* basis;             // shared, [piece][kRow]
  float* mean;
  float* inv_freq;
  Columns columns;

  __device__ Rebuilder(const LowRankKeys& low_rank, const Layout& sizes, unsigned char* shared,
                       int64_t sequence, int64_t head)
      : keys(low_rank),
        layout(sizes),
        basis_rows(head_rows<Element>(low_rank.basis, sequence, head)),
        basis(reinterpret_cast<Element*>(shared + sizes.basis())),
        mean(reinterpret_cast<float*>(shared)),
        inv_freq(reinterpret_cast<float*>(shared + sizes.inv_freq())),
        columns(low_rank.rope) {}

  /// Starts copying the first piece of the basis.
  __device__ __forceinline__ void start() const { load_basis(0); }

  /// Copies the small vectors. They and the basis are there after this thread's copies are waited
  /// for and a barrier.
  __device__ __forceinline__ void load_vectors(int64_t item) const {
    const int half = keys.rope.rotary_dim / 2;
    for (int i = threadIdx.x; i < kHeadDim; i += blockDim.x) {
      const int dim = layout.scattered ? scattered_dim(i, half) : i;
      mean[i] = keys.mean == nullptr ? 0.0f : keys.mean[item * kHeadDim + dim];
    }
    for (int i = threadIdx.x; i < kHeadDim / 2; i += blockDim.x) {
      inv_freq[i] = i < half ? keys.rope.inv_freq[i] : 0.0f;
    }
  }

  /// The scale of this lane's key; 0 where there is none, and where nothing is quantised.
  __device__ __forceinline__ float scale_of(int64_t sequence, const KeyRef& key) const {
    if constexpr (!kQuantised) return 0.0f;
    return key.exists() ? keys.factor_scales.of_head(sequence, 0)[key.source] : 0.0f;
  }

  /// acc = the keys of the warp's 16 rows in `source`, before they are rounded. Where the basis is
  /// streamed all warps of the CTA call this together, and those without keys pass live = false.
  __device__ __forceinline__ void operator()(float (&acc)[kHeadDim / 8][4], const Factor* source,
                                             const KeyRef& key, float scale, bool live) const {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.0f;
    for (int from = 0; from < keys.rank; from += layout.piece) {
      if (layout.streams()) {
        __syncthreads();  // all are done with the last piece
        load_basis(from);
        cuda::cp_async_commit();
        cuda::cp_async_wait<0>();
        __syncthreads();
      }
      if (live) multiply(acc, source + from, min(layout.piece, keys.rank - from));
    }
    if (!live) return;
    const int lane = threadIdx.x % 32;
    if constexpr (kQuantised) {
      const float low_scale = __shfl_sync(~0u, scale, lane / 4);
      const float high_scale = __shfl_sync(~0u, scale, lane / 4 + 8);
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        acc[i][0] = __fmul_rn(acc[i][0], low_scale), acc[i][1] = __fmul_rn(acc[i][1], low_scale);
        acc[i][2] = __fmul_rn(acc[i][2], high_scale), acc[i][3] = __fmul_rn(acc[i][3], high_scale);
      }
    }
    const int32_t low = __shfl_sync(~0u, key.source, lane / 4);
    const int32_t high = __shfl_sync(~0u, key.source, lane / 4 + 8);
    finish_keys<kHeadDim>(acc, columns, keys.rope, mean, inv_freq, static_cast<float>(low),
                          static_cast<float>(high));
  }

 private:
  __device__ void load_basis(int from) const {
    constexpr int kPieces = kHeadDim / 8;
    const int ranks = min(layout.piece, keys.rank - from);
    const int half = keys.rope.rotary_dim / 2;
    const int64_t stride = keys.basis.row_stride;
    if (layout.scattered) {
      for (int i = threadIdx.x; i < ranks * kHeadDim; i += blockDim.x) {
        const int row = i / kHeadDim, column = i % kHeadDim;
        basis[row * kRow + column] =
            basis_rows[(from + row) * stride + scattered_dim(column, half)];
      }
      return;
    }
    for (int i = threadIdx.x; i < ranks * kPieces; i += blockDim.x) {
      const int row = i / kPieces, column = i % kPieces * 8;
      cuda::cp_async_16(basis + row * kRow + column, basis_rows + (from + row) * stride + column,
                        true);
    }
  }

  /// The rank that place `place` of 16 in a step of the contraction takes. Quantised rows are read
  /// four ranks, 4 q .. 4 q + 3, a lane: two go to places 2 q and 2 q + 1, two to those 8 on, and
  /// which is which is chosen so that eight rows of the basis still lie in different banks.
  __device__ static int rank_at(int place) {
    if constexpr (!kQuantised) return place;
    const int quad = place % 8 / 2;
    return 4 * quad + 2 * (place / 8 ^ quad / 2) + place % 2;
  }

  /// The A operand of one step: 16 rows of 16 ranks.
  __device__ __forceinline__ void load_factor(uint32_t (&left)[4], const Factor* source,
                                              int rank) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kQuantised) {
      const int row_bytes = 2 * layout.source_row();
      const auto* row = reinterpret_cast<const unsigned char*>(source) + lane / 4 * row_bytes +
                        lane % 4 * 4 + rank;
      const uint32_t order = lane % 4 < 2 ? 0x3210 : 0x1032;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t word =
            __byte_perm(*reinterpret_cast<const uint32_t*>(row + 8 * i * row_bytes), 0, order);
        left[i] = widen_e4m3<Element>(word & 0xffff);
        left[2 + i] = widen_e4m3<Element>(word >> 16);
      }
    } else {
      cuda::ldmatrix_x4(left, source + lane % 16 * layout.source_row() + 8 * (lane / 16) + rank);
    }
  }

  /// acc += 16 rows x `ranks` of the source times the piece of the basis.
  __device__ __forceinline__ void multiply(float (&acc)[kHeadDim / 8][4], const Factor* source,
                                           int ranks) const {
    const int lane = threadIdx.x % 32, group = lane / 16;
    const Element* right_row = basis + rank_at(lane % 16) * kRow;
    int column[kHeadDim / 16];
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) column[i] = columns(i, group);
    for (int rank = 0; rank < ranks; rank += 16) {
      uint32_t left[4], right[kHeadDim / 16][4];
      load_factor(left, source, rank);
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        cuda::ldmatrix_x4_trans(right[i], right_row + column[i]);
      }
#pragma unroll
      for (int i = 0; i < kHeadDim / 16; ++i) {
        const uint32_t first[2] = {right[i][0], right[i][1]};
        const uint32_t second[2] = {right[i][2], right[i][3]};
        cuda::mma_16x8x16<Element>(acc[2 * i], left, first);
        cuda::mma_16x8x16<Element>(acc[2 * i + 1], left, second);
      }
      right_row += 16 * kRow;
    }
  }
};

}  // namespace sparseattn::shadow_sm80
