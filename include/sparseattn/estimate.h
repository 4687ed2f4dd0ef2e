// Estimation: which columns, offsets or blocks carry a prompt's attention mass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "sparseattn/plan.h"
#include "sparseattn/types.h"

namespace sparseattn {

/// Attention of the last `last_q` query rows over all keys, summed per column and per offset; the
/// largest masses are kept (MInference, arXiv 2407.02490, section 3.2). Columns [0, sink) and
/// offsets [0, local) rank before all others; equal masses rank by the smaller index.
///
/// A head with a share takes the numbers of columns and offsets as limits, and keeps only the
/// cheapest columns and runs of offsets that cover that share of the mass: see index/mass.h.
struct VerticalSlashEstimate {
  Shape shape;
  DType dtype;  // of q and k
  View q;       // [batch, q_heads, q_len, head_dim]
  View k;       // [batch, kv_heads, kv_len, head_dim]
  float scale;
  int32_t last_q;  // 1 .. 64, at most q_len rows are used
  int32_t sink;
  int32_t local;
  int32_t heads;               // query heads estimated, of each sequence
  const int32_t* head_ids;     // [heads] device, or null: 0, 1, 2, ...
  const int32_t* num_columns;  // [heads] device, or null: max_columns for all
  const int32_t* num_offsets;  // [heads] device, or null: max_offsets for all
  int32_t max_columns;
  int32_t max_offsets;
  int32_t* columns;      // out [batch, heads, max_columns] ascending, then -1 to the end of the row
  int32_t* offsets;      // out [batch, heads, max_offsets] ascending, then -1
  Lengths lengths = {};  // each sequence is estimated from its own last rows
  int32_t share = 0;     // of all heads where `shares` is null; millionths, 0: none
  const int32_t* shares = nullptr;  // [heads] device
};
size_t estimate_vertical_slash_bytes(const VerticalSlashEstimate& params);
Status estimate_vertical_slash(const VerticalSlashEstimate& params, void* workspace,
                               cudaStream_t stream);

/// Mean-pooled queries against mean-pooled keys, `top_k` blocks in each row. Only blocks that start
/// at or before the last position of the query block count. The block that holds the position of
/// the query block's first row ranks first, so that no row is left empty; equal scores rank by the
/// smaller index.
///
/// With a stride the scores are antidiagonal (XAttention, arXiv 2503.16428): blocks become vectors
/// of stride * head_dim, the means of their rows i % stride == r, and residue r of the queries
/// meets residue stride - 1 - r of the keys; the products are averaged over the residues that both
/// blocks have. The means are rounded to `dtype`, so that tensor cores multiply them.
///
/// With a share a row keeps the fewest of its top_k blocks whose weights, the softmax of the scores
/// times 1/sqrt(head_dim), reach it.
struct BlockSparseEstimate {
  Shape shape;
  DType dtype;
  View q;
  View k;
  int32_t block;  // 64 or 128, query and key blocks alike
  int32_t heads;
  const int32_t* head_ids;  // [heads] device, or null: 0, 1, 2, ...
  const int32_t* top_k;     // [heads] device, or null: max_top_k for all
  int32_t max_top_k;
  uint32_t* block_bits;  // out [batch, heads, q_blocks, block_words]
  uint8_t* block_mask;   // out bool [batch, heads, q_blocks, kv_blocks] contiguous, or null
  Lengths lengths = {};  // blocks past a sequence's end select nothing and are not selected
  int32_t share = 0;     // of all heads where `shares` is null; millionths, 0: none
  const int32_t* shares = nullptr;   // [heads] device
  int32_t stride = 0;                // 0: means; else 4, 8, 16 or 32
  const int32_t* strides = nullptr;  // [heads] device: heads of another stride are left alone
};
size_t estimate_block_sparse_bytes(const BlockSparseEstimate& params);
Status estimate_block_sparse(const BlockSparseEstimate& params, void* workspace,
                             cudaStream_t stream);

}  // namespace sparseattn
