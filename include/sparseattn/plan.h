// The plan: the device-side form of all heads' indexes, and the calls that build one.
//
// Vertical-slash needs no per-row index. Relative to the end of a query tile the keys that a set of
// offsets covers are the same for every tile, so one list of segments per head is the whole slash
// index. Columns are packed once per head into contiguous rows that all tiles share.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "sparseattn/types.h"

namespace sparseattn {

/// Keys [e - distance - count, e - distance) of the query tile that ends at e, clipped to
/// [0, kv_len) of its sequence. 1 <= count <= 64. Segments of a head are disjoint, `distance`
/// ascending.
struct Segment {
  int32_t distance;
  int32_t count;
};

/// The slash index of two neighbouring query tiles that share their loads (rows 128 m .. 128 m +
/// 127 of a call, Hopper kernel). 64 keys from e - far on, where e is the end of the second tile;
/// bit j of visible[w] is set if tile w sees key e - far + j through its cover and no earlier
/// segment of the list holds that key. All 64 keys lie in the cover of one of the two tiles.
struct PairSegment {
  int32_t far;
  uint32_t visible[2][2];  // [tile][half]
};

/// What one query head of one sequence does. `slot` is the head's row in the arrays below.
struct HeadTask {
  PatternKind kind;
  int32_t sink;    // kAShape: keys [0, sink) are visible; otherwise 0
  int32_t window;  // kAShape: p - k < window is visible; otherwise kNoWindow
  int32_t slot;    // kVerticalSlash: [0, batch * vs_heads); kBlockSparse: [0, batch * bs_heads)
};

/// Sizes that fix the memory of a plan. `vs_heads` / `bs_heads` count the query heads of one
/// sequence whose pattern is vertical-slash / block-sparse; slot = sequence * heads + ordinal.
struct PlanSizes {
  Shape shape;
  DType dtype;          // of keys and values
  int32_t vs_heads;     //
  int32_t max_columns;  // entries in a row of the column lists given
  int32_t max_offsets;  // entries in a row of the offset lists given
  int32_t bs_heads;     //
  int32_t block_q;      // 64 or 128 when bs_heads > 0
  int32_t block_kv;     // 64 or 128 when bs_heads > 0

  Lengths lengths = {};  // of each sequence; memory and strides are those of the whole shape

  SPARSEATTN_HOST_DEVICE Shape shape_of(int64_t sequence) const {
    return sequence_shape(shape, lengths, sequence);
  }
  constexpr int32_t q_blocks() const { return (shape.q_len + block_q - 1) / block_q; }
  constexpr int32_t kv_blocks() const { return (shape.kv_len + block_kv - 1) / block_kv; }
  /// 32-bit words in one row of `block_bits`.
  constexpr int32_t block_words() const { return (kv_blocks() + 31) / 32; }
  /// Distances from a tile's end lie in [0, span), in a shorter sequence in [0, its kv_len + 64).
  constexpr int32_t span() const { return shape.kv_len + kTileRows; }
  /// 32-bit words in one row of `cover`.
  constexpr int32_t cover_words() const { return (span() + 31) / 32; }
  /// Rows of packed keys of one head: whole boxes of 64.
  constexpr int32_t packed_rows() const { return (max_columns + 63) / 64 * 64; }
  /// Most segments of a head: a run of covered keys is at least 64 long, so it takes one more
  /// segment than it is long in 64s at most, and so does each offset; pairs reach twice as far.
  constexpr int32_t max_segments() const {
    const int32_t by_span = span() / 64 + span() / 65 + 2;
    return max_offsets < by_span ? max_offsets : by_span;
  }
  constexpr int32_t max_pair_segments() const {
    const int32_t by_span = (span() + kTileRows) / 64 + (span() + kTileRows) / 129 + 2;
    return max_offsets < by_span / 2 ? 2 * max_offsets : by_span;
  }
};

/// All pointers are device memory inside one workspace (see carve_plan).
struct Plan {
  PlanSizes sizes;
  HeadTask* heads;             // [batch, q_heads]
  int32_t* vs_heads;           // [vs_heads] query head of each vertical-slash ordinal
  int32_t* vs_budget;          // [2, vs_heads] columns and offsets asked for (Pattern a and b)
  int32_t* vs_share;           // [vs_heads] Pattern share
  int32_t* bs_heads;           // [bs_heads]
  int32_t* bs_budget;          // [bs_heads] blocks asked for in a row
  int32_t* bs_share;           // [bs_heads] Pattern share
  int32_t* bs_stride;          // [bs_heads] Pattern stride
  int32_t* num_segments;       // [batch * vs_heads]
  int32_t* num_columns;        // [batch * vs_heads]
  Segment* segments;           // [batch * vs_heads, max_segments]
  int32_t* num_pair_segments;  // [batch * vs_heads]
  PairSegment* pair_segments;  // [batch * vs_heads, max_pair_segments] `far` ascending
  int32_t* columns;       // [batch * vs_heads, max_columns] ascending, distinct, in [0, kv_len)
  uint32_t* cover;        // [batch * vs_heads, cover_words] bit d: distance d lies in a segment
  uint32_t* column_bits;  // [batch * vs_heads, cover_words] scratch: bit c: column c is listed
  uint32_t* offset_bits;  // [batch * vs_heads, cover_words] scratch: bit o: offset o is listed
  void* packed_k;        // [batch * vs_heads, packed_rows, head_dim] keys of `columns`; zeros up to
                         //   the next multiple of 64 rows, the rest is never read
  void* packed_v;        // [batch * vs_heads, packed_rows, head_dim]
  uint32_t* block_bits;  // [batch * bs_heads, q_blocks, block_words] bit j: block j is selected
  uint32_t* next_tile;   // [1] tiles that a launch of the Hopper kernel has handed out
};

/// Bytes of device memory that a plan of these sizes takes.
size_t plan_bytes(const PlanSizes& sizes);
/// Lays a plan out in `workspace` (plan_bytes(sizes) bytes, aligned to 256). Touches no memory.
Plan carve_plan(const PlanSizes& sizes, void* workspace);

/// Fills heads and all that is [vs_heads] or [bs_heads] from `patterns` [q_heads], a host array
/// that is read before the call returns (it travels as kernel arguments, not as a copy).
Status plan_heads(const Plan& plan, const Pattern* patterns, cudaStream_t stream);

/// Index lists as the caller has them: any order, duplicates allowed, values outside
/// [0, kv_len + 63] select nothing (kv_len of the sequence). int32 or int64, element strides, zero
/// strides allowed.
struct IndexLists {
  const void* data;  // [batch, vs_heads, length]
  bool wide;         // int64 rather than int32
  int32_t length;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t stride;
};

/// Columns and offsets to segments, columns, cover.
Status plan_vertical_slash(const Plan& plan, const IndexLists& columns, const IndexLists& offsets,
                           cudaStream_t stream);
/// Copies the key and value rows of every head's columns into packed_k and packed_v.
Status pack_columns(const Plan& plan, const View& k, const View& v, cudaStream_t stream);

/// bool [batch, bs_heads, q_blocks, kv_blocks], strides in bytes, zero strides allowed.
struct BlockMask {
  const uint8_t* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
  int64_t stride;
};
Status plan_block_sparse(const Plan& plan, const BlockMask& mask, cudaStream_t stream);

}  // namespace sparseattn
