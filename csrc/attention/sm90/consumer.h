// The consumer warpgroups: each computes one query tile of the pair, 64 rows.
//
// A step takes the pair of boxes of a stage: scores of this step, then output of the step before,
// are issued together, and the softmax of this step runs while the output product does. The two
// consumers take turns in issuing (a named barrier each), so that one's products run under the
// other's softmax. Both go through all stages and have the same number of turns in a tile; one that
// has no step for a turn passes it on.
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

  __device__ __forceinline__ void run() {
    if (index_ == 0) pass_turn();  // the second comes first
    next_tile();
    if (!stops()) {
      begin_tile();
      Scores scores;
      Probabilities probabilities;  // of a step whose output is pending
      Stage before;                 // ... the stage of it
      PairWord word{0};
      bool pending = false;
      for (bool more = true; more;) {
        attend(scores, probabilities, before, word, pending);
        more = end_tile(scores, probabilities, before, word, pending);
      }
    }
    if (index_ == 1) take_turn();  // the other's last pass
  }

 private:
  using Stage = RingPosition<Traits::kStages>;
  using TilePosition = RingPosition<kTileSlots>;
  using ScoreMma = typename Traits::ScoreMma;
  using OutputMma = typename Traits::OutputMma;
  using Scores = decltype(cute::partition_fragment_C(
      ScoreMma{}, cute::Shape<cute::_64, cute::Int<kStageRows>>{}));
  static constexpr int kBoxScores = kBoxRows / 2;
  using Output = decltype(cute::partition_fragment_C(
      OutputMma{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));
  /// An A operand, as the accumulators of scores lie: ((column, row, half), 1, 16 columns each).
  using Probabilities = decltype(cute::make_tensor<Element>(
      cute::Layout<cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1,
                               cute::Int<kStageRows / 16>>>{}));

  __device__ void take_turn() { cuda::barrier_sync<256>(1 + index_); }
  __device__ void pass_turn() { cuda::barrier_arrive<256>(2 - index_); }

  /// One arrival a warp. All its lanes are done: the end of a product of the whole warp, or
  /// __syncwarp, lies between what they read and this.
  __device__ __forceinline__ void release(cuda::MBarrier& barrier) {
    arrive_as_warp(barrier, thread_ % 32);
  }

  /// Of the stage at hand.
  __device__ __forceinline__ PairWord read_word() {
    return {smem_.stages[at_.index].words[index_].bits};
  }

  __device__ const Tile& tile() const { return smem_.tiles[tile_.index]; }
  __device__ void next_tile() { smem_.tile_full[tile_.index].wait(tile_.parity); }
  __device__ bool stops() const { return tile().sequence < 0; }

  __device__ __forceinline__ void begin_tile() {
    smem_.query_full.wait(query_parity_);
    query_parity_ ^= 1;
    reset();
  }
  __device__ __forceinline__ void reset() {
    cute::clear(output_);
    softmax_.reset();
  }
  __device__ __forceinline__ void store_tile(TilePosition at) {
    store(smem_.tiles[at.index]);
    __syncwarp();
    release(smem_.tile_free[at.index]);
  }

  /// Goes through the tile's pairs. The output of a step is computed in the next one, or when there
  /// is none, but for the tile's last.
  __device__ __forceinline__ void attend(Scores& scores, Probabilities& probabilities,
                                         Stage& before, PairWord& word, bool& pending) {
    while (find_step(word, probabilities, before, pending)) {
      if (!pending) {
        smem_.keys_full[at_.index].wait(at_.parity);
        word = read_word();
        take_turn();
        issue_scores(scores);
        pass_turn();
        cute::warpgroup_wait<0>();
        begin_steps(word, scores, probabilities);
        pending = true;
        before = at_;
        at_.advance();
        continue;
      }
      // Three ways, with the same products: plain steps are one stretch of code.
      for (;;) {
        smem_.keys_full[at_.index].wait(at_.parity);
        word = read_word();
        if (word.has(PairWord::kMask * 3)) {
          issue_step(scores, probabilities, before);
          mask(word, scores, tile());
          end_step(word, scores, probabilities, before);
        } else {
          issue_step(scores, probabilities, before);
          if (!softmax_.exceeded_by(scores)) {
            release_keys(word);
            softmax_.template exponentiate<0>(scores, scale_log2_);
            stay_ahead();
            finish_output(before);
            before = at_;
            at_.advance();
            // Here, and not where all ways through the loop meet: the way back would be longer.
            asm volatile("" : "+r"(at_.index), "+r"(at_.parity));
            softmax_.template exponentiate<1>(scores, scale_log2_);
            softmax_.add(scores);
            pack(scores, probabilities);
            if (word.has(PairWord::kNext)) continue;
            break;
          }
          end_step(word, scores, probabilities, before);
        }
        if (!word.has(PairWord::kNext)) break;
      }
    }
    if (word.has(PairWord::kEven)) {
      take_turn();
      pass_turn();
    }
  }

  /// Issues the products of a step, scores and the output of the step before, and waits for the
  /// scores.
  __device__ __forceinline__ void issue_step(Scores& scores, const Probabilities& probabilities,
                                             Stage before) {
    take_turn();
    issue_scores(scores);
    smem_.values_full[before.index].wait(before.parity);
    issue_output(before, probabilities);
    pass_turn();
    // The products of this consumer end one after the other, the scores first.
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(scores);
  }

  /// The softmax of a step whose scores have arrived and are masked.
  __device__ __forceinline__ void end_step(PairWord word, Scores& scores,
                                           Probabilities& probabilities, Stage& before) {
    release_keys(word);
    float rescale[2];
    const bool moved = softmax_.follow(scores, scale_log2_, rescale);
    softmax_.template exponentiate<0>(scores, scale_log2_);
    stay_ahead();
    finish_output(before);
    before = at_;
    at_.advance();
    if (moved) scale_output(rescale);
    softmax_.template exponentiate<1>(scores, scale_log2_);
    softmax_.add(scores);
    pack(scores, probabilities);
  }

  /// Stores the tile and goes to the next one; false: there is none. If it begins with a step of
  /// this consumer, its scores are computed while the output is, and is stored.
  __device__ __forceinline__ bool end_tile(Scores& scores, Probabilities& probabilities,
                                           Stage& before, PairWord& word, bool& pending) {
    const TilePosition last = tile_;
    tile_.advance();
    next_tile();
    const bool stop = stops();
    bool joins = false;
    if (!stop && pending) {
      smem_.keys_full[at_.index].wait(at_.parity);
      word = read_word();
      joins = word.has(PairWord::kStep);
    }
    if (!joins) {
      if (pending) compute_output(before, probabilities);
      store_tile(last);
      pending = false;
      word = {0};
      if (stop) return false;
      begin_tile();
      return true;
    }
    smem_.values_full[before.index].wait(before.parity);
    issue_output(before, probabilities);
    smem_.query_full.wait(query_parity_);
    query_parity_ ^= 1;
    take_turn();
    issue_scores(scores);
    pass_turn();
    cute::warpgroup_wait<1>();  // the output, which was issued first
    cute::warpgroup_fence_operand(output_);
    release(smem_.values_free[before.index]);
    store_tile(last);
    cute::warpgroup_wait<0>();
    reset();
    begin_steps(word, scores, probabilities);
    before = at_;
    at_.advance();
    return true;
  }

  /// Goes past pairs of the other. `word`: of the pair before; false: it was the tile's last.
  __device__ __forceinline__ bool find_step(PairWord& word, const Probabilities& probabilities,
                                            Stage before, bool& pending) {
    while (!word.has(PairWord::kNext)) {
      if (word.has(PairWord::kEnd)) return false;
      smem_.keys_full[at_.index].wait(at_.parity);
      word = read_word();
      if (word.has(PairWord::kStep)) return true;
      if (word.has(PairWord::kPass)) {
        // The other is ahead: a stage that is held here would stop its ring.
        if (pending) compute_output(before, probabilities);
        pending = false;
        take_turn();
        pass_turn();
      }
      __syncwarp();
      release(smem_.keys_free[at_.index]);
      if (word.has(PairWord::kEnd)) release(smem_.query_free);
      at_.advance();
    }
    return true;
  }

  __device__ __forceinline__ void compute_output(Stage step, const Probabilities& probabilities) {
    smem_.values_full[step.index].wait(step.parity);
    issue_output(step, probabilities);
    finish_output(step);
  }

  /// The scores of a step with no output pending have arrived.
  __device__ __forceinline__ void begin_steps(PairWord word, Scores& scores,
                                              Probabilities& probabilities) {
    cute::warpgroup_fence_operand(scores);
    if (word.has(PairWord::kMask * 3)) mask(word, scores, tile());
    release_keys(word);
    float rescale[2];
    if (softmax_.follow(scores, scale_log2_, rescale)) scale_output(rescale);
    softmax_.template exponentiate<0>(scores, scale_log2_);
    softmax_.template exponentiate<1>(scores, scale_log2_);
    softmax_.add(scores);
    pack(scores, probabilities);
  }

  /// Keeps the assembler from moving what comes before behind what comes after: a loop that is
  /// never entered, but that ends a block. The condition is the same for all threads, which it
  /// knows.
  __device__ __forceinline__ void stay_ahead() const {
    if (params_.shape.q_len < 0) {
      uint32_t clock;
      do {
        asm volatile("mov.u32 %0, %%clock;" : "=r"(clock));
      } while (clock & 1);
    }
  }

  __device__ __forceinline__ void pack(const Scores& scores, Probabilities& out) {
    auto words = cute::recast<uint32_t>(out);
#pragma unroll
    for (int i = 0; i < cute::size(words); ++i) words(i) = pack(scores(2 * i), scores(2 * i + 1));
  }

  __device__ __forceinline__ void scale_output(const float (&rescale)[2]) {
#pragma unroll
    for (int i = 0; i < cute::size(output_); ++i) output_(i) *= rescale[i / 2 % 2];
  }

  /// Scores have arrived, and those that nobody sees are gone: lets the keys go, and after the last
  /// the queries.
  __device__ __forceinline__ void release_keys(PairWord word) {
    release(smem_.keys_free[at_.index]);
    if (word.has(PairWord::kEnd)) release(smem_.query_free);
  }

  /// Sets the invisible scores of the step to -inf.
  __device__ __forceinline__ void mask(PairWord word, Scores& scores, const Tile& tile) {
    const Box(&boxes)[2] = smem_.stages[at_.index].boxes;
    if (word.has(PairWord::kMask)) mask<0>(scores, boxes[0], tile);
    if (word.has(PairWord::kMask << 1)) mask<1>(scores, boxes[1], tile);
    __syncwarp();
  }

  /// The output has arrived: lets the values go.
  __device__ __forceinline__ void finish_output(Stage step) {
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(output_);
    release(smem_.values_free[step.index]);
  }

  /// scores = query x keys^T.
  __device__ __forceinline__ void issue_scores(Scores& scores) {
    using namespace cute;
    ScoreMma mma;
    const auto slice = mma.get_slice(0);
    const auto keys = slice.partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.keys[0]), typename Traits::KeyLayout{}));
    const auto query = slice.partition_fragment_A(
        make_tensor(make_smem_ptr(smem_.query[index_]), typename Traits::QueryLayout{}));
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
#pragma unroll
    for (int k = 0; k < Traits::kHeadDim / 16; ++k) {
      gemm(mma, query(_, _, k), keys(_, _, k, at_.index), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
  }

  /// output += probabilities x values.
  __device__ __forceinline__ void issue_output(Stage step, const Probabilities& probabilities) {
    using namespace cute;
    OutputMma mma;
    const auto values = mma.get_slice(0).partition_fragment_B(
        make_tensor(make_smem_ptr(smem_.values[0]), typename Traits::ValueLayout{}));
    warpgroup_fence_operand(output_);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < kStageRows / 16; ++k) {
      gemm(mma, probabilities(_, _, k), values(_, _, k, step.index), output_);
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

  /// Sets the invisible scores of one of the step's boxes to -inf.
  template <int kBox>
  __device__ __forceinline__ void mask(Scores& scores, const Box& box, const Tile& tile) const {
    uint64_t seen[2];
    seen[0] = seen[1] = static_cast<uint64_t>(box.bits[index_][1]) << 32 | box.bits[index_][0];
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
      int count[2] = {0, 0};
#pragma unroll 1  // rare, and code on the way of other masks
      for (int r = 0; r < 16; ++r) {
        const int position = warp_position + r;
        const int visible = __popc(__ballot_sync(~0u, low <= position)) +
                            __popc(__ballot_sync(~0u, high <= position));
        if (lane / 4 == r) count[0] = visible;
        if (lane / 4 + 8 == r) count[1] = visible;
      }
      seen[0] &= bits_below(count[0]);
      seen[1] &= bits_below(count[1]);
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
      const bool kept = query_row < shape.q_len;
      Element* out_row = out + query_row * params_.out.row_stride + thread_ % 4 * 8;
#pragma unroll
      for (int n = 0; n < Traits::kHeadDim / 8; n += 4) {
        uint32_t words[4];  // first this thread's of four pieces of 16 bytes, then a whole piece
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = 4 * (n + i) + 2 * row;
          words[i] = sum > 0.f ? pack(output_(at) * inverse, output_(at + 1) * inverse) : 0;
        }
        transpose_quad(words, thread_);
        if (kept) {
          *reinterpret_cast<uint4*>(out_row + 8 * n) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      if (kept && params_.lse != nullptr && thread_ % 4 == 0) {
        params_.lse[head_row * shape.q_len + query_row] =
            sum > 0.f ? softmax_.reference[row] * 0.6931471805599453f + logf(sum) : -INFINITY;
      }
    }
  }

  const AttentionParams& params_;
  Storage& smem_;
  const int index_, thread_;
  const float scale_log2_;
  Stage at_;
  TilePosition tile_;
  uint32_t query_parity_ = 0;
  Output output_;
  OnlineSoftmax<Traits::kSlack> softmax_;
};

}  // namespace sparseattn::sm90
