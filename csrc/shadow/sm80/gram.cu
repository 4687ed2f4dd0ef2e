// Gram matrix and sums of keys.
//
// A CTA multiplies one pair of 128-feature tiles, the upper triangle of them, over one split of the
// rows: eight warps of 64 x 32. Rows of keys are the contraction, so both operands come out of
// shared memory transposed. Products of kFlushRows rows are summed in fp32 by the tensor cores, all
// beyond in fp64 registers; splits meet in the workspace and are added in order, nothing is atomic.
//
// Ring. At the barrier of step n every thread has waited for its own copies of step n and has
// finished computing step n - 1, so step n may be read and the stage of step n - 1 may be filled.
//
// Floor for 122K x 1024: 144 GFLOP in the triangle, 0.36 ms at 400 TFLOP/s.
#include <algorithm>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/ptx.cuh"
#include "shadow/sm80/checks.h"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kGramThreads = 256;
constexpr int kTileFeatures = 128;
constexpr int kTilePieces = kTileFeatures / 8;
constexpr int kStepRows = 32;
constexpr int kFlushRows = 256;
constexpr int kGramStages = 4;
constexpr int kRowBytes = 2 * kTileFeatures;
constexpr int kBlockBytes = kStepRows * kRowBytes;
constexpr int kStageBytes = 2 * kBlockBytes;  // left features, then right ones
constexpr int kRingBytes = kGramStages * kStageBytes;
constexpr int kWarpRows = 64, kWarpColumns = 32;
constexpr int kRowTiles = kWarpRows / 16, kColumnTiles = kWarpColumns / 8;
constexpr int64_t kTileProducts = int64_t{kTileFeatures} * kTileFeatures;
constexpr int64_t kMostPartialBytes = int64_t{96} << 20;
constexpr int64_t kMostSplits = 64;
// Sums: a CTA takes kSumRows rows of kSumPieces pieces of eight features.
constexpr int kSumThreads = 256;
constexpr int kSumRows = 512;
constexpr int kSumPieces = 32;
constexpr int kSumLanes = kSumThreads / kSumPieces;
// Reduction: blocks of kReduceSide x kReduceSide products.
constexpr int kReduceThreads = 256;
constexpr int kReduceSide = 32;
constexpr int kReduceParts = kReduceThreads / kReduceSide;
constexpr int kTileBlocks = kTileFeatures / kReduceSide;  // each way

struct GramJob {
  ShadowGram in;
  int32_t width;
  int32_t tiles;       // of features
  int32_t pairs;       // of tiles, left <= right
  int32_t splits;      // of the rows, for products
  int32_t split_rows;  // a multiple of kFlushRows
  int32_t sum_splits;  // of the rows, for sums
  double* partial;     // [batch, splits, pairs, kTileFeatures, kTileFeatures]
  double* sums;        // [batch, sum_splits, width]
};

/// Pair number `pair` in the order (0, 0), (0, 1), ..., (1, 1), ...
struct TilePair {
  int32_t left = 0, right;
  __device__ TilePair(int32_t pair, int32_t tiles) {
    while (pair >= tiles - left) pair -= tiles - left++;
    right = left + pair;
  }
};

/// Piece of eight features from `feature` on of the rows of a sequence.
template <class Element>
__device__ __forceinline__ const Element* feature_rows(const ShadowGram& in, int64_t sequence,
                                                       int32_t feature) {
  return static_cast<const Element*>(in.k.data) + sequence * in.k.batch_stride +
         feature / in.head_dim * in.k.head_stride + feature % in.head_dim;
}

/// A thread's share of loading 128 features of kStepRows rows.
template <class Element>
struct FeatureLoader {
  const Element* from;
  bool valid;

  __device__ FeatureLoader(const GramJob& job, int64_t sequence, int32_t tile) {
    const int32_t feature = tile * kTileFeatures + 8 * (threadIdx.x % kTilePieces);
    valid = feature < job.width;
    from = feature_rows<Element>(job.in, sequence, valid ? feature : 0);
  }

