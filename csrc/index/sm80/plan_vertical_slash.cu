// Lists of columns and offsets to sorted columns, segments and covers.
//
// Both lists become bitmaps first, which sorts them and drops duplicates. Then one CTA for each
// bitmap reads its words in order, a chunk at a time, and carries what a scan needs from chunk to
// chunk. Atomics only OR bits, so the result does not depend on their order.
#include "common/cuda/launch.h"
#include "common/cuda/team.cuh"
#include "index/sm80/cover_bits.h"
#include "sparseattn/plan.h"

namespace sparseattn {
namespace index_sm80 {

constexpr int kMarkThreads = 256;
constexpr int kScanWarps = 32;
constexpr int kWordsPerThread = 4;
constexpr int kChunkWords = 32 * kScanWarps * kWordsPerThread;
using ScanTeam = cuda::Team<kScanWarps>;

__device__ __forceinline__ int64_t list_value(const IndexLists& lists, int64_t index) {
  return lists.wide ? static_cast<const int64_t*>(lists.data)[index]
                    : static_cast<const int32_t*>(lists.data)[index];
}

/// Sets bit c of column_bits for every column c and bit o of cover for every offset o.
__global__ void __launch_bounds__(kMarkThreads)
    mark_lists_kernel(const __grid_constant__ Plan plan, const __grid_constant__ IndexLists columns,
                      const __grid_constant__ IndexLists offsets, int32_t ctas_per_slot) {
  const PlanSizes& sizes = plan.sizes;
  const int slot = blockIdx.x / ctas_per_slot;
  const int32_t kv_len = sizes.shape_of(slot / sizes.vs_heads).kv_len;
  const int64_t entry =
      static_cast<int64_t>(blockIdx.x % ctas_per_slot) * kMarkThreads + threadIdx.x;
  const bool is_column = entry < columns.length;
  const IndexLists& lists = is_column ? columns : offsets;
  const int64_t i = is_column ? entry : entry - columns.length;
  if (i >= lists.length) return;
  const int64_t value =
      list_value(lists, slot / sizes.vs_heads * lists.batch_stride +
                            slot % sizes.vs_heads * lists.head_stride + i * lists.stride);
  if (value < 0 || value >= (is_column ? kv_len : kv_len + kTileRows)) return;
  uint32_t* bits = (is_column ? plan.column_bits : plan.cover) +
                   static_cast<int64_t>(slot) * sizes.cover_words();
  atomicOr(bits + value / 32, 1u << (value % 32));
}

__device__ __forceinline__ void list_columns(const Plan& plan, int64_t slot, int32_t* scratch) {
  const PlanSizes& sizes = plan.sizes;
  const int words = sizes.cover_words();
  const uint32_t* bits = plan.column_bits + slot * words;
  int32_t* out = plan.columns + slot * sizes.max_columns;
  int32_t found = 0;
  for (int base = 0; base < words; base += kChunkWords) {
    const int first = base + ScanTeam::rank() * kWordsPerThread;
    uint32_t word[kWordsPerThread];
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      word[i] = first + i < words ? bits[first + i] : 0;
      count += __popc(word[i]);
    }
    int32_t total;
    int32_t at = found + cuda::team_scan<ScanTeam>(count, 0, cuda::Add{}, scratch, total);
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      for (uint32_t rest = word[i]; rest != 0; rest &= rest - 1) {
        out[at++] = 32 * (first + i) + lowest_bit(rest);
      }
    }
    found += total;
  }
  if (ScanTeam::rank() == 0) plan.num_columns[slot] = found;
}

struct SlashScratch {
  uint32_t offsets[kChunkWords + 2];  // offset bits of a chunk behind the last two words before it
  int32_t scan[kScanWarps];
};

