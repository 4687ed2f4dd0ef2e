// The producer warps: one plans boxes, one loads their keys, one their values, one deals them out.
//
// The planner takes tiles from the counter and walks their indexes, up to two batches of boxes
// ahead of the others, so that the latency of an index never stops the copies. The three others
// read the same boxes in the same order, each at its own pace; box i uses stage i % kStages of both
// rings.
//
// Rounds. The consumers take turns in issuing their products (consumer.h), one turn each a round.
// The dealer tells each consumer what it does in its next round: it steps as soon as it has got two
// boxes; one that has held a single box while kMaxHold others went by steps with that one, since a
// stage that is held for long would stop the ring. It passes a round on only if the other consumer
// comes to a second step before it has one: passing would else wait for the one that passes.
#pragma once

#include "attention/sm90/tensor_map.h"
#include "attention/sm90/walker.h"

namespace sparseattn::sm90 {

constexpr uint32_t kBatchCount = 63;
constexpr uint32_t kBatchEnd = 64;    // the tile's last
constexpr uint32_t kBatchStop = 128;  // no tile: nothing comes after it

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
      Tile tile{-1, 0, 0, 0, 0, {}};
      if (number < tiles) tile = tile_of(params_, number);
      smem_.tile_free[tile_.index].wait(tile_.parity ^ 1);
      if (lane_ == 0) {
        smem_.tiles[tile_.index] = tile;
        smem_.tile_full[tile_.index].arrive();
      }
      tile_.advance();
      if (tile.sequence < 0) {
        begin_batch();
        end_batch(kBatchStop);
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
    const WalkerContext at{params_.plan, tile.task, PairScope(tile), tile.first_row, lane_};
    Walker walker;
    for (bool done = false; !done;) {
      begin_batch();
      const Filled filled = walker.fill(at, smem_.planned[batch_.index]);
      done = filled.done;
      end_batch(filled.count | (done ? kBatchEnd : 0));
    }
  }
  __device__ void begin_batch() { smem_.batch_free[batch_.index].wait(batch_.parity ^ 1); }
  __device__ void end_batch(uint32_t header) {
    __syncwarp();
    if (lane_ == 0) {
      smem_.batch[batch_.index] = header;
      smem_.batch_full[batch_.index].arrive();
    }
    batch_.advance();
  }

  const AttentionParams& params_;
  Storage& smem_;
  const int lane_;
  RingPosition<2> tile_, batch_;
};

/// One of the three warps that read the planned boxes: calls self.begin_tile(), self.box(box) for
/// each box, self.end_tile(), for every tile.
template <class Storage, class Self>
__device__ __forceinline__ void read_boxes(Storage& smem, int lane, Self& self) {
  RingPosition<2> batch;
  for (bool begins = true;;) {
    smem.batch_full[batch.index].wait(batch.parity);
    const uint32_t header = smem.batch[batch.index];
    if (header & kBatchStop) return;
    if (begins) self.begin_tile();
    const int count = header & kBatchCount;
#pragma unroll 1
    for (int i = 0; i < count; ++i) self.box(smem.planned[batch.index][i]);
    __syncwarp();
    if (lane == 0) smem.batch_free[batch.index].arrive();
    batch.advance();
    begins = header & kBatchEnd;
    if (begins) self.end_tile();
  }
}

/// A consumer that does not own the box never looks at its stage.
__device__ __forceinline__ void arrive_for_strangers(cuda::MBarrier& free, uint32_t flags) {
  const int strangers = !(flags & Box::kOwner) + !(flags & Box::kOwner << 1);
  if (strangers != 0) free.arrive(strangers * kConsumerWarps);
}

/// Loads the keys of all boxes and the queries of all tiles, or (kKeys false) the values.
template <class Traits, bool kKeys>
class Loader {
 public:
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;

  __device__ Loader(const AttentionParams& params, const TensorMaps& maps, Storage& smem, int lane)
      : params_(params), maps_(maps), smem_(smem), lane_(lane) {}

  __device__ void run() { read_boxes(smem_, lane_, *this); }

  __device__ __forceinline__ void begin_tile() {
    smem_.tile_full[tile_.index].wait(tile_.parity);
    const Tile& tile = smem_.tiles[tile_.index];
    sequence_ = tile.sequence;
    kv_head_ = tile.head / params_.shape.group();
    packed_row_ = tile.task.slot * params_.plan.sizes.packed_rows();
    if constexpr (kKeys) load_query(tile);
    __syncwarp();
    if (lane_ == 0) smem_.tile_free[tile_.index].arrive();
    tile_.advance();
  }