  /// Rows from `end` on are zero.
  __device__ __forceinline__ void load(int64_t row_stride, int32_t first, int32_t end,
                                       unsigned char* block) const {
    constexpr int kRowsAtOnce = kGramThreads / kTilePieces;
    static_assert(kRowsAtOnce % 8 == 0);
    const int row = threadIdx.x / kTilePieces, piece = threadIdx.x % kTilePieces;
    unsigned char* to = block + row * kRowBytes + 16 * (piece ^ row % 8);
#pragma unroll
    for (int i = 0; i < kStepRows; i += kRowsAtOnce) {
      const bool exists = valid && first + row + i < end;
      cuda::cp_async_16(to + i * kRowBytes, from + (exists ? first + row + i : 0) * row_stride,
                        exists);
    }
  }
};

template <class Element>
__global__ void __launch_bounds__(kGramThreads, 1)
    products_kernel(const __grid_constant__ GramJob job) {
  extern __shared__ __align__(128) unsigned char ring[];
  const ShadowGram& in = job.in;
  const TilePair tile(static_cast<int32_t>(blockIdx.x % job.pairs), job.tiles);
  const int32_t split = static_cast<int32_t>(blockIdx.x / job.pairs % job.splits);
  const int64_t sequence = blockIdx.x / job.pairs / job.splits;
  const int32_t rows = in.lens.at(sequence, in.rows);
  const int64_t begin = static_cast<int64_t>(split) * job.split_rows;
  if (begin >= rows) return;
  const int32_t first = static_cast<int32_t>(begin);
  const int32_t end = static_cast<int32_t>(min(begin + job.split_rows, static_cast<int64_t>(rows)));
  const int32_t steps = (end - first + kStepRows - 1) / kStepRows;

  const FeatureLoader<Element> left(job, sequence, tile.left), right(job, sequence, tile.right);
  const bool diagonal = tile.left == tile.right;
  const int64_t row_stride = in.k.row_stride;
  const auto load_step = [&](int32_t step) {
    if (step < steps) {
      unsigned char* stage = ring + step % kGramStages * kStageBytes;
      const int32_t row = first + step * kStepRows;
      left.load(row_stride, row, end, stage);
      if (!diagonal) right.load(row_stride, row, end, stage + kBlockBytes);
    }
    cuda::cp_async_commit();
  };
#pragma unroll
  for (int step = 0; step < kGramStages - 1; ++step) load_step(step);

  // Lane i of ldmatrix gives row i % 8 of matrix i / 8; the matrices of the left operand go by
  // features first, those of the right one by keys first.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row = warp / 4 * kWarpRows, column = warp % 4 * kWarpColumns;
  const int swizzle = lane % 8, upper = lane / 16, second = lane / 8 % 2;
  const int left_key = 8 * upper + lane % 8, left_piece = row / 8 + second;
  const int right_key = 8 * second + lane % 8, right_piece = column / 8 + upper;
  const int right_block = diagonal ? 0 : kBlockBytes;

  float products[kRowTiles][kColumnTiles][4] = {};
  double sums[kRowTiles][kColumnTiles][4] = {};
  for (int32_t step = 0; step < steps; ++step) {
    cuda::cp_async_wait<kGramStages - 2>();
    __syncthreads();
    load_step(step + kGramStages - 1);
    const unsigned char* stage = ring + step % kGramStages * kStageBytes;
    const unsigned char* left_rows = stage + left_key * kRowBytes;
    const unsigned char* right_rows = stage + right_block + right_key * kRowBytes;
#pragma unroll
    for (int d = 0; d < kStepRows / 16; ++d) {
      uint32_t b[kColumnTiles / 2][4];
#pragma unroll
      for (int n = 0; n < kColumnTiles / 2; ++n) {
        cuda::ldmatrix_x4_trans(
            b[n], right_rows + 16 * d * kRowBytes + 16 * ((right_piece + 2 * n) ^ swizzle));
      }
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
        uint32_t a[4];
        cuda::ldmatrix_x4_trans(
            a, left_rows + 16 * d * kRowBytes + 16 * ((left_piece + 2 * m) ^ swizzle));
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
          const uint32_t own[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
          cuda::mma_16x8x16<Element>(products[m][n], a, own);
        }
      }
    }
    if (step % (kFlushRows / kStepRows) != kFlushRows / kStepRows - 1 && step != steps - 1) {
      continue;
    }
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[m][n][i] += static_cast<double>(products[m][n][i]);
          products[m][n][i] = 0.f;
        }
      }
    }
  }

  double* out = job.partial + blockIdx.x * kTileProducts;
