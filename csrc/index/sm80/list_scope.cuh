// One list that the vertical-slash selection makes: the columns or the offsets of a head entry.
#pragma once

#include "index/sm80/head_list.cuh"
#include "index/sm80/select.cuh"
#include "index/sm80/vertical_slash_job.h"

namespace sparseattn::index_sm80 {

/// List 2 i holds the columns of head entry i, list 2 i + 1 its offsets.
struct ListScope {
  SequenceScope own;
  int64_t entry;
  int64_t row;  // of the intermediates
  bool is_offsets;
  bool listed;  // made in this round, and not by launch_select_share
  int32_t n, k;
  int32_t forced;  // the first keys that are taken whatever their mass
  int32_t limit;
  float* mass;

  __device__ ListScope(const VerticalSlashJob& job, int64_t list) {
    const VerticalSlashEstimate& in = job.in;
    const Shape& shape = in.shape;
    const int group = shape.q_heads / shape.kv_heads;
    entry = list / 2;
    is_offsets = list % 2 != 0;
    const int64_t sequence = entry / in.heads;
    const int ordinal = static_cast<int>(entry % in.heads);
    const int head = listed_head(in.head_ids, ordinal);
    const int64_t unit = sequence * shape.kv_heads + head / group;
    listed = unit >= job.first_unit && unit < job.first_unit + job.units &&
             !(is_offsets && share_of(in.shares, ordinal, in.share) > 0);
    row = (unit - job.first_unit) * group + head % group;
    limit = is_offsets ? in.max_offsets : in.max_columns;
    forced = is_offsets ? in.local : in.sink;
    mass = (is_offsets ? job.offset_mass : job.column_mass) + row * job.mass_stride;
    own = sequence_scope(job, sequence);
    n = own.kv_len;
    k = min(budget_of(is_offsets ? in.num_offsets : in.num_columns, ordinal, limit), n);
  }

  /// Of the round's candidates, histograms and counts.
  __device__ int64_t slot() const { return 2 * row + is_offsets; }
  __device__ uint32_t key_at(int32_t i) const {
    return i < forced ? kForcedKey : order_key(mass[i]);
  }
  /// Whether the list is long enough that candidates are looked for first.
  __device__ bool has_candidates(const VerticalSlashJob& job) const {
    return listed && job.candidates != nullptr && n >= kLongList && k > 0 &&
           k <= kMostCandidates / 4;
  }

  /// Adds what chunks spill to the offsets [begin, end): diagonals 0 .. 63 of chunk c >= 1. Chunks
  /// are longer than 64, so no two meet.
  __device__ __forceinline__ void add_spill(const VerticalSlashJob& job, int32_t begin,
                                            int32_t end) const {
    const float* spill = job.spill + row * job.max_chunks * 64;
    for (int i = 64 + threadIdx.x; i < own.chunks * 64; i += blockDim.x) {
      const int offset = own.origin - i / 64 * job.chunk_keys + i % 64;
      if (offset >= begin && offset < end) mass[offset] += spill[i];
    }
  }
};

}  // namespace sparseattn::index_sm80
