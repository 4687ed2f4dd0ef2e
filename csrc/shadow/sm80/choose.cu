// From landmark scores to the selected chunks: the largest log-probability of every chunk, on the
// whole device, then an exact selection, one CTA for each key/value head.
#include <algorithm>

#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "shadow/sm80/rank.cuh"
#include "shadow/sm80/select_job.h"

namespace sparseattn::shadow_sm80 {
namespace {

constexpr int kRankWarps = 8;
constexpr int kRankThreads = 32 * kRankWarps;
constexpr int kRankChunks = 4 * kRankThreads;  // of a CTA
constexpr int kRankRows = 64;                  // normalizers held at a time
constexpr int kChooseDigitBits = 11;
using ChooseTeam = cuda::Team<32>;
using ChooseSelect = index_sm80::SelectScratch<ChooseTeam, kChooseDigitBits>;
/// Shared memory of a choosing CTA beside the keys.
constexpr int64_t kChooseStaticBytes = sizeof(ChooseSelect) + 1024;

/// Log2 of a row's sum. Lanes share the splits; the order does not depend on timing.
__device__ __forceinline__ float normalizer(const float2* partial, int32_t splits) {
  const int lane = threadIdx.x % 32;
  float top = -INFINITY;
  for (int32_t i = lane; i < splits; i += 32) top = fmaxf(top, partial[i].x);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    top = fmaxf(top, __shfl_xor_sync(cuda::kFullWarp, top, distance));
  }
  const float base = top == -INFINITY ? 0.f : top;
  float sum = 0.f;
  for (int32_t i = lane; i < splits; i += 32) {
    const float2 part = partial[i];
    sum += part.y * cuda::exp2_approx(part.x - base);
  }
  return top + log2f(cuda::warp_sum(sum));
}

}  // namespace

/// A CTA for each kRankChunks chunks of each head of [batch, kv_heads].
__global__ void __launch_bounds__(kRankThreads)
    ranks_kernel(const __grid_constant__ SelectJob job, int32_t ctas_per_head) {
  __shared__ float normalizers[kRankRows];
  const ShadowSelect& in = job.in;
  const int64_t head = blockIdx.x / ctas_per_head;
  const int64_t first =
      static_cast<int64_t>(blockIdx.x % ctas_per_head) * kRankChunks + 4 * threadIdx.x;
  const int64_t sequence = head / in.kv_heads;
  const int32_t num_chunks = in.num_chunks.at(sequence, in.chunks);
  const int32_t own_rows =
      min(in.q_lens.at(sequence, in.q_len) * job.group - job.first_row, job.round_rows);
  const int32_t splits = (num_chunks + job.split_chunks - 1) / job.split_chunks;
  const bool reads = first < num_chunks;

  float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  for (int32_t base = 0; base < own_rows; base += kRankRows) {
    const int32_t rows = min(kRankRows, own_rows - base);
    const int64_t row = head * job.most_rows + base;
    __syncthreads();
    for (int32_t r = threadIdx.x / 32; r < rows; r += kRankWarps) {
      const float lse = normalizer(job.partial + (row + r) * job.splits, splits);
      if (threadIdx.x % 32 == 0) normalizers[r] = lse;
    }
    __syncthreads();
    if (!reads) continue;
    const float* scores = job.scores + row * job.stride + first;
#pragma unroll 4
    for (int32_t r = 0; r < rows; ++r) {
      const float4 s = *reinterpret_cast<const float4*>(scores + r * job.stride);
      const float lse = normalizers[r];
      // NaN loses against any number.
      best[0] = fmaxf(best[0], s.x - lse);
      best[1] = fmaxf(best[1], s.y - lse);
      best[2] = fmaxf(best[2], s.z - lse);
      best[3] = fmaxf(best[3], s.w - lse);
    }
  }
  if (first >= job.stride) return;
  uint32_t keys[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t chunk = static_cast<int32_t>(first) + i;
    keys[i] = job.is_candidate(head, chunk, num_chunks) ? rank_key(best[i]) : 0;
  }
  auto* to = reinterpret_cast<uint4*>(job.keys + head * job.stride + first);
  if (job.first_row > 0) {
    const uint4 before = *to;
    keys[0] = max(keys[0], before.x);
    keys[1] = max(keys[1], before.y);
    keys[2] = max(keys[2], before.z);
    keys[3] = max(keys[3], before.w);
  }
  *to = make_uint4(keys[0], keys[1], keys[2], keys[3]);
}