#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const int at = (row + 16 * m + lane / 4) * kTileFeatures + column + 8 * n + 2 * (lane % 4);
      *reinterpret_cast<double2*>(out + at) = make_double2(sums[m][n][0], sums[m][n][1]);
      *reinterpret_cast<double2*>(out + at + 8 * kTileFeatures) =
          make_double2(sums[m][n][2], sums[m][n][3]);
    }
  }
}

/// A CTA for each block of kSumPieces pieces, of each kSumRows rows, of each sequence.
template <class Element>
__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(const __grid_constant__ GramJob job, int32_t column_blocks) {
  __shared__ float lanes[kSumLanes][8 * kSumPieces];
  const ShadowGram& in = job.in;
  const int32_t block = static_cast<int32_t>(blockIdx.x % column_blocks);
  const int32_t split = static_cast<int32_t>(blockIdx.x / column_blocks % job.sum_splits);
  const int64_t sequence = blockIdx.x / column_blocks / job.sum_splits;
  const int32_t rows = in.lens.at(sequence, in.rows);
  const int64_t first = static_cast<int64_t>(split) * kSumRows;
  if (first >= rows) return;
  const int32_t count = static_cast<int32_t>(min(static_cast<int64_t>(kSumRows), rows - first));

  const int piece = threadIdx.x % kSumPieces, lane = threadIdx.x / kSumPieces;
  const int32_t feature = 8 * (block * kSumPieces + piece);
  float sum[8] = {};
  if (feature < job.width) {
    const Element* from = feature_rows<Element>(in, sequence, feature) + first * in.k.row_stride;
#pragma unroll 8
    for (int i = lane; i < count; i += kSumLanes) {
      cuda::add_elements<Element>(
          sum, __ldg(reinterpret_cast<const uint4*>(from + i * in.k.row_stride)));
    }
  }
#pragma unroll
  for (int d = 0; d < 8; ++d) lanes[lane][8 * piece + d] = sum[d];
  __syncthreads();
  const int32_t column = 8 * kSumPieces * block + static_cast<int32_t>(threadIdx.x);
  if (column >= job.width) return;
  double total = 0.0;
#pragma unroll
  for (int i = 0; i < kSumLanes; ++i) total += static_cast<double>(lanes[i][threadIdx.x]);
  job.sums[(sequence * job.sum_splits + split) * job.width + column] = total;
}

