// The producer warps: the planner finds a tile's boxes, the dealer pairs them and deals the pairs
// out to the consumers, one loader copies their keys, one their values.
//
// The planner takes tiles from the counter and walks their indexes, two batches of boxes ahead of
// the dealer, so that the latency of an index never stops the copies. The dealer and the loaders
// take the same pairs in the same order, each at its own pace; pair i uses stage i % kStages of
// both rings.
//
// Turns. The consumers take turns in issuing their products (consumer.h), so both have the same
// number of them in a tile. The dealer tells each what it does with a pair: a step if it owns it.
// If not, it passes a turn on, but only at the other's second step in a row: passing would else
// wait for the one that passes. A pair is handed over when the next one is known, so that a
// consumer need not look at a stage to know that it has a step there, or that the tile has ended.
#pragma once

#include "attention/sm90/pairing.h"
#include "attention/sm90/tensor_map.h"
#include "attention/sm90/walker.h"

namespace sparseattn::sm90 {

/// With the count of a batch of boxes: the tile's last, or instead of one: there are no more tiles.
constexpr uint32_t kLastBatch = 1u << 8;
constexpr uint32_t kStop = 1u << 9;

/// Which pair of tiles a number stands for. The heads of one key/value head and neighbouring pairs
/// run together and share L2; a head's longest pairs come first.
__device__ __forceinline__ Tile tile_of(const AttentionParams& params, uint32_t number) {
  const Shape& shape = params.shape;
  const uint32_t group = shape.group(), pairs = (shape.q_tiles() + kConsumers - 1) / kConsumers;
  const uint32_t per_kv_head = group * pairs;
  const uint32_t kv_head = number / per_kv_head, rest = number % per_kv_head;
  Tile tile;
  tile.sequence = kv_head / shape.kv_heads;
  tile.head = kv_head % shape.kv_heads * group + rest % group;
  tile.first_row = static_cast<int32_t>(pairs - 1 - rest / group) * kPairRows;
  const Shape own = params.plan.sizes.shape_of(tile.sequence);
  tile.q_len = own.q_len;
  tile.kv_len = own.kv_len;
  tile.task = params.plan.heads[static_cast<int64_t>(tile.sequence) * shape.q_heads + tile.head];
  return tile;
}

template <class Traits>
class Planner {
 public:
  using Storage = typename Traits::SharedStorage;

  __device__ Planner(const AttentionParams& params, Storage& smem, int lane)
      : params_(params), smem_(smem), lane_(lane) {}

  __device__ void run(uint32_t tiles) {
    for (;;) {
      uint32_t number = 0;
      if (lane_ == 0) number = atomicAdd(params_.plan.next_tile, 1u);
      number = __shfl_sync(~0u, number, 0);
      smem_.tile_free[tile_.index].wait(tile_.parity ^ 1);
      Tile& tile = smem_.tiles[tile_.index];
      if (lane_ == 0) {
        tile = number < tiles ? tile_of(params_, number) : Tile{-1, 0, 0, 0, 0, {}};
        smem_.tile_full[tile_.index].arrive();
      }
      __syncwarp();
      tile_.advance();
      if (number >= tiles) {
        begin_batch();
        end_batch(kStop);
        return;
      }
      switch (tile.task.kind) {
        case PatternKind::kVerticalSlash:
          walk<SlashWalker>(tile);
          break;
        case PatternKind::kBlockSparse:
          walk<BlockWalker>(tile);
          break;
        default:
          walk<BandWalker>(tile);
      }
    }
  }

 private:
  template <class Walker>
  __device__ __forceinline__ void walk(const Tile& tile) {
    const WalkerContext at{params_.plan, tile, lane_};
    Walker walker;
    for (bool done = false; !done;) {
      begin_batch();
      const Filled filled = walker.fill(at, smem_.boxes[batch_.index]);
      done = filled.done;
      end_batch(filled.count | (done ? kLastBatch : 0));
    }
  }
  __device__ void begin_batch() { smem_.boxes_free[batch_.index].wait(batch_.parity ^ 1); }
  __device__ void end_batch(uint32_t head) {
    __syncwarp();
    if (lane_ == 0) smem_.box_count[batch_.index] = head;
    arrive_as_warp(smem_.boxes_full[batch_.index], lane_);
    batch_.advance();
  }

  const AttentionParams& params_;
  Storage& smem_;
  const int lane_;
  RingPosition<kTileSlots> tile_;
  RingPosition<2> batch_;
};

/// Loads the keys of all pairs, or (kKeys false) their values.
template <class Traits, bool kKeys>
class Loader {
 public:
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;

  __device__ Loader(const AttentionParams& params, const TensorMaps& maps, Storage& smem, int lane)
      : params_(params), maps_(maps), smem_(smem), lane_(lane) {}

