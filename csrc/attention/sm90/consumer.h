// The consumer warpgroups: each computes one query tile of the pair, 64 rows.
//
// A step takes one or two boxes: scores of this step, then output of the step before, are issued
// together, and the softmax of this step runs while the output product does. The two consumers take
// turns in issuing (a named barrier each), so that one's products run under the other's softmax.
// Both see the same rounds; one that has nothing to do in a round passes its turn on.
#pragma once

#include <cute/arch/copy_sm75.hpp>

#include "attention/sm90/softmax.h"
#include "attention/sm90/traits.h"
#include "sparseattn/attention.h"

namespace sparseattn::sm90 {

template <class Traits>
class Consumer {
 public:
  using Element = typename Traits::Element;
  using Storage = typename Traits::SharedStorage;

  /// `index`: which of the two; `thread`: 0 .. 127.
  __device__ Consumer(const AttentionParams& params, Storage& smem, int index, int thread)
      : params_(params),
        smem_(smem),
        index_(index),
        thread_(thread),
        scale_log2_(params.scale * 1.4426950408889634f) {}

  __device__ void run() {
    if (index_ == 1) pass_turn();
    RingPosition<2> tile;
    uint32_t query_parity = 0;
    for (;; tile.advance(), query_parity ^= 1) {
      smem_.tile_full[tile.index].wait(tile.parity);
      if (smem_.tiles[tile.index].sequence < 0) break;
      smem_.query_full.wait(query_parity);
      load_query();
      release(smem_.query_free);
      attend(smem_.tiles[tile.index]);
      store(smem_.tiles[tile.index]);
      release(smem_.tile_free[tile.index]);
    }
    if (index_ == 0) take_turn();  // the other's last pass
  }

 private:
  using ScoreMma = typename Traits::ScoreMma;
  using OutputMma = typename Traits::OutputMma;
  using Scores = decltype(cute::partition_fragment_C(
      ScoreMma{}, cute::Shape<cute::_64, cute::Int<kBoxRows>>{}));
  using Output = decltype(cute::partition_fragment_C(
      OutputMma{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));
  /// A operands, as the accumulators of scores lie: ((column, row, half), 1, 16 columns each).
  template <int kColumns>
  using Operand = decltype(cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                               cute::Int<kColumns / 16>>>{}));

  /// A stage of the rings and the parity of its phase, in one register.
  class Held {
   public:
    Held() = default;
    __device__ explicit Held(const RingPosition<Traits::kStages>& at)
        : packed_(at.index | at.parity << 16) {}
    __device__ int stage() const { return packed_ & 0xffff; }
    __device__ uint32_t parity() const { return packed_ >> 16; }

   private:
    uint32_t packed_;
  };

  __device__ void take_turn() { cuda::barrier_sync<256>(1 + index_); }
  __device__ void pass_turn() { cuda::barrier_arrive<256>(2 - index_); }

  /// One arrival a warp, after all its lanes are done.
  __device__ __forceinline__ void release(cuda::MBarrier& barrier) {
    __syncwarp();
    if (thread_ % 32 == 0) barrier.arrive();
  }

  __device__ void load_query() {
    const int warp = thread_ / 32, lane = thread_ % 32;
    const int row = warp * 16 + lane % 16;
    constexpr int kAtomPieces = Traits::kAtomCols / 8;
    const int swizzle = kAtomPieces == 8 ? row % 8 : row / 2 % 4;
    auto words = cute::recast<uint32_t>(query_);
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const int piece = 2 * k + lane / 16;
      const Element* from = smem_.query[index_] +
                            (piece / kAtomPieces * kBoxRows + row) * Traits::kAtomCols +
                            8 * (piece % kAtomPieces ^ swizzle);
      uint32_t fragment[4];
      cuda::ldmatrix_x4(fragment, from);
#pragma unroll
      for (int i = 0; i < 4; ++i) words(4 * k + i) = fragment[i];
    }
  }

  /// Waits for boxes until a round is over; returns the flags of its last.
  __device__ __forceinline__ uint32_t gather(int& holds, Held& first, Held& second) {
    uint32_t flags;
    do {
      smem_.keys_full[keys_.index].wait(keys_.parity);
      // The same for all lanes; the shuffle tells the compiler.
      flags = __shfl_sync(~0u, smem_.boxes[keys_.index].flags, 0);
      if (flags >> index_ & Box::kOwner) {
        if (holds++ == 0) {
          first = Held(keys_);
        } else {
          second = Held(keys_);
        }
      } else {
        release(smem_.keys_free[keys_.index]);
      }
      keys_.advance();
    } while (!(flags & Box::kRound));
    return flags;
  }

  /// Boxes of a step. A step with one box computes with it twice, the second time masked.
  struct Step {
    Held first, second;
    bool single;
  };

