// What the kernels of the block-sparse estimate share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparseattn/estimate.h"

namespace sparseattn::index_sm80 {

/// Antidiagonal scores are made panel by panel: kPanelBlocks query blocks of one slot of
/// [batch, heads]. A round is as many panels as the scratch memory holds.
constexpr int32_t kPanelBlocks = 128;

struct BlockSparseJob {
  BlockSparseEstimate in;
  int32_t q_blocks;
  int32_t kv_blocks;
  int32_t words;        // 32-bit words in a row of block_bits
  int64_t mean_stride;  // row length of k_means
  float* q_means;       // [batch, heads, q_blocks, head_dim]
  float* k_means;       // [batch, kv_heads, head_dim, mean_stride] transposed: a warp reads 32 keys
  // Antidiagonal scores (in.stride > 0) have these instead of q_means and k_means.
  int32_t slot_panels;  // panels of a slot
  int64_t all_panels;   // of all slots
  int64_t first_panel;  // of the round
  int32_t panels;       // of the round
  void* q_residues;     // [panels, kPanelBlocks, stride, head_dim] in.dtype: means of residues
  void* k_residues;     // [batch, kv_heads, kv_blocks, stride, head_dim] residue stride-1-r at r
  float* scores;        // [panels, kPanelBlocks, mean_stride]

  __host__ __device__ bool any_share() const { return in.shares != nullptr || in.share > 0; }
  /// Elements of a block's residues.
  __host__ __device__ int64_t depth() const {
    return static_cast<int64_t>(in.stride) * in.shape.head_dim;
  }
};

/// Fills q_means (of the heads asked for) and k_means.
Status launch_block_means(const BlockSparseJob& job, cudaStream_t stream);
/// Fills k_residues.
Status launch_key_residues(const BlockSparseJob& job, cudaStream_t stream);
/// Fills q_residues and scores of the round's panels.
Status launch_panel_scores(const BlockSparseJob& job, cudaStream_t stream);
/// Scores the means, or takes the round's scores, and writes block_bits and block_mask.
Status launch_select_blocks(const BlockSparseJob& job, cudaStream_t stream);

}  // namespace sparseattn::index_sm80