/// CTA for each block of products of each pair of each sequence, then one for each kReduceSide
/// columns of the sums of each sequence.
__global__ void __launch_bounds__(kReduceThreads)
    reduce_kernel(const __grid_constant__ GramJob job, int64_t product_ctas) {
  __shared__ double block[kReduceSide][kReduceSide + 1];
  const ShadowGram& in = job.in;
  const int x = threadIdx.x % kReduceSide, part = threadIdx.x / kReduceSide;
  const int64_t width = job.width;
  if (blockIdx.x >= product_ctas) {
    const int32_t blocks = (job.width + kReduceSide - 1) / kReduceSide;
    const int64_t cta = blockIdx.x - product_ctas;
    const int64_t sequence = cta / blocks, column = cta % blocks * kReduceSide + x;
    const int32_t rows = in.lens.at(sequence, in.rows);
    const int32_t splits = (rows + kSumRows - 1) / kSumRows;
    const double* from = job.sums + sequence * job.sum_splits * width + column;
    double sum = 0.0;
    if (column < width) {
#pragma unroll 4
      for (int32_t s = part; s < splits; s += kReduceParts) sum += from[s * width];
    }
    block[part][x] = sum;
    __syncthreads();
    if (part != 0 || column >= width) return;
    for (int i = 1; i < kReduceParts; ++i) sum += block[i][x];
    in.total[sequence * width + column] += sum;
    if (column == 0) in.count[sequence] += rows;
    return;
  }

  const int32_t of_tile = static_cast<int32_t>(blockIdx.x % (kTileBlocks * kTileBlocks));
  const int64_t of_pair = blockIdx.x / (kTileBlocks * kTileBlocks);
  const int64_t sequence = of_pair / job.pairs, pair = of_pair % job.pairs;
  const TilePair tile(static_cast<int32_t>(pair), job.tiles);
  const int32_t block_row = of_tile / kTileBlocks, block_column = of_tile % kTileBlocks;
  const int32_t first_row = tile.left * kTileFeatures + block_row * kReduceSide;
  const int32_t first_column = tile.right * kTileFeatures + block_column * kReduceSide;
  if (first_row > first_column || first_row >= width || first_column >= width) return;
  const int32_t rows = in.lens.at(sequence, in.rows);
  const int32_t splits = (rows + job.split_rows - 1) / job.split_rows;
  const double* from = job.partial + (sequence * job.splits * job.pairs + pair) * kTileProducts +
                       block_row * kReduceSide * kTileFeatures + block_column * kReduceSide + x;
  double* gram = in.gram + sequence * width * width;
#pragma unroll
  for (int i = part; i < kReduceSide; i += kReduceParts) {
    double sum = 0.0;
    for (int32_t s = 0; s < splits; ++s) {
      sum += from[s * job.pairs * kTileProducts + i * kTileFeatures];
    }
    const int64_t r = first_row + i, c = first_column + x;
    if (r <= c && c < width) {
      sum += gram[r * width + c];
      gram[r * width + c] = sum;
    }
    block[i][x] = sum;
  }
  __syncthreads();
  // The lower triangle. Widths are multiples of kReduceSide or not; r and c trade places.
#pragma unroll
  for (int i = part; i < kReduceSide; i += kReduceParts) {
    const int64_t r = first_row + x, c = first_column + i;
    if (r < c && c < width) gram[c * width + r] = block[x][i];
  }
}

/// Lays out `workspace` and returns the bytes it takes.
inline size_t lay_out(GramJob& job, void* workspace) {
  const ShadowGram& in = job.in;
  job.width = in.kv_heads * in.head_dim;
  job.tiles = static_cast<int32_t>(cuda::ceil_div(job.width, kTileFeatures));
  job.pairs = job.tiles * (job.tiles + 1) / 2;
  const int64_t pairs = std::max<int64_t>(1, static_cast<int64_t>(in.batch) * job.pairs);
  const int64_t tile_bytes = kTileProducts * sizeof(double);
  const int64_t most =
      std::min({std::max<int64_t>(1, cuda::ceil_div(in.rows, kFlushRows)), kMostSplits,
                std::max<int64_t>(1, kMostPartialBytes / (pairs * tile_bytes))});
  // As many splits as end in full waves: the work of a wave is one split's share of the rows.
  const int64_t sms = multiprocessors();
  int64_t splits = 1;
  for (int64_t s = 2; s <= most; ++s) {
    if (cuda::ceil_div(pairs * s, sms) * splits < cuda::ceil_div(pairs * splits, sms) * s) {
      splits = s;
    }
  }
  const int64_t share = cuda::ceil_div(std::max(in.rows, 1), splits);
  job.split_rows = static_cast<int32_t>(
      std::min<int64_t>(cuda::ceil_div(share, kFlushRows) * kFlushRows, INT32_MAX / 2));
  job.splits = static_cast<int32_t>(splits);
  job.sum_splits = static_cast<int32_t>(cuda::ceil_div(in.rows, kSumRows));
  if (workspace != nullptr) {
    job.partial = static_cast<double*>(workspace);
    job.sums = job.partial + pairs * splits * kTileProducts;
  }
  return pairs * splits * tile_bytes +
         sizeof(double) * static_cast<size_t>(in.batch) * job.sum_splits * job.width;
}

