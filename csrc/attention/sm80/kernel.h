// The portable attention kernel: one CTA a query tile, mma.sync fed by cp.async.
//
// Keys and values have one buffer each, and copies of one run under the computation on the other.
// Two barriers a step: at the first, keys n are visible to all and every warp is done with values
// n - 1, so values n may be copied in; at the second, values n are visible and every warp is done
// with keys n, so keys n + 1 may be.
#pragma once

#include "attention/sm80/copy.h"
#include "attention/sm80/softmax.h"
#include "attention/sm80/traits.h"
#include "attention/sm80/walker.h"
#include "sparseattn/attention.h"

namespace sparseattn::sm80 {

/// Which (sequence, head, tile) a CTA computes. The heads of one key/value head and neighbouring
/// tiles run together and share L2; a group's longest tiles come first, so the last CTAs are short.
struct TileIndex {
  int sequence, head, tile;
  __device__ TileIndex(const Shape& shape, uint32_t cta) {
    const uint32_t group = shape.group(), tiles = shape.q_tiles();
    const uint32_t per_kv_head = group * tiles;
    const uint32_t kv_head = cta / per_kv_head;
    const uint32_t rest = cta % per_kv_head;
    sequence = kv_head / shape.kv_heads;
    head = kv_head % shape.kv_heads * group + rest % group;
    tile = tiles - 1 - rest / group;
  }
};

template <class Element>
__device__ __forceinline__ Element* head_pointer(const View& view, int sequence, int head) {
  return static_cast<Element*>(view.data) + sequence * view.batch_stride + head * view.head_stride;
}

/// Row of the tile that accumulator row `row` (0, 1) of a thread's 16-row tile `tile` belongs to.
template <class Traits>
__device__ __forceinline__ int accumulator_row(int thread, int tile, int row) {
  return (tile * Traits::kWarps + thread / 32) * 16 + thread % 32 / 4 + 8 * row;
}

/// Sets the invisible scores of a masked step to -inf. Thread columns: 8 n + 2 (lane % 4) + {0, 1}.
template <class Traits, bool kPacks, class Scores>
__device__ __forceinline__ void mask_scores(Scores& scores, const Step& step, int thread,
                                            int first_position, const HeadTask& task,
                                            const int32_t* columns) {
  using namespace cute;
  const int first_column = thread % 4 * 2;
  const uint32_t words[2] = {step.bits[0] >> first_column, step.bits[1] >> first_column};
  const bool by_row = step.by_row();
#pragma unroll
  for (int i = 0; i < 2 * size<2>(scores); ++i) {
    const int n = i / 2, c = i % 2;
    const bool listed = words[n / 4] >> (n % 4 * 8 + c) & 1;
#pragma unroll
    for (int row = 0; row < 2 * Traits::kRowTiles; ++row) {
      float& score = scores(make_coord(c, row % 2), row / 2, n);
      score = listed ? score : -INFINITY;
    }
  }
  if (!by_row) return;
#pragma unroll
  for (int i = 0; i < 2 * size<2>(scores); ++i) {
    const int n = i / 2, c = i % 2, j = 8 * n + first_column + c;
    int key = step.start + j;
    if (kPacks && step.packed()) key = j < step.count() ? columns[key] : 0;
#pragma unroll
    for (int row = 0; row < 2 * Traits::kRowTiles; ++row) {
      const int position = first_position + accumulator_row<Traits>(thread, row / 2, row % 2);
      // A vertical-slash head has no window.
      const bool in_band = kPacks || position - key < task.window || key < task.sink;
      if (!(key <= position && in_band)) {
        scores(make_coord(c, row % 2), row / 2, n) = -INFINITY;
      }
    }
  }
}

/// Accumulators of a tile, and what one step does to them.
template <class Traits>
struct Consumer {
  using Element = typename Traits::Element;
  using Mma = typename Traits::TiledMma;
  using ThreadMma = decltype(Mma{}.get_thread_slice(0));
  using Accumulator = decltype(cute::partition_fragment_C(
      Mma{}, cute::Shape<cute::_64, cute::Int<Traits::kHeadDim>>{}));

