// Lists of columns and offsets to sorted columns, segments and covers.
//
// Both lists become bitmaps first, which sorts them and drops duplicates; offsets then become the
// distances they cover. One CTA for each list to be made reads the words of its bitmap in order, a
// chunk at a time, and carries what a scan needs from chunk to chunk. Atomics only OR bits, so the
// result does not depend on their order.
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

/// Sets bit c of column_bits for every column c and bit o of offset_bits for every offset o.
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
  uint32_t* bits = (is_column ? plan.column_bits : plan.offset_bits) +
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

/// Offset bits to covered distances.
__global__ void __launch_bounds__(kMarkThreads)
    cover_kernel(const __grid_constant__ Plan plan, int32_t ctas_per_slot) {
  const PlanSizes& sizes = plan.sizes;
  const int words = sizes.cover_words();
  const int slot = blockIdx.x / ctas_per_slot;
  const int64_t row = static_cast<int64_t>(slot) * words;
  const int word = blockIdx.x % ctas_per_slot * kMarkThreads + threadIdx.x;
  if (word >= words) return;
  const int32_t span = sizes.shape_of(slot / sizes.vs_heads).kv_len + kTileRows;
  const uint32_t* offsets = plan.offset_bits + row;
  const uint32_t covered =
      cover_word(offsets[word], word > 0 ? offsets[word - 1] : 0, word > 1 ? offsets[word - 2] : 0);
  plan.cover[row + word] = clip_word(covered, 32 * word, span);
}

/// The cover of a slot, word by word; 0 outside.
struct CoverWords {
  const uint32_t* data;
  int words;
  __device__ CoverWords(const Plan& plan, int64_t slot)
      : data(plan.cover + slot * plan.sizes.cover_words()), words(plan.sizes.cover_words()) {}
  __device__ uint32_t operator()(int word) const {
    return word >= 0 && word < words ? data[word] : 0;
  }
};

/// The cover of a pair of tiles, distances from the end of the second.
struct PairCoverWords {
  CoverWords single;
  __device__ uint32_t operator()(int word) const { return single(word) | single(word - 2); }
};

/// Calls write(i, distance) for the near end of every segment i, in ascending order; returns how
/// many there are.
template <class WordAt, class Write>
__device__ __forceinline__ int32_t list_segment_starts(int words, const WordAt& word_at,
                                                       const Write& write, int32_t* scratch) {
  int32_t found = 0;
  int32_t last_start = -1;  // of the last run that starts before the chunk
  for (int base = 0; base < words; base += kChunkWords) {
    const int first = base + ScanTeam::rank() * kWordsPerThread;
    uint32_t covered[kWordsPerThread];
    bool before[kWordsPerThread];
    int32_t starts[kWordsPerThread];
    int32_t start = -1;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      covered[i] = word_at(first + i);
      before[i] = (i == 0 ? word_at(first - 1) : covered[max(i - 1, 0)]) >> 31 != 0;
      starts[i] = run_start(covered[i], before[i], 32 * (first + i));
      start = max(start, starts[i]);
    }
    int32_t total;
    const int32_t earlier = cuda::team_scan<ScanTeam>(start, -1, cuda::Max{}, scratch, total);
    int32_t run = max(last_start, earlier);
    last_start = max(last_start, total);

    // Where segments begin in each word: a cut of the run that comes in, a run of the word's own.
    int32_t cuts[kWordsPerThread];
    int32_t count = 0;
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      cuts[i] = run_cut(covered[i], before[i], 32 * (first + i), run);
      count += (cuts[i] >= 0) + (starts[i] >= 0);
      run = max(run, starts[i]);
    }
    int32_t at = found + cuda::team_scan<ScanTeam>(count, 0, cuda::Add{}, scratch, total);
#pragma unroll
    for (int i = 0; i < kWordsPerThread; ++i) {
      if (cuts[i] >= 0) write(at++, cuts[i]);
      if (starts[i] >= 0) write(at++, starts[i]);
    }
    found += total;
  }
  ScanTeam::sync();  // what was written is visible to the team
  return found;
}

