// The producer warps: one plans boxes, one loads them.
//
// The planner takes tiles from the counter and walks their indexes, up to two batches of boxes ahead
// of the loader, so that the latency of an index never stops the copies. The loader fills the stages
// of two rings, keys and values, in the order of the boxes. Values follow their keys kLag boxes
// later: they are needed that much later, and their stages come free that much later.
//
// Rounds. The consumers take turns in issuing their products (consumer.h), one turn each a round.
// The loader decides where rounds end and writes it into the boxes: a consumer steps when it holds
// two boxes; one that has held a single box for kMaxHold others steps with that one, since a stage
// that is held for long would stop the ring.
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
      Tile tile{-1, 0, 0, {}};
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
    const WalkerContext at{params_.plan, tile.task, PairScope(params_.shape, tile.first_row),
                           tile.first_row, lane_};
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

template <class Traits>
class Loader {
 public:
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;
  static constexpr int kLag = 2;
  static constexpr int kMaxHold = 3;

  __device__ Loader(const AttentionParams& params, const TensorMaps& maps, Storage& smem, int lane)
      : params_(params), maps_(maps), smem_(smem), lane_(lane) {}

  __device__ void run() {
    for (bool begins = true;;) {
      smem_.batch_full[batch_.index].wait(batch_.parity);
      const uint32_t header = smem_.batch[batch_.index];
      if (header & kBatchStop) return;
      if (begins) begin_tile();
      const int count = header & kBatchCount;
      for (int i = 0; i < count; ++i) push(smem_.planned[batch_.index][i]);
      __syncwarp();
      if (lane_ == 0) smem_.batch_free[batch_.index].arrive();
      batch_.advance();
      begins = header & kBatchEnd;
      if (begins) end_tile();
    }
  }

