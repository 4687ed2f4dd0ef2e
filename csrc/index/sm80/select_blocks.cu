// Scores of query-block means against key-block means, and the best key blocks of each row.
//
// A CTA takes kRows consecutive rows of one head: all threads compute their scores into shared
// memory, then a team of 8 / kRows warps selects in each row. Long rows leave room for fewer.
#include "common/cuda/launch.h"
#include "index/sm80/block_sparse_job.h"
#include "index/sm80/head_list.cuh"
#include "index/sm80/select.cuh"
#include "index/sm80/share_blocks.cuh"

namespace sparseattn::index_sm80 {
namespace {

constexpr int kBlockWarps = 8;
constexpr int kBlockThreads = 32 * kBlockWarps;
constexpr int kDigitBits = 8;
/// What a CTA may take on every supported architecture (sm_86 and sm_89 have the least).
constexpr size_t kMaxSharedBytes = 99 * 1024;

/// Key blocks of query block `block` that start at or before its last row's position, and the one
/// that holds its first row's position. A block past the sequence's rows has no candidates.
struct RowScope {
  int32_t candidates = 0;
  int32_t forced = -1;
  /// `own` is the shape of the sequence.
  __device__ RowScope(const Shape& own, int size, int block) {
    const int64_t first = static_cast<int64_t>(block) * size;
    const int64_t last = min(first + size, static_cast<int64_t>(own.q_len)) - 1;
    const int past = own.kv_len - own.q_len;
    if (last < first) return;
    candidates = static_cast<int32_t>((last + past) / size) + 1;
    forced = static_cast<int32_t>((first + past) / size);
  }
};

template <int kRows>
using RowTeam = cuda::Team<kBlockWarps / kRows>;

/// Shared memory of a CTA: scratch of each team, query means [head_dim, kRows], scores
/// [kRows, mean_stride], and where a head has a share the scratch that cuts a row.
template <int kRows>
size_t shared_bytes(const BlockSparseJob& job) {
  const size_t cut = job.any_share() ? sizeof(RowCutScratch<RowTeam<kRows>>) : 0;
  return kRows * (sizeof(SelectScratch<RowTeam<kRows>, kDigitBits>) +
                  sizeof(float) * job.in.shape.head_dim + sizeof(float) * job.mean_stride + cut);
}

template <int kRows>
__device__ __forceinline__ void score_rows(const BlockSparseJob& job, const float* k_means,
                                           const float* queries, int candidates, float* scores) {
  constexpr int kKeys = 2;  // a thread's
  const int dim = job.in.shape.head_dim;
  const int stride = static_cast<int>(job.mean_stride);
  for (int base = threadIdx.x; base < candidates; base += kKeys * kBlockThreads) {
    float sum[kKeys][kRows] = {};
    int column[kKeys];
#pragma unroll
    for (int i = 0; i < kKeys; ++i) column[i] = min(base + i * kBlockThreads, candidates - 1);
#pragma unroll 8
    for (int d = 0; d < dim; ++d) {
      const float* keys = k_means + static_cast<int64_t>(d) * stride;
#pragma unroll
      for (int i = 0; i < kKeys; ++i) {
        const float key = keys[column[i]];
#pragma unroll
        for (int r = 0; r < kRows; ++r) sum[i][r] = fmaf(queries[d * kRows + r], key, sum[i][r]);
      }
    }
#pragma unroll
    for (int i = 0; i < kKeys; ++i) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) scores[r * stride + column[i]] = sum[i][r];
    }
  }
}

/// Writes a row of bits (and bytes): the words of a warp's range, in order.
template <class Team, class KeyAt>
__device__ __forceinline__ void write_row(const BlockSparseJob& job, int64_t row,
                                          const RowScope& scope, const Threshold& threshold,
                                          const KeyAt& key_at, int32_t* scratch) {
  const int lane = Team::lane();
  const WarpRange range = warp_range<Team>(32 * job.words);
  int32_t equal = 0;
  for (int i = range.begin + lane; i < min(range.end, scope.candidates); i += 32) {
    equal += key_at(i) == threshold.key;
  }
  equal = cuda::warp_sum(equal);
  int32_t total;
  int32_t equal_before =
      cuda::team_scan<Team>(lane == 0 ? equal : 0, 0, cuda::Add{}, scratch, total);
  equal_before = __shfl_sync(cuda::kFullWarp, equal_before, 0);

  uint32_t* bits = job.in.block_bits + row * job.words;
  uint8_t* mask = job.in.block_mask == nullptr ? nullptr : job.in.block_mask + row * job.kv_blocks;
  for (int base = range.begin; base < range.end; base += 32) {
    const int block = base + lane;
    const uint32_t key = block < scope.candidates ? key_at(block) : 0;
    const bool is_equal = block < scope.candidates && key == threshold.key;
    const uint32_t all_equal = __ballot_sync(cuda::kFullWarp, is_equal);
    const int32_t ties = equal_before + __popc(all_equal & ((1u << lane) - 1));
    const bool selected =
        block < scope.candidates && (key > threshold.key || (is_equal && ties < threshold.ties));
    const uint32_t word = __ballot_sync(cuda::kFullWarp, selected);
    equal_before += __popc(all_equal);
    if (lane == 0) bits[base / 32] = word;
    if (mask != nullptr && block < job.kv_blocks) mask[block] = selected;
  }
}

}  // namespace

