// The consumer warpgroups: each computes one query tile of the pair, 64 rows.
//
// A step takes two boxes: scores of this step, then output of the step before, are issued together,
// and the softmax of this step runs while the output product does. The two consumers take turns in
// issuing (a named barrier each), so that one's products run under the other's softmax. Both go
// through the same rounds; one that has nothing to do in a round passes its turn on.
#pragma once

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
    if (index_ == 0) pass_turn();  // the second comes first
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
    if (index_ == 1) take_turn();  // the other's last pass
  }

 private:
  using ScoreMma = typename Traits::ScoreMma;
  using OutputMma = typename Traits::OutputMma;
  /// Scores of two boxes, one after the other.
  using Scores = decltype(cute::make_tensor<float>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::Int<2 * kBoxRows / 8>>,
                               cute::_1, cute::_1>>{}));
  static constexpr int kBoxScores = kBoxRows / 2;
  using Output = decltype(cute::partition_fragment_C(
      OutputMma{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));
  /// A operands, as the accumulators of scores lie: ((column, row, half), 1, 16 columns each).
  template <int kColumns>
  using Operand = decltype(cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                               cute::Int<kColumns / 16>>>{}));

  using Probabilities = Operand<2 * kBoxRows>;

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
    auto words = cute::recast<uint32_t>(query_);
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      const int piece = 2 * k + lane / 16;
      const Element* from = smem_.query[index_] +
                            (piece / kAtomPieces * kBoxRows + row) * Traits::kAtomCols +
                            8 * (piece % kAtomPieces ^ Traits::swizzle(row));
      uint32_t fragment[4];
      cuda::ldmatrix_x4(fragment, from);
