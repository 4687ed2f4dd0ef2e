// Vertical-slash estimate: two passes over the keys, then an exact selection.
//
// Floors for 32 query and 8 key/value heads of 128 at kv_len n (H200): each pass reads 2 KB of keys
// a position (4.3 TB/s: 0.06 ms at 128K, 0.5 ms at 1M) and does 0.52 MFLOP a position on the tensor
// cores by mma.sync (at 500 TFLOP/s: 0.14 ms at 128K, 1.1 ms at 1M).
#include <algorithm>

#include "common/cuda/launch.h"
#include "index/mass.h"
#include "index/sm80/vertical_slash_job.h"

namespace sparseattn {
namespace index_sm80 {
namespace {

constexpr size_t kAlignment = 256;
/// Masses of all heads at once would take 8 bytes for each head and key; heads are taken in rounds
/// whose masses fit here.
constexpr int64_t kMassBytes = int64_t{128} << 20;

int64_t align(int64_t value, int64_t to) { return cuda::ceil_div(value, to) * to; }

/// Fills in all that follows from the sizes; the pieces of the workspace are laid out from
/// `workspace` on. Returns the bytes they take.
size_t lay_out(VerticalSlashJob& job, void* workspace) {
  const Shape& shape = job.in.shape;
  const int64_t all_units = static_cast<int64_t>(shape.batch) * shape.kv_heads;
  job.mass_stride = align(shape.kv_len, 64);
  job.max_chunks = static_cast<int32_t>(
      std::min<int64_t>(kMaxChunks, cuda::ceil_div(shape.kv_len, kMinChunkKeys)));
  const int64_t unit_bytes = 2 * sizeof(float) * job.mass_stride * shape.group();
  const int64_t units = std::max<int64_t>(1, kMassBytes / unit_bytes);
  job.units = static_cast<int32_t>(std::min(units, all_units));

  size_t used = 0;
  const auto take = [&](size_t bytes) {
    void* piece = workspace == nullptr ? nullptr : static_cast<unsigned char*>(workspace) + used;
    used += align(bytes, kAlignment);
    return piece;
  };
  const size_t rows = job.rows();
  const size_t chunk_entries = rows * job.max_chunks * 64;
  job.column_mass = static_cast<float*>(take(rows * job.mass_stride * sizeof(float)));
  job.offset_mass = static_cast<float*>(take(rows * job.mass_stride * sizeof(float)));
  job.spill = static_cast<float*>(take(chunk_entries * sizeof(float)));
  job.partial = static_cast<float2*>(take(chunk_entries * sizeof(float2)));
  job.normalizer = static_cast<float*>(take(rows * 64 * sizeof(float)));
  if (shape.kv_len >= kLongList) {
    job.pieces = static_cast<int32_t>(
        std::min<int64_t>(cuda::ceil_div(shape.kv_len, kPieceKeys), kMostPieces));
    job.histogram = static_cast<int32_t*>(take(2 * rows * kFirstBins * sizeof(int32_t)));
    job.piece_count = static_cast<int32_t*>(take(2 * rows * job.pieces * sizeof(int32_t)));
    job.candidates = static_cast<int32_t*>(take(2 * rows * kMostCandidates * sizeof(int32_t)));
  }
  job.runs = static_cast<int32_t>(cuda::ceil_div(shape.kv_len, index::kRunOffsets));
  if (job.any_share()) {
    const size_t entries = rows * job.runs;
    job.run_mass = static_cast<float*>(take(entries * sizeof(float)));
    job.column_sum = static_cast<uint64_t*>(take(entries * sizeof(uint64_t)));
    job.run_list = static_cast<int32_t*>(take(entries * sizeof(int32_t)));
  }
  return used;
}

/// Cuts the keys into chunks, so that the CTAs of a launch fill the multiprocessors in whole waves.
Status choose_chunks(VerticalSlashJob& job) {
  int device = 0, multiprocessors = 0;
  Status status = cuda::to_status(cudaGetDevice(&device));
  if (!status.ok()) return status;
  status = cuda::to_status(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (!status.ok()) return status;

  const int group = job.in.shape.group();
  job.heads_per_cta = group == 1 ? 1 : group == 2 ? 2 : kMaxHeadsPerCta;
  job.ctas_per_chunk = static_cast<int32_t>(cuda::ceil_div(group, job.heads_per_cta));
  const int64_t warps_per_multiprocessor = 8;
  const int64_t slots = std::max(1, multiprocessors) * warps_per_multiprocessor / job.heads_per_cta;
  const int64_t ctas_per_round = static_cast<int64_t>(job.units) * job.ctas_per_chunk;
  int64_t best_chunks = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t chunks = std::max<int64_t>(1, slots * waves / ctas_per_round);
    const int64_t ctas = chunks * ctas_per_round;
    const double use = static_cast<double>(ctas) / (align(ctas, slots));
    if (use > best_use + 0.05) {
      best_use = use;
      best_chunks = chunks;
    }
  }
  const int64_t kv_len = job.in.shape.kv_len;
  const int64_t chunks = std::min<int64_t>(best_chunks, job.max_chunks);
  const int64_t keys = align(cuda::ceil_div(kv_len, chunks), kStepKeys);
  job.chunk_keys = static_cast<int32_t>(std::max<int64_t>(keys, kMinChunkKeys));
  job.chunks = static_cast<int32_t>(cuda::ceil_div(kv_len, job.chunk_keys));
  return {};
}

template <int kHeadDim>
Status run_round(const VerticalSlashJob& job, cudaStream_t stream) {
  Status status = launch_row_sums<kHeadDim>(job, stream);
  if (status.ok()) status = launch_normalizers(job, stream);
  if (status.ok()) status = launch_masses<kHeadDim>(job, stream);
  if (status.ok()) status = launch_select_indices(job, stream);
  if (status.ok() && job.any_share()) status = launch_select_share(job, stream);
  return status;
}

Status check(const VerticalSlashEstimate& params) {
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    return {1, "estimate_vertical_slash: dtype must be fp16 or bf16"};
  }
  if (params.last_q < 1 || params.last_q > kTileRows) {
    return {1, "estimate_vertical_slash: last_q must be in 1 .. 64"};
  }
  const Shape& shape = params.shape;
  if (shape.head_dim != 64 && shape.head_dim != 96 && shape.head_dim != 128) {
    return {1, "estimate_vertical_slash: head_dim must be 64, 96 or 128"};
  }
  if (shape.q_len < 1 || shape.kv_len < shape.q_len) {
    return {1, "estimate_vertical_slash: expected 1 <= q_len <= kv_len"};
  }
  if (params.heads > shape.q_heads) {
    return {1, "estimate_vertical_slash: heads exceeds the query heads"};
  }
  if (params.share < 0 || params.share > kWholeShare) {
    return {1, "estimate_vertical_slash: share must be in 0 .. 1000000 millionths"};
  }
  const int64_t entries = static_cast<int64_t>(shape.batch) * shape.q_heads;
  static_assert(kMostPieces <= kMaxChunks);
  if (!cuda::grid_fits(entries * 2 * kMaxChunks)) {
    return {1, "estimate_vertical_slash: batch times q_heads is too large"};
  }
  return {};
}

}  // namespace
}  // namespace index_sm80

