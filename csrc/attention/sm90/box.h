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
constexpr int kStageRows = 2 * kBoxRows;
constexpr int kConsumerWarps = 4;  // of one consumer

/// 64 rows of keys, or of a head's packed columns, from `start` on. Rows outside the tensor are
/// zeros. A consumer that is not an owner sees none of the keys. Boxes are loaded and computed in
/// pairs, both of the same owners (pairing.h).
struct alignas(8) Box {
  // Of consumer w: kOwner << w, ...
  static constexpr uint32_t kOwner = 1;   // sees some of the keys, or of its partner's
  static constexpr uint32_t kMasked = 4;  // does not see all: `bits` say which may be seen ...
  static constexpr uint32_t kByRow = 16;  // ... and some rows see fewer
  static constexpr uint32_t kPacked = 64;
  /// Only the first count() rows may be read: those after them may be seen by no row of the call.
  static constexpr uint32_t kRagged = 128;
  static constexpr uint32_t kCount = 256;  // its unit in the flags
  // In place of a pair: the tile has no more, or there are no more tiles.
  static constexpr uint32_t kTileEnd = 1u << 16;
  static constexpr uint32_t kStop = 1u << 17;
  int32_t start;
  uint32_t flags;
  uint32_t bits[kConsumers][2];  // bit j: key start + j

  __device__ int count() const { return static_cast<int>(flags / kCount & 0xff); }
  __device__ uint32_t owners() const { return flags & (kOwner << kConsumers) - 1; }
  __device__ bool masked(int w) const { return flags >> w & (kMasked | kByRow); }
  /// Makes w an owner that sees nothing.
  __device__ void hide_from(int w) {
    flags = (flags | kOwner << w | kMasked << w) & ~(kByRow << w);
    bits[w][0] = bits[w][1] = 0;
  }
};
static_assert(sizeof(Box) == 24);

/// What a consumer does in one round, in a word: the stage of its step, the parity of the stage's
/// phase, and flags. A word without kStep passes the turn on.
struct RoundWord {
  static constexpr uint32_t kParity = 1u << 8;
  static constexpr uint32_t kStep = 1u << 9;
  static constexpr uint32_t kMask = 1u << 10;  // kMask << i: box i of the stage is masked
  static constexpr uint32_t kEnd = 1u << 12;   // the tile's last round

  uint32_t bits;

  __device__ int stage() const { return static_cast<int>(bits & 0xff); }
  __device__ uint32_t parity() const { return bits / kParity & 1; }
  __device__ bool has(uint32_t flag) const { return bits & flag; }
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
  /// first[w] and last[w] for a w that is not known before: no indexed array, which would be
  /// memory.
  __device__ int first_of(int w) const { return w == 0 ? first[0] : first[1]; }
  __device__ int last_of(int w) const { return w == 0 ? last[0] : last[1]; }
  __device__ int last_of_pair() const { return max(last[0], last[1]); }
};

}  // namespace sparseattn::sm90
