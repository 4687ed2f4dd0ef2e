// What the producer hands to the consumers: tiles, and the boxes of keys of a tile.
#pragma once

#include <cstdint>

#include "common/cuda/ptx_sm90.cuh"
#include "sparseattn/plan.h"
#include "sparseattn/types.h"

namespace sparseattn::sm90 {

/// Query rows of a CTA: two tiles, one a consumer warpgroup.
constexpr int kConsumers = 2;
constexpr int kPairRows = kConsumers * kTileRows;
constexpr int kBoxRows = 64;
constexpr int kStageRows = 2 * kBoxRows;
constexpr int kConsumerWarps = 4;  // of one consumer

/// Lanes that arrive on a barrier for their warp: one, after __syncwarp has ordered what the others
/// did. compute-sanitizer's racecheck knows barriers only from the threads that arrive, so the
/// build for it (CMake: SPARSEATTN_RACECHECK) lets all of them arrive.
#ifdef SPARSEATTN_RACECHECK
inline constexpr int kArrivingLanes = 32;
#else
inline constexpr int kArrivingLanes = 1;
#endif

/// An arrival of the warp whose lanes have met since they last used what the barrier guards.
__device__ __forceinline__ void arrive_as_warp(cuda::MBarrier& barrier, int lane) {
  if (lane < kArrivingLanes) barrier.arrive();
}

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
  /// In place of a pair: there are no more tiles.
  static constexpr uint32_t kStop = 1u << 16;
  int32_t start;
  uint32_t flags;
  uint32_t bits[kConsumers][2];  // bit j: key start + j

  __device__ int count() const { return static_cast<int>(flags / kCount & 0xff); }
  __device__ uint32_t owners() const { return flags & (kOwner << kConsumers) - 1; }
  __device__ bool masked(int w) const { return flags >> w & (kMasked | kByRow); }
  __device__ bool masked() const { return flags & (kMasked | kByRow) * 3; }
  /// Makes w an owner that sees nothing.
  __device__ void hide_from(int w) {
    flags = (flags | kOwner << w | kMasked << w) & ~(kByRow << w);
    bits[w][0] = bits[w][1] = 0;
  }
};
static_assert(sizeof(Box) == 24);

/// What a consumer does with a pair of boxes, in a word. Consumers take turns in issuing their
/// products (consumer.h).
struct PairWord {
  static constexpr uint32_t kStep = 1;   // it owns the pair: a step
  static constexpr uint32_t kPass = 2;   // it does not, and passes a turn on
  static constexpr uint32_t kMask = 4;   // kMask << i: box i is masked
  static constexpr uint32_t kNext = 16;  // it owns the tile's next pair, too
  static constexpr uint32_t kEnd = 32;   // the tile's last pair
  static constexpr uint32_t kEven = 64;  // after it, passes one more turn on

  uint32_t bits;

  __device__ bool has(uint32_t flag) const { return bits & flag; }
};

/// Two boxes of the same owners, and what each consumer does with them.
struct Pair {
  Box boxes[2];
  PairWord words[kConsumers];
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
