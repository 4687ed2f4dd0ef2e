// What the producer hands to the consumers: tiles, and the boxes of keys of a tile.
#pragma once

#include <cstdint>

#include "sparseattn/plan.h"
#include "sparseattn/types.h"

namespace sparseattn::sm90 {

/// Query rows of a CTA: two tiles, one a consumer warpgroup.
constexpr int kConsumers = 2;
constexpr int kPairRows = kConsumers * kTileRows;
constexpr int kBoxRows = 64;
constexpr int kConsumerWarps = 4;  // of one consumer

/// 64 rows of keys, or of a head's packed columns, from `start` on. Rows outside the tensor are
/// zeros. A consumer that is not an owner sees none of the keys.
struct alignas(16) Box {
  // Of consumer w: kOwner << w, ...
  static constexpr uint32_t kOwner = 1;   // sees some of the keys
  static constexpr uint32_t kMasked = 4;  // does not see all: `bits` say which may be seen ...
  static constexpr uint32_t kByRow = 16;  // ... and some rows see fewer
  static constexpr uint32_t kPacked = 64;
  /// Only the first `count` rows may be read: those after them may be seen by no row of the call.
  static constexpr uint32_t kRagged = 128;
  // Set as the box is handed to the consumers.
  static constexpr uint32_t kRound = 256;  // the last box of a round
  static constexpr uint32_t kStep = 512;   // consumer w computes with the one or two boxes it holds
  static constexpr uint32_t kEnd = 2048;   // no box at all: the tile is over

  int32_t start;
  uint32_t flags;
  uint32_t bits[kConsumers][2];  // bit j: key start + j
  int32_t count;

  __device__ bool owned_by(int consumer) const { return flags >> consumer & kOwner; }
};
static_assert(sizeof(Box) == 32);

/// A pair of query tiles of one head. sequence < 0: there are no more.
struct alignas(16) Tile {
  int32_t sequence;
  int32_t head;
  int32_t first_row;
  HeadTask task;
};

/// Positions of the rows of a pair's two tiles.
struct PairScope {
  int kv_len;
  int end[kConsumers];    // of a full tile
  int first[kConsumers];  // position of the first row
  int last[kConsumers];   // one past the last key that any row may see; 0: the tile has no rows

  __device__ PairScope(const Shape& shape, int first_row) : kv_len(shape.kv_len) {
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      const int row = first_row + kTileRows * w;
      first[w] = shape.kv_len - shape.q_len + row;
      end[w] = first[w] + kTileRows;
      last[w] = row < shape.q_len ? min(end[w], shape.kv_len) : 0;
    }
  }
  __device__ int last_of_pair() const { return max(last[0], last[1]); }
};

}  // namespace sparseattn::sm90
