// The small kernels of the vertical-slash estimate: row normalizers between its passes, and the
// selection of columns and offsets from their masses.
#include "common/cuda/launch.h"
#include "index/sm80/list_scope.cuh"

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

/// A CTA for each list.
__global__ void __launch_bounds__(SelectTeam::kThreads)
    select_indices_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ ListScratch scratch;
  const ListScope list(job, blockIdx.x);
  if (!list.listed) return;
  int32_t* out = (list.is_offsets ? job.in.offsets : job.in.columns) + list.entry * list.limit;
  const auto select = [&](int32_t n, const auto& key_at, const auto& id_at) {
    const Threshold threshold =
        find_threshold<SelectTeam, kDigitBits>(n, list.k, key_at, scratch.select);
    write_selected<SelectTeam>(n, list.k, threshold, key_at, out, list.limit, scratch.scan, id_at);
  };
  const bool counted = list.has_candidates(job);
  int32_t candidates = 0;
  if (counted) {
    const int32_t* counts = job.piece_count + list.slot() * job.pieces;
    for (int32_t p = 0; p < job.pieces; ++p) candidates += counts[p];
  }
  if (counted && candidates <= kMostCandidates) {
    const int32_t* ids = job.candidates + list.slot() * kMostCandidates;
    select(
        candidates, [&list, ids](int32_t i) { return list.key_at(ids[i]); },
        [ids](int32_t i) { return ids[i]; });
    return;
  }
  if (list.is_offsets && !counted) {
    list.add_spill(job, 0, list.n);
    SelectTeam::sync();
  }
  select(list.n, [&list](int32_t i) { return list.key_at(i); }, SameId{});
}

Status launch_select_indices(const VerticalSlashJob& job, cudaStream_t stream) {
  if (job.candidates != nullptr) {
    const Status status = launch_select_candidates(job, stream);
    if (!status.ok()) return status;
  }
  const int64_t ctas = 2 * static_cast<int64_t>(job.in.shape.batch) * job.in.heads;
  select_indices_kernel<<<static_cast<unsigned>(ctas), SelectTeam::kThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
