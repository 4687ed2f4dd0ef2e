// Decode attention over selected chunks and exact rows, for one block of 16 query rows a CTA.
//
// Query row r of a key/value head is row r / group of query head r % group of its group. A CTA has
// one split of the keys: they come in tiles of 16, those of the selected chunks first, and the
// tiles go round the splits, then round the warps of a CTA. A warp works alone: it copies a tile's
// rows, rebuilds the keys (or takes exact ones), and keeps a softmax state of its own; all states
// are merged at the end, in the order of the warps, then of the splits.
//
// Copies of a warp come in two groups a tile, source rows then values, and are waited for in that
// order: the next tile's source is on its way from when this one's is read, the next values from
// when these are.
#pragma once

#include "shadow/sm80/job.h"
#include "shadow/sm80/rebuild.cuh"

namespace sparseattn::shadow_sm80 {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 1));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 2);
  return x + __shfl_xor_sync(~0u, x, 1);
}

/// LSE of a softmax state in log2 units.
__device__ __forceinline__ float lse_of(float max, float sum) {
  return sum > 0.0f ? max * kLn2 + logf(sum) : -INFINITY;
}

/// The keys of a block of query rows, in tiles of 16.
struct TileList {
  const ShadowAttention& in;
  const int32_t* selected;  // of the head
  const int32_t* slot_of;
  int32_t length;   // exact rows end there
  int32_t start;    // and begin there
  int32_t q_rows;   // of the sequence
  int32_t chunked;  // tiles of selected chunks
  int32_t tiles;

  __device__ TileList(const ShadowAttention& call, int64_t sequence, int64_t item,
                      int32_t first_row)
      : in(call),
        selected(call.selected + item * call.top_k),
        slot_of(call.slot_of + item * call.top_k),
        length(call.exact_lens.at(sequence, call.shape.kv_len)),
        start(start_of(call.exact_starts, sequence, length)),
        q_rows(call.q_lens.at(sequence, call.shape.q_len)),
        chunked((call.top_k * call.keys.chunk + kWarpKeys - 1) / kWarpKeys),
        tiles(chunked + (length - start + kWarpKeys - 1) / kWarpKeys) {
    if (first_row >= q_rows * call.shape.group()) tiles = 0;
  }

  /// This lane's key of a tile; none past the last one. Chunks do not wait for the lengths.
  __device__ __forceinline__ KeyRef at(int32_t tile) const {
    const int key = threadIdx.x % kWarpKeys;
    if (tile < chunked) {
      const uint32_t token = tile * kWarpKeys + key;
      const int32_t entry = token / in.keys.chunk, within = token % in.keys.chunk;
      if (entry >= in.top_k) return KeyRef::none();
      const int32_t slot = slot_of[entry];
      KeyRef ref = token_of(in.keys, selected[entry], within);
      if (slot < 0 || slot >= in.slots) return KeyRef::none();
      ref.value = slot * in.keys.chunk + within;
      return ref;
    }
    if (tile >= tiles) return KeyRef::none();
    const int64_t row = start + int64_t{tile - chunked} * kWarpKeys + key;
    if (row >= length) return KeyRef::none();
    // The last q_rows rows are those of the queries: row length - q_rows + i from query i on.
    const int64_t query = row - (length - q_rows);
    return {static_cast<int32_t>(row), static_cast<int32_t>(row),
            static_cast<int32_t>(query > 0 ? query * in.shape.group() : 0)};
  }
};

/// A warp's 16 query rows: output accumulators and softmax state. Each thread has rows lane / 4 and
/// lane / 4 + 8 of the block, and columns 8 n + 2 (lane % 4) + {0, 1}.
template <int kHeadDim, class Element>
struct WarpState {
  static constexpr int kRow = kHeadDim + kRowPad;

  float out[kHeadDim / 8][4];
  float max[2];  // log2 units
  float sum[2];  // this thread's share, relative to max