/// `cover` holds offset bits and is overwritten chunk by chunk with the distances they cover.
__device__ __forceinline__ void list_segments(const Plan& plan, int64_t slot,
                                              SlashScratch& scratch) {
  const PlanSizes& sizes = plan.sizes;
  const int words = sizes.cover_words();
  const int span = sizes.shape_of(slot / sizes.vs_heads).kv_len + kTileRows;
  uint32_t* cover = plan.cover + slot * words;
  Segment* segments = plan.segments + slot * sizes.max_offsets;
  const int rank = ScanTeam::rank();
  int32_t found = 0;
  int32_t last_start = -1;  // of the last run that starts before the chunk
  if (rank < 2) scratch.offsets[rank] = 0;

  for (int base = 0; base < words; base += kChunkWords) {
    const int first = rank * kWordsPerThread;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      const int word = rank + i * ScanTeam::kThreads;
      scratch.offsets[2 + word] = base + word < words ? cover[base + word] : 0;
    }
    ScanTeam::sync();
    uint32_t offsets[kWordsPerThread + 2];
#pragma unroll
    for (int i = 0; i < kWordsPerThread + 2; ++i) offsets[i] = scratch.offsets[first + i];

    uint32_t covered[kWordsPerThread];
    int32_t start = -1;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      const int32_t distance = 32 * (base + first + i);
      const uint32_t word = cover_word(offsets[i + 2], offsets[i + 1], offsets[i]);
      covered[i] = base + first + i < words ? clip_word(word, distance, span) : 0;
      const bool before = covered_before(offsets[i + 1], offsets[i]);
      start = max(start, run_start(covered[i], before, distance));
      if (base + first + i < words) cover[base + first + i] = covered[i];
    }
    int32_t total;
    const int32_t earlier = cuda::team_scan<ScanTeam>(start, -1, cuda::Max{}, scratch.scan, total);
    const int32_t carried_start = max(last_start, earlier);
    last_start = max(last_start, total);

    // Where segments begin in each word: a cut of the run that comes in, a run of the word's own.
    int32_t cuts[kWordsPerThread], starts[kWordsPerThread];
    int32_t count = 0;
    int32_t run = carried_start;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      const int32_t distance = 32 * (base + first + i);
      const bool before = covered_before(offsets[i + 1], offsets[i]);
      cuts[i] = run_cut(covered[i], before, distance, run);
      starts[i] = run_start(covered[i], before, distance);
      count += (cuts[i] >= 0) + (starts[i] >= 0);
      run = max(run, starts[i]);
    }
    int32_t at = found + cuda::team_scan<ScanTeam>(count, 0, cuda::Add{}, scratch.scan, total);
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      if (cuts[i] >= 0) segments[at++].distance = cuts[i];
      if (starts[i] >= 0) segments[at++].distance = starts[i];
    }
    found += total;
    // All threads are past their reads of `offsets` since the scans' barriers.
    if (rank < 2) scratch.offsets[rank] = scratch.offsets[kChunkWords + rank];
    ScanTeam::sync();
  }

  ScanTeam::sync();
  for (int i = rank; i < found; i += ScanTeam::kThreads) {
    segments[i].count = segment_count(cover, words, segments[i].distance);
  }
  if (rank == 0) plan.num_segments[slot] = found;
}

/// CTA 2 s lists the columns of slot s, CTA 2 s + 1 its segments.
__global__ void __launch_bounds__(ScanTeam::kThreads)
    scan_lists_kernel(const __grid_constant__ Plan plan) {
  __shared__ SlashScratch scratch;
  const int64_t slot = blockIdx.x / 2;
  if (blockIdx.x % 2 == 0) {
    list_columns(plan, slot, scratch.scan);
  } else {
    list_segments(plan, slot, scratch);
  }
}

}  // namespace index_sm80

Status plan_vertical_slash(const Plan& plan, const IndexLists& columns, const IndexLists& offsets,
                           cudaStream_t stream) {
  using namespace index_sm80;
  const PlanSizes& sizes = plan.sizes;
  const int64_t slots = static_cast<int64_t>(sizes.shape.batch) * sizes.vs_heads;
  if (slots == 0) return {};
  if (columns.length > sizes.max_columns) {
    return {1, "plan_vertical_slash: columns are longer than the plan's max_columns"};
  }
  if (offsets.length > sizes.max_offsets) {
    return {1, "plan_vertical_slash: offsets are longer than the plan's max_offsets"};
  }
  const int64_t ctas_per_slot =
      cuda::ceil_div(static_cast<int64_t>(columns.length) + offsets.length, kMarkThreads);
  if (!cuda::grid_fits(slots * ctas_per_slot) || !cuda::grid_fits(2 * slots)) {
    return {1, "plan_vertical_slash: more index entries than a grid can hold"};
  }
  const size_t bytes = slots * sizes.cover_words() * sizeof(uint32_t);
  Status status = cuda::to_status(cudaMemsetAsync(plan.cover, 0, bytes, stream));
  if (!status.ok()) return status;
  status = cuda::to_status(cudaMemsetAsync(plan.column_bits, 0, bytes, stream));
  if (!status.ok()) return status;
  if (ctas_per_slot > 0) {
    mark_lists_kernel<<<static_cast<unsigned>(slots * ctas_per_slot), kMarkThreads, 0, stream>>>(
        plan, columns, offsets, static_cast<int32_t>(ctas_per_slot));
    status = cuda::launch_status();
    if (!status.ok()) return status;
  }
  scan_lists_kernel<<<static_cast<unsigned>(2 * slots), ScanTeam::kThreads, 0, stream>>>(plan);
  return cuda::launch_status();
}

}  // namespace sparseattn
