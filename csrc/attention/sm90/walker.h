// Walkers turn a head's pattern and index into the boxes of a pair of query tiles.
//
// One warp calls fill() until it is done; each call writes up to kBatch boxes.
// Keys inside a box are loaded whatever its masks say, so every row of a box is seen by some row of
// the call, lies outside the tensor (zeros), or is cut off by kRagged.
#pragma once

#include <cstdint>

#include "attention/sm90/pairing.h"
#include "attention/sm90/traits.h"

namespace sparseattn::sm90 {

/// The tile lies in shared memory, and its scope is computed where it is needed: the planner's
/// registers are few.
struct WalkerContext {
  const Plan& plan;
  const Tile& tile;
  int lane;

  /// Boxes are made by the lanes below kBatch; the others do the same and keep nothing.
  __device__ int maker() const { return lane % kBatch; }
  __device__ bool makes() const { return lane < kBatch; }

  __device__ PairScope scope() const { return PairScope(tile); }
  __device__ int64_t slot() const { return tile.task.slot; }
};

/// Boxes written, and whether they were the last; the same for all lanes.
struct Filled {
  int count;
  bool done;
};

/// Writes the boxes of the lanes that have one, without gaps.
__device__ __forceinline__ int write_boxes(const Box& box, bool kept, int lane, Box* boxes) {
  const unsigned all = __ballot_sync(~0u, kept);
  if (kept) boxes[lanes_below(all, lane)] = box;
  return __popc(all);
}

/// A box of the keys [start, start + 64) of which [from, to) count, for the consumers in `owners`.
/// Rows see them up to their own position, or fewer where `by_row` says so.
struct RangeBox {
  const PairScope& scope;
  Box box;

  __device__ RangeBox(const PairScope& scope, int start, int from, int to)
      : scope(scope), box{start, 0, {{0, 0}, {0, 0}}} {
    const uint64_t bits = ~uint64_t{0} >> (64 - (to - from)) << (from - start);
    box.bits[0][0] = box.bits[1][0] = static_cast<uint32_t>(bits);
    box.bits[0][1] = box.bits[1][1] = static_cast<uint32_t>(bits >> 32);
    if (to - from < kBoxRows) box.flags |= Box::kMasked * 3;
  }
  __device__ void add_owner(int w, int to, bool by_row) {
    box.flags |= Box::kOwner << w;
    if (by_row || to - 1 > scope.first[w]) box.flags |= Box::kByRow << w;
  }
};

/// Cuts off the rows that are inside the tensor but belong to no row of the call: those at `limit`
/// and beyond.
__device__ __forceinline__ void cut(Box& box, int limit, int tensor_rows) {
  if (box.start + kBoxRows > limit && limit < tensor_rows) {
    box.flags |= Box::kRagged | (limit - box.start) * Box::kCount;
  }
}

/// Dense and A-shape: the union of the tiles' windows from its near end, then the sinks it does not
/// reach.
struct BandWalker {
  int cursor = 0;  // next box

  __device__ Filled fill(const WalkerContext& at, Box* boxes) {
    const PairScope scope = at.scope();
    const int window = at.tile.task.window, sink = at.tile.task.sink;
    const int last = scope.last_of_pair();
    // Keys from here on may be inside some row's window; with window 0 there are none. Tiles
    // without rows have no keys.
    const int window_start = window > 0 ? min(max(0, scope.first[0] + 1 - window), last) : last;
    const int sink_stop = min(sink, window_start);
    const int window_boxes = (last - window_start + kBoxRows - 1) / kBoxRows;
    const int total = window_boxes + (sink_stop + kBoxRows - 1) / kBoxRows;
    const int index = cursor + at.maker();
    cursor += kBatch;
    Box box;
    if (index < window_boxes) {
      box = window_box(at, last - kBoxRows * index, window_start);
    } else if (index < total) {
      box = sink_box(at, kBoxRows * (index - window_boxes), sink_stop);
    }
    const bool kept = at.makes() && index < total && box.owners() != 0;
    return {write_boxes(box, kept, at.lane, boxes), cursor >= total};
  }

