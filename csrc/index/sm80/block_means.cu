// fp32 means of blocks of queries and of keys.
#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "index/sm80/block_sparse_job.h"
#include "index/sm80/head_list.cuh"

namespace sparseattn::index_sm80 {

constexpr int kMeanThreads = 128;
constexpr int kMaxHeadDim = 128;

/// A CTA for each block: first those of the queries, then those of the keys. A thread adds one
/// 16-byte piece of every rows_at_once-th row; the threads of a piece are added in order.
template <class Element>
__global__ void __launch_bounds__(kMeanThreads)
    block_means_kernel(const __grid_constant__ BlockSparseJob job, int64_t query_ctas) {
  __shared__ float sums[kMeanThreads * 8];
  const BlockSparseEstimate& in = job.in;
  const Shape& shape = in.shape;
  const bool is_query = blockIdx.x < query_ctas;
  const int64_t cta = blockIdx.x - (is_query ? 0 : query_ctas);
  const int blocks = is_query ? job.q_blocks : job.kv_blocks;
  const int heads = is_query ? in.heads : shape.kv_heads;
  const View& view = is_query ? in.q : in.k;

  const int block = static_cast<int>(cta % blocks);
  const int64_t row = cta / blocks;
  const int ordinal = static_cast<int>(row % heads);
  if (is_query && in.strides != nullptr && in.strides[ordinal] != in.stride) return;
  const Shape own = sequence_shape(shape, in.lengths, row / heads);
  const int length = is_query ? own.q_len : own.kv_len;
  const int64_t head = is_query ? listed_head(in.head_ids, ordinal) : ordinal;
  const int64_t first = static_cast<int64_t>(block) * in.block;
  const int count = static_cast<int>(min(static_cast<int64_t>(in.block), length - first));
  if (count <= 0) return;  // past the sequence's end: nobody reads this mean

  const int dim = shape.head_dim, pieces = dim / 8, rows_at_once = kMeanThreads / pieces;
  const int piece = threadIdx.x % pieces, lane_row = threadIdx.x / pieces;
  const Element* from = static_cast<const Element*>(view.data) + row / heads * view.batch_stride +
                        head * view.head_stride + first * view.row_stride + 8 * piece;
  float sum[8] = {};
  if (lane_row < rows_at_once) {
#pragma unroll 8
    for (int i = lane_row; i < count; i += rows_at_once) {
      cuda::add_elements<Element>(sum, *reinterpret_cast<const uint4*>(from + i * view.row_stride));
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[lane_row * dim + 8 * piece + i] = sum[i];
  }
  __syncthreads();
  const int d = threadIdx.x;
  if (d >= dim) return;
  float total = 0.f;
  for (int i = 0; i < rows_at_once; ++i) total += sums[i * dim + d];
  const float mean = total / static_cast<float>(count);
  if (is_query) {
    job.q_means[cta * dim + d] = mean;
  } else {
    job.k_means[(row * dim + d) * job.mean_stride + block] = mean;
  }
}

Status launch_block_means(const BlockSparseJob& job, cudaStream_t stream) {
  const Shape& shape = job.in.shape;
  const int64_t query_ctas = static_cast<int64_t>(shape.batch) * job.in.heads * job.q_blocks;
  const int64_t key_ctas = static_cast<int64_t>(shape.batch) * shape.kv_heads * job.kv_blocks;
  if (!cuda::grid_fits(query_ctas + key_ctas)) {
    return {1, "estimate_block_sparse: more blocks than a grid can hold"};
  }
  static_assert(kMeanThreads >= kMaxHeadDim);
  const auto kernel = job.in.dtype == DType::kFloat16 ? block_means_kernel<__half>
                                                      : block_means_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(query_ctas + key_ctas), kMeanThreads, 0, stream>>>(job,
                                                                                    query_ctas);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
