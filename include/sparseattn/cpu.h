// The same operators on the CPU. Host memory, row-major, fp32 or bf16, memory O(tile).
#pragma once

#include <cstdint>
#include <functional>

#include "sparseattn/types.h"

namespace sparseattn::cpu {

/// Runs body(begin, end) over disjoint pieces of [0, n), possibly on several threads.
using ParallelFor =
    std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& body)>;

/// What one query head of one sequence attends to. Only the fields of its kind are read.
struct HeadIndex {
  PatternKind kind = PatternKind::kDense;
  int32_t sink = 0;                     // kAShape
  int32_t window = kNoWindow;           // kAShape
  const int32_t* columns = nullptr;     // kVerticalSlash: any order, duplicates and values out of
  const int32_t* offsets = nullptr;     //   range allowed (they select nothing)
  int32_t num_columns = 0;              //
  int32_t num_offsets = 0;              //
  const uint8_t* block_mask = nullptr;  // kBlockSparse: [q_blocks, kv_blocks], nonzero is selected
  int64_t mask_row_stride = 0;          //   bytes
  int64_t mask_stride = 1;              //   bytes
  int32_t block_q = 64;                 //
  int32_t block_kv = 64;                //
};

struct AttentionParams {
  Shape shape;
  DType dtype;  // fp32 or bf16, of q, k, v and out; sums are fp32
  View q;       // [batch, q_heads, q_len, head_dim]
  View k;       // [batch, kv_heads, kv_len, head_dim]
  View v;       // [batch, kv_heads, kv_len, head_dim]
  View out;     // [batch, q_heads, q_len, head_dim]
  float* lse;   // [batch, q_heads, q_len] contiguous, natural log; may be null
  float scale;
  const HeadIndex* heads;  // [batch, q_heads]
  Lengths lengths = {};
};
Status sparse_attention(const AttentionParams& params, const ParallelFor& parallel_for);

/// See sparseattn/estimate.h for the definition; the masses are fp32 sums in a fixed order.
struct VerticalSlashEstimate {
  Shape shape;
  DType dtype;
  View q;
  View k;
  float scale;
  int32_t last_q;
  int32_t sink;
  int32_t local;
  int32_t heads;               // query heads estimated, of each sequence
  const int32_t* head_ids;     // [heads] or null: 0, 1, 2, ...
  const int32_t* num_columns;  // [heads] or null: max_columns for all
  const int32_t* num_offsets;  // [heads] or null: max_offsets for all
  int32_t max_columns;
  int32_t max_offsets;
  int32_t* columns;  // out [batch, heads, max_columns] ascending, then -1
  int32_t* offsets;  // out [batch, heads, max_offsets] ascending, then -1
  Lengths lengths = {};
  int32_t share = 0;                // of all heads where `shares` is null; millionths, 0: none
  const int32_t* shares = nullptr;  // [heads]
};
Status estimate_vertical_slash(const VerticalSlashEstimate& params,
                               const ParallelFor& parallel_for);

struct BlockSparseEstimate {
  Shape shape;
  DType dtype;
  View q;
  View k;
  int32_t block;
  int32_t heads;
  const int32_t* head_ids;  // [heads] or null
  const int32_t* top_k;     // [heads] or null: max_top_k for all
  int32_t max_top_k;
  uint8_t* block_mask;  // out bool [batch, heads, q_blocks, kv_blocks] contiguous
  Lengths lengths = {};
  int32_t share = 0;                 // as in VerticalSlashEstimate
  const int32_t* shares = nullptr;   // [heads]
  int32_t stride = 0;                // of all heads where `strides` is null; 0: means
  const int32_t* strides = nullptr;  // [heads]: heads of another stride are left alone
};
Status estimate_block_sparse(const BlockSparseEstimate& params, const ParallelFor& parallel_for);

}  // namespace sparseattn::cpu