__device__ __forceinline__ void list_segments(const Plan& plan, int64_t slot, int32_t* scratch) {
  const CoverWords cover(plan, slot);
  Segment* segments = plan.segments + slot * plan.sizes.max_segments();
  const auto write = [segments](int32_t i, int32_t distance) { segments[i].distance = distance; };
  const int32_t found = list_segment_starts(cover.words, cover, write, scratch);
  for (int i = ScanTeam::rank(); i < found; i += ScanTeam::kThreads) {
    segments[i].count = trailing_ones(bits_from(cover, segments[i].distance));
  }
  if (ScanTeam::rank() == 0) plan.num_segments[slot] = found;
}

__device__ __forceinline__ void list_pair_segments(const Plan& plan, int64_t slot,
                                                   int32_t* scratch) {
  const CoverWords cover(plan, slot);
  const PairCoverWords pair{cover};
  PairSegment* segments = plan.pair_segments + slot * plan.sizes.max_pair_segments();
  const auto write = [segments](int32_t i, int32_t distance) { segments[i].far = distance; };
  const int32_t found = list_segment_starts(cover.words + 2, pair, write, scratch);
  for (int i = ScanTeam::rank(); i < found; i += ScanTeam::kThreads) {
    const int32_t distance = segments[i].far;
    const int32_t count = trailing_ones(bits_from(pair, distance));
    const int32_t far = distance + count;
    // Keys ascend where distances fall: bit j is distance far - 1 - j.
    const uint64_t own = ~uint64_t{0} >> (64 - count);
    const uint64_t second = __brevll(bits_from(cover, far - 64)) & own;
    const uint64_t first = __brevll(bits_from(cover, far - 64 - kTileRows)) & own;
    segments[i] = {far,
                   {{static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32)},
                    {static_cast<uint32_t>(second), static_cast<uint32_t>(second >> 32)}}};
  }
  if (ScanTeam::rank() == 0) plan.num_pair_segments[slot] = found;
}

/// CTAs 3 s, 3 s + 1 and 3 s + 2 list the columns, segments and pair segments of slot s.
__global__ void __launch_bounds__(ScanTeam::kThreads)
    scan_lists_kernel(const __grid_constant__ Plan plan) {
  __shared__ int32_t scratch[kScanWarps];
  const int64_t slot = blockIdx.x / 3;
  switch (blockIdx.x % 3) {
    case 0:
      return list_columns(plan, slot, scratch);
    case 1:
      return list_segments(plan, slot, scratch);
    default:
      return list_pair_segments(plan, slot, scratch);
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
  const int64_t cover_ctas = cuda::ceil_div(sizes.cover_words(), kMarkThreads);
  if (!cuda::grid_fits(slots * ctas_per_slot) || !cuda::grid_fits(slots * cover_ctas)) {
    return {1, "plan_vertical_slash: more index entries than a grid can hold"};
  }
  const size_t bytes = slots * sizes.cover_words() * sizeof(uint32_t);
  Status status = cuda::to_status(cudaMemsetAsync(plan.offset_bits, 0, bytes, stream));
  if (!status.ok()) return status;
  status = cuda::to_status(cudaMemsetAsync(plan.column_bits, 0, bytes, stream));
  if (!status.ok()) return status;
  if (ctas_per_slot > 0) {
    mark_lists_kernel<<<static_cast<unsigned>(slots * ctas_per_slot), kMarkThreads, 0, stream>>>(
        plan, columns, offsets, static_cast<int32_t>(ctas_per_slot));
    status = cuda::launch_status();
    if (!status.ok()) return status;
  }
  cover_kernel<<<static_cast<unsigned>(slots * cover_ctas), kMarkThreads, 0, stream>>>(
      plan, static_cast<int32_t>(cover_ctas));
  status = cuda::launch_status();
  if (!status.ok()) return status;
  scan_lists_kernel<<<static_cast<unsigned>(3 * slots), ScanTeam::kThreads, 0, stream>>>(plan);
  return cuda::launch_status();
}

}  // namespace sparseattn