/// A CTA for each head of [batch, kv_heads]. Keys of log-probabilities differ in few of their upper
/// bits; they are spread over the whole range so that the digits of the selection tell them apart.
/// What is no candidate has key 0, all candidates have more.
template <bool kIsShared>
__global__ void __launch_bounds__(ChooseTeam::kThreads)
    choose_kernel(const __grid_constant__ SelectJob job) {
  using Team = ChooseTeam;
  extern __shared__ __align__(16) uint32_t held[];
  __shared__ ChooseSelect select;
  __shared__ int32_t scan[Team::kWarps];
  __shared__ uint32_t bounds[Team::kWarps];
  const ShadowSelect& in = job.in;
  const int64_t head = blockIdx.x;
  const int64_t sequence = head / in.kv_heads;
  const int32_t n = in.num_chunks.at(sequence, in.chunks);
  const uint32_t* keys = job.keys + head * job.stride;

  uint32_t lowest = 0xffffffffu, highest = 0;
  int32_t count = 0;
  const auto take = [&](uint32_t key) {
    if (key == 0) return;
    lowest = min(lowest, key);
    highest = max(highest, key);
    ++count;
  };
#pragma unroll 4
  for (int64_t i = 4 * Team::rank(); i < n; i += 4 * Team::kThreads) {
    const uint4 four = *reinterpret_cast<const uint4*>(keys + i);  // keys past n are 0
    take(four.x);
    take(four.y);
    take(four.z);
    take(four.w);
    if constexpr (kIsShared) *reinterpret_cast<uint4*>(held + i) = four;
  }
  int32_t candidates;
  uint32_t top, inverse_bottom;
  cuda::team_scan<Team>(count, 0, cuda::Add{}, scan, candidates);
  cuda::team_scan<Team>(highest, 0u, cuda::Max{}, bounds, top);
  cuda::team_scan<Team>(~lowest, 0u, cuda::Max{}, bounds, inverse_bottom);
  const uint32_t bottom = ~inverse_bottom;
  const int shift = top > bottom ? __clz(static_cast<int>(top - bottom)) : 0;
  const auto spread = [bottom, shift](uint32_t key) {
    return key == 0 ? 0 : ((key - bottom) << shift) + 1;
  };
  const int32_t asked = in.q_lens.at(sequence, in.q_len) > 0 ? in.top_k : 0;
  const int32_t k = min(asked, candidates);
  int32_t* out = in.selected + head * in.top_k;

  const auto choose = [&](const auto& key_at) {
    const index_sm80::Threshold threshold =
        index_sm80::find_threshold<Team, kChooseDigitBits>(n, k, key_at, select);
    index_sm80::write_selected<Team>(n, k, threshold, key_at, out, in.top_k, scan);
  };
  if constexpr (kIsShared) {
    for (int32_t i = Team::rank(); i < n; i += Team::kThreads) held[i] = spread(held[i]);
    Team::sync();
    choose([](int32_t i) { return held[i]; });
  } else {
    choose([keys, spread](int32_t i) { return spread(keys[i]); });
  }
}

Status launch_ranks(const SelectJob& job, cudaStream_t stream) {
  const int64_t ctas_per_head = cuda::ceil_div(job.stride, kRankChunks);
  const int64_t ctas = job.heads() * ctas_per_head;
  if (!cuda::grid_fits(ctas)) return {1, "shadow_select: more chunks than a grid can hold"};
  ranks_kernel<<<static_cast<unsigned>(ctas), kRankThreads, 0, stream>>>(
      job, static_cast<int32_t>(ctas_per_head));
  return cuda::launch_status();
}

Status launch_choose(const SelectJob& job, cudaStream_t stream) {
  const int64_t bytes = job.stride * static_cast<int64_t>(sizeof(uint32_t));
  const auto ctas = static_cast<unsigned>(job.heads());
  if (bytes + kChooseStaticBytes > shared_bytes_limit()) {
    choose_kernel<false><<<ctas, ChooseTeam::kThreads, 0, stream>>>(job);
    return cuda::launch_status();
  }
  const Status status = cuda::to_status(cudaFuncSetAttribute(
      choose_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (!status.ok()) return status;
  choose_kernel<true><<<ctas, ChooseTeam::kThreads, bytes, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::shadow_sm80
