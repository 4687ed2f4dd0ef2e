// What the kernels of the selection share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

/// Row r of a key/value head is query row r / group of query head head * group + r % group, so the
/// rows of a sequence are the first ones. A round is as many rows as the scratch memory holds
/// scores of; rounds add up in the keys.
struct SelectJob {
  ShadowSelect in;
  int32_t group;
  int32_t rows;        // of a head
  int32_t tile_rows;   // 8, 16 or 32: rows that a CTA scores
  int32_t first_row;   // of the round
  int32_t round_rows;  // rows of this round
  int32_t most_rows;   // of all rounds
  int32_t splits;      // of the chunks of a head
  int32_t split_chunks;
  int64_t stride;   // row length of scores and keys, a multiple of 64
  float* scores;    // [heads, most_rows, stride] in log2 units, -inf for excluded chunks
  float2* partial;  // [heads, most_rows, splits] max, and sum of 2^(score - max)
  uint32_t* keys;   // [heads, stride] rank of each candidate, 0 for what is none

  __host__ __device__ int64_t heads() const { return static_cast<int64_t>(in.batch) * in.kv_heads; }
  __device__ bool is_candidate(int64_t head, int32_t chunk, int32_t num_chunks) const {
    return chunk < num_chunks &&
           (in.excluded == nullptr || in.excluded[head * in.chunks + chunk] == 0);
  }
};

/// Scores and partial sums of the round's rows.
Status launch_scores(const SelectJob& job, cudaStream_t stream);
/// Keys from the scores of the round, the larger of them and what is there after the first.
Status launch_ranks(const SelectJob& job, cudaStream_t stream);
/// The chunks of the largest keys.
Status launch_choose(const SelectJob& job, cudaStream_t stream);

}  // namespace sparseattn::shadow_sm80