  __device__ WarpState() : max{-INFINITY, -INFINITY}, sum{0.0f, 0.0f} {
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) out[i][0] = out[i][1] = out[i][2] = out[i][3] = 0.0f;
  }

  /// Takes a tile's scores in log2 units, -inf where a key is not seen: rescales what is there, and
  /// turns the scores into probabilities.
  __device__ __forceinline__ void step(float (&scores)[2][4]) {
    float decay[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& s0 = scores[0][2 * row];
      float& s1 = scores[0][2 * row + 1];
      float& s2 = scores[1][2 * row];
      float& s3 = scores[1][2 * row + 1];
      const float high = fmaxf(max[row], quad_max(fmaxf(fmaxf(s0, s1), fmaxf(s2, s3))));
      // A row that has seen nothing yet keeps -inf as its maximum; 0 stands in for it below.
      const float safe = high == -INFINITY ? 0.0f : high;
      decay[row] = cuda::exp2_approx(max[row] - safe);
      max[row] = high;
      s0 = cuda::exp2_approx(s0 - safe), s1 = cuda::exp2_approx(s1 - safe);
      s2 = cuda::exp2_approx(s2 - safe), s3 = cuda::exp2_approx(s3 - safe);
      sum[row] = fmaf(sum[row], decay[row], (s0 + s1) + (s2 + s3));
    }
    // Past the first tiles a new maximum is rare.
    if (!__any_sync(~0u, decay[0] != 1.0f || decay[1] != 1.0f)) return;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) {
      out[i][0] *= decay[0];
      out[i][1] *= decay[0];
      out[i][2] *= decay[1];
      out[i][3] *= decay[1];
    }
  }

  /// out += probabilities x the values [16][kRow].
  __device__ __forceinline__ void accumulate(const float (&scores)[2][4], const Element* values) {
    const int lane = threadIdx.x % 32;
    const uint32_t left[4] = {round_pair<Element>(scores[0][0], scores[0][1]),
                              round_pair<Element>(scores[0][2], scores[0][3]),
                              round_pair<Element>(scores[1][0], scores[1][1]),
                              round_pair<Element>(scores[1][2], scores[1][3])};
    const Element* row = values + lane % 16 * kRow + lane / 16 * 8;
#pragma unroll
    for (int i = 0; i < kHeadDim / 16; ++i) {
      uint32_t right[4];
      cuda::ldmatrix_x4_trans(right, row + 16 * i);
      const uint32_t first[2] = {right[0], right[1]}, second[2] = {right[2], right[3]};
      cuda::mma_16x8x16<Element>(out[2 * i], left, first);
      cuda::mma_16x8x16<Element>(out[2 * i + 1], left, second);
    }
  }
};

/// Keys as B operands: step i of the contraction over head_dim takes {0, 1} with keys 0 .. 7 and
/// {2, 3} with keys 8 .. 15.
template <int kHeadDim>
using KeyOperands = uint32_t[kHeadDim / 16][4];

template <int kHeadDim, class Element>
__device__ __forceinline__ void load_exact(KeyOperands<kHeadDim>& operands, const Element* source,
                                           int source_row) {
  const int lane = threadIdx.x % 32;
  const Element* row = source + (lane % 8 + lane / 16 * 8) * source_row + lane / 8 % 2 * 8;
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) cuda::ldmatrix_x4(operands[i], row + 16 * i);
}

/// Accumulators of keys are B operands once they are rounded.
template <int kHeadDim, class Element>
__device__ __forceinline__ void round_keys(KeyOperands<kHeadDim>& operands,
                                           const float (&acc)[kHeadDim / 8][4]) {
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    operands[i][0] = round_pair<Element>(acc[2 * i][0], acc[2 * i][1]);
    operands[i][1] = round_pair<Element>(acc[2 * i + 1][0], acc[2 * i + 1][1]);
    operands[i][2] = round_pair<Element>(acc[2 * i][2], acc[2 * i][3]);
    operands[i][3] = round_pair<Element>(acc[2 * i + 1][2], acc[2 * i + 1][3]);
  }
}

