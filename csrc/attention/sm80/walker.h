// Walkers turn a head's pattern and index into the steps of one query tile.
//
// One warp writes steps to shared memory, up to kMaxSteps at a time, entries in parallel over its
// lanes; a cursor says where to go on. The steps of a tile are thus nobody's registers while the
// main loop runs. Every key that a step loads is seen by the tile's last row, unless a mask bit
// removes it: a key that no row of the call sees is never loaded.
#pragma once

#include <cstdint>

#include "sparseattn/plan.h"
#include "sparseattn/types.h"

namespace sparseattn::sm80 {

/// Up to 64 keys: rows [start, start + count) of the keys, or of the head's packed columns.
struct alignas(16) Step {
  static constexpr uint32_t kCountMask = 127;
  static constexpr uint32_t kMasked = 128;  // some (row, key) pair of the step is invisible
  static constexpr uint32_t kPacked = 256;  // rows of packed_k / packed_v instead of k / v
  static constexpr uint32_t kByRow = 512;   // ... and which ones depends on the row

  int32_t start;
  uint32_t info;
  uint32_t bits[2];  // bit j set: key start + j counts, for some row at least

  __device__ int count() const { return static_cast<int>(info & kCountMask); }
  __device__ bool masked() const { return info & kMasked; }
  __device__ bool packed() const { return info & kPacked; }
  __device__ bool by_row() const { return info & kByRow; }
};

constexpr int kMaxSteps = 128;

/// Positions of a query tile's rows: first .. last - 1. Full tiles end at `end`. The shape is that
/// of the tile's sequence, and the tile has at least one row.
struct TileScope {
  int end;
  int first;
  int last;  // one past the last key that any row of the tile may see
  __device__ TileScope(const Shape& shape, int tile)
      : end(shape.tile_end(tile)), first(end - kTileRows), last(min(end, shape.kv_len)) {}

  /// Keys [start, stop) as a step. Rows differ at the causal edge, or where the caller says so.
  __device__ Step range(int start, int stop, bool by_row = false) const {
    const int count = stop - start;
    by_row = by_row || stop - 1 > first;
    uint32_t info = static_cast<uint32_t>(count);
    if (by_row) info |= Step::kByRow;
    if (by_row || count < 64) info |= Step::kMasked;
    const uint64_t bits = ~uint64_t{0} >> (64 - count);
    return {start, info, {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32)}};
  }
};

/// What a walker needs to know of its tile; the same for all lanes.
struct WalkerContext {
  const Plan& plan;
  HeadTask task;
  TileScope scope;
  int tile;
  int lane;
};

__device__ __forceinline__ int lanes_below(unsigned ballot, int lane) {
  return __popc(ballot & ((1u << lane) - 1));
}

/// Dense and A-shape: the window from its near end, then the sinks it does not reach.
struct BandWalker {
  static constexpr bool kPacks = false;
  int cursor = 0;  // next step

  __device__ int fill(const WalkerContext& at, Step* steps) {
    const TileScope& scope = at.scope;
    const int window = at.task.window;
    // Keys from here on may be inside some row's window; with window 0 there are none.
    const int window_start = window > 0 ? max(0, scope.first + 1 - window) : scope.last;
    const int sink_stop = min(at.task.sink, window_start);
    const int window_steps = (scope.last - window_start + 63) / 64;
    const int total = window_steps + (sink_stop + 63) / 64;
    const int count = min(kMaxSteps, total - cursor);
    for (int i = at.lane; i < count; i += 32) {
      const int index = cursor + i;
      if (index < window_steps) {
        const int stop = scope.last - 64 * index;
        const int start = max(stop - 64, window_start);
        // The tile's last row is the first to lose sight of a key.
        const bool leaves_window = scope.last - 1 - start >= window && stop > at.task.sink;
        steps[i] = scope.range(start, stop, leaves_window);
      } else {
        const int start = 64 * (index - window_steps);
        steps[i] = scope.range(start, min(start + 64, sink_stop));
      }
    }
    cursor += count;
    return count;
  }
};

/// The head's segments, near to far, then its packed columns.
struct SlashWalker {
  static constexpr bool kPacks = true;
  static constexpr int kDone = INT32_MIN;
  int cursor = 0;  // next segment; past the segments, -1 - (next chunk of 64 columns); or kDone

  __device__ int fill(const WalkerContext& at, Step* steps) {
    int count = 0;
    if (cursor >= 0) count = fill_segments(at, steps);
    return cursor < 0 && cursor != kDone ? fill_columns(at, steps, count) : count;
  }

 private:
  __device__ int fill_segments(const WalkerContext& at, Step* steps) {
    const TileScope& scope = at.scope;
    const Segment* segments =
        at.plan.segments + int64_t{at.task.slot} * at.plan.sizes.max_segments();
    const int total = at.plan.num_segments[at.task.slot];
    int count = 0;
    while (count + 32 <= kMaxSteps) {
      const int index = cursor + at.lane;
      const Segment segment = index < total ? segments[index] : Segment{0, 0};
      const int stop = min(scope.end - segment.distance, scope.last);
      const int start = max(scope.end - segment.distance - segment.count, 0);
      const unsigned kept = __ballot_sync(~0u, start < stop);
      if (start < stop) steps[count + lanes_below(kept, at.lane)] = scope.range(start, stop);
      count += __popc(kept);
      cursor += 32;
      // Distances ascend: once one lies before key 0 all others do.
      const bool over = index >= total || scope.end - segment.distance <= 0;
      if (__any_sync(~0u, over)) {
        cursor = -1;
        break;
      }
    }
    return count;
  }