  __device__ __forceinline__ void box(const Box& box) {
    const int start = box.start;
    const uint32_t flags = box.flags;
    cuda::MBarrier& full = kKeys ? smem_.keys_full[at_.index] : smem_.values_full[at_.index];
    cuda::MBarrier& free = kKeys ? smem_.keys_free[at_.index] : smem_.values_free[at_.index];
    Element* to = kKeys ? smem_.keys[at_.index] : smem_.values[at_.index];
    free.wait(at_.parity ^ 1);
    if (flags & Box::kRagged) {
      const View& view = kKeys ? params_.k : params_.v;
      const Element* source = static_cast<const Element*>(view.data) +
                              sequence_ * view.batch_stride + kv_head_ * view.head_stride;
      copy_rows<Traits>(to, source, view.row_stride, start, box.count, lane_);
    }
    if (lane_ == 0) {
      if constexpr (kKeys) smem_.boxes[at_.index] = box;
      arrive_for_strangers(free, flags);
      if (flags & Box::kRagged) {
        full.arrive();
      } else {
        full.arrive_expect(Traits::kBoxBytes);
        const bool packed = flags & Box::kPacked;
        const RowMap& rows = kKeys ? maps_.k : maps_.v;
        const RowMap& packed_rows = kKeys ? maps_.packed_k : maps_.packed_v;
        const RowMap& map = packed ? packed_rows : rows;
        load_rows(to, map, &full, cuda::L2Policy::kEvictLast, packed ? packed_row_ + start : start,
                  packed ? 0 : kv_head_ * rows.head_step, packed ? 0 : sequence_ * rows.batch_step);
      }
    }
    __syncwarp();
    at_.advance();
  }

  __device__ void end_tile() {}

 private:
  __device__ __forceinline__ void load_query(const Tile& tile) {
    smem_.query_free.wait(query_parity_ ^ 1);
    query_parity_ ^= 1;
    if (lane_ != 0) return;
    smem_.query_full.arrive_expect(kConsumers * Traits::kBoxBytes);
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      load_rows(smem_.query[w], maps_.q, &smem_.query_full, cuda::L2Policy::kEvictFirst,
                tile.first_row + kTileRows * w, tile.head * maps_.q.head_step,
                sequence_ * maps_.q.batch_step);
    }
  }

  const AttentionParams& params_;
  const TensorMaps& maps_;
  Storage& smem_;
  const int lane_;
  RingPosition<2> tile_;
  RingPosition<Traits::kStages> at_;
  uint32_t query_parity_ = 0;
  int sequence_ = 0, kv_head_ = 0, packed_row_ = 0;
};

/// Gives the boxes to their owners, round by round.
template <class Traits>
class Dealer {
 public:
  using Storage = typename Traits::SharedStorage;
  static constexpr int kMaxHold = 3;

  __device__ Dealer(Storage& smem, int lane) : smem_(smem), lane_(lane) {}

  __device__ void run() { read_boxes(smem_, lane_, *this); }

  __device__ void begin_tile() {}

  __device__ __forceinline__ void box(const Box& box) {
    const uint32_t flags = box.flags;
    // The second consumer comes first: its tile begins where the keys do.
#pragma unroll
    for (int w = kConsumers - 1; w >= 0; --w) {
      const bool masked = flags >> w & (Box::kMasked | Box::kByRow);
      const uint32_t own = RoundWord::of_box(at_.index, at_.parity, masked);
      if (flags >> w & Box::kOwner) {
        if (age_[w] != 0) push_step(w, RoundWord::kStep | held_[w] | RoundWord::second(own));
        held_[w] = own;
        age_[w] = age_[w] == 0;
      } else if (age_[w] != 0 && ++age_[w] > kMaxHold) {
        push_step(w, step_with_held(w));
      }
    }
    at_.advance();
  }

  /// Evens out the rounds and ends the tile with one more, in which consumers step with what they
  /// still hold.
  __device__ void end_tile() {
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      if (lead_[w] < lead_[1 - w]) push_step(w, step_with_held(w));
    }
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) push(w, RoundWord::kEnd | step_with_held(w));
    lead_[0] = lead_[1] = 0;
  }

 private:
  /// A step with the one box that consumer w holds, or none.
  __device__ __forceinline__ uint32_t step_with_held(int w) {
    if (age_[w] == 0) return 0;
    age_[w] = 0;
    return RoundWord::kStep | RoundWord::kSingle | RoundWord::kMask << 1 | held_[w] |
           RoundWord::second(held_[w]);
  }

  /// The next round of consumer w. The other, where it has had no step since this one's last,
  /// passes.
  __device__ __forceinline__ void push_step(int w, uint32_t word) {
    if (lead_[w] > lead_[1 - w]) {
      push(1 - w, 0);
      ++lead_[1 - w];
    }
    push(w, word);
    ++lead_[w];
  }

  __device__ __forceinline__ void push(int w, uint32_t word) {
    auto& round = round_[w];
    smem_.round_free[w][round.index].wait(round.parity ^ 1);
    if (lane_ == 0) {
      smem_.rounds[w][round.index] = word;
      smem_.round_full[w][round.index].arrive();
    }
    __syncwarp();
    round.advance();
  }

  Storage& smem_;
  const int lane_;
  RingPosition<Traits::kStages> at_;
  RingPosition<kRounds> round_[kConsumers];
  uint32_t held_[kConsumers] = {0, 0};  // RoundWord of the box that a consumer holds
  int age_[kConsumers] = {0, 0};        // 0: holds none; else 1 + the boxes gone by since
  int lead_[kConsumers] = {0, 0};       // rounds of the tile so far
};

}  // namespace sparseattn::sm90