/// scores = queries x keys in log2 units. The keys' dims lie as `columns` says.
template <int kHeadDim, class Element>
__device__ __forceinline__ void score(float (&scores)[2][4], const Element* queries,
                                      const KeyOperands<kHeadDim>& keys, const Columns& columns,
                                      float scale_log2) {
  constexpr int kRow = kHeadDim + kRowPad;
  const int lane = threadIdx.x % 32;
  const Element* row = queries + lane % 16 * kRow;
  float sums[2][2][4] = {};  // even and odd steps apart: shorter chains
#pragma unroll
  for (int i = 0; i < kHeadDim / 16; ++i) {
    uint32_t left[4];
    cuda::ldmatrix_x4(left, row + columns(i, lane / 16));
    const uint32_t first[2] = {keys[i][0], keys[i][1]}, second[2] = {keys[i][2], keys[i][3]};
    cuda::mma_16x8x16<Element>(sums[i % 2][0], left, first);
    cuda::mma_16x8x16<Element>(sums[i % 2][1], left, second);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    scores[i / 4][i % 4] = (sums[0][i / 4][i % 4] + sums[1][i / 4][i % 4]) * scale_log2;
  }
}

/// Row `row` of the unit's block is the query row and head that it says.
struct QueryRow {
  int64_t head;
  int32_t query;
  __device__ QueryRow(const Shape& shape, int64_t kv_head, int32_t row)
      : head(kv_head * shape.group() + row % shape.group()), query(row / shape.group()) {}
};

/// Copies the block's query rows; rows that do not exist become zeros.
template <int kHeadDim, class Element>
__device__ void load_queries(const ShadowAttention& in, const Layout& layout, unsigned char* shared,
                             int64_t sequence, int64_t kv_head, int32_t first_row) {
  constexpr int kRow = kHeadDim + kRowPad, kPieces = kHeadDim / 8;
  const int32_t rows = in.shape.q_len * in.shape.group();
  Element* to = reinterpret_cast<Element*>(shared + layout.queries());
  for (int i = threadIdx.x; i < kTileQueries * kPieces; i += blockDim.x) {
    const int row = i / kPieces, column = i % kPieces * 8;
    const bool exists = first_row + row < rows;
    const QueryRow at(in.shape, kv_head, exists ? first_row + row : 0);
    const Element* from =
        head_rows<Element>(in.q, sequence, at.head) + at.query * in.q.row_stride + column;
    cuda::cp_async_16(to + row * kRow + column, from, exists);
  }
  if (!layout.scattered) return;
  Element* reordered = reinterpret_cast<Element*>(shared + layout.reordered_queries());
  for (int i = threadIdx.x; i < kTileQueries * kHeadDim; i += blockDim.x) {
    const int row = i / kHeadDim, column = i % kHeadDim;
    const bool exists = first_row + row < rows;
    const QueryRow at(in.shape, kv_head, exists ? first_row + row : 0);
    const Element* from = head_rows<Element>(in.q, sequence, at.head) + at.query * in.q.row_stride;
    reordered[row * kRow + column] =
        exists ? from[scattered_dim(column, in.keys.rope.rotary_dim / 2)] : Element(0.0f);
  }
}

