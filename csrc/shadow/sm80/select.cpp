// Selection of chunks: scores with partial sums, ranks, choice. Three launches where the scores of
// all rows fit the scratch memory, as they do in decoding; two more for each further round of rows.
//
// Scores are stored rather than computed twice: 4 bytes for each row and chunk, where a landmark
// has 2 * head_dim.
#include <algorithm>
#include <cstdint>

#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "shadow/sm80/select_job.h"

namespace sparseattn {
namespace {

using shadow_sm80::SelectJob;

/// Scratch memory of a round of scores.
constexpr int64_t kRoundBytes = int64_t{128} << 20;
/// CTAs that keep enough loads in flight.
constexpr int64_t kScoreCtas = 512;
constexpr int64_t kAlignment = 256;

int64_t aligned(int64_t bytes) { return cuda::ceil_div(bytes, kAlignment) * kAlignment; }

/// Lays out `workspace` and returns the bytes it takes.
size_t lay_out(SelectJob& job, void* workspace) {
  const ShadowSelect& in = job.in;
  job.group = in.q_heads / in.kv_heads;
  job.rows = in.q_len * job.group;
  job.tile_rows = job.rows <= 8 ? 8 : job.rows <= 16 ? 16 : 32;
  job.stride = cuda::ceil_div(in.chunks, 64) * 64;
  const int64_t row_bytes = std::max<int64_t>(1, job.heads() * job.stride * sizeof(float));
  const int64_t fits =
      std::max<int64_t>(1, kRoundBytes / row_bytes / job.tile_rows) * job.tile_rows;
  job.most_rows = static_cast<int32_t>(std::min<int64_t>(job.rows, fits));
  const int64_t row_tiles = cuda::ceil_div(job.most_rows, job.tile_rows);
  const int64_t share = cuda::ceil_div(job.heads() * row_tiles * in.chunks, kScoreCtas);
  job.split_chunks = static_cast<int32_t>(std::min(
      std::max<int64_t>(cuda::ceil_div(share, 64) * 64, 128), std::max<int64_t>(job.stride, 64)));
  job.splits = static_cast<int32_t>(cuda::ceil_div(in.chunks, job.split_chunks));

  const int64_t score_bytes = aligned(job.most_rows * row_bytes);
  const int64_t partial_bytes =
      aligned(job.heads() * job.most_rows * job.splits * static_cast<int64_t>(sizeof(float2)));
  if (workspace != nullptr) {
    auto* at = static_cast<unsigned char*>(workspace);
    job.scores = reinterpret_cast<float*>(at);
    job.partial = reinterpret_cast<float2*>(at + score_bytes);
    job.keys = reinterpret_cast<uint32_t*>(at + score_bytes + partial_bytes);
  }
  return score_bytes + partial_bytes + aligned(row_bytes);
}

Status check(const ShadowSelect& in) {
  if (!shadow_sm80::is_half(in.dtype)) return {1, "shadow_select: dtype: expected fp16 or bf16"};
  if (!shadow_sm80::is_head_dim(in.head_dim)) {
    return {1, "shadow_select: head_dim: expected 64, 96 or 128"};
  }
  if (in.batch < 0 || in.q_heads < 1 || in.kv_heads < 1 || in.q_heads % in.kv_heads != 0) {
    return {1, "shadow_select: heads: expected q_heads a positive multiple of kv_heads"};
  }
  if (in.q_len < 1 || in.chunks < 0 || in.top_k < 0) {
    return {1, "shadow_select: sizes: expected q_len >= 1, chunks >= 0 and top_k >= 0"};
  }
  if (int64_t{in.q_len} * (in.q_heads / in.kv_heads) > INT32_MAX / 2) {
    return {1, "shadow_select: q: expected less than 2^30 rows of a key/value head"};
  }
  if (!shadow_sm80::is_aligned(in.q, in.batch, in.q_heads, in.q_len) ||
      !shadow_sm80::is_aligned(in.landmarks, in.batch, in.kv_heads, in.chunks)) {
    return {1, "shadow_select: q, landmarks: expected rows that start on 16-byte boundaries"};
  }
  return {};
}

}  // namespace

size_t shadow_select_bytes(const ShadowSelect& params) {
  SelectJob job{};
  job.in = params;
  return check(params).ok() ? lay_out(job, nullptr) : 0;
}

Status shadow_select(const ShadowSelect& params, void* workspace, cudaStream_t stream) {
  Status status = check(params);
  if (!status.ok()) return status;
  SelectJob job{};
  job.in = params;
  lay_out(job, workspace);
  if (job.heads() == 0 || params.top_k == 0) return {};
  if (!cuda::grid_fits(job.heads())) {
    return {1, "shadow_select: more heads than a grid can hold"};
  }
  const int32_t rows = params.chunks > 0 ? job.rows : 0;
  for (; status.ok() && job.first_row < rows; job.first_row += job.most_rows) {
    job.round_rows = std::min(job.most_rows, rows - job.first_row);
    status = shadow_sm80::launch_scores(job, stream);
    if (status.ok()) status = shadow_sm80::launch_ranks(job, stream);
  }
  return status.ok() ? shadow_sm80::launch_choose(job, stream) : status;
}

}  // namespace sparseattn
