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

/// Head dims that the kernels exist for.
constexpr int32_t kHeadDims[] = {64, 96, 128};

/// Portable kernel, sm_80 and newer: mma.sync and cp.async.
Status sparse_attention_sm80(const AttentionParams& params, cudaStream_t stream);

/// Hopper kernel, sm_90a: WGMMA and TMA. Rows must start on 16-byte boundaries. Two calls must not
/// use one plan at the same time: a launch counts its tiles in the plan's next_tile.
Status sparse_attention_sm90(const AttentionParams& params, cudaStream_t stream);

enum class AttentionPath : int32_t { kSm80 = 80, kSm90 = 90 };

/// The path that sparse_attention takes on devices of this compute capability.
AttentionPath attention_path(int major, int minor);

/// The fastest kernel of the current device.
Status sparse_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace sparseattn
