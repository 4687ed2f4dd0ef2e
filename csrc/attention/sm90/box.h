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
  int32_t start;
  uint32_t flags;
  uint32_t bits[kConsumers][2];  // bit j: key start + j
  int32_t count;
};
static_assert(sizeof(Box) == 32);

/// What a consumer does in one round, in a word: the stages of the two boxes of its step, the
/// parities of their phases, and flags. A word without kStep passes the turn on.
struct RoundWord {
  static constexpr uint32_t kStep = 1u << 18;
  static constexpr uint32_t kSingle = 1u << 19;  // one box, named twice; its second use is masked
  static constexpr uint32_t kMask = 1u << 20;    // kMask << i: box i is masked
  static constexpr uint32_t kEnd = 1u << 22;     // the tile's last round

  uint32_t bits;

  __device__ int stage(int box) const { return static_cast<int>(bits >> 8 * box & 0xff); }
  __device__ uint32_t parity(int box) const { return bits >> (16 + box) & 1; }
  __device__ bool has(uint32_t flag) const { return bits & flag; }

  /// The part of a word that names box 0.
  static __device__ uint32_t of_box(int stage, uint32_t parity, bool masked) {
    return static_cast<uint32_t>(stage) | parity << 16 | (masked ? kMask : 0);
  }
  /// The same for box 1.
  static __device__ uint32_t second(uint32_t of_box) {
    return (of_box & 0xff) << 8 | (of_box & ~0xffu) << 1;
  }
};

/// A pair of query tiles of one head. sequence < 0: there are no more.
struct alignas(16) Tile {
  int32_t sequence;
  int32_t head;
  int32_t first_row;
  int32_t q_len;  // of the sequence
  int32_t kv_len;
  HeadTask task;
};

/// Positions of the rows of a pair's two tiles.
struct PairScope {
  int kv_len;
  int end[kConsumers];    // of a full tile
  int first[kConsumers];  // position of the first row
  int last[kConsumers];   // one past the last key that any row may see; 0: the tile has no rows

  __device__ explicit PairScope(const Tile& tile) : kv_len(tile.kv_len) {
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      const int row = tile.first_row + kTileRows * w;
      first[w] = tile.kv_len - tile.q_len + row;
      end[w] = first[w] + kTileRows;
      last[w] = row < tile.q_len ? min(end[w], tile.kv_len) : 0;
    }
  }
  __device__ int last_of_pair() const { return max(last[0], last[1]); }
};

}  // namespace sparseattn::sm90