template <class Element>
Status launch_gram(const GramJob& job, cudaStream_t stream) {
  const ShadowGram& in = job.in;
  const int64_t batch = in.batch;
  const int64_t ctas = batch * job.splits * job.pairs;
  const int64_t column_blocks = cuda::ceil_div(job.width, 8 * kSumPieces);
  const int64_t sum_ctas = batch * job.sum_splits * column_blocks;
  const int64_t product_ctas = batch * job.pairs * kTileBlocks * kTileBlocks;
  const int64_t reduce_ctas = product_ctas + batch * cuda::ceil_div(job.width, kReduceSide);
  if (!cuda::grid_fits(std::max({ctas, sum_ctas, reduce_ctas}))) {
    return {1, "shadow_gram: more rows than a grid can hold"};
  }
  const auto kernel = products_kernel<Element>;
  const Status status = cuda::to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kRingBytes));
  if (!status.ok()) return status;
  kernel<<<static_cast<unsigned>(ctas), kGramThreads, kRingBytes, stream>>>(job);
  sums_kernel<Element><<<static_cast<unsigned>(sum_ctas), kSumThreads, 0, stream>>>(
      job, static_cast<int32_t>(column_blocks));
  reduce_kernel<<<static_cast<unsigned>(reduce_ctas), kReduceThreads, 0, stream>>>(job,
                                                                                   product_ctas);
  return cuda::launch_status();
}

inline Status check(const ShadowGram& in) {
  if (!is_half(in.dtype)) return {1, "shadow_gram: dtype: expected fp16 or bf16"};
  if (!is_head_dim(in.head_dim)) return {1, "shadow_gram: head_dim: expected 64, 96 or 128"};
  if (in.batch < 0 || in.kv_heads < 1 || in.rows < 0) {
    return {1, "shadow_gram: sizes: expected batch, rows >= 0 and kv_heads >= 1"};
  }
  if (in.kv_heads > 16384 / in.head_dim) {
    return {1, "shadow_gram: k: expected kv_heads * head_dim <= 16384"};
  }
  if (!is_aligned(in.k, in.batch, in.kv_heads, in.rows))
    return {1, "shadow_gram: k: expected rows that start on 16-byte boundaries"};
  return {};
}

}  // namespace shadow_sm80

size_t shadow_gram_bytes(const ShadowGram& params) {
  shadow_sm80::GramJob job{};
  job.in = params;
  return shadow_sm80::check(params).ok() ? shadow_sm80::lay_out(job, nullptr) : 0;
}

Status shadow_gram(const ShadowGram& params, void* workspace, cudaStream_t stream) {
  const Status status = shadow_sm80::check(params);
  if (!status.ok()) return status;
  if (params.batch == 0 || params.rows == 0) return {};
  shadow_sm80::GramJob job{};
  job.in = params;
  shadow_sm80::lay_out(job, workspace);
  return params.dtype == DType::kFloat16 ? shadow_sm80::launch_gram<__half>(job, stream)
                                         : shadow_sm80::launch_gram<__nv_bfloat16>(job, stream);
}

}  // namespace sparseattn
