// What the kernels of the block-sparse estimate share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparseattn/estimate.h"

namespace sparseattn::index_sm80 {

struct BlockSparseJob {
  BlockSparseEstimate in;
  int32_t q_blocks;
  int32_t kv_blocks;
  int32_t words;        // 32-bit words in a row of block_bits
  int64_t mean_stride;  // row length of k_means
  float* q_means;       // [batch, heads, q_blocks, head_dim]
  float* k_means;       // [batch, kv_heads, head_dim, mean_stride] transposed: a warp reads 32 keys
};

/// Fills q_means (of the heads asked for) and k_means.
Status launch_block_means(const BlockSparseJob& job, cudaStream_t stream);
/// Scores the means and writes block_bits and block_mask.
Status launch_select_blocks(const BlockSparseJob& job, cudaStream_t stream);

}  // namespace sparseattn::index_sm80
