// Landmark scores, with what each split of the chunks adds to the softmax of every query row.
//
// Landmarks are the rows of an m16n8k16 product, query rows its columns: thread (g, t) = (lane / 4,
// lane % 4) holds landmarks g and g + 8, query rows 8 n + 2 t and 8 n + 2 t + 1. The order of the
// contraction is free, so both operands come straight from global memory in pieces of 16 bytes:
// elements 32 p + 8 t .. 32 p + 8 t + 7 of a row are thread t's share of steps 2 p and 2 p + 1.
// The next landmarks are in flight while these are multiplied; shared memory is not needed.
//
// Floor: landmarks are read once, 8 us for 122K tokens in chunks of 8, 8 heads of 128.
#include "common/cuda/launch.h"
#include "common/cuda/ptx.cuh"
#include "common/cuda/team.cuh"
#include "shadow/sm80/select_job.h"

namespace sparseattn::shadow_sm80 {
namespace {

constexpr int kScoreWarps = 4;
constexpr int kScoreThreads = 32 * kScoreWarps;
constexpr int kTileChunks = 16;

/// Max and sum of a row over some scores, in log2 units.
__device__ __forceinline__ float2 merge(float2 a, float2 b) {
  const float top = fmaxf(a.x, b.x);
  const float base = top == -INFINITY ? 0.f : top;
  return make_float2(top,
                     a.y * cuda::exp2_approx(a.x - base) + b.y * cuda::exp2_approx(b.x - base));
}

template <int kPieces>
struct LandmarkTile {
  uint4 low[kPieces], high[kPieces];  // landmarks g and g + 8

  template <class Element>
  __device__ __forceinline__ void load(const Element* landmarks, int64_t stride, int32_t first,
                                       int32_t num_chunks) {
    const int32_t g = threadIdx.x % 32 / 4;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const bool has_low = first + g < num_chunks, has_high = first + g + 8 < num_chunks;
    const auto* at = reinterpret_cast<const uint4*>(landmarks + (first + g) * stride);
    const auto* at_high = reinterpret_cast<const uint4*>(landmarks + (first + g + 8) * stride);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) low[p] = has_low ? __ldg(at + 4 * p) : zero;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) high[p] = has_high ? __ldg(at_high + 4 * p) : zero;
  }
};

}  // namespace

/// A CTA for each tile of rows, of each split, of each head of [batch, kv_heads].
template <class Element, int kHeadDim, int kTiles>
__global__ void __launch_bounds__(kScoreThreads, 2)
    scores_kernel(const __grid_constant__ SelectJob job, int32_t row_tiles) {
  constexpr int kPieces = kHeadDim / 32;
  __shared__ float2 sums[kScoreWarps][8 * kTiles];
  const ShadowSelect& in = job.in;
  const int32_t first_row = static_cast<int32_t>(blockIdx.x % row_tiles) * 8 * kTiles;
  const int32_t split = static_cast<int32_t>(blockIdx.x / row_tiles % job.splits);
  const int64_t head = blockIdx.x / row_tiles / job.splits;
  const int64_t sequence = head / in.kv_heads, kv_head = head % in.kv_heads;
  const int32_t num_chunks = in.num_chunks.at(sequence, in.chunks);
  const int32_t own_rows =
      min(in.q_lens.at(sequence, in.q_len) * job.group - job.first_row, job.round_rows);
  const int64_t begin = static_cast<int64_t>(split) * job.split_chunks;
  if (begin >= num_chunks || first_row >= own_rows) return;
  const int32_t end =
      static_cast<int32_t>(min(begin + job.split_chunks, static_cast<int64_t>(num_chunks)));

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const Element* landmarks = static_cast<const Element*>(in.landmarks.data) +
                             sequence * in.landmarks.batch_stride +
                             kv_head * in.landmarks.head_stride + 8 * t;
  const int64_t stride = in.landmarks.row_stride;
  int32_t first = static_cast<int32_t>(begin) + kTileChunks * warp;
  LandmarkTile<kPieces> next;
  next.load(landmarks, stride, first, end);

  uint4 queries[kTiles][kPieces];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const int32_t row = first_row + 8 * n + g;
    const bool valid = row < own_rows;
    const int64_t of_head = valid ? job.first_row + row : 0;
    const Element* from = static_cast<const Element*>(in.q.data) + sequence * in.q.batch_stride +
                          (kv_head * job.group + of_head % job.group) * in.q.head_stride +
                          of_head / job.group * in.q.row_stride + 8 * t;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      queries[n][p] =
          valid ? __ldg(reinterpret_cast<const uint4*>(from) + 4 * p) : make_uint4(0, 0, 0, 0);
    }
  }

  const float factor = in.scale * 1.44269504f;
  float2 row_sum[kTiles][2];
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    row_sum[n][0] = row_sum[n][1] = make_float2(-INFINITY, 0.f);
  }
  float* scores = job.scores + (head * job.most_rows + first_row) * job.stride;
  for (; first < end; first += kTileChunks * kScoreWarps) {
    const LandmarkTile<kPieces> tile = next;
    if (first + kTileChunks * kScoreWarps < end) {
      next.load(landmarks, stride, first + kTileChunks * kScoreWarps, end);
    }
    float products[kTiles][4] = {};
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const uint32_t a0[4] = {tile.low[p].x, tile.high[p].x, tile.low[p].y, tile.high[p].y};
      const uint32_t a1[4] = {tile.low[p].z, tile.high[p].z, tile.low[p].w, tile.high[p].w};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const uint32_t b0[2] = {queries[n][p].x, queries[n][p].y};
        const uint32_t b1[2] = {queries[n][p].z, queries[n][p].w};
        cuda::mma_16x8x16<Element>(products[n], a0, b0);
        cuda::mma_16x8x16<Element>(products[n], a1, b1);
      }
    }
    const int32_t low = first + g, high = low + 8;
    const bool has_low = low < end && job.is_candidate(head, low, num_chunks);
    const bool has_high = high < end && job.is_candidate(head, high, num_chunks);
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const float s0 = has_low ? products[n][c] * factor : -INFINITY;
        const float s1 = has_high ? products[n][2 + c] * factor : -INFINITY;
        const int32_t row = 8 * n + 2 * t + c;
        if (first_row + row < own_rows) {
          float* to = scores + row * job.stride;
          if (low < end) to[low] = s0;
          if (high < end) to[high] = s1;
        }
        float2& sum = row_sum[n][c];
        const float top = fmaxf(sum.x, fmaxf(s0, s1));
        const float base = top == -INFINITY ? 0.f : top;
        sum.y = sum.y * cuda::exp2_approx(sum.x - base) + cuda::exp2_approx(s0 - base) +
                cuda::exp2_approx(s1 - base);
        sum.x = top;
      }
    }
  }