/// Merges the warps' states: two columns of one row a thread. Writes the output, or the split's
/// part of it.
template <int kHeadDim, class Element>
__device__ void merge_warps(const AttentionJob& job, const unsigned char* shared, int64_t unit,
                            int split, int64_t sequence, int64_t kv_head, int32_t first_row) {
  constexpr int kRow = kHeadDim + kRowPad, kPairs = kHeadDim / 2;
  const Layout& layout = job.layout;
  const Shape& shape = job.in.shape;
  const auto* states = reinterpret_cast<const float2*>(shared + layout.states());
  for (int i = threadIdx.x; i < job.rows * kPairs; i += blockDim.x) {
    const int row = i / kPairs, column = i % kPairs * 2;
    float max = -INFINITY;
    for (int warp = 0; warp < layout.warps; ++warp) {
      max = fmaxf(max, states[warp * kTileQueries + row].x);
    }
    float sum = 0.0f, x = 0.0f, y = 0.0f;
    for (int warp = 0; warp < layout.warps; ++warp) {
      const float2 state = states[warp * kTileQueries + row];
      if (state.x == -INFINITY) continue;
      const auto* out = reinterpret_cast<const float*>(shared + layout.source(warp));
      const float2 pair = *reinterpret_cast<const float2*>(out + row * kRow + column);
      const float weight = cuda::exp2_approx(state.x - max);
      sum = fmaf(weight, state.y, sum);
      x = fmaf(weight, pair.x, x);
      y = fmaf(weight, pair.y, y);
    }
    if (job.splits > 1) {
      const int64_t part = (unit * job.rows + row) * job.splits + split;
      if (column == 0) job.states[part] = make_float2(max, sum);
      if (max != -INFINITY) {
        *reinterpret_cast<float2*>(job.partial + part * kHeadDim + column) = make_float2(x, y);
      }
      continue;
    }
    if (first_row + row >= shape.q_len * shape.group()) continue;
    const QueryRow at(shape, kv_head, first_row + row);
    Element* out = head_rows<Element>(job.in.out, sequence, at.head);
    const float inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    *reinterpret_cast<uint32_t*>(out + at.query * job.in.out.row_stride + column) =
        round_pair<Element>(x * inverse, y * inverse);
    if (column == 0 && job.in.lse != nullptr) {
      job.in.lse[(sequence * shape.q_heads + at.head) * shape.q_len + at.query] = lse_of(max, sum);
    }
  }
}