#pragma unroll
      for (int i = 0; i < 4; ++i) words(4 * k + i) = fragment[i];
    }
  }

  __device__ __forceinline__ bool round_is_there() {
    return smem_.round_full[index_][round_.index].test_wait(round_.parity);
  }
  __device__ __forceinline__ void await_round(RoundWord& word) {
    smem_.round_full[index_][round_.index].wait(round_.parity);
    read_round(word);
  }
  __device__ __forceinline__ void read_round(RoundWord& word) {
    // The same for all lanes; the shuffle tells the compiler.
    word.bits = __shfl_sync(~0u, smem_.rounds[index_][round_.index], 0);
    release(smem_.round_free[index_][round_.index]);
    round_.advance();
  }

  /// Passes turns on until there is a step; false: the tile ends without one.
  __device__ __forceinline__ bool find_step(RoundWord& word) {
    while (!word.has(RoundWord::kStep)) {
      take_turn();
      pass_turn();
      if (word.has(RoundWord::kEnd)) return false;
      await_round(word);
    }
    return true;
  }

  /// Steps in a row: the output of each is computed in the next one, or after the last.
  __device__ __forceinline__ void attend(const Tile& tile) {
    cute::clear(output_);
    softmax_.reset();
    RoundWord step;
    await_round(step);
    while (find_step(step)) {
      Probabilities probabilities;  // of the step before
      begin_steps(step, probabilities, tile);
      RoundWord before = step;
      bool ahead = false;  // `step` is the word after `before`
      for (;;) {
        if (before.has(RoundWord::kEnd)) break;
        if (!ahead) await_round(step);
        // With nothing to do, finish: stages that are held would stop the rings.
        if (!step.has(RoundWord::kStep)) break;
        await_stages(step, before);
        take_turn();
        Scores scores;
        issue_scores(step, scores);
        const bool there = !step.has(RoundWord::kEnd) && round_is_there();
        issue_output(before, probabilities);
        pass_turn();
        RoundWord next;
        ahead = __all_sync(~0u, there);
        if (ahead) read_round(next);
        cute::warpgroup_wait<1>();
        finish_scores(step, scores, tile);
        float rescale[2];
        const bool changed = softmax_.raise(scores, scale_log2_, rescale);
        // By now the output of the step before is there, and its probabilities may be replaced.
        finish_output(before);
        if (changed) scale_output(rescale);
        exponentiate(scores, probabilities);
        before = step;
        step = next;
      }
      await_values(before);
      issue_output(before, probabilities);
      finish_output(before);
      if (before.has(RoundWord::kEnd)) return;
    }
  }

  /// A step with no output left to compute.
  __device__ __forceinline__ void begin_steps(RoundWord step, Probabilities& probabilities,
                                              const Tile& tile) {
    smem_.keys_full[step.stage(0)].wait(step.parity(0));
    smem_.keys_full[step.stage(1)].wait(step.parity(1));
    take_turn();
    Scores scores;
    issue_scores(step, scores);
    pass_turn();
    cute::warpgroup_wait<0>();
    finish_scores(step, scores, tile);
    float rescale[2];
    if (softmax_.raise(scores, scale_log2_, rescale)) scale_output(rescale);
    exponentiate(scores, probabilities);
  }

  __device__ __forceinline__ void exponentiate(const Scores& scores, Probabilities& out) {
    auto words = cute::recast<uint32_t>(out);
    softmax_.exponentiate(scores, scale_log2_,
                          [&](int i, float a, float b) { words(i) = pack(a, b); });
  }

  __device__ __forceinline__ void scale_output(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < cute::size(output_); ++i) output_(i) *= rescale[i / 2 % 2];
  }

  /// Waits for the keys of `step` and the values of `before`; all four are asked before any is
  /// waited for.
  __device__ __forceinline__ void await_stages(RoundWord step, RoundWord before) {
    bool there = true;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      there &= smem_.keys_full[step.stage(i)].test_wait(step.parity(i));
      there &= smem_.values_full[before.stage(i)].test_wait(before.parity(i));
    }
    if (there) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) smem_.keys_full[step.stage(i)].wait(step.parity(i));
    await_values(before);
  }
  __device__ __forceinline__ void await_values(RoundWord step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) smem_.values_full[step.stage(i)].wait(step.parity(i));
  }

  /// Scores have arrived: masks them and lets the keys go.
  __device__ __forceinline__ void finish_scores(RoundWord step, Scores& scores, const Tile& tile) {
    cute::warpgroup_fence_operand(scores);
    const bool single = step.has(RoundWord::kSingle);
    if (step.has(RoundWord::kMask)) mask<0>(scores, smem_.boxes[step.stage(0)], tile, false);
    if (step.has(RoundWord::kMask << 1)) mask<1>(scores, smem_.boxes[step.stage(1)], tile, single);
    release(smem_.keys_free[step.stage(0)]);
    if (!single) release(smem_.keys_free[step.stage(1)]);
  }

  /// The output has arrived: lets the values go.
  __device__ __forceinline__ void finish_output(RoundWord step) {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(output_);
    release(smem_.values_free[step.stage(0)]);
    if (!step.has(RoundWord::kSingle)) release(smem_.values_free[step.stage(1)]);
  }

  /// scores = query x keys^T of two boxes.
  __device__ __forceinline__ void issue_scores(RoundWord step, Scores& scores) {
    using namespace cute;
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    using Half = Layout<cute::Shape<cute::Shape<_2, _2, Int<kBoxRows / 8>>, _1, _1>>;
    auto low = make_tensor(scores.data(), Half{});
    auto high = make_tensor(scores.data() + kBoxScores, Half{});
    multiply(step.stage(0), low);
    multiply(step.stage(1), high);
    warpgroup_commit_batch();
  }

  template <class Out>
  __device__ __forceinline__ void multiply(int stage, Out& out) {
    using namespace cute;
    ScoreMma mma;
    const auto slice = mma.get_slice(0);
    const auto keys = slice.partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.keys[0]), typename Traits::KeyLayout{}));
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      gemm(mma, query_(_, _, k), keys(_, _, k, stage), out);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
  }

  /// output += probabilities x values of two boxes.
  __device__ __forceinline__ void issue_output(RoundWord step, const Probabilities& probabilities) {
    using namespace cute;
    OutputMma mma;
    const auto values = mma.get_slice(0).partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.values[0]), typename Traits::ValueLayout{}));
    constexpr int kHalf = kBoxRows / 16;
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      gemm(mma, probabilities(_, _, k), values(_, _, k, step.stage(0)), output_);
    }