#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float2 sum = row_sum[n][c];
#pragma unroll
      for (int distance = 4; distance < 32; distance *= 2) {
        const float2 other = make_float2(__shfl_xor_sync(cuda::kFullWarp, sum.x, distance),
                                         __shfl_xor_sync(cuda::kFullWarp, sum.y, distance));
        sum = merge(sum, other);
      }
      if (g == 0) sums[warp][8 * n + 2 * t + c] = sum;
    }
  }
  __syncthreads();
  const int32_t row = threadIdx.x;
  if (row >= 8 * kTiles || first_row + row >= own_rows) return;
  float2 sum = sums[0][row];
#pragma unroll
  for (int w = 1; w < kScoreWarps; ++w) sum = merge(sum, sums[w][row]);
  job.partial[(head * job.most_rows + first_row + row) * job.splits + split] = sum;
}

namespace {

template <class Element, int kHeadDim>
Status launch_dim(const SelectJob& job, cudaStream_t stream) {
  const int64_t row_tiles = cuda::ceil_div(job.round_rows, job.tile_rows);
  const int64_t ctas = job.heads() * job.splits * row_tiles;
  if (!cuda::grid_fits(ctas)) return {1, "shadow_select: more chunks than a grid can hold"};
  const auto kernel = job.tile_rows == 8    ? scores_kernel<Element, kHeadDim, 1>
                      : job.tile_rows == 16 ? scores_kernel<Element, kHeadDim, 2>
                                            : scores_kernel<Element, kHeadDim, 4>;
  kernel<<<static_cast<unsigned>(ctas), kScoreThreads, 0, stream>>>(
      job, static_cast<int32_t>(row_tiles));
  return cuda::launch_status();
}

template <class Element>
Status launch_element(const SelectJob& job, cudaStream_t stream) {
  switch (job.in.head_dim) {
    case 64:
      return launch_dim<Element, 64>(job, stream);
    case 96:
      return launch_dim<Element, 96>(job, stream);
    default:
      return launch_dim<Element, 128>(job, stream);
  }
}

}  // namespace

Status launch_scores(const SelectJob& job, cudaStream_t stream) {
  return job.in.dtype == DType::kFloat16 ? launch_element<__half>(job, stream)
                                         : launch_element<__nv_bfloat16>(job, stream);
}

}  // namespace sparseattn::shadow_sm80
