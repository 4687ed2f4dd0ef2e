// Words shared by every layer of the kernel library: shapes, strided views, patterns, status.
#pragma once

#include <cstdint>

namespace sparseattn {

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

/// Query rows are taken in tiles of this many rows; the cover rule of an offset is stated per tile.
constexpr int32_t kTileRows = 64;

/// A `window` that excludes nothing.
constexpr int32_t kNoWindow = INT32_MAX;

/// Sizes of one prefill call. Query row i is at position i + kv_len - q_len (bottom-right aligned);
/// query head h reads key/value head h / (q_heads / kv_heads).
struct Shape {
  int32_t batch;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t q_len;
  int32_t kv_len;
  int32_t head_dim;

  constexpr int32_t group() const { return q_heads / kv_heads; }
  constexpr int32_t q_tiles() const { return (q_len + kTileRows - 1) / kTileRows; }
  /// One past the last position of query tile `tile` if the tile were full. May exceed kv_len.
  constexpr int32_t tile_end(int32_t tile) const { return kv_len - q_len + kTileRows * (tile + 1); }
};

/// Four-dimensional tensor [batch, heads, rows, head_dim]: element strides, head_dim contiguous.
struct View {
  void* data;
  int64_t batch_stride;
  int64_t head_stride;
  int64_t row_stride;
};

enum class PatternKind : int32_t {
  kDense = 0,
  kAShape = 1,         // a = sink, b = window
  kVerticalSlash = 2,  // a = number of columns, b = number of offsets
  kBlockSparse = 3,    // a = top_k blocks in a row
};

/// A share of attention mass travels as an integer number of millionths; 0 asks for no share.
constexpr int32_t kWholeShare = 1000000;

/// The pattern of one query head, as the host states it.
struct Pattern {
  PatternKind kind;
  int32_t a;
  int32_t b;
  int32_t share = 0;   // kVerticalSlash, kBlockSparse: millionths; a and b are limits then
  int32_t stride = 0;  // kBlockSparse: antidiagonal scores of this stride; 0: means
};

/// Result of a library call. `what` is a static string, null when all is well.
struct Status {
  int32_t code = 0;
  const char* what = nullptr;
  constexpr bool ok() const { return what == nullptr; }
};

}  // namespace sparseattn