template <int kRows>
__global__ void __launch_bounds__(kBlockThreads, 2)
    select_blocks_kernel(const __grid_constant__ BlockSparseJob job, int32_t ctas_per_head) {
  using Team = RowTeam<kRows>;
  using Scratch = SelectScratch<Team, kDigitBits>;
  extern __shared__ __align__(16) unsigned char smem[];
  auto* scratch = reinterpret_cast<Scratch*>(smem);
  const BlockSparseEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int dim = shape.head_dim;
  float* queries = reinterpret_cast<float*>(smem + kRows * sizeof(Scratch));
  float* scores = queries + kRows * dim;

  // A group of CTAs is a slot of [batch, heads], or a panel of one.
  const bool is_scored = in.stride > 0;
  const int64_t group = blockIdx.x / ctas_per_head;
  const int64_t panel = job.first_panel + group;
  const int64_t slot = is_scored ? panel / job.slot_panels : group;
  const int group_row = static_cast<int>(blockIdx.x % ctas_per_head) * kRows;
  const int first_row =
      group_row + (is_scored ? static_cast<int>(panel % job.slot_panels) * kPanelBlocks : 0);
  const int ordinal = static_cast<int>(slot % in.heads);
  if (first_row >= job.q_blocks) return;
  if (in.strides != nullptr && in.strides[ordinal] != in.stride) return;
  const int64_t kv_head = listed_head(in.head_ids, ordinal) / (shape.q_heads / shape.kv_heads);
  const int64_t sequence = slot / in.heads;
  const int64_t k_row = sequence * shape.kv_heads + kv_head;
  const Shape own = sequence_shape(shape, in.lengths, sequence);
  const int own_blocks = (own.q_len + in.block - 1) / in.block;

  const int last_row = max(first_row, min(first_row + kRows, own_blocks) - 1);
  const int candidates = RowScope(own, in.block, last_row).candidates;
  if (is_scored) {
    for (int row = 0; row <= last_row - first_row; ++row) {
      const float* from = job.scores + (group * kPanelBlocks + group_row + row) * job.mean_stride;
      float* to = scores + row * job.mean_stride;
      for (int i = threadIdx.x; i < candidates; i += kBlockThreads) to[i] = from[i];
    }
  } else {
    for (int i = threadIdx.x; i < kRows * dim; i += kBlockThreads) {
      const int row = first_row + i / dim;
      queries[i % dim * kRows + i / dim] =
          row < own_blocks ? job.q_means[(slot * job.q_blocks + row) * dim + i % dim] : 0.f;
    }
    __syncthreads();
    score_rows<kRows>(job, job.k_means + k_row * dim * job.mean_stride, queries, candidates,
                      scores);
  }
  __syncthreads();

  const int row = first_row + Team::index();
  if (row >= job.q_blocks) return;
  const RowScope scope(own, in.block, row);
  const float* row_scores = scores + Team::index() * job.mean_stride;
  const auto key_at = [row_scores, scope](int32_t i) {
    return i == scope.forced ? kForcedKey : order_key(row_scores[i]);
  };
  const int32_t k = min(budget_of(in.top_k, ordinal, in.max_top_k), scope.candidates);
  Scratch& team = scratch[Team::index()];
  Threshold threshold = find_threshold<Team, kDigitBits>(scope.candidates, k, key_at, team);
  const int32_t share = share_of(in.shares, ordinal, in.share);
  if (share > 0 && scope.candidates > 0) {
    // Behind the scores; both are multiples of 8 bytes long.
    auto* cut = reinterpret_cast<RowCutScratch<Team>*>(scores + kRows * job.mean_stride);
    threshold = cut_to_share<Team>(row_scores, scope.candidates, scope.forced, threshold,
                                   rsqrtf(static_cast<float>(dim)) * 1.44269504f, share,
                                   cut[Team::index()]);
  }
  write_row<Team>(job, slot * job.q_blocks + row, scope, threshold, key_at, team.scan);
}

namespace {

template <int kRows>
Status launch_rows(const BlockSparseJob& job, cudaStream_t stream) {
  static_assert(kPanelBlocks % kRows == 0);
  const bool is_scored = job.in.stride > 0;
  const int64_t ctas_per_head =
      is_scored ? kPanelBlocks / kRows : cuda::ceil_div(job.q_blocks, kRows);
  const int64_t heads = static_cast<int64_t>(job.in.shape.batch) * job.in.heads;
  const int64_t ctas = (is_scored ? job.panels : heads) * ctas_per_head;
  if (!cuda::grid_fits(ctas)) {
    return {1, "estimate_block_sparse: more blocks than a grid can hold"};
  }
  const size_t bytes = shared_bytes<kRows>(job);
  const auto kernel = select_blocks_kernel<kRows>;
  const Status status = cuda::to_status(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (!status.ok()) return status;
  kernel<<<static_cast<unsigned>(ctas), kBlockThreads, bytes, stream>>>(
      job, static_cast<int32_t>(ctas_per_head));
  return cuda::launch_status();
}

}  // namespace

Status launch_select_blocks(const BlockSparseJob& job, cudaStream_t stream) {
  if (shared_bytes<8>(job) <= kMaxSharedBytes) return launch_rows<8>(job, stream);
  if (shared_bytes<4>(job) <= kMaxSharedBytes) return launch_rows<4>(job, stream);
  if (shared_bytes<2>(job) <= kMaxSharedBytes) return launch_rows<2>(job, stream);
  if (shared_bytes<1>(job) <= kMaxSharedBytes) return launch_rows<1>(job, stream);
  if (job.any_share()) {
    return {1,
            "estimate_block_sparse: a row of more than 24384 key blocks has no room for a share"};
  }
  return {1, "estimate_block_sparse: a row of more than 24576 key blocks is not supported"};
}

}  // namespace sparseattn::index_sm80