  /// Waits for rounds until it is this consumer's turn to step; false: the tile is over without one.
  __device__ __forceinline__ bool next_step(Step& step, int& holds, bool& over) {
    if (over) return false;
    for (;;) {
      const uint32_t flags = gather(holds, step.first, step.second);
      over = flags & Box::kEnd;
      take_turn();
      if (flags >> index_ & Box::kStep) break;
      pass_turn();
      if (over) return false;
    }
    step.single = holds == 1;
    if (step.single) step.second = step.first;
    holds = 0;
    return true;
  }

  __device__ __forceinline__ void attend(const Tile& tile) {
    cute::clear(output_);
    softmax_.reset();
    int holds = 0;
    bool over = false;
    Step step{};
    if (!next_step(step, holds, over)) return;
    Operand<kBoxRows> low, high;  // probabilities of the step before
    float rescale[2];
    {
      Scores scores_low, scores_high;
      issue_scores(step, scores_low, scores_high);
      pass_turn();
      cute::warpgroup_wait<0>();
      finish_scores(step, scores_low, scores_high, tile);
      softmax_.step(scores_low, scores_high, scale_log2_, rescale);
      narrow(scores_low, low);
      narrow(scores_high, high);
    }
    for (Step before = step; next_step(step, holds, over); before = step) {
      Scores scores_low, scores_high;
      issue_scores(step, scores_low, scores_high);
      issue_output(before, low, high);
      pass_turn();
      cute::warpgroup_wait<1>();
      finish_scores(step, scores_low, scores_high, tile);
      const bool changed = softmax_.step(scores_low, scores_high, scale_log2_, rescale);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(output_);
      release_values(before);
      if (changed) {
#pragma unroll
        for (int i = 0; i < cute::size(output_); ++i) output_(i) *= rescale[i / 2 % 2];
      }
      narrow(scores_low, low);
      narrow(scores_high, high);
    }
    issue_output(step, low, high);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(output_);
    release_values(step);
  }

  /// Scores have arrived: masks them and lets the keys go.
  __device__ __forceinline__ void finish_scores(const Step& step, Scores& low, Scores& high,
                                                const Tile& tile) {
    cute::warpgroup_fence_operand(low);
    cute::warpgroup_fence_operand(high);
    mask(low, smem_.boxes[step.first.stage()], tile, false);
    mask(high, smem_.boxes[step.second.stage()], tile, step.single);
    if (!step.single) release(smem_.keys_free[step.second.stage()]);
    release(smem_.keys_free[step.first.stage()]);
  }

  __device__ __forceinline__ void release_values(const Step& step) {
    release(smem_.values_free[step.first.stage()]);
    if (!step.single) release(smem_.values_free[step.second.stage()]);
  }

  /// scores = query x keys^T of two boxes.
  __device__ __forceinline__ void issue_scores(const Step& step, Scores& low, Scores& high) {
    using namespace cute;
    ScoreMma mma;
    const auto keys = mma.get_slice(0).partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.keys[0]), typename Traits::KeyLayout{}));
    warpgroup_fence_operand(low);
    warpgroup_fence_operand(high);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      gemm(mma, query_(_, _, k), keys(_, _, k, step.first.stage()), low);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      gemm(mma, query_(_, _, k), keys(_, _, k, step.second.stage()), high);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  /// output += probabilities x values of two boxes.
  __device__ __forceinline__ void issue_output(const Step& step, const Operand<kBoxRows>& low,
                                               const Operand<kBoxRows>& high) {
    using namespace cute;
    smem_.values_full[step.first.stage()].wait(step.first.parity());
    smem_.values_full[step.second.stage()].wait(step.second.parity());
    OutputMma mma;
    const auto values = mma.get_slice(0).partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.values[0]), typename Traits::ValueLayout{}));
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < kBoxRows / 16; ++k) {
      gemm(mma, low(_, _, k), values(_, _, k, step.first.stage()), output_);
    }
