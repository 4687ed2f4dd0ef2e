// Sparse prefill attention over a plan: every pattern and every head in one launch.
#pragma once

#include <cuda_runtime_api.h>

#include "sparseattn/plan.h"
#include "sparseattn/types.h"

namespace sparseattn {

struct AttentionParams {
  Shape shape;
  DType dtype;  // fp16 or bf16, of q, k, v and out
  View q;       // [batch, q_heads, q_len, head_dim]
  View k;       // [batch, kv_heads, kv_len, head_dim]
  View v;       // [batch, kv_heads, kv_len, head_dim]
  View out;     // [batch, q_heads, q_len, head_dim]
  float* lse;   // [batch, q_heads, q_len] contiguous, natural log; may be null
  float scale;
  Plan plan;  // of the same shape; its sizes hold the lengths of the sequences
};

/// Head dims that sparse_attention_sm80 has a kernel for.
constexpr int32_t kHeadDims[] = {64, 96, 128};

/// Portable kernel, sm_80 and newer: mma.sync and cp.async.
Status sparse_attention_sm80(const AttentionParams& params, cudaStream_t stream);

}  // namespace sparseattn
