// What the kernels of the vertical-slash estimate share: how one launch is cut into CTAs, and where
// its intermediate results lie.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparseattn/estimate.h"

namespace sparseattn::index_sm80 {

/// A stage of keys in shared memory; also the step by which diagonal sums are handed out.
constexpr int kStepKeys = 32;
/// A chunk is longer than the 63 diagonals by which it overlaps its neighbour.
constexpr int kMinChunkKeys = 256;
constexpr int kMaxChunks = 1024;
/// Lists of so many keys get candidates first (select_candidates.cu), at most so many.
constexpr int32_t kLongList = 1 << 16;
constexpr int32_t kMostCandidates = 1 << 16;
constexpr int32_t kPieceKeys =
    1 << 15;  // of a list, for a CTA; more where there are over kMostPieces
constexpr int32_t kMostPieces = 64;
/// The first digit of a key: 11 bits, as of the selection itself.
constexpr int kFirstShift = 21;
constexpr int kFirstBins = 1 << (32 - kFirstShift);
/// Query heads of one key/value head in a CTA, one warp each.
constexpr int kMaxHeadsPerCta = 4;

/// A unit is one key/value head of one sequence; a row of the intermediates belongs to one of its
/// query heads: row = (unit - first_unit) * group + head % group.
struct VerticalSlashJob {
  VerticalSlashEstimate in;
  int32_t first_unit;
  int32_t units;
  int32_t heads_per_cta;  // 1, 2 or 4
  int32_t ctas_per_chunk;
  int32_t chunk_keys;  // multiple of kStepKeys, at least kMinChunkKeys
  int32_t chunks;
  int32_t max_chunks;   // row length of `spill` and `partial`
  int64_t mass_stride;  // row length of the masses
  float scale_log2;     // scale times log2(e)
  float* column_mass;   // [rows, mass_stride] column c at c
  float* offset_mass;   // [rows, mass_stride] offset o at o
  float* spill;         // [rows, max_chunks, 64] what a chunk adds to its neighbour's offsets
  float2* partial;      // [rows, max_chunks, 64] of a chunk and query row: maximum of the scores
                        //   in base 2, sum of 2^(score - maximum)
  float* normalizer;    // [rows, 64] log2 of a query row's sum over all keys; +inf: not a row
  // Of long lists, null where there are none; 2 r is the list of columns of row r, 2 r + 1 that of
  // its offsets.
  int32_t pieces;        // CTAs that share a list
  int32_t* histogram;    // [2 * rows, kFirstBins] keys of each first digit
  int32_t* piece_count;  // [2 * rows, pieces] candidates
  int32_t* candidates;   // [2 * rows, kMostCandidates] ascending
  // Of heads with a share; null where no head has one. See index/mass.h.
  int32_t runs;          // runs of 64 offsets, the last one shorter
  float* run_mass;       // [rows, runs]
  uint64_t* column_sum;  // [rows, runs] fixed-point mass of columns 64 j .. 64 j + 63
  int32_t* run_list;     // [rows, runs] scratch: runs that the limit has room for

  __host__ __device__ bool any_share() const { return in.shares != nullptr || in.share > 0; }
  __host__ __device__ int64_t rows() const {
    return static_cast<int64_t>(units) * (in.shape.q_heads / in.shape.kv_heads);
  }
};

/// What the estimate reads of one sequence. Offsets are counted from the first query row used, at
/// position `origin`. A sequence without query rows has no keys: kv_len is 0.
struct SequenceScope {
  int32_t kv_len;
  int32_t first_query;  // of the query rows used
  int32_t query_rows;   // min(last_q, q_len)
  int32_t origin;       // kv_len - query_rows
  int32_t chunks;       // that hold keys of it
};

__host__ __device__ inline SequenceScope sequence_scope(const VerticalSlashJob& job,
                                                        int64_t sequence) {
  const Shape own = sequence_shape(job.in.shape, job.in.lengths, sequence);
  const int32_t rows = job.in.last_q < own.q_len ? job.in.last_q : own.q_len;
  return {own.kv_len, own.q_len - rows, rows, own.kv_len - rows,
          own.kv_len / job.chunk_keys + (own.kv_len % job.chunk_keys != 0)};
}

/// First pass over the keys: fills `partial`. Instantiated in inst/ for head_dim 64, 96, 128.
template <int kHeadDim>
Status launch_row_sums(const VerticalSlashJob& job, cudaStream_t stream);
/// Second pass: fills the masses and `spill`.
template <int kHeadDim>
Status launch_masses(const VerticalSlashJob& job, cudaStream_t stream);

/// Between the passes: `partial` to `normalizer`.
Status launch_normalizers(const VerticalSlashJob& job, cudaStream_t stream);
/// Before the selection, where there are long lists: their candidates, and the offsets' masses with
/// what chunks spilled.
Status launch_select_candidates(const VerticalSlashJob& job, cudaStream_t stream);
/// After them: masses to the lists of columns and offsets of the job's heads. Heads with a share
/// get the columns of largest mass that their limit has room for.
Status launch_select_indices(const VerticalSlashJob& job, cudaStream_t stream);
/// After that, for heads with a share: the columns kept of these, and the offsets.
Status launch_select_share(const VerticalSlashJob& job, cudaStream_t stream);

}  // namespace sparseattn::index_sm80
