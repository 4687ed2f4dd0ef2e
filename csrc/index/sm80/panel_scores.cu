// Antidiagonal scores of pairs of blocks: residue means, then a product on the tensor cores.
//
// A block's residues are one vector of stride * head_dim elements, those of the keys in reverse
// order, so that the score of a pair is a dot product. A CTA multiplies the 128 query blocks of a
// panel by 128 key blocks: eight warps of 64 x 32, 64 elements of the vectors in a step.
//
// Ring. At the barrier of step n every thread has waited for its own copies of step n and has
// finished computing step n - 1, so step n may be read and the stage of step n - 1 may be filled.
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/ptx.cuh"
#include "index/sm80/block_sparse_job.h"
#include "index/sm80/head_list.cuh"

namespace sparseattn::index_sm80 {
namespace {

constexpr int kResidueThreads = 128;
constexpr int kScoreThreads = 256;
constexpr int kTileBlocks = kPanelBlocks;  // both ways
constexpr int kStepElements = 64;          // rows of a stage are 128 bytes, eight pieces
constexpr int kPieces = kStepElements / 8;
constexpr int kRowBytes = 2 * kStepElements;
constexpr int kTileBytes = kTileBlocks * kRowBytes;
constexpr int kStageBytes = 2 * kTileBytes;  // queries, then keys
constexpr int kStages = 3;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;

/// Means of the `count` rows of a block by residue, to out [stride, dim]; 0 where there is no row.
template <class Element>
__device__ __forceinline__ void write_residues(const Element* rows, int64_t row_stride, int count,
                                               int stride, int dim, bool reverse, Element* out) {
  const int pieces = dim / 8;
  for (int i = threadIdx.x; i < stride * pieces; i += kResidueThreads) {
    const int residue = i / pieces, piece = i % pieces;
    float sum[8] = {};
#pragma unroll 4
    for (int row = residue; row < count; row += stride) {
      const Element* from = rows + row * row_stride + 8 * piece;
      cuda::add_elements<Element>(sum, *reinterpret_cast<const uint4*>(from));
    }
    const auto number = static_cast<float>(max((count - residue + stride - 1) / stride, 1));
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[j] /= number;
    const int at = reverse ? stride - 1 - residue : residue;
    *reinterpret_cast<uint4*>(out + at * dim + 8 * piece) = cuda::round_elements<Element>(sum);
  }
}

/// A panel of the round: kPanelBlocks query blocks of one head, the last panel's fewer.
struct PanelScope {
  int64_t slot;  // of [batch, heads]
  int64_t sequence;
  int32_t ordinal;
  int32_t first_block;
  bool active;
  Shape own;  // of the sequence