 private:
  /// Keys up to `stop`; the last box of the window begins where the window does and masks what the
  /// box before it has.
  __device__ static Box window_box(const WalkerContext& at, int stop, int window_start) {
    const PairScope scope = at.scope();
    const int window = at.tile.task.window, sink = at.tile.task.sink;
    const int start = max(stop - kBoxRows, window_start);
    RangeBox made(scope, start, start, stop);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      // A tile's last row is the first to lose sight of a key, its first row the last.
      const bool leaves_window = scope.last[w] - 1 - start >= window && stop > sink;
      const bool in_window = scope.first[w] - (stop - 1) < window || start < sink;
      if (start < scope.last[w] && in_window) made.add_owner(w, stop, leaves_window);
    }
    cut(made.box, scope.kv_len, at.plan.sizes.shape.kv_len);
    return made.box;
  }
  /// Keys from `from` on; the last box ends where the sinks do.
  __device__ static Box sink_box(const WalkerContext& at, int from, int sink_stop) {
    const PairScope scope = at.scope();
    const int to = min(from + kBoxRows, sink_stop);
    RangeBox made(scope, to - kBoxRows, from, to);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      if (from < scope.last[w]) made.add_owner(w, to, false);
    }
    return made.box;
  }
};

/// The head's segments, near to far, then its packed columns.
struct SlashWalker {
  static constexpr int kChunks = 4;  // of 64 columns, whose loads are in flight together

  bool in_columns = false;
  int cursor = 0;  // next segment, or chunk of columns

  __device__ Filled fill(const WalkerContext& at, Box* boxes) {
    if (in_columns) return columns(at, boxes);
    const bool single = at.scope().last[1] == 0;
    const int count = single ? segments(at, boxes) : pair_segments(at, boxes);
    if (in_columns) cursor = 0;
    return {count, false};
  }

 private:
  /// The second tile has no rows: the first has the segments to itself.
  __device__ int segments(const WalkerContext& at, Box* boxes) {
    const PairScope scope = at.scope();
    const Plan& plan = at.plan;
    const int64_t slot = at.slot();
    const int index = cursor + at.maker(), total = plan.num_segments[slot];
    const Segment segment =
        index < total ? plan.segments[slot * plan.sizes.max_segments() + index] : Segment{0, 0};
    // A short segment ends a run: its box reaches back over the one before.
    const int from = max(scope.end[0] - segment.distance - segment.count, 0);
    const int to = min(scope.end[0] - segment.distance, scope.last[0]);
    Box box;
    if (from < to) {
      RangeBox made(scope, scope.end[0] - segment.distance - segment.count, from, to);
      made.add_owner(0, to, false);
      cut(made.box, scope.kv_len, plan.sizes.shape.kv_len);
      box = made.box;
    }
    cursor += kBatch;
    // Distances ascend: once one lies before key 0 all others do.
    in_columns = __any_sync(~0u, index >= total || scope.end[0] - segment.distance <= 0);
    return write_boxes(box, at.makes() && from < to, at.lane, boxes);
  }