  __device__ int fill_columns(const WalkerContext& at, Step* steps, int count) {
    constexpr int kUnroll = 4;  // chunks whose loads are in flight together
    const TileScope& scope = at.scope;
    const int32_t* columns = at.plan.columns + int64_t{at.task.slot} * at.plan.sizes.max_columns;
    const uint32_t* cover = at.plan.cover + int64_t{at.task.slot} * at.plan.sizes.cover_words();
    const int total = at.plan.num_columns[at.task.slot];
    bool done = false;
    while (!done && count + kUnroll <= kMaxSteps) {
      const int chunk = -1 - cursor;
      int positions[2 * kUnroll];
      uint32_t words[2 * kUnroll];
#pragma unroll
      for (int i = 0; i < 2 * kUnroll; ++i) {
        const int column = 64 * chunk + 32 * i + at.lane;
        positions[i] = column < total ? columns[column] : INT32_MAX;
      }
#pragma unroll
      for (int i = 0; i < 2 * kUnroll; ++i) {
        words[i] = positions[i] < scope.last ? cover[(scope.end - 1 - positions[i]) / 32] : 0;
      }
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        Step step{64 * (chunk + i), Step::kPacked, {0, 0}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int position = positions[2 * i + half];
          const uint32_t word = words[2 * i + half];
          const bool valid = position < scope.last;
          const bool covered = word >> ((scope.end - 1 - position) & 31) & 1;
          step.bits[half] = __ballot_sync(~0u, valid && !covered);
          step.info += __popc(__ballot_sync(~0u, valid));
          if (__any_sync(~0u, valid && position > scope.first)) step.info |= Step::kByRow;
        }
        done = done || step.count() < 64;
        if ((step.bits[0] & step.bits[1]) != ~0u || step.by_row()) step.info |= Step::kMasked;
        if ((step.bits[0] | step.bits[1]) != 0) {
          if (at.lane == 0) steps[count] = step;
          ++count;
        }
      }
      cursor -= kUnroll;
    }
    if (done) cursor = kDone;
    return count;
  }
};

/// The selected blocks of one row of block bits, ascending, in steps of 64 keys.
struct BlockWalker {
  static constexpr bool kPacks = false;
  int cursor = 0;  // first block not looked at

  __device__ int fill(const WalkerContext& at, Step* steps) {
    const PlanSizes& sizes = at.plan.sizes;
    const int last = at.scope.last;
    const int blocks = (last + sizes.block_kv - 1) / sizes.block_kv;
    const int row = at.tile * kTileRows / sizes.block_q;
    const uint32_t* bits =
        at.plan.block_bits + (int64_t{at.task.slot} * sizes.q_blocks() + row) * sizes.block_words();
    int count = 0;
    while (count == 0 && cursor < blocks) {
      const int base = 32 * (cursor / 32 + at.lane);  // first block of this lane's word
      uint32_t word = base < blocks ? bits[base / 32] : 0;
      if (base < cursor) word &= ~0u << (cursor - base);
      if (blocks - base < 32 && base < blocks) word &= (1u << (blocks - base)) - 1;
      count = write(at, steps, word, base);
    }
    return count;
  }

 private:
  /// Writes the blocks of all lanes' words in order, as many as fit, and moves the cursor.
  __device__ int write(const WalkerContext& at, Step* steps, uint32_t word, int base) {
    const int block_kv = at.plan.sizes.block_kv, last = at.scope.last;
    const int most = block_kv / 64;  // steps of a block, fewer where `last` cuts it
    const auto pieces = [&](int block) { return min(most, (last - block * block_kv + 63) / 64); };
    const int mine = word == 0 ? 0 : (__popc(word) - 1) * most + pieces(base + 31 - __clz(word));
    int position = mine;
#pragma unroll
    for (int delta = 1; delta < 32; delta *= 2) {
      const int below = __shfl_up_sync(~0u, position, delta);
      if (at.lane >= delta) position += below;
    }
    const int total = __shfl_sync(~0u, position, 31);
    position -= mine;
    int unwritten = 32 * (cursor / 32 + 32), written = total;
    while (word != 0) {
      const int block = base + __ffs(word) - 1;
      const int count = pieces(block);
      if (position + count > kMaxSteps) {
        unwritten = block;
        written = position;
        break;
      }
      for (int piece = 0; piece < count; ++piece) {
        const int start = block * block_kv + 64 * piece;
        steps[position++] = at.scope.range(start, min(start + 64, last));
      }
      word &= word - 1;
    }
    cursor = __reduce_min_sync(~0u, unwritten);
    return __reduce_min_sync(~0u, written);
  }
};

}  // namespace sparseattn::sm80