  __device__ void run() {
    RingPosition<kPairSlots> slot;
    for (bool begins = true;; slot.advance()) {
      smem_.pairs_full[slot.index].wait(slot.parity);
      const Pair& pair = smem_.pairs[slot.index];
      if (pair.boxes[0].flags & Box::kStop) return;
      if (begins) begin_tile();
      begins = pair.words[0].has(PairWord::kEnd);
      load_pair(pair);
      arrive_as_warp(smem_.pairs_free[slot.index], lane_);
    }
  }

 private:
  __device__ __forceinline__ void begin_tile() {
    smem_.tile_full[tile_.index].wait(tile_.parity);
    const Tile& tile = smem_.tiles[tile_.index];
    sequence_ = tile.sequence;
    kv_head_ = tile.head / params_.shape.group();
    packed_row_ = tile.task.slot * params_.plan.sizes.packed_rows();
    __syncwarp();
    arrive_as_warp(smem_.tile_free[tile_.index], lane_);
    tile_.advance();
  }

  __device__ __forceinline__ void load_pair(const Pair& pair) {
    const Box(&boxes)[2] = pair.boxes;
    cuda::MBarrier& full = kKeys ? smem_.keys_full[at_.index] : smem_.values_full[at_.index];
    cuda::MBarrier& free = kKeys ? smem_.keys_free[at_.index] : smem_.values_free[at_.index];
    Element* stage = kKeys ? smem_.keys[at_.index] : smem_.values[at_.index];
    free.wait(at_.parity ^ 1);
    int copied = 0;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      if (!(boxes[i].flags & Box::kRagged)) {
        ++copied;
        continue;
      }
      const View& view = kKeys ? params_.k : params_.v;
      const Element* source = static_cast<const Element*>(view.data) +
                              sequence_ * view.batch_stride + kv_head_ * view.head_stride;
      copy_rows<Traits>(stage + i * kBoxRows * Traits::kAtomCols, source, view.row_stride,
                        boxes[i].start, boxes[i].count(), lane_);
    }
    if (lane_ == 0) {
      if constexpr (kKeys) {
        smem_.stages[at_.index] = pair;
      } else {
        // A consumer that does not own the pair never looks at the values.
        const uint32_t owners = boxes[0].owners();
        const int strangers = !(owners & 1) + !(owners & 2);
        if (strangers != 0) free.arrive(strangers * kConsumerWarps * kArrivingLanes);
      }
      full.arrive_expect(copied * Traits::kBoxBytes);
    }
    __syncwarp();
    // A lane for each piece of each box.
    const int i = lane_ / Traits::kPieces;
    if (i < 2 && !(boxes[i].flags & Box::kRagged)) {
      load(stage, i, lane_ % Traits::kPieces, boxes[i], full);
    }
    __syncwarp();
    at_.advance();
  }

  __device__ __forceinline__ void load(Element* stage, int i, int piece, const Box& box,
                                       cuda::MBarrier& full) const {
    const bool packed = box.flags & Box::kPacked;
    const RowMap& rows = kKeys ? maps_.k : maps_.v;
    const RowMap& map = !packed ? rows : kKeys ? maps_.packed_k : maps_.packed_v;
    const int row = packed ? packed_row_ + box.start : box.start;
    const int head = packed ? 0 : kv_head_ * rows.head_step;
    const int sequence = packed ? 0 : sequence_ * rows.batch_step;
    load_piece(stage + (piece * kStageRows + i * kBoxRows) * Traits::kAtomCols, map, &full,
               cuda::L2Policy::kEvictLast, row, piece, head, sequence);
  }

  const AttentionParams& params_;
  const TensorMaps& maps_;
  Storage& smem_;
  const int lane_;
  RingPosition<kTileSlots> tile_;
  RingPosition<Traits::kStages> at_;
  int sequence_ = 0, kv_head_ = 0, packed_row_ = 0;
};

/// Pairs the boxes, and tells the consumers what to do with them: lane w writes the words of
/// consumer w. It also loads the queries, after it has handed over the first pairs of their tile:
/// so keys and values may be there before the last scores of the tile before let the queries in.
template <class Traits>
class Dealer {
 public:
  using Storage = typename Traits::SharedStorage;

  __device__ Dealer(const AttentionParams& params, const TensorMaps& maps, Storage& smem, int lane)
      : params_(params), maps_(maps), smem_(smem), lane_(lane), consumer_(lane % 2) {}

