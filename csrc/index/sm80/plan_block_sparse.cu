// A block mask of bytes to rows of bits.
#include "common/cuda/launch.h"
#include "common/cuda/team.cuh"
#include "sparseattn/plan.h"

namespace sparseattn {
namespace index_sm80 {

constexpr int kMaskThreads = 256;
constexpr int kMaskWarps = kMaskThreads / 32;
constexpr int kWordsPerWarp = 8;

/// A warp makes up to kWordsPerWarp consecutive words of one mask row; each lane reads a byte of
/// every word.
__global__ void __launch_bounds__(kMaskThreads)
    plan_block_sparse_kernel(const __grid_constant__ Plan plan,
                             const __grid_constant__ BlockMask mask, int64_t pieces,
                             int32_t pieces_per_row) {
  const PlanSizes& sizes = plan.sizes;
  const int lane = threadIdx.x % 32;
  const int64_t piece = static_cast<int64_t>(blockIdx.x) * kMaskWarps + threadIdx.x / 32;
  if (piece >= pieces) return;
  const int64_t row = piece / pieces_per_row;
  const int first_word = static_cast<int>(piece % pieces_per_row) * kWordsPerWarp;
  const int words = sizes.block_words(), kv_blocks = sizes.kv_blocks();
  const int64_t slot = row / sizes.q_blocks();
  const uint8_t* from = mask.data + slot / sizes.bs_heads * mask.batch_stride +
                        slot % sizes.bs_heads * mask.head_stride +
                        row % sizes.q_blocks() * mask.row_stride;
  bool selected[kWordsPerWarp];
#pragma unroll
  for (int i = 0; i < kWordsPerWarp; ++i) {
    const int64_t block = 32 * static_cast<int64_t>(first_word + i) + lane;
    selected[i] = block < kv_blocks && from[block * mask.stride] != 0;
  }
  uint32_t own = 0;
#pragma unroll
  for (int i = 0; i < kWordsPerWarp; ++i) {
    const uint32_t word = __ballot_sync(cuda::kFullWarp, selected[i]);
    if (lane == i) own = word;
  }
  if (lane < kWordsPerWarp && first_word + lane < words) {
    plan.block_bits[row * words + first_word + lane] = own;
  }
}

}  // namespace index_sm80

Status plan_block_sparse(const Plan& plan, const BlockMask& mask, cudaStream_t stream) {
  using namespace index_sm80;
  const PlanSizes& sizes = plan.sizes;
  const int64_t slots = static_cast<int64_t>(sizes.shape.batch) * sizes.bs_heads;
  if (slots == 0) return {};
  const int64_t pieces_per_row = cuda::ceil_div(sizes.block_words(), kWordsPerWarp);
  const int64_t pieces = slots * sizes.q_blocks() * pieces_per_row;
  const int64_t ctas = cuda::ceil_div(pieces, kMaskWarps);
  if (ctas == 0) return {};
  if (!cuda::grid_fits(ctas)) return {1, "plan_block_sparse: more blocks than a grid can hold"};
  plan_block_sparse_kernel<<<static_cast<unsigned>(ctas), kMaskThreads, 0, stream>>>(
      plan, mask, pieces, static_cast<int32_t>(pieces_per_row));
  return cuda::launch_status();
}

}  // namespace sparseattn
