// The small kernels of the vertical-slash estimate: row normalizers between its passes, and the
// selection of columns and offsets from their masses.
#include "common/cuda/launch.h"
#include "index/sm80/head_list.cuh"
#include "index/sm80/select.cuh"
#include "index/sm80/vertical_slash_job.h"

namespace sparseattn::index_sm80 {
namespace {

constexpr int kParts = 8;  // threads that share a query row's chunks
constexpr int kNormalizerThreads = 64 * kParts;
constexpr int kDigitBits = 11;
using SelectTeam = cuda::Team<32>;

__device__ __forceinline__ float2 add_partials(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  return make_float2(top, a.y * cuda::exp2_approx(a.x - top) + b.y * cuda::exp2_approx(b.x - top));
}

}  // namespace

/// A CTA for each row of the intermediates.
__global__ void __launch_bounds__(kNormalizerThreads)
    normalizers_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ float2 parts[kParts][64];
  const Shape& shape = job.in.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const int64_t row = blockIdx.x;
  const int64_t unit = job.first_unit + row / group;
  const int kv_head = static_cast<int>(unit % shape.kv_heads);
  const int head = kv_head * group + static_cast<int>(row % group);
  if (!is_listed(job.in.head_ids, job.in.heads, head)) return;

  const SequenceScope own = sequence_scope(job, unit / shape.kv_heads);
  const int query = threadIdx.x % 64, part = threadIdx.x / 64;
  const float2* partial = job.partial + row * job.max_chunks * 64 + query;
  float2 sum = make_float2(-1e30f, 0.f);
  for (int chunk = part; chunk < own.chunks; chunk += kParts) {
    sum = add_partials(sum, partial[chunk * 64]);
  }
  parts[part][query] = sum;
  __syncthreads();
  if (part != 0) return;
#pragma unroll
  for (int i = 1; i < kParts; ++i) sum = add_partials(sum, parts[i][query]);
  job.normalizer[row * 64 + query] =
      query < own.query_rows && sum.y != 0.f ? sum.x + log2f(sum.y) : INFINITY;
}

Status launch_normalizers(const VerticalSlashJob& job, cudaStream_t stream) {
  normalizers_kernel<<<static_cast<unsigned>(job.rows()), kNormalizerThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

struct ListScratch {
  SelectScratch<SelectTeam, kDigitBits> select;
  int32_t scan[SelectTeam::kWarps];
};

/// CTA 2 i lists the columns of head entry i, CTA 2 i + 1 its offsets.
__global__ void __launch_bounds__(SelectTeam::kThreads)
    select_indices_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ ListScratch scratch;
  const VerticalSlashEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const int64_t entry = blockIdx.x / 2;
  const bool is_offsets = blockIdx.x % 2 != 0;
  const int sequence = static_cast<int>(entry / in.heads);
  const int ordinal = static_cast<int>(entry % in.heads);
  const int head = listed_head(in.head_ids, ordinal);
  const int64_t unit = static_cast<int64_t>(sequence) * shape.kv_heads + head / group;
  if (unit < job.first_unit || unit >= job.first_unit + job.units) return;
  // launch_select_share lists the offsets of heads with a share.
  if (is_offsets && share_of(in.shares, ordinal, in.share) > 0) return;
  const int64_t row = (unit - job.first_unit) * group + head % group;

  const int32_t limit = is_offsets ? in.max_offsets : in.max_columns;
  const int32_t forced = is_offsets ? in.local : in.sink;
  float* mass = (is_offsets ? job.offset_mass : job.column_mass) + row * job.mass_stride;
  int32_t* out = (is_offsets ? in.offsets : in.columns) + entry * limit;
  const int32_t budget = budget_of(is_offsets ? in.num_offsets : in.num_columns, ordinal, limit);
  const SequenceScope own = sequence_scope(job, sequence);
  const int32_t n = own.kv_len;
  const int32_t k = min(budget, n);

  if (is_offsets) {
    // Diagonals 0 .. 63 of chunk c >= 1; chunks are longer than 64, so no two meet.
    const float* spill = job.spill + row * job.max_chunks * 64;
    for (int i = 64 + SelectTeam::rank(); i < own.chunks * 64; i += SelectTeam::kThreads) {
      const int offset = own.origin - i / 64 * job.chunk_keys + i % 64;
      if (offset >= 0) mass[offset] += spill[i];
    }
    SelectTeam::sync();
  }
  const auto key_at = [mass, forced](int32_t i) {
    return i < forced ? kForcedKey : order_key(mass[i]);
  };
  const Threshold threshold = find_threshold<SelectTeam, kDigitBits>(n, k, key_at, scratch.select);
  write_selected<SelectTeam>(n, k, threshold, key_at, out, limit, scratch.scan);
}

Status launch_select_indices(const VerticalSlashJob& job, cudaStream_t stream) {
  const int64_t ctas = 2 * static_cast<int64_t>(job.in.shape.batch) * job.in.heads;
  select_indices_kernel<<<static_cast<unsigned>(ctas), SelectTeam::kThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