  int thread;
  Accumulator acc;
  OnlineSoftmax<Traits::kRowTiles> softmax;

  static __device__ auto tile(Element* data) {
    return cute::make_tensor(cute::make_smem_ptr(data), typename Traits::SmemTile{});
  }

  __device__ explicit Consumer(int thread_index) : thread(thread_index) { cute::clear(acc); }

  /// scores = query x keys^T.
  template <class Scores>
  __device__ __forceinline__ void score(Element* query_tile, Element* keys_tile,
                                        Scores& scores) const {
    using namespace cute;
    const auto query = tile(query_tile);
    const auto keys = tile(keys_tile);
    auto left = Mma{}.get_thread_slice(thread).partition_fragment_A(query);
    auto right = Mma{}.get_thread_slice(thread).partition_fragment_B(keys);
    auto copy_left = make_tiled_copy_A(typename Traits::CopyRows{}, Mma{}).get_thread_slice(thread);
    auto copy_right =
        make_tiled_copy_B(typename Traits::CopyRows{}, Mma{}).get_thread_slice(thread);
    const auto left_source = copy_left.partition_S(query);
    const auto right_source = copy_right.partition_S(keys);
    auto left_target = copy_left.retile_D(left);
    auto right_target = copy_right.retile_D(right);
    clear(scores);
#pragma unroll
    for (int i = 0; i < size<2>(right); ++i) {
      cute::copy(typename Traits::CopyRows{}, left_source(_, _, i), left_target(_, _, i));
      cute::copy(typename Traits::CopyRows{}, right_source(_, _, i), right_target(_, _, i));
      gemm(Mma{}, left(_, _, i), right(_, _, i), scores);
    }
  }

  /// Scores in the element type, as A operands: two neighbouring accumulator tiles are 16 wide.
  template <class Scores>
  static __device__ __forceinline__ auto narrow(const Scores& scores) {
    using namespace cute;
    const auto split = logical_divide(scores.layout(), cute::Shape<X, X, _2>{});
    const auto operand =
        make_layout(make_layout(get<0, 0>(split), get<0, 1>(split), get<2, 0>(split)),
                    get<1>(split), get<2, 1>(split));
    auto narrowed = make_tensor<Element>(operand);
    const auto wide = make_tensor(scores.data(), operand);
#pragma unroll
    for (int i = 0; i < size(wide); ++i) narrowed(i) = static_cast<Element>(wide(i));
    return narrowed;
  }

  /// acc += probabilities x values.
  template <class Probabilities>
  __device__ __forceinline__ void accumulate(Element* values_tile,
                                             const Probabilities& probabilities) {
    using namespace cute;
    const auto values = make_tensor(make_smem_ptr(values_tile), typename Traits::SmemTileT{});
    auto fragment = Mma{}.get_thread_slice(thread).partition_fragment_B(
        make_tensor(make_smem_ptr(values_tile), typename Traits::SmemTileTPlain{}));
    auto copy =
        make_tiled_copy_B(typename Traits::CopyTransposed{}, Mma{}).get_thread_slice(thread);
    const auto source = copy.partition_S(values);
    auto target = copy.retile_D(fragment);
#pragma unroll
    for (int i = 0; i < size<2>(fragment); ++i) {
      cute::copy(typename Traits::CopyTransposed{}, source(_, _, i), target(_, _, i));
      gemm(Mma{}, probabilities(_, _, i), fragment(_, _, i), acc);
    }
  }

