// Copies the key and value rows of every head's columns into contiguous rows, in 16-byte pieces.
#include "common/cuda/launch.h"
#include "sparseattn/plan.h"

namespace sparseattn {
namespace index_sm80 {

constexpr int kPackThreads = 256;
constexpr int kPiecesPerThread = 4;
constexpr int kPackPieces = kPackThreads * kPiecesPerThread;

/// A CTA copies kPackPieces consecutive pieces of one slot's packed rows, keys and values. Rows
/// from num_columns to the next multiple of 64 become zero: they are loaded, and must not hold NaN.
__global__ void __launch_bounds__(kPackThreads)
    pack_columns_kernel(const __grid_constant__ Plan plan, const __grid_constant__ View k,
                        const __grid_constant__ View v, int32_t ctas_per_slot,
                        int32_t element_bytes) {
  const PlanSizes& sizes = plan.sizes;
  const int64_t slot = blockIdx.x / ctas_per_slot;
  const int pieces_per_row = sizes.shape.head_dim * element_bytes / 16;
  const int num_columns = plan.num_columns[slot];
  const int num_rows = (num_columns + 63) / 64 * 64;
  const int64_t first = static_cast<int64_t>(blockIdx.x % ctas_per_slot) * kPackPieces;
  if (first >= static_cast<int64_t>(num_rows) * pieces_per_row) return;

  const int64_t sequence = slot / sizes.vs_heads;
  const int64_t kv_head = plan.vs_heads[slot % sizes.vs_heads] / sizes.shape.group();
  const int64_t slot_row = slot * sizes.packed_rows();
  const int32_t* columns = plan.columns + slot * sizes.max_columns;
  const char* from_k = static_cast<const char*>(k.data) +
                       (sequence * k.batch_stride + kv_head * k.head_stride) * element_bytes;
  const char* from_v = static_cast<const char*>(v.data) +
                       (sequence * v.batch_stride + kv_head * v.head_stride) * element_bytes;
  uint4* to_k = static_cast<uint4*>(plan.packed_k) + slot_row * pieces_per_row;
  uint4* to_v = static_cast<uint4*>(plan.packed_v) + slot_row * pieces_per_row;

  uint4 keys[kPiecesPerThread], values[kPiecesPerThread];
#pragma unroll
  for (int i = 0; i < kPiecesPerThread; ++i) {
    const int64_t piece = first + i * kPackThreads + threadIdx.x;
    const int row = static_cast<int>(piece / pieces_per_row);
    keys[i] = values[i] = make_uint4(0, 0, 0, 0);
    if (row >= num_columns) continue;
    const int byte = static_cast<int>(piece % pieces_per_row) * 16;
    const int64_t key = columns[row];
    keys[i] = *reinterpret_cast<const uint4*>(from_k + key * k.row_stride * element_bytes + byte);
    values[i] = *reinterpret_cast<const uint4*>(from_v + key * v.row_stride * element_bytes + byte);
  }
#pragma unroll
  for (int i = 0; i < kPiecesPerThread; ++i) {
    const int64_t piece = first + i * kPackThreads + threadIdx.x;
    if (piece / pieces_per_row >= num_rows) continue;
    to_k[piece] = keys[i];
    to_v[piece] = values[i];
  }
}

}  // namespace index_sm80

Status pack_columns(const Plan& plan, const View& k, const View& v, cudaStream_t stream) {
  using namespace index_sm80;
  const PlanSizes& sizes = plan.sizes;
  const int64_t slots = static_cast<int64_t>(sizes.shape.batch) * sizes.vs_heads;
  const int32_t element_bytes = sizes.dtype == DType::kFloat32 ? 4 : 2;
  const int64_t row_bytes = static_cast<int64_t>(sizes.shape.head_dim) * element_bytes;
  if (row_bytes % 16 != 0) return {1, "pack_columns: head_dim is not a multiple of 16 bytes"};
  const int64_t ctas_per_slot = cuda::ceil_div(sizes.packed_rows() * (row_bytes / 16), kPackPieces);
  const int64_t ctas = slots * ctas_per_slot;
  if (ctas == 0) return {};
  if (!cuda::grid_fits(ctas)) return {1, "pack_columns: more columns than a grid can hold"};
  pack_columns_kernel<<<static_cast<unsigned>(ctas), kPackThreads, 0, stream>>>(
      plan, k, v, static_cast<int32_t>(ctas_per_slot), element_bytes);
  return cuda::launch_status();
}

}  // namespace sparseattn