  __device__ PanelScope(const BlockSparseJob& job, int64_t panel) {
    slot = (job.first_panel + panel) / job.slot_panels;
    first_block = static_cast<int32_t>((job.first_panel + panel) % job.slot_panels) * kPanelBlocks;
    sequence = slot / job.in.heads;
    ordinal = static_cast<int32_t>(slot % job.in.heads);
    active = job.in.strides == nullptr || job.in.strides[ordinal] == job.in.stride;
    own = sequence_shape(job.in.shape, job.in.lengths, sequence);
  }
};

}  // namespace

/// A CTA for each key block.
template <class Element>
__global__ void __launch_bounds__(kResidueThreads)
    key_residues_kernel(const __grid_constant__ BlockSparseJob job) {
  const BlockSparseEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int block = static_cast<int>(blockIdx.x % job.kv_blocks);
  const int64_t head = blockIdx.x / job.kv_blocks;  // of [batch, kv_heads]
  const int64_t first = static_cast<int64_t>(block) * in.block;
  const Shape own = sequence_shape(shape, in.lengths, head / shape.kv_heads);
  if (first >= own.kv_len) return;
  const Element* rows = static_cast<const Element*>(in.k.data) +
                        head / shape.kv_heads * in.k.batch_stride +
                        head % shape.kv_heads * in.k.head_stride + first * in.k.row_stride;
  write_residues(rows, in.k.row_stride, min(in.block, static_cast<int>(own.kv_len - first)),
                 in.stride, shape.head_dim, true,
                 static_cast<Element*>(job.k_residues) + blockIdx.x * job.depth());
}

/// A CTA for each query block of the round's panels.
template <class Element>
__global__ void __launch_bounds__(kResidueThreads)
    query_residues_kernel(const __grid_constant__ BlockSparseJob job) {
  const BlockSparseEstimate& in = job.in;
  const Shape& shape = in.shape;
  const PanelScope scope(job, blockIdx.x / kPanelBlocks);
  const int block = scope.first_block + static_cast<int>(blockIdx.x % kPanelBlocks);
  const int64_t first = static_cast<int64_t>(block) * in.block;
  if (!scope.active || first >= scope.own.q_len) return;
  const int64_t head = listed_head(in.head_ids, scope.ordinal);
  const Element* rows = static_cast<const Element*>(in.q.data) +
                        scope.sequence * in.q.batch_stride + head * in.q.head_stride +
                        first * in.q.row_stride;
  write_residues(rows, in.q.row_stride, min(in.block, static_cast<int>(scope.own.q_len - first)),
                 in.stride, shape.head_dim, false,
                 static_cast<Element*>(job.q_residues) + blockIdx.x * job.depth());
}

namespace {

/// Elements [first, first + kStepElements) of 128 vectors to a tile; vectors from `valid` on are 0.
template <class Element>
__device__ __forceinline__ void load_tile(const Element* vectors, int depth, int valid, int first,
                                          unsigned char* tile) {
  constexpr int kRowsAtOnce = kScoreThreads / kPieces;
  static_assert(kRowsAtOnce % 8 == 0);
  const int row = threadIdx.x / kPieces, column = threadIdx.x % kPieces;
  const Element* from = vectors + first + 8 * column;
  unsigned char* to = tile + row * kRowBytes + 16 * (column ^ row % 8);
#pragma unroll
  for (int i = 0; i < kTileBlocks; i += kRowsAtOnce) {
    const bool exists = row + i < valid;
    cuda::cp_async_16(to + i * kRowBytes, from + (exists ? row + i : 0) * depth, exists);
  }
}

/// Adds the products of one stage to a warp's sums.
template <class Element>
__device__ __forceinline__ void multiply_stage(const unsigned char* stage, int row, int column,
                                               float (&sums)[kRowTiles][kColumnTiles][4]) {
  const int lane = threadIdx.x % 32;
  // Lane i of ldmatrix gives row i % 8 of matrix i / 8: queries by rows first, keys by pieces
  // first.
  const unsigned char* queries = stage + (row + lane % 16) * kRowBytes;
  const unsigned char* keys = stage + kTileBytes + (column + lane % 8 + lane / 16 * 8) * kRowBytes;
  const int query_piece = lane / 16, key_piece = lane / 8 % 2, swizzle = lane % 8;
#pragma unroll
  for (int d = 0; d < kStepElements / 16; ++d) {
    uint32_t b[kColumnTiles / 2][4];
#pragma unroll
    for (int n = 0; n < kColumnTiles / 2; ++n) {
      cuda::ldmatrix_x4(b[n], keys + 16 * n * kRowBytes + 16 * ((2 * d + key_piece) ^ swizzle));
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      uint32_t a[4];
      cuda::ldmatrix_x4(a, queries + 16 * m * kRowBytes + 16 * ((2 * d + query_piece) ^ swizzle));
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const uint32_t half[2] = {b[n / 2][2 * (n % 2)], b[n / 2][2 * (n % 2) + 1]};
        cuda::mma_16x8x16<Element>(sums[m][n], a, half);
      }
    }
  }
}

/// Residue pairs that two blocks have in common; the last block of a sequence may lack some.
__device__ __forceinline__ int common_residues(const BlockSparseJob& job, const Shape& own,
                                               int64_t q_block, int64_t k_block) {
  const int64_t size = job.in.block, stride = job.in.stride;
  const int64_t q_rows = own.q_len - q_block * size;
  const int64_t k_rows = own.kv_len - k_block * size;
  return static_cast<int>(min(stride, q_rows) + min(stride, k_rows) - stride);
}

}  // namespace