  __device__ int pair_segments(const WalkerContext& at, Box* boxes) {
    const PairScope scope = at.scope();
    const Plan& plan = at.plan;
    const int64_t slot = at.slot();
    const int index = cursor + at.maker(), total = plan.num_pair_segments[slot];
    Box box{INT32_MIN, 0, {{0, 0}, {0, 0}}};
    if (index < total) {
      const PairSegment segment = plan.pair_segments[slot * plan.sizes.max_pair_segments() + index];
      box.start = scope.end[1] - segment.far;
      const int below = min(max(-box.start, 0), 64);  // keys before the first
      const int beyond = min(max(box.start + kBoxRows - scope.kv_len, 0), 64);  // ... past the last
      uint64_t inside = below < 64 && beyond < 64 ? ~uint64_t{0} << below : 0;
      inside = inside << beyond >> beyond;
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        const uint64_t visible =
            (static_cast<uint64_t>(segment.visible[w][1]) << 32 | segment.visible[w][0]) & inside;
        set_bits(box, w, visible);
        if (visible == 0) continue;
        box.flags |= Box::kOwner << w;
        if (visible != ~uint64_t{0}) box.flags |= Box::kMasked << w;
        if (box.start + 63 - __clzll(static_cast<long long>(visible)) > scope.first[w]) {
          box.flags |= Box::kByRow << w;
        }
      }
      if (box.flags != 0) cut(box, scope.kv_len, plan.sizes.shape.kv_len);
    }
    cursor += kBatch;
    in_columns = __any_sync(~0u, index >= total || box.start + kBoxRows <= 0);
    return write_boxes(box, at.makes() && box.flags != 0, at.lane, boxes);
  }

  __device__ Filled columns(const WalkerContext& at, Box* boxes) {
    const PairScope scope = at.scope();
    const int64_t slot = at.slot();
    const int32_t* listed = at.plan.columns + slot * at.plan.sizes.max_columns;
    const uint32_t* cover = at.plan.cover + slot * at.plan.sizes.cover_words();
    const int total = at.plan.num_columns[slot], last = scope.last_of_pair();
    int positions[2 * kChunks];
#pragma unroll
    for (int i = 0; i < 2 * kChunks; ++i) {
      const int column = 64 * cursor + 32 * i + at.lane;
      positions[i] = column < total ? listed[column] : INT32_MAX;
    }
    Filled filled{0, false};
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      Box box{64 * (cursor + i), Box::kPacked, {{0, 0}, {0, 0}}};
      uint32_t all[kConsumers] = {~0u, ~0u};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int position = positions[2 * i + half];
#pragma unroll
        for (int w = 0; w < kConsumers; ++w) {
          const int distance = scope.end[w] - 1 - position;
          const bool valid = position < scope.last[w];
          const bool seen = valid && !(cover[valid ? distance / 32 : 0] >> (distance & 31) & 1);
          box.bits[w][half] = __ballot_sync(~0u, seen);
          all[w] &= box.bits[w][half];
          if (box.bits[w][half] != 0) box.flags |= Box::kOwner << w;
          if (__any_sync(~0u, seen && position > scope.first[w])) box.flags |= Box::kByRow << w;
        }
        filled.done = filled.done || __any_sync(~0u, position >= last);
      }
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        if (all[w] != ~0u) box.flags |= Box::kMasked << w;
      }
      if (box.owners() != 0) {
        if (at.lane == 0) boxes[filled.count] = box;
        ++filled.count;
      }
    }
    cursor += kChunks;
    return filled;
  }

  __device__ static void set_bits(Box& box, int w, uint64_t bits) {
    box.bits[w][0] = static_cast<uint32_t>(bits);
    box.bits[w][1] = static_cast<uint32_t>(bits >> 32);
  }
};

/// The selected blocks of the tiles' rows of block bits, 1024 blocks at a time: first the boxes
/// that both tiles have (with blocks of 128 queries all of them), ascending, then alternately those
/// of either, so that neither falls behind.
struct BlockWalker {
  /// Boxes of some of the blocks at hand: this lane's 32 blocks, and counts of boxes.
  struct Set {
    uint32_t word;
    int before;  // of the lanes below
    int total;
  };

  int base = 0;  // the first block at hand
  int rank = 0;  // boxes of each set already written
  bool loaded = false, meeting;
  uint32_t words[kConsumers];  // this lane's blocks of each tile
  Set sets[kConsumers];        // what the tiles take now: both the same, or each its own

  __device__ Filled fill(const WalkerContext& at, Box* boxes) {
    const PlanSizes& sizes = at.plan.sizes;
    const PairScope scope = at.scope();
    const int blocks = (scope.last_of_pair() + sizes.block_kv - 1) / sizes.block_kv;
    if (!loaded) load(at);
    const int w = at.maker() % 2;
    const int start = start_of(at, w, rank + (meeting ? at.maker() : at.maker() / 2));
    Box box{start, 0, {{~0u, ~0u}, {~0u, ~0u}}};
    const bool kept = at.makes() && start >= 0;
    if (kept) {
      if (meeting || w == 0) give(scope, box, 0);
      if (meeting || w == 1) give(scope, box, 1);
      int limit = scope.kv_len;
      if (!(box.flags >> 1 & Box::kOwner)) limit = min(limit, scope.last[0]);
      if (box.flags >> 1 & Box::kOwner) limit = min(limit, scope.last[1]);
      cut(box, limit, sizes.shape.kv_len);
    }
    rank += meeting ? kBatch : kBatch / 2;
    if (rank >= max(sets[0].total, sets[1].total) && !(meeting && take(at, false))) {
      base += 32 * 32;
      loaded = false;
    }
    const int count = write_boxes(box, kept && box.owners() != 0, at.lane, boxes);
    return {count, !loaded && base >= blocks};
  }