#pragma unroll
    for (int k = 0; k < kHalf; ++k) {
      gemm(mma, probabilities(_, _, kHalf + k), values(_, _, k, step.stage(1)), output_);
    }
    warpgroup_commit_batch();
  }

  /// Two values rounded, in one word.
  static __device__ __forceinline__ uint32_t pack(float a, float b) {
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
      const __half2 pair = __floats2half2_rn(a, b);
      return reinterpret_cast<const uint32_t&>(pair);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
      return reinterpret_cast<const uint32_t&>(pair);
    }
  }

  /// Sets the invisible scores of one of the step's boxes to -inf, or all of them.
  template <int kBox>
  __device__ __forceinline__ void mask(Scores& scores, const Box& box, const Tile& tile,
                                       bool all) const {
    uint64_t seen[2];
    seen[0] = seen[1] =
        all ? 0 : static_cast<uint64_t>(box.bits[index_][1]) << 32 | box.bits[index_][0];
    if (box.flags >> index_ & Box::kByRow) hide_by_row(seen, box, tile);
    const int column = thread_ % 4 * 2;
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const uint32_t words[2] = {static_cast<uint32_t>(seen[row]) >> column,
                                 static_cast<uint32_t>(seen[row] >> 32) >> column};
#pragma unroll
      for (int i = 0; i < kBoxScores / 2; ++i) {
        const int n = i / 2, c = i % 2;
        float& score = scores(kBox * kBoxScores + 4 * n + 2 * row + c);
        if (!(words[n / 4] & 1u << (n % 4 * 8 + c))) score = -INFINITY;
      }
    }
  }

  /// Clears the bits of keys that this thread's rows do not see.
  __device__ __forceinline__ void hide_by_row(uint64_t (&seen)[2], const Box& box,
                                              const Tile& tile) const {
    const int lane = thread_ % 32;
    const int warp_position =
        tile.kv_len - tile.q_len + tile.first_row + kTileRows * index_ + thread_ / 32 * 16;
    if (box.flags & Box::kPacked) {
      // Columns ascend, so a row sees those before the first that is beyond its position.
      const int32_t* columns = params_.plan.columns +
                               int64_t{tile.task.slot} * params_.plan.sizes.max_columns + box.start;
      const int listed = params_.plan.num_columns[tile.task.slot] - box.start;
      const int low = lane < listed ? columns[lane] : INT32_MAX;
      const int high = 32 + lane < listed ? columns[32 + lane] : INT32_MAX;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        int count = 0;
#pragma unroll 4
        for (int r = 0; r < 8; ++r) {
          const int position = warp_position + 8 * row + r;
          const int visible = __popc(__ballot_sync(~0u, low <= position)) +
                              __popc(__ballot_sync(~0u, high <= position));
          if (lane / 4 == r) count = visible;
        }
        seen[row] &= bits_below(count);
      }
      return;
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int distance = warp_position + lane / 4 + 8 * row - box.start;  // of key 0
      const uint64_t in_window = ~bits_below(distance - tile.task.window + 1);
      const uint64_t in_sink = bits_below(tile.task.sink - box.start);
      seen[row] &= bits_below(distance + 1) & (in_window | in_sink);
    }
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
      const int query_row = tile.first_row + kTileRows * index_ + tile_row(row);
      const float own_sum = quad_sum(softmax_.sum[row]);
      // Rows past the sequence's own length may have computed with anything.
      const float sum = query_row < tile.q_len ? own_sum : 0.f;
      const float inverse = 1.f / sum;
      if (query_row >= shape.q_len) continue;
      Element* out_row = out + query_row * params_.out.row_stride + thread_ % 4 * 2;
#pragma unroll
      for (int n = 0; n < Traits::kHeadDim / 8; ++n) {
        const Element pair[2] = {
            static_cast<Element>(sum > 0.f ? output_(4 * n + 2 * row) * inverse : 0.f),
            static_cast<Element>(sum > 0.f ? output_(4 * n + 2 * row + 1) * inverse : 0.f)};
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
  RingPosition<kRounds> round_;
  Operand<Traits::kHeadDim> query_;
  Output output_;
  OnlineSoftmax softmax_;
};

}  // namespace sparseattn::sm90