/// A CTA for each panel of the round and each 128 key blocks; those past the panel's last position
/// have nothing to do.
template <class Element>
__global__ void __launch_bounds__(kScoreThreads, 2)
    panel_scores_kernel(const __grid_constant__ BlockSparseJob job, int32_t key_tiles) {
  extern __shared__ __align__(128) unsigned char ring[];
  const BlockSparseEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int64_t panel = blockIdx.x / key_tiles;
  const int first_key = static_cast<int>(blockIdx.x % key_tiles) * kTileBlocks;
  const PanelScope scope(job, panel);
  const Shape& own = scope.own;
  const int q_blocks = min(kPanelBlocks, (own.q_len + in.block - 1) / in.block - scope.first_block);
  if (!scope.active || q_blocks <= 0) return;
  const int64_t end_row = min(static_cast<int64_t>(scope.first_block + q_blocks) * in.block,
                              static_cast<int64_t>(own.q_len));
  const int64_t end_position = end_row + own.kv_len - own.q_len;
  if (static_cast<int64_t>(first_key) * in.block >= end_position) return;

  const int depth = static_cast<int>(job.depth());
  const int64_t kv_head = listed_head(in.head_ids, scope.ordinal) / shape.group();
  const int64_t k_row = scope.sequence * shape.kv_heads + kv_head;
  const Element* queries =
      static_cast<const Element*>(job.q_residues) + panel * kPanelBlocks * depth;
  const Element* keys =
      static_cast<const Element*>(job.k_residues) + (k_row * job.kv_blocks + first_key) * depth;
  const int k_blocks = min(kTileBlocks, (own.kv_len + in.block - 1) / in.block - first_key);
  const int steps = depth / kStepElements;
  const auto load = [&](int step, int stage) {
    unsigned char* to = ring + stage * kStageBytes;
    if (step < steps) {
      load_tile(queries, depth, q_blocks, step * kStepElements, to);
      load_tile(keys, depth, k_blocks, step * kStepElements, to + kTileBytes);
    }
    cuda::cp_async_commit();
  };

  const int warp = threadIdx.x / 32;
  const int row = warp / 4 * kWarpRows, column = warp % 4 * kWarpColumns;
  float sums[kRowTiles][kColumnTiles][4] = {};
#pragma unroll
  for (int step = 0; step < kStages - 1; ++step) load(step, step);
  int stage = 0, free_stage = kStages - 1;
  for (int step = 0; step < steps; ++step) {
    cuda::cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1, free_stage);
    multiply_stage<Element>(ring + stage * kStageBytes, row, column, sums);
    stage = stage + 1 == kStages ? 0 : stage + 1;
    free_stage = free_stage + 1 == kStages ? 0 : free_stage + 1;
  }

  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int block = row + 16 * m + 8 * half + lane / 4;
      float* out = job.scores + (panel * kPanelBlocks + block) * job.mean_stride + first_key;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        const int at = column + 8 * n + 2 * (lane % 4);
        if (block >= q_blocks || first_key + at >= job.mean_stride) continue;
        float score[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int pairs =
              common_residues(job, own, scope.first_block + block, first_key + at + i);
          score[i] = pairs > 0 ? sums[m][n][2 * half + i] / static_cast<float>(pairs) : 0.f;
        }
        *reinterpret_cast<float2*>(out + at) = make_float2(score[0], score[1]);
      }
    }
  }
}

namespace {

template <class Element>
Status launch_panel_scores_as(const BlockSparseJob& job, cudaStream_t stream) {
  const auto panels = static_cast<int64_t>(job.panels);
  const int64_t key_tiles = cuda::ceil_div(job.kv_blocks, kTileBlocks);
  if (!cuda::grid_fits(panels * kPanelBlocks) || !cuda::grid_fits(panels * key_tiles)) {
    return {1, "estimate_block_sparse: more blocks than a grid can hold"};
  }
  query_residues_kernel<Element>
      <<<static_cast<unsigned>(panels * kPanelBlocks), kResidueThreads, 0, stream>>>(job);
  Status status = cuda::launch_status();
  if (!status.ok()) return status;
  constexpr int kBytes = kStages * kStageBytes;
  const auto kernel = panel_scores_kernel<Element>;
  status = cuda::to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  if (!status.ok()) return status;
  kernel<<<static_cast<unsigned>(panels * key_tiles), kScoreThreads, kBytes, stream>>>(
      job, static_cast<int32_t>(key_tiles));
  return cuda::launch_status();
}

}  // namespace

Status launch_panel_scores(const BlockSparseJob& job, cudaStream_t stream) {
  return job.in.dtype == DType::kFloat16 ? launch_panel_scores_as<__half>(job, stream)
                                         : launch_panel_scores_as<__nv_bfloat16>(job, stream);
}

Status launch_key_residues(const BlockSparseJob& job, cudaStream_t stream) {
  const Shape& shape = job.in.shape;
  const int64_t ctas = static_cast<int64_t>(shape.batch) * shape.kv_heads * job.kv_blocks;
  if (!cuda::grid_fits(ctas)) {
    return {1, "estimate_block_sparse: more blocks than a grid can hold"};
  }
  const auto kernel = job.in.dtype == DType::kFloat16 ? key_residues_kernel<__half>
                                                      : key_residues_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(ctas), kResidueThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