  /// Writes the output rows, and the LSE where it is asked for. Each thread owns two neighbouring
  /// columns of every 8 in its rows.
  __device__ __forceinline__ void store(const AttentionParams& params,
                                        const TileContext<Element>& where) {
    using namespace cute;
    const Shape& shape = params.shape;
    Element* out = head_pointer<Element>(params.out, where.sequence, where.head);
    const int64_t head_row = static_cast<int64_t>(where.sequence) * shape.q_heads + where.head;
#pragma unroll
    for (int i = 0; i < 2 * Traits::kRowTiles; ++i) {
      const int tile = i / 2, row = i % 2;
      const int row_of_tile = accumulator_row<Traits>(thread, tile, row);
      // Rows past the sequence's end attended as rows of zeros do; they come out empty.
      const bool exists = row_of_tile < where.rows;
      const float sum = quad_sum(softmax.sum[tile][row]);
      const float inverse = sum > 0.f ? 1.f / sum : 0.f;
      const int query_row = where.tile * kTileRows + row_of_tile;
      if (query_row >= shape.q_len) continue;
      Element* out_row = out + query_row * params.out.row_stride + thread % 4 * 2;
#pragma unroll
      for (int n = 0; n < size<2>(acc); ++n) {
        const Element pair[2] = {static_cast<Element>(acc(make_coord(0, row), tile, n) * inverse),
                                 static_cast<Element>(acc(make_coord(1, row), tile, n) * inverse)};
        *reinterpret_cast<uint32_t*>(out_row + 8 * n) =
            exists ? *reinterpret_cast<const uint32_t*>(pair) : 0;
      }
      if (params.lse != nullptr && thread % 4 == 0) {
        params.lse[head_row * shape.q_len + query_row] =
            exists && sum > 0.f ? softmax.max[tile][row] * params.scale + logf(sum) : -INFINITY;
      }
    }
  }
};

/// A tile of which the sequence has no row: output 0, LSE -inf.
template <class Traits>
__device__ __forceinline__ void store_empty(const AttentionParams& params, const TileIndex& where) {
  using Element = typename Traits::Element;
  constexpr int kPairs = Traits::kHeadDim / 2;
  const Shape& shape = params.shape;
  const int first = where.tile * kTileRows, count = min(kTileRows, shape.q_len - first);
  Element* out = head_pointer<Element>(params.out, where.sequence, where.head);
  for (int i = threadIdx.x; i < count * kPairs; i += Traits::kThreads) {
    Element* pair = out + (first + i / kPairs) * params.out.row_stride + i % kPairs * 2;
    *reinterpret_cast<uint32_t*>(pair) = 0;
  }
  if (params.lse == nullptr) return;
  const int64_t head_row = static_cast<int64_t>(where.sequence) * shape.q_heads + where.head;
  float* lse = params.lse + head_row * shape.q_len + first;
  for (int i = threadIdx.x; i < count; i += Traits::kThreads) lse[i] = -INFINITY;
}

/// Fills the context of the CTA's tile. `own` is the shape of its sequence.
template <class Element>
__device__ void set_context(TileContext<Element>& context, const AttentionParams& params,
                            const TileIndex& where, const HeadTask& task, const Shape& own) {
  const Plan& plan = params.plan;
  const int kv_head = where.head / params.shape.group();
  context.task = task;
  context.sequence = where.sequence;
  context.head = where.head;
  context.tile = where.tile;
  context.rows = min(kTileRows, own.q_len - where.tile * kTileRows);
  context.scope = TileScope(own, where.tile);
  context.k = head_pointer<Element>(params.k, where.sequence, kv_head);
  context.v = head_pointer<Element>(params.v, where.sequence, kv_head);
  if (task.kind == PatternKind::kVerticalSlash) {
    const int64_t row = int64_t{task.slot} * plan.sizes.packed_rows();
    context.packed_k = static_cast<const Element*>(plan.packed_k) + row * params.shape.head_dim;
    context.packed_v = static_cast<const Element*>(plan.packed_v) + row * params.shape.head_dim;
    context.columns = plan.columns + int64_t{task.slot} * plan.sizes.max_columns;
  }
}

/// Copies the keys (or values) of a step.
template <class Traits, bool kPacks>
__device__ __forceinline__ void load_step(typename Traits::Element* target, const Step& step,
                                          const typename Traits::Element* rows, int64_t stride,
                                          const typename Traits::Element* packed) {
  if (kPacks && step.packed()) {
    rows = packed;
    stride = Traits::kHeadDim;
  }
  RowCopy<Traits>(threadIdx.x)(target, rows, stride, step.start, step.count());
  cp_async_commit();
}

/// Computes one tile with the steps that `Walker` comes to.
template <class Traits, class Walker>
__device__ __forceinline__ void attend(const AttentionParams& params,
                                       typename Traits::SharedStorage& smem) {
  using Element = typename Traits::Element;
  constexpr bool kPacks = Walker::kPacks;
  const int thread = threadIdx.x;
  const TileContext<Element>& context = smem.context;

  // Warp 0 writes the next steps; everyone is done with the old ones before and sees them after.
  Walker walker;
  const auto refill = [&] {
    __syncthreads();
    if (thread < 32) {
      const int filled =
          walker.fill({params.plan, context.task, context.scope, context.tile, thread}, smem.steps);
      if (thread == 0) smem.num_steps = filled;
    }
    __syncthreads();
    return smem.num_steps;
  };
  int count = refill();
  if (count > 0) {
    load_step<Traits, kPacks>(smem.keys, smem.steps[0], context.k, params.k.row_stride,
                              context.packed_k);
  }

  Consumer<Traits> consumer(thread);
  const float scale_log2 = params.scale * 1.4426950408889634f;
  for (int index = 0; count > 0;) {
    cp_async_wait_all();
    __syncthreads();
    load_step<Traits, kPacks>(smem.values, smem.steps[index], context.v, params.v.row_stride,
                              context.packed_v);
    auto scores = cute::partition_fragment_C(typename Traits::TiledMma{},
                                             cute::Shape<cute::_64, cute::_64>{});
    consumer.score(smem.query, smem.keys, scores);
    if (smem.steps[index].masked()) {
      mask_scores<Traits, kPacks>(scores, smem.steps[index], thread, context.scope.first,
                                  context.task, context.columns);
    }
    cp_async_wait_all();
    __syncthreads();
    consumer.softmax.step(scores, consumer.acc, scale_log2);
    const auto probabilities = consumer.narrow(scores);
    if (++index == count) {
      count = refill();
      index = 0;
    }
    if (count > 0) {
      load_step<Traits, kPacks>(smem.keys, smem.steps[index], context.k, params.k.row_stride,
                                context.packed_k);
    }
    consumer.accumulate(smem.values, probabilities);
  }
  consumer.store(params, context);
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kCtasPerSm)
    attention_kernel(const __grid_constant__ AttentionParams params) {
  using Element = typename Traits::Element;
  extern __shared__ __align__(128) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const Shape& shape = params.shape;
  const TileIndex where(shape, blockIdx.x);
  const HeadTask task =
      params.plan.heads[static_cast<int64_t>(where.sequence) * shape.q_heads + where.head];
  const Shape own = params.plan.sizes.shape_of(where.sequence);
  const int first_query = where.tile * kTileRows;
  if (first_query >= own.q_len) return store_empty<Traits>(params, where);
  if (threadIdx.x == 0) set_context(smem.context, params, where, task, own);
  RowCopy<Traits>(threadIdx.x)(
      smem.query, head_pointer<Element>(params.q, where.sequence, where.head), params.q.row_stride,
      first_query, min(kTileRows, own.q_len - first_query));
  cp_async_commit();
  __syncthreads();
  switch (task.kind) {
    case PatternKind::kVerticalSlash:
      return attend<Traits, SlashWalker>(params, smem);
    case PatternKind::kBlockSparse:
      return attend<Traits, BlockWalker>(params, smem);
    default:
      return attend<Traits, BandWalker>(params, smem);
  }
}

}  // namespace sparseattn::sm80