 private:
  __device__ void begin_tile() {
    smem_.tile_full[tile_.index].wait(tile_.parity);
    const Tile& tile = smem_.tiles[tile_.index];
    sequence_ = tile.sequence;
    kv_head_ = tile.head / params_.shape.group();
    packed_row_ = tile.task.slot * static_cast<int64_t>(params_.plan.sizes.packed_rows());
    smem_.query_free.wait(query_parity_ ^ 1);
    query_parity_ ^= 1;
    if (lane_ == 0) {
      smem_.query_full.arrive_expect(kConsumers * Traits::kBoxBytes);
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        load_rows<Traits>(smem_.query[w], maps_.q, &smem_.query_full, cuda::L2Policy::kEvictFirst,
                          tile.first_row + kTileRows * w, tile.head, sequence_);
      }
    }
    __syncwarp();
    if (lane_ == 0) smem_.tile_free[tile_.index].arrive();
    tile_.advance();
  }

  /// Ends the last round of the tile, in which consumers step with what they hold.
  __device__ void end_tile() {
    smem_.keys_free[keys_.index].wait(keys_.parity ^ 1);
    uint32_t flags = Box::kEnd | Box::kRound;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      if (held_[w] != 0) flags |= Box::kStep << w;
      held_[w] = 0;
    }
    if (lane_ == 0) {
      smem_.boxes[keys_.index].flags = flags;
      smem_.keys_full[keys_.index].arrive();
    }
    keys_.advance();
    while (lagging_ > 0) load_values();
    smem_.values_free[values_.index].wait(values_.parity ^ 1);
    if (lane_ == 0) {
      smem_.values_free[values_.index].arrive(kConsumers * kConsumerWarps);
      smem_.values_full[values_.index].arrive();
    }
    values_.advance();
  }

  __device__ __forceinline__ void push(Box box) {
    smem_.keys_free[keys_.index].wait(keys_.parity ^ 1);
    box.flags |= end_round(box.flags);
    cuda::MBarrier* barrier = &smem_.keys_full[keys_.index];
    if (box.flags & Box::kRagged) {
      copy_ragged(smem_.keys[keys_.index], params_.k, box);
      if (lane_ == 0) {
        smem_.boxes[keys_.index] = box;
        barrier->arrive();
      }
    } else if (lane_ == 0) {
      smem_.boxes[keys_.index] = box;
      barrier->arrive_expect(Traits::kBoxBytes);
      load(smem_.keys[keys_.index], maps_.k, maps_.packed_k, barrier, box);
    }
    __syncwarp();
    keys_.advance();
    if (lagging_ == kLag) load_values();
#pragma unroll
    for (int i = 0; i < kLag; ++i) {
      if (i == lagging_) lag_[i] = {box.start, box.flags, box.count};
    }
    ++lagging_;
  }

  /// Values of the oldest box that has none yet.
  __device__ __forceinline__ void load_values() {
    smem_.values_free[values_.index].wait(values_.parity ^ 1);
    Box box;
    box.start = lag_[0].start;
    box.flags = lag_[0].flags;
    box.count = lag_[0].count;
    // A consumer that does not own the box never looks at its values.
    const int strangers = !box.owned_by(0) + !box.owned_by(1);
    if (strangers != 0 && lane_ == 0) {
      smem_.values_free[values_.index].arrive(strangers * kConsumerWarps);
    }
    cuda::MBarrier* barrier = &smem_.values_full[values_.index];
    if (box.flags & Box::kRagged) {
      copy_ragged(smem_.values[values_.index], params_.v, box);
      if (lane_ == 0) barrier->arrive();
    } else if (lane_ == 0) {
      barrier->arrive_expect(Traits::kBoxBytes);
      load(smem_.values[values_.index], maps_.v, maps_.packed_v, barrier, box);
    }
    __syncwarp();
    values_.advance();
#pragma unroll
    for (int i = 1; i < kLag; ++i) lag_[i - 1] = lag_[i];
    --lagging_;
  }

  __device__ __forceinline__ void load(Element* to, const RowMap& rows, const RowMap& packed,
                                       cuda::MBarrier* barrier, const Box& box) {
    if (box.flags & Box::kPacked) {
      load_rows<Traits>(to, packed, barrier, cuda::L2Policy::kEvictLast,
                        static_cast<int>(packed_row_) + box.start, 0, 0);
    } else {
      load_rows<Traits>(to, rows, barrier, cuda::L2Policy::kEvictLast, box.start, kv_head_,
                        sequence_);
    }
  }
  __device__ void copy_ragged(Element* to, const View& view, const Box& box) {
    const Element* source = static_cast<const Element*>(view.data) +
                            sequence_ * view.batch_stride + kv_head_ * view.head_stride;
    copy_rows<Traits>(to, source, view.row_stride, box.start, box.count, lane_);
  }

  /// Flags of a box that ends a round.
  __device__ __forceinline__ uint32_t end_round(uint32_t flags) {
    uint32_t steps = 0;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) {
      // held_: 0, or 1 + the boxes passed since the one that is held.
      const bool owner = flags >> w & Box::kOwner;
      const bool had = held_[w] != 0;
      if (had) ++held_[w];
      if (owner && !had) held_[w] = 1;
      if ((owner && had) || held_[w] > kMaxHold) {
        steps |= Box::kStep << w;
        held_[w] = 0;
      }
    }
    return steps != 0 ? steps | Box::kRound : 0;
  }

  const AttentionParams& params_;
  const TensorMaps& maps_;
  Storage& smem_;
  const int lane_;
  RingPosition<2> tile_, batch_;
  RingPosition<Traits::kStages> keys_, values_;
  uint32_t query_parity_ = 0;
  int sequence_ = 0, kv_head_ = 0;
  int64_t packed_row_ = 0;
  int held_[kConsumers] = {0, 0};
  struct {
    int32_t start;
    uint32_t flags;
    int32_t count;
  } lag_[kLag];
  int lagging_ = 0;
};

}  // namespace sparseattn::sm90