  __device__ void run() {
    RingPosition<2> batch;
    Pairing pairing;
    const auto place = [this](int i) -> Box(&)[2] { return slot(taken_ + i).boxes; };
    for (bool begins = true;; batch.advance()) {
      smem_.boxes_full[batch.index].wait(batch.parity);
      const uint32_t head = smem_.box_count[batch.index];
      Box box;
      if (lane_ < kBatch) box = smem_.boxes[batch.index][lane_];
      __syncwarp();
      arrive_as_warp(smem_.boxes_free[batch.index], lane_);

      await_slots();
      if (head & kStop) {
        if (lane_ == 0) place(0)[0].flags = Box::kStop;
        publish(taken_);
        return;
      }
      int count = pairing.add(box, head & 0xff, lane_, smem_.held, place);
      if (head & kLastBatch) {
        count +=
            pairing.finish(lane_, smem_.held, [&](int i) -> Box(&)[2] { return place(count + i); });
        if (count == 0 && !dealt_) {
          if (lane_ < 2) place(0)[lane_] = no_keys();
          count = 1;
        }
      }
      __syncwarp();
#pragma unroll 1
      for (int i = 0; i < count; ++i) deal();
      if (begins && count != 0) {
        begin_tile();
        begins = false;
      }
      if (head & kLastBatch) {
        end_tile();
        begins = true;
      }
    }
  }

 private:
  __device__ Pair& slot(uint32_t number) { return smem_.pairs[number % kPairSlots]; }
  /// Until a batch fits. Slots are taken in order, and the loaders free them in order: if the last
  /// is free, all are.
  __device__ void await_slots() {
    const uint32_t last = taken_ + kBatchPairs - 1;
    smem_.pairs_free[last % kPairSlots].wait(last / kPairSlots & 1 ^ 1);
  }
  __device__ void publish(uint32_t number) {
    __syncwarp();
    arrive_as_warp(smem_.pairs_full[number % kPairSlots], lane_);
  }

  /// For a tile that sees nothing: 64 zeros that nobody sees.
  static __device__ Box no_keys() {
    return {0, Box::kOwner * 3 | Box::kMasked * 3 | Box::kRagged, {{0, 0}, {0, 0}}};
  }

  __device__ __forceinline__ void begin_tile() {
    smem_.tile_full[tile_.index].wait(tile_.parity);
    smem_.query_free.wait(query_parity_ ^ 1);
    query_parity_ ^= 1;
    if (lane_ == 0) load_query(smem_.tiles[tile_.index]);
    __syncwarp();
    arrive_as_warp(smem_.tile_free[tile_.index], lane_);
    tile_.advance();
  }

  /// Takes the next slot, and hands over the one before.
  __device__ __forceinline__ void deal() {
    const Box(&boxes)[2] = slot(taken_).boxes;
    uint32_t word = 0;
    const int other_turns = __shfl_xor_sync(~0u, turns_, 1);
    if (boxes[0].owners() >> consumer_ & 1) {
      word = PairWord::kStep;
      if (boxes[0].masked(consumer_)) word |= PairWord::kMask;
      if (boxes[1].masked(consumer_)) word |= PairWord::kMask << 1;
    } else if (other_turns > turns_) {
      word = PairWord::kPass;
    }
    turns_ += word != 0;
    if (dealt_) hand_over(word & PairWord::kStep ? PairWord::kNext : 0);
    dealt_ = true;
    word_ = word;
    ++taken_;
  }

  __device__ __forceinline__ void end_tile() {
    const bool behind = turns_ < __shfl_xor_sync(~0u, turns_, 1);
    hand_over(PairWord::kEnd | (behind ? PairWord::kEven : 0));
    dealt_ = false;
    turns_ = 0;
  }

  /// The last slot taken.
  __device__ __forceinline__ void hand_over(uint32_t more) {
    if (lane_ < kConsumers) slot(taken_ - 1).words[consumer_].bits = word_ | more;
    publish(taken_ - 1);
  }

  __device__ __forceinline__ void load_query(const Tile& tile) {
    smem_.query_full.arrive_expect(kConsumers * Traits::kBoxBytes);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
#pragma unroll
      for (int piece = 0; piece < Traits::kPieces; ++piece) {
        load_piece(smem_.query[w] + piece * kBoxRows * Traits::kAtomCols, maps_.q,
                   &smem_.query_full, cuda::L2Policy::kEvictFirst, tile.first_row + kTileRows * w,
                   piece, tile.head * maps_.q.head_step, tile.sequence * maps_.q.batch_step);
      }
    }
  }

  const AttentionParams& params_;
  const TensorMaps& maps_;
  Storage& smem_;
  const int lane_, consumer_;
  RingPosition<kTileSlots> tile_;
  uint32_t query_parity_ = 0;
  uint32_t taken_ = 0;  // slots so far
  uint32_t word_ = 0;   // of the last one
  bool dealt_ = false;  // there is one in this tile
  int turns_ = 0;       // of the tile so far
};

}  // namespace sparseattn::sm90