#pragma unroll
    for (int k = 0; k < kBoxRows / 16; ++k) {
      gemm(mma, high(_, _, k), values(_, _, k, step.second.stage()), output_);
    }
    warpgroup_commit_batch();
  }

  static __device__ __forceinline__ void narrow(const Scores& scores, Operand<kBoxRows>& out) {
    using namespace cute;
    static_assert(size(Scores{}) == size(Operand<kBoxRows>{}));
    const NumericArrayConverter<Element> convert;
#pragma unroll
    for (int i = 0; i < size(out); i += 2) convert(scores(i), scores(i + 1), out, i);
  }

  /// Rounds pairs, one instruction each.
  template <class E>
  struct NumericArrayConverter {
    __device__ __forceinline__ void operator()(float a, float b, Operand<kBoxRows>& out,
                                               int i) const {
      auto words = cute::recast<uint32_t>(out);
      if constexpr (std::is_same_v<E, cutlass::half_t>) {
        const __half2 pair = __floats2half2_rn(a, b);
        words(i / 2) = reinterpret_cast<const uint32_t&>(pair);
      } else {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
        words(i / 2) = reinterpret_cast<const uint32_t&>(pair);
      }
    }
  };

  /// Sets the invisible scores of a box to -inf, or all.
  __device__ __forceinline__ void mask(Scores& scores, const Box& box, const Tile& tile,
                                       bool all) const {
    const uint32_t flags = __shfl_sync(~0u, box.flags, 0) >> index_;
    if (!all && !(flags & (Box::kMasked | Box::kByRow))) return;
    const int column = thread_ % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      uint64_t seen = static_cast<uint64_t>(box.bits[index_][1]) << 32 | box.bits[index_][0];
      if (flags & Box::kByRow) seen &= seen_by_row(box, tile, row);
      if (all) seen = 0;
      const uint32_t words[2] = {static_cast<uint32_t>(seen) >> column,
                                 static_cast<uint32_t>(seen >> 32) >> column};
#pragma unroll
      for (int i = 0; i < cute::size(scores) / 2; ++i) {
        const int n = i / 2, c = i % 2;
        float& score = scores(4 * n + 2 * row + c);
        if (!(words[n / 4] & 1u << (n % 4 * 8 + c))) score = -INFINITY;
      }
    }
  }

  /// Keys of a box that row `row` (0, 1) of this thread's may see, one bit each.
  __device__ __forceinline__ uint64_t seen_by_row(const Box& box, const Tile& tile, int row) const {
    const Shape& shape = params_.shape;
    const int position = shape.kv_len - shape.q_len + tile.first_row + kTileRows * index_ +
                         tile_row(row);
    if (box.flags & Box::kPacked) {
      // Columns ascend: how many are at or before the position?
      const int32_t* columns = params_.plan.columns +
                               int64_t{tile.task.slot} * params_.plan.sizes.max_columns + box.start;
      const int listed = params_.plan.num_columns[tile.task.slot] - box.start;
      int count = 0;
#pragma unroll 1
      for (int step = 64; step > 0; step /= 2) {
        const int next = count + step;
        if (next <= listed && next <= kBoxRows && columns[next - 1] <= position) count = next;
      }
      return bits_below(count);
    }
    const int distance = position - box.start;  // of key 0
    const uint64_t in_window = ~bits_below(distance - tile.task.window + 1);
    const uint64_t in_sink = bits_below(tile.task.sink - box.start);
    return bits_below(distance + 1) & (in_window | in_sink);
  }

  /// The lowest `count` bits, also below 0 and above 64.
  static __device__ __forceinline__ uint64_t bits_below(int count) {
    return count <= 0 ? 0 : ~uint64_t{0} >> (64 - min(count, 64));
  }

  /// Row of the tile that accumulator row `row` (0, 1) of this thread is.
  __device__ __forceinline__ int tile_row(int row) const {
    return thread_ / 32 * 16 + thread_ % 32 / 4 + 8 * row;
  }

  /// Writes the output rows, and the LSE where it is asked for.
  __device__ __forceinline__ void store(const Tile& tile) {
    const Shape& shape = params_.shape;
    const int64_t head_row = static_cast<int64_t>(tile.sequence) * shape.q_heads + tile.head;
    Element* out = static_cast<Element*>(params_.out.data) +
                   tile.sequence * params_.out.batch_stride + tile.head * params_.out.head_stride;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float sum = quad_sum(softmax_.sum[row]);
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int query_row = tile.first_row + kTileRows * index_ + tile_row(row);
      if (query_row >= shape.q_len) continue;
      Element* out_row = out + query_row * params_.out.row_stride + thread_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
        const Element pair[2] = {
            static_cast<Element>(output_(4 * n + 2 * row) * inverse),
            static_cast<Element>(output_(4 * n + 2 * row + 1) * inverse)};
        *reinterpret_cast<uint32_t*>(out_row + 8 * n) = *reinterpret_cast<const uint32_t*>(pair);
      }
      if (params_.lse != nullptr && thread_ % 4 == 0) {
        params_.lse[head_row * shape.q_len + query_row] =
            sum > 0.f ? softmax_.max[row] * params_.scale + logf(sum) : -INFINITY;
      }
    }
  }

  const AttentionParams& params_;
  Storage& smem_;
  const int index_, thread_;
  const float scale_log2_;
  RingPosition<Traits::kStages> keys_;
  Operand<Traits::kHeadDim> query_;
  Output output_;
  OnlineSoftmax softmax_;
};

}  // namespace sparseattn::sm90