template <int kHeadDim, class Element, class Factor>
__global__ void __launch_bounds__(32 * kMostWarps)
    attention_kernel(const __grid_constant__ AttentionJob job) {
  constexpr int kRow = kHeadDim + kRowPad;
  constexpr bool kQuantised = std::is_same_v<Factor, E4m3>;
  extern __shared__ __align__(16) unsigned char shared[];
  const ShadowAttention& in = job.in;
  const Layout& layout = job.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int32_t split = blockIdx.x % job.splits, unit = blockIdx.x / job.splits;
  const int32_t first_row = unit % job.row_blocks * kTileQueries;
  const int32_t item = unit / job.row_blocks;
  const int32_t sequence = item / in.shape.kv_heads, kv_head = item % in.shape.kv_heads;

  // What depends on nothing is on its way first.
  Rebuilder<kHeadDim, Element, Factor> rebuild(in.keys, layout, shared, sequence, kv_head);
  rebuild.start();
  load_queries<kHeadDim, Element>(in, layout, shared, sequence, kv_head, first_row);
  const TileList list(in, sequence, item, first_row);

  Element* source = reinterpret_cast<Element*>(shared + layout.source(warp));
  Element* values = reinterpret_cast<Element*>(shared + layout.values(warp));
  const Factor* factor = head_rows<Factor>(in.keys.factor, sequence, 0);
  const Element* exact_k = head_rows<Element>(in.k, sequence, kv_head);
  const Element* exact_v = head_rows<Element>(in.v, sequence, kv_head);
  const Element* slots = head_rows<Element>(in.values, sequence, kv_head);
  const auto copy_source = [&](int32_t tile, const KeyRef& key) {
    if (tile < list.tiles) {
      const bool chunked = tile < list.chunked;
      if constexpr (kQuantised) {
        copy_rows(reinterpret_cast<unsigned char*>(source), 2 * layout.source_row(),
                  reinterpret_cast<const unsigned char*>(chunked ? static_cast<const void*>(factor)
                                                                 : exact_k),
                  chunked ? in.keys.factor.row_stride : 2 * in.k.row_stride,
                  chunked ? in.keys.rank / 16 : kHeadDim / 8, key.source, key.exists());
      } else {
        copy_rows(source, layout.source_row(), chunked ? factor : exact_k,
                  chunked ? in.keys.factor.row_stride : in.k.row_stride,
                  chunked ? in.keys.rank / 8 : kHeadDim / 8, key.source, key.exists());
      }
    }
    cuda::cp_async_commit();
  };
  const auto scale_of = [&](int32_t tile, const KeyRef& key) {
    return rebuild.scale_of(sequence, tile < list.chunked ? key : KeyRef::none());
  };
  const auto copy_values = [&](int32_t tile, const KeyRef& key) {
    if (tile < list.tiles) {
      const bool chunked = tile < list.chunked;
      copy_rows(values, kRow, chunked ? slots : exact_v, chunked ? kHeadDim : in.v.row_stride,
                kHeadDim / 8, key.value, key.exists());
    }
    cuda::cp_async_commit();
  };

  // The copies of the basis and the queries are in the first group, with the first source rows.
  const int32_t stride = job.splits * layout.warps;
  int32_t tile = split + job.splits * warp;
  KeyRef key = list.at(tile);
  float factor_scale = scale_of(tile, key);
  copy_source(tile, key);
  copy_values(tile, key);
  rebuild.load_vectors(item);
  cuda::cp_async_wait<1>();
  __syncthreads();

  const auto* queries = reinterpret_cast<const Element*>(shared + layout.queries());
  const auto* reordered = reinterpret_cast<const Element*>(shared + layout.reordered_queries());
  const float scale_log2 = in.scale * kLog2e;
  WarpState<kHeadDim, Element> state;
  // The loop is that of the CTA's first warp: streamed pieces of the basis are taken in step.
  for (int32_t first = split; first < list.tiles; first += stride, tile += stride) {
    const KeyRef next = list.at(tile + stride);
    const float next_scale = scale_of(tile + stride, next);
    const bool live = __any_sync(~0u, key.exists());
    const bool chunked = tile < list.chunked;
    cuda::cp_async_wait<1>();
    __syncwarp();  // source rows of all lanes are there
    KeyOperands<kHeadDim> operands;
    if (chunked || (layout.streams() && first < list.chunked)) {
      float acc[kHeadDim / 8][4];
      rebuild(acc, reinterpret_cast<const Factor*>(source), key, factor_scale, live && chunked);
      round_keys<kHeadDim, Element>(operands, acc);
    }
    if (!chunked) load_exact<kHeadDim, Element>(operands, source, layout.source_row());
    __syncwarp();  // and read by all
    copy_source(tile + stride, next);

    float scores[2][4];
    if (live) {
      score<kHeadDim, Element>(scores, chunked ? reordered : queries, operands,
                               chunked ? rebuild.columns : Columns::in_order(), scale_log2);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Columns 8 (i / 2) + 2 (lane % 4) + i % 2, rows lane / 4 and lane / 4 + 8.
        const int from = __shfl_sync(~0u, key.first, i / 2 * 8 + lane % 4 * 2 + i % 2);
        if (first_row + lane / 4 < from) scores[i / 2][i % 2] = -INFINITY;
        if (first_row + lane / 4 + 8 < from) scores[i / 2][2 + i % 2] = -INFINITY;
      }
      state.step(scores);
    }
    cuda::cp_async_wait<1>();
    __syncwarp();  // values of all lanes are there
    if (live) state.accumulate(scores, values);
    __syncwarp();  // and read by all
    copy_values(tile + stride, next);
    key = next;
    factor_scale = next_scale;
  }

  // The warp leaves its rows where its copies were: none is on its way any more.
  cuda::cp_async_wait<0>();
  __syncwarp();
  float* left = reinterpret_cast<float*>(shared + layout.source(warp));
  auto* states = reinterpret_cast<float2*>(shared + layout.states()) + warp * kTileQueries;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const float sum = quad_sum(state.sum[i]);
    if (lane % 4 == 0) {
      // Rows past the sequence's last one attended as rows of zeros do; they come out empty.
      const bool exists = first_row + row < list.q_rows * in.shape.group();
      states[row] = exists ? make_float2(state.max[i], sum) : make_float2(-INFINITY, 0.0f);
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(left + row * kRow + 8 * n + lane % 4 * 2) =
          make_float2(state.out[n][2 * i], state.out[n][2 * i + 1]);
    }
  }
  __syncthreads();
  merge_warps<kHeadDim, Element>(job, shared, unit, split, sequence, kv_head, first_row);
}

}  // namespace sparseattn::shadow_sm80
