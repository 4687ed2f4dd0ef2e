// ShadowKV decode (arXiv 2410.21465): parameters of its steps, and the CPU functions that run them.
//
// The keys of a prompt become a low-rank factor (before RoPE), landmarks (means of `chunk`
// neighbouring keys after RoPE) and a few chunks that stay exact; values go to a store. A step
// selects chunks by their landmarks, plans which of their values are still in a slot, fetches the
// others, and attends: exact rows as they are, selected chunks with rebuilt keys.
//
// Chunk j of a sequence is its tokens [j * chunk, (j + 1) * chunk), and token n is at RoPE position
// n. Lists of chunk ids are int32, contiguous, -1 where there is nothing. All pointers are memory
// of the device that computes, and what changes from step to step lies there: a captured launch
// reads it anew. Numbers read there are clamped or dropped, never trusted with an address.
#pragma once

#include <cstddef>
#include <cstdint>

#include "sparseattn/cpu.h"
#include "sparseattn/types.h"

struct CUstream_st;  // what a cudaStream_t points to

namespace sparseattn {

/// Sums from which the basis of a sequence's keys is computed, added to what is there. Keys come
/// before RoPE, and their heads side by side: width = kv_heads * head_dim.
struct ShadowGram {
  int32_t batch;
  int32_t kv_heads;
  int32_t rows;
  int32_t head_dim;
  DType dtype;
  View k;           // [batch, kv_heads, rows, head_dim]
  LengthList lens;  // rows of each sequence that count
  double* gram;     // [batch, width, width] += k^T k, both triangles
  double* total;    // [batch, width] += sum of the rows
  int64_t* count;   // [batch] += rows
};

/// Landmarks of the whole chunks among `rows` rows of keys after RoPE. Chunk j of the call becomes
/// chunk first_chunk[b] + j of sequence b; what has no room is dropped.
struct ShadowLandmarks {
  int32_t batch;
  int32_t kv_heads;
  int32_t rows;
  int32_t head_dim;
  int32_t chunk;   // 4, 8, 16 or 32
  int32_t chunks;  // room for each sequence
  DType dtype;
  View k;                  // [batch, kv_heads, rows, head_dim]
  LengthList lens;         // rows of each sequence that count
  LengthList first_chunk;  // 0 for all where there is no data
  View landmarks;          // out [batch, kv_heads, chunks, head_dim] of `dtype`
  float* min_cosine;       // out [batch, kv_heads, chunks], or null: smallest cosine of a chunk's
                           //   keys to their mean; 0 where one of the two is zero
};

/// The chunks that stay exact: [0, sink_chunks) first, then those of smallest min_cosine; equals,
/// and NaN last, by the smaller id.
struct ShadowOutliers {
  int32_t batch;
  int32_t kv_heads;
  int32_t chunks;
  int32_t count;  // asked for
  int32_t sink_chunks;
  const float* min_cosine;  // [batch, kv_heads, chunks]
  LengthList num_chunks;    // chunks of each sequence
  int32_t* outliers;        // out [batch, kv_heads, count] ascending, then -1
};

/// The top_k chunks by landmark score. With s = q . landmark * scale and the softmax of each query
/// row over the sequence's candidates (excluded chunks are none), a chunk's score is the largest
/// log-probability that a row of the group gives it, in fp32. Equal scores go by the smaller id.
struct ShadowSelect {
  int32_t batch;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t q_len;
  int32_t chunks;
  int32_t head_dim;
  int32_t top_k;
  DType dtype;
  View q;                   // [batch, q_heads, q_len, head_dim] after RoPE
  View landmarks;           // [batch, kv_heads, chunks, head_dim]
  LengthList q_lens;        // query rows of each sequence
  LengthList num_chunks;    // chunks of each sequence; the landmarks of others are not read
  const uint8_t* excluded;  // bool [batch, kv_heads, chunks], or null
  float scale;
  int32_t* selected;  // out [batch, kv_heads, top_k] ascending, then -1
};

/// Where the values of the selected chunks are or go: `slots` >= top_k places for each key/value
/// head. A chunk that is in a slot stays there. The others, by ascending place in the list, take
/// the slots that hold none of the selected chunks, least recently used first, then lower slots.
/// The slots of all selected chunks are stamped with 1 + the largest stamp of the head.
struct ShadowPlan {
  int32_t batch;
  int32_t kv_heads;
  int32_t top_k;
  int32_t slots;
  const int32_t* selected;  // [batch, kv_heads, top_k] distinct
  int32_t* slot_chunk;      // [batch, kv_heads, slots] in and out, -1: empty
  int32_t* last_used;       // [batch, kv_heads, slots] in and out, 0: never
  int32_t* slot_of;         // out [batch, kv_heads, top_k] slot of each selected chunk, -1 for -1
  int32_t* misses;          // out [batch, kv_heads, top_k, 2] (slot, chunk), then -1
  int32_t* miss_count;      // out [batch, kv_heads]
};

/// Where rows are quantised: a number of row r is its e4m3 (fp8 with 3 bits of mantissa, as in
/// torch.float8_e4m3fn) times the fp32 scale of r. Without data rows are of the call's dtype.
struct RowScales {
  float* data = nullptr;  // [batch, heads, rows], rows contiguous
  int64_t batch_stride = 0;
  int64_t head_stride = 0;

