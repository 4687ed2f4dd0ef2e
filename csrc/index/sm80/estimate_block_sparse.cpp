// Block-sparse estimate: means of blocks, then an exact selection in every row.
//
// Floor for 32 query and 8 key/value heads of 128 at length n (H200): queries and keys are read
// once, 10 KB a position (4.3 TB/s: 0.31 ms at 128K). The scores are fp32 sums, n^2 / 8192 of 128
// terms a head and causal (17 GFLOP at 128K: 0.3 ms).
//
// Antidiagonal scores of stride 16 have 16 times the terms (275 GFLOP at 128K): 0.7 ms on the
// tensor cores at 400 TFLOP/s, where fp32 sums would take 5 ms and more.
#include <algorithm>
#include <cstdint>

#include "common/cuda/launch.h"
#include "index/sm80/block_sparse_job.h"
#include "sparseattn/estimate.h"

namespace sparseattn {
namespace {

using index_sm80::BlockSparseJob;
using index_sm80::kPanelBlocks;

/// Scratch memory of the rounds of antidiagonal scores.
constexpr int64_t kRoundBytes = int64_t{96} << 20;

/// Lays out what antidiagonal scores take.
size_t lay_out_residues(BlockSparseJob& job, void* workspace) {
  constexpr int64_t kElement = 2;
  const Shape& shape = job.in.shape;
  job.slot_panels = static_cast<int32_t>(cuda::ceil_div(job.q_blocks, kPanelBlocks));
  job.all_panels = static_cast<int64_t>(shape.batch) * job.in.heads * job.slot_panels;
  // Multiples of 256, so all pieces are aligned.
  const int64_t panel_q_bytes = kPanelBlocks * job.depth() * kElement;
  const int64_t panel_score_bytes = kPanelBlocks * job.mean_stride * sizeof(float);
  const int64_t fits = std::max<int64_t>(1, kRoundBytes / (panel_q_bytes + panel_score_bytes));
  job.panels = static_cast<int32_t>(std::min(job.all_panels, fits));
  const int64_t k_bytes =
      static_cast<int64_t>(shape.batch) * shape.kv_heads * job.kv_blocks * job.depth() * kElement;
  if (workspace != nullptr) {
    auto* at = static_cast<unsigned char*>(workspace);
    job.scores = reinterpret_cast<float*>(at);
    job.q_residues = at + job.panels * panel_score_bytes;
    job.k_residues = at + job.panels * (panel_score_bytes + panel_q_bytes);
  }
  return job.panels * (panel_q_bytes + panel_score_bytes) + k_bytes;
}

/// Lays the means out in `workspace` and returns the bytes they take.
size_t lay_out(BlockSparseJob& job, void* workspace) {
  constexpr int64_t kAlignment = 256;
  const Shape& shape = job.in.shape;
  job.q_blocks = static_cast<int32_t>(cuda::ceil_div(shape.q_len, job.in.block));
  job.kv_blocks = static_cast<int32_t>(cuda::ceil_div(shape.kv_len, job.in.block));
  job.words = (job.kv_blocks + 31) / 32;
  job.mean_stride = 32 * static_cast<int64_t>(job.words);
  if (job.in.stride > 0) return lay_out_residues(job, workspace);
  const size_t q_floats =
      static_cast<size_t>(shape.batch) * job.in.heads * job.q_blocks * shape.head_dim;
  const size_t k_floats =
      static_cast<size_t>(shape.batch) * shape.kv_heads * shape.head_dim * job.mean_stride;
  const size_t q_bytes =
      cuda::ceil_div(static_cast<int64_t>(q_floats * sizeof(float)), kAlignment) * kAlignment;
  if (workspace != nullptr) {
    job.q_means = static_cast<float*>(workspace);
    job.k_means = job.q_means + q_bytes / sizeof(float);
  }
  return q_bytes + k_floats * sizeof(float);
}

Status check(const BlockSparseEstimate& params) {
  const Shape& shape = params.shape;
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    return {1, "estimate_block_sparse: dtype must be fp16 or bf16"};
  }
  if (params.block != 64 && params.block != 128) {
    return {1, "estimate_block_sparse: block must be 64 or 128"};
  }
  if (shape.head_dim % 8 != 0 || shape.head_dim < 8 || shape.head_dim > 128) {
    return {1, "estimate_block_sparse: head_dim must be a multiple of 8, at most 128"};
  }
  if (shape.q_len < 1 || shape.kv_len < shape.q_len) {
    return {1, "estimate_block_sparse: expected 1 <= q_len <= kv_len"};
  }
  const int32_t stride = params.stride;
  if (stride != 0 && stride != 4 && stride != 8 && stride != 16 && stride != 32) {
    return {1, "estimate_block_sparse: stride must be 0, 4, 8, 16 or 32"};
  }
  if (stride != 0 && shape.head_dim % 16 != 0) {
    return {1, "estimate_block_sparse: antidiagonal scores need a head_dim that 16 divides"};
  }
  if (params.share < 0 || params.share > kWholeShare) {
    return {1, "estimate_block_sparse: share must be in 0 .. 1000000 millionths"};
  }
  return {};
}

Status run_rounds(BlockSparseJob& job, cudaStream_t stream) {
  Status status = index_sm80::launch_key_residues(job, stream);
  const int32_t panels = job.panels;
  for (job.first_panel = 0; job.first_panel < job.all_panels && status.ok();
       job.first_panel += panels) {
    job.panels = static_cast<int32_t>(std::min<int64_t>(panels, job.all_panels - job.first_panel));
    status = index_sm80::launch_panel_scores(job, stream);
    if (status.ok()) status = index_sm80::launch_select_blocks(job, stream);
  }
  return status;
}

}  // namespace

size_t estimate_block_sparse_bytes(const BlockSparseEstimate& params) {
  BlockSparseJob job{};
  job.in = params;
  return lay_out(job, nullptr);
}

Status estimate_block_sparse(const BlockSparseEstimate& params, void* workspace,
                             cudaStream_t stream) {
  if (params.shape.batch == 0 || params.heads == 0) return {};
  Status status = check(params);
  if (!status.ok()) return status;
  BlockSparseJob job{};
  job.in = params;
  lay_out(job, workspace);
  if (params.stride > 0) return run_rounds(job, stream);
  status = index_sm80::launch_block_means(job, stream);
  if (!status.ok()) return status;
  return index_sm80::launch_select_blocks(job, stream);
}

}  // namespace sparseattn