size_t estimate_vertical_slash_bytes(const VerticalSlashEstimate& params) {
  index_sm80::VerticalSlashJob job{};
  job.in = params;
  return index_sm80::lay_out(job, nullptr);
}

Status estimate_vertical_slash(const VerticalSlashEstimate& params, void* workspace,
                               cudaStream_t stream) {
  using namespace index_sm80;
  const Shape& shape = params.shape;
  if (shape.batch == 0 || params.heads == 0) return {};
  Status status = check(params);
  if (!status.ok()) return status;
  VerticalSlashJob job{};
  job.in = params;
  job.scale_log2 = params.scale * 1.4426950408889634f;
  lay_out(job, workspace);
  const int32_t units_per_round = job.units;
  const int32_t all_units = shape.batch * shape.kv_heads;
  for (int32_t first = 0; first < all_units && status.ok(); first += units_per_round) {
    job.first_unit = first;
    job.units = std::min(units_per_round, all_units - first);
    status = choose_chunks(job);
    if (!status.ok()) break;
    switch (shape.head_dim) {
      case 64:
        status = run_round<64>(job, stream);
        break;
      case 96:
        status = run_round<96>(job, stream);
        break;
      default:
        status = run_round<128>(job, stream);
    }
  }
  return status;
}

}  // namespace sparseattn