  constexpr bool quantised() const { return data != nullptr; }
  SPARSEATTN_HOST_DEVICE float* of_head(int64_t sequence, int64_t head) const {
    return data + sequence * batch_stride + head * head_stride;
  }
};

constexpr float kLargestE4m3 = 448.0f;

/// Writes rows into a store, `group` of them side by side: rows j * group .. of x become row
/// first + j. Where the store has scales they are quantised, by a scale of the largest magnitude
/// (of what is not NaN) / 448: x / scale, rounded to fp32, becomes the nearest e4m3, ties to even,
/// at most 448. NaN stays NaN; a row with an infinity becomes NaN.
struct StoreRows {
  int32_t batch;
  int32_t heads;
  int32_t rows;  // of x, a multiple of `group`
  int32_t dim;
  int32_t group;
  int32_t first;
  DType dtype;       // of x, and of the store unless it is quantised
  View x;            // [batch, heads, rows, dim]
  View store;        // out [batch, heads, first + rows / group or more, group * dim]; may be pinned
                     //   host memory of the device that computes
  RowScales scales;  // out, of the store
};

/// Copies missed chunks from the store into their slots. Views are of rows of a whole chunk.
/// Quantised ones come out as their numbers, rounded to dtype.
struct GatherValues {
  int32_t batch;
  int32_t kv_heads;
  int32_t top_k;
  int32_t chunks;
  int32_t slots;
  int64_t row_bytes;          // of a chunk of one head in `values`: chunk * head_dim elements
  DType dtype;                // of values, and of the store unless it is quantised
  View store;                 // [batch, kv_heads, chunks, chunk * head_dim]; may be pinned host
                              //   memory of the device that computes
  View values;                // out [batch, kv_heads, slots, chunk * head_dim]
  const int32_t* misses;      // [batch, kv_heads, top_k, 2] (slot, chunk); others are dropped
  const int32_t* miss_count;  // [batch, kv_heads]
  RowScales store_scales;     // memory of the device
};

/// Rotary position embedding. Pair i of a key at position n turns by the angle n * inv_freq[i],
/// the product rounded to fp32 as models compute it; cosine and sine are of that angle, times
/// `scale`. Pairs are dims (2i, 2i + 1) if interleaved, else (i, i + rotary_dim / 2); dims from
/// rotary_dim on are left alone.
struct Rope {
  const float* inv_freq;  // [rotary_dim / 2]
  int32_t rotary_dim;     // even, 0 .. head_dim; 0: no rotation
  bool interleaved;
  float scale;
};

/// Keys before RoPE of keys after it, heads side by side. Row n is at position first + n; of a pair
/// (a, b) there become (a cos + b sin) / scale and (b cos - a sin) / scale, less the mean, in fp32
/// and rounded once.
struct ShadowUndoRope {
  int32_t batch;
  int32_t kv_heads;
  int32_t rows;
  int32_t head_dim;
  int32_t first;  // first + rows < 2^31
  DType dtype;    // of k and out
  View k;         // [batch, kv_heads, rows, head_dim] after RoPE
  View out;       // out, the same shape: memory of [batch, rows, kv_heads, head_dim]; not that of k
  const float* mean;  // [batch, kv_heads, head_dim], or null: zero
  Rope rope;          // scale is not 0
};

/// Keys of a prompt at low rank: key(n, head) = rope(factor[n] . basis[head] + mean[head], n). The
/// scale of a quantised row of the factor multiplies its product with the basis.
struct LowRankKeys {
  int32_t rows;  // tokens
  int32_t rank;  // a multiple of 16
  int32_t chunk;
  View factor;        // [batch, (one head), rows, rank]
  View basis;         // [batch, kv_heads, rank, head_dim]
  const float* mean;  // [batch, kv_heads, head_dim], or null: zero
  Rope rope;
  RowScales factor_scales;
};

/// Rebuilt keys of chunks. A list entry that is no chunk of `rows` tokens gives zeros.
struct LowRankReconstruct {
  int32_t batch;
  int32_t kv_heads;
  int32_t head_dim;
  int32_t top_k;
  DType dtype;  // of factor (unless it is quantised), basis and out
  LowRankKeys keys;
  const int32_t* selected;  // [batch, kv_heads, top_k]
  View out;                 // [batch, kv_heads, top_k * chunk, head_dim]
};

/// Decode attention. Sequence b has the exact rows [exact_starts[b], exact_lens[b]), the last of
/// which belong to its queries: query row i of q_lens[b] sees those up to row
/// exact_lens[b] - q_lens[b] + i, and all tokens of the selected chunks.
struct ShadowAttention {
  Shape shape;  // kv_len: rows of the exact buffer
  DType dtype;  // of q, k, v, out, factor (unless it is quantised), basis and values
  View q;       // [batch, q_heads, q_len, head_dim] after RoPE
  View k;       // [batch, kv_heads, kv_len, head_dim] after RoPE
  View v;       // [batch, kv_heads, kv_len, head_dim]
  View out;     // [batch, q_heads, q_len, head_dim]; 0 past q_lens, or where nothing is seen
  float* lse;   // [batch, q_heads, q_len] natural log, -inf where nothing is seen; may be null
  float scale;
  LengthList q_lens;
  LengthList exact_lens;
  LengthList exact_starts;  // 0 for all where there is no data
  LowRankKeys keys;
  int32_t top_k;
  int32_t slots;
  const int32_t* selected;  // [batch, kv_heads, top_k] distinct; an entry counts if it is a chunk
  const int32_t* slot_of;   // [batch, kv_heads, top_k]           of keys.rows tokens in a slot
  View values;  // [batch, kv_heads, slots, chunk * head_dim], row_stride chunk * head_dim
};

/// A length of each sequence that is 0 where nothing is given.
SPARSEATTN_HOST_DEVICE inline int32_t start_of(const LengthList& list, int64_t sequence,
                                               int32_t most) {
  return list.data == nullptr ? 0 : list.at(sequence, most);
}

namespace cpu {
// fp32 or bf16, sums in fp32; head_dim 16, 32, 64, 96 or 128.
Status shadow_undo_rope(const ShadowUndoRope& params, const ParallelFor& parallel_for);
Status shadow_gram(const ShadowGram& params, const ParallelFor& parallel_for);
Status shadow_landmarks(const ShadowLandmarks& params, const ParallelFor& parallel_for);
Status shadow_outliers(const ShadowOutliers& params, const ParallelFor& parallel_for);
Status shadow_select(const ShadowSelect& params, const ParallelFor& parallel_for);
Status shadow_plan(const ShadowPlan& params, const ParallelFor& parallel_for);
Status store_rows(const StoreRows& params, const ParallelFor& parallel_for);
Status gather_values(const GatherValues& params, const ParallelFor& parallel_for);
Status lowrank_reconstruct(const LowRankReconstruct& params, const ParallelFor& parallel_for);
Status shadow_attention(const ShadowAttention& params, const ParallelFor& parallel_for);
}  // namespace cpu

// CUDA, sm_80 and newer: fp16 or bf16, head_dim 64, 96 or 128. Rows of keys, queries, landmarks and
// values start on 16-byte boundaries. `workspace` is as many bytes of the device as the function
// beside says for the current device, on a 256-byte boundary; launches that may run at the same
// time need one each.
/// The mean starts on a 16-byte boundary, too.
Status shadow_undo_rope(const ShadowUndoRope& params, CUstream_st* stream);
size_t shadow_gram_bytes(const ShadowGram& params);
Status shadow_gram(const ShadowGram& params, void* workspace, CUstream_st* stream);
Status shadow_landmarks(const ShadowLandmarks& params, CUstream_st* stream);
Status shadow_outliers(const ShadowOutliers& params, CUstream_st* stream);
size_t shadow_select_bytes(const ShadowSelect& params);
Status shadow_select(const ShadowSelect& params, void* workspace, CUstream_st* stream);
size_t shadow_plan_bytes(const ShadowPlan& params);
Status shadow_plan(const ShadowPlan& params, void* workspace, CUstream_st* stream);
/// The stores may be memory of the device, managed, or pinned memory of the host, whose rows are
/// read and written over PCIe by the kernels themselves. Rows of the store and the values, and of x
/// and its groups, start on 16-byte boundaries.
Status store_rows(const StoreRows& params, CUstream_st* stream);
Status gather_values(const GatherValues& params, CUstream_st* stream);

// CUDA, from sm_80 on: fp16 or bf16 with sums in fp32; head_dim 64, 96 or 128. Rows of what is read
// and of `out` start at multiples of 16 bytes. A rank whose basis does not fit in shared memory is
// taken in pieces; up to 2000 or so fits so on every device. The stream is a cudaStream_t.
//
// Query rows of a key/value head go in blocks of 16, each of which rebuilds the keys for itself:
// one block at decode, where q_len is 1 and a group has up to 16 heads. Results of a call are the
// same bit for bit; those of a sequence may differ in rounding with the batch it is in, as more
// CTAs share its keys in a small batch. `workspace` is as many bytes of device memory as
// shadow_attention_bytes says for the current device, on a 256-byte boundary.
size_t shadow_attention_bytes(const ShadowAttention& params);
Status shadow_attention(const ShadowAttention& params, void* workspace, CUstream_st* stream);
Status lowrank_reconstruct(const LowRankReconstruct& params, CUstream_st* stream);

}  // namespace sparseattn