 private:
  __device__ static int row_of(const WalkerContext& at, int w) {
    return (at.tile.first_row + kTileRows * w) / at.plan.sizes.block_q;
  }
  __device__ static void give(const PairScope& scope, Box& box, int w) {
    if (box.start >= scope.last_of(w)) return;
    box.flags |= Box::kOwner << w;
    if (box.start + kBoxRows - 1 > scope.first_of(w)) box.flags |= Box::kByRow << w;
  }

  __device__ void load(const WalkerContext& at) {
    words[0] = word_of(at, 0);
    words[1] = word_of(at, 1);
    if (!take(at, true)) take(at, false);
    loaded = true;
  }

  /// Goes on with what both tiles have, or with each one's own. Whether there is anything.
  __device__ bool take(const WalkerContext& at, bool shared) {
    const PairScope scope = at.scope();
    // In one row of blocks the second tile sees what the first does, and more.
    const bool same = row_of(at, 0) == row_of(at, 1);
    const uint32_t both = same ? words[0] | words[1] : words[0] & words[1];
    meeting = shared;
    rank = 0;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      sets[w] = set_of(at, shared ? scope.last_of_pair() : scope.last[w],
                       shared ? both : words[w] & ~both);
    }
    return max(sets[0].total, sets[1].total) > 0;
  }

  /// The bits of this lane's blocks that tile w has.
  __device__ uint32_t word_of(const WalkerContext& at, int w) const {
    const PlanSizes& sizes = at.plan.sizes;
    const int first = base + 32 * at.lane;
    const int blocks = (at.scope().last[w] + sizes.block_kv - 1) / sizes.block_kv;
    if (first >= blocks) return 0;
    const int64_t row = at.slot() * sizes.q_blocks() + row_of(at, w);
    const uint32_t word = at.plan.block_bits[row * sizes.block_words() + first / 32];
    return blocks - first < 32 ? word & ((1u << (blocks - first)) - 1) : word;
  }

  __device__ Set set_of(const WalkerContext& at, int last, uint32_t word) const {
    const int mine = boxes_in(at, last, word, base + 32 * at.lane);
    int sum = mine;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(~0u, sum, delta);
      if (at.lane >= delta) sum += below;
    }
    return {word, sum - mine, __shfl_sync(~0u, sum, 31)};
  }

  /// Boxes of the blocks in `word`, whose first block is `first`.
  __device__ static int boxes_in(const WalkerContext& at, int last, uint32_t word, int first) {
    if (word == 0) return 0;
    const int most = at.plan.sizes.block_kv / kBoxRows;
    const int top = first + 31 - __clz(word);
    const int pieces = min(most, (last - top * at.plan.sizes.block_kv + 63) / kBoxRows);
    return (__popc(word) - 1) * most + pieces;
  }

  /// First key of the `index`-th box of the w-th set, or -1. All lanes call.
  __device__ int start_of(const WalkerContext& at, int w, int index) const {
    // The last lane with no more boxes before it than `index` has the box.
    int lane = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      const int before0 = __shfl_sync(~0u, sets[0].before, lane + step);
      const int before1 = __shfl_sync(~0u, sets[1].before, lane + step);
      if ((w == 0 ? before0 : before1) <= index) lane += step;
    }
    const uint32_t word0 = __shfl_sync(~0u, sets[0].word, lane);
    const uint32_t word1 = __shfl_sync(~0u, sets[1].word, lane);
    const int before0 = __shfl_sync(~0u, sets[0].before, lane);
    const int before1 = __shfl_sync(~0u, sets[1].before, lane);
    if (index >= (w == 0 ? sets[0].total : sets[1].total)) return -1;
    const int inside = index - (w == 0 ? before0 : before1);
    const int most = at.plan.sizes.block_kv / kBoxRows;
    const int bit = nth_bit(w == 0 ? word0 : word1, inside / most);
    return (base + 32 * lane + bit) * at.plan.sizes.block_kv + inside % most * kBoxRows;
  }

  /// Position of the set bit that has n set bits below it.
  __device__ static int nth_bit(uint32_t word, int n) {
    int at = 0;
#pragma unroll
    for (int width = 16; width > 0; width /= 2) {
      const int low = __popc(word >> at & ((1u << width) - 1));
      if (n >= low) {
        n -= low;
        at += width;
      }
    }
    return at;
  }
};

}  // namespace sparseattn::sm90
