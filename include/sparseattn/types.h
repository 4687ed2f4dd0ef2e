// Words shared by every layer of the kernel library: shapes, strided views, patterns, status.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define SPARSEATTN_HOST_DEVICE __host__ __device__
#else
#define SPARSEATTN_HOST_DEVICE
#endif

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

/// One length for each sequence of a batch, in the memory of the device that computes.
struct LengthList {
  const void* data = nullptr;  // [batch], or null: the whole length for all
  bool wide = false;           // int64 rather than int32
  int64_t stride = 1;          // elements, zero allowed

  /// Length of `sequence`, within [0, most].
  SPARSEATTN_HOST_DEVICE int32_t at(int64_t sequence, int32_t most) const {
    if (data == nullptr) return most;
    const int64_t index = sequence * stride;
    const int64_t length =
        wide ? static_cast<const int64_t*>(data)[index] : static_cast<const int32_t*>(data)[index];
    return length < 0 ? 0 : length > most ? most : static_cast<int32_t>(length);
  }
};

/// A batch of sequences of unequal length, padded at the end to the lengths of the Shape: sequence
/// b has query rows 0 .. q[b]-1 and keys 0 .. kv[b]-1, aligned at the end by themselves. Rows past
/// q[b] come out empty, and nothing past either length is read. By default all have the whole
/// lengths.
struct Lengths {
  LengthList q;
  LengthList kv;
};

/// The shape of one sequence: q_len and kv_len are its own, 0 <= q_len <= kv_len. A sequence
/// without query rows has no keys either: nothing would see them.
SPARSEATTN_HOST_DEVICE inline Shape sequence_shape(const Shape& shape, const Lengths& lengths,
                                                   int64_t sequence) {
  Shape own = shape;
  own.kv_len = lengths.kv.at(sequence, shape.kv_len);
  own.q_len = lengths.q.at(sequence, own.kv_len < shape.q_len ? own.kv_len : shape.q_len);
  if (own.q_len == 0) own.kv_len = 0;
  return own;
}

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
