// Tensor maps of the copy engine, and copies by them.
#pragma once

#include <cuda.h>

#include "attention/sm90/box.h"
#include "common/cuda/ptx_sm90.cuh"
#include "sparseattn/attention.h"

namespace sparseattn::sm90 {

/// A [batch, heads, rows, head_dim] tensor whose copies are 64 rows of a swizzled piece of the
/// columns. A dimension with stride 0 has one entry in the map.
struct RowMap {
  CUtensorMap map;
  int32_t head_step;   // 0 or 1: coordinate of head h is h * head_step
  int32_t batch_step;  // likewise
};

struct TensorMaps {
  RowMap q, k, v, packed_k, packed_v;
};

/// Fills `maps` for a call; `atom_cols` columns a piece. Host.
Status make_tensor_maps(const AttentionParams& params, int atom_cols, TensorMaps& maps);

/// 64 rows from `row` on, of one piece of columns.
__device__ __forceinline__ void load_piece(void* to, const RowMap& source, cuda::MBarrier* barrier,
                                           cuda::L2Policy policy, int row, int piece, int head,
                                           int sequence) {
  cuda::load_box(to, &source.map, barrier, policy, 0, row, piece, head, sequence);
}

/// Rows [row, row + count) by ordinary loads into half a stage, zeros for the rest of the 64 and
/// before row 0; a warp. `source` is row 0.
template <class Traits>
__device__ __forceinline__ void copy_rows(typename Traits::Element* to,
                                          const typename Traits::Element* source,
                                          int64_t row_stride, int row, int count, int lane) {
  constexpr int kPieces = Traits::kHeadDim / 8;  // 16 bytes each
  constexpr int kAtomPieces = Traits::kAtomCols / 8;
#pragma unroll 1
  for (int i = lane; i < kBoxRows * kPieces; i += 32) {
    const int r = i / kPieces, piece = i % kPieces;
    const int atom = piece / kAtomPieces, inner = piece % kAtomPieces;
    uint4 data = make_uint4(0, 0, 0, 0);
    if (r < count && row + r >= 0) {
      data = *reinterpret_cast<const uint4*>(source + (row + r) * row_stride + 8 * piece);
    }
    *reinterpret_cast<uint4*>(to + (atom * kStageRows + r) * Traits::kAtomCols +
                              8 * (inner ^ Traits::swizzle(r))) = data;
  }
  cuda::fence_async_shared();
  __syncwarp();
}

}  // namespace sparseattn::sm90
