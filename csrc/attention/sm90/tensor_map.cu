// Encodes tensor maps through the driver entry point, so that nothing links against libcuda.
#include <cuda_runtime_api.h>

#include "attention/sm90/tensor_map.h"
#include "common/cuda/launch.h"

namespace sparseattn::sm90 {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Status find_encode(Encode& encode) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const Status status = cuda::to_status(cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
#else
  const Status status = cuda::to_status(
      cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result));
#endif
  if (!status.ok()) return status;
  if (result != cudaDriverEntryPointSuccess || function == nullptr) {
    return {1, "sparse_attention_sm90: the driver has no cuTensorMapEncodeTiled (CUDA 12 needed)"};
  }
  encode = reinterpret_cast<Encode>(function);
  return {};
}

struct Extent {
  int64_t batch, heads, rows;
};

Status encode_rows(Encode encode, const AttentionParams& params, const View& view,
                   const Extent& extent, int atom_cols, RowMap& out) {
  constexpr int64_t kElement = 2;
  const auto entries = [](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(stride == 0 ? 1 : size);
  };
  // A dimension of one entry may have any stride; the engine wants a multiple of 16 bytes.
  const auto bytes = [&](int64_t size, int64_t stride) {
    return static_cast<cuuint64_t>(size == 1 || stride == 0 ? 16 : stride * kElement);
  };
  const cuuint64_t sizes[5] = {
      static_cast<cuuint64_t>(atom_cols), entries(extent.rows, view.row_stride),
      static_cast<cuuint64_t>(params.shape.head_dim / atom_cols),
      entries(extent.heads, view.head_stride), entries(extent.batch, view.batch_stride)};
  const cuuint64_t strides[4] = {
      bytes(extent.rows, view.row_stride), static_cast<cuuint64_t>(atom_cols) * kElement,
      bytes(extent.heads, view.head_stride), bytes(extent.batch, view.batch_stride)};
  const cuuint32_t box[5] = {static_cast<cuuint32_t>(atom_cols), kBoxRows, 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const auto type = params.dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                    : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const auto swizzle = atom_cols == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
  const CUresult result = encode(
      &out.map, type, 5, view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  out.head_step = sizes[3] > 1;
  out.batch_step = sizes[4] > 1;
  if (result != CUDA_SUCCESS) {
    return {
        static_cast<int32_t>(result),
        "sparse_attention_sm90: a tensor map was refused (strides must be multiples of 16 bytes "
        "below 2^40)"};
  }
  return {};
}

}  // namespace

Status make_tensor_maps(const AttentionParams& params, int atom_cols, TensorMaps& maps) {
  Encode encode = nullptr;
  Status status = find_encode(encode);
  if (!status.ok()) return status;
  const Shape& shape = params.shape;
  const PlanSizes& sizes = params.plan.sizes;
  const Extent queries{shape.batch, shape.q_heads, shape.q_len};
  const Extent keys{shape.batch, shape.kv_heads, shape.kv_len};
  status = encode_rows(encode, params, params.q, queries, atom_cols, maps.q);
  if (status.ok()) status = encode_rows(encode, params, params.k, keys, atom_cols, maps.k);
  if (status.ok()) status = encode_rows(encode, params, params.v, keys, atom_cols, maps.v);
  // Without columns the packed maps are never used: any valid one will do.
  maps.packed_k = maps.k;
  maps.packed_v = maps.v;
  const int64_t rows = static_cast<int64_t>(shape.batch) * sizes.vs_heads * sizes.packed_rows();
  if (rows == 0) return status;
  if (rows > INT32_MAX) {
    return {1, "sparse_attention_sm90: more than 2^31 - 1 packed columns over all heads"};
  }
  const View packed_k{params.plan.packed_k, 0, 0, shape.head_dim};
  const View packed_v{params.plan.packed_v, 0, 0, shape.head_dim};
  const Extent packed{1, 1, rows};
  if (status.ok()) {
    status = encode_rows(encode, params, packed_k, packed, atom_cols, maps.packed_k);
  }
  if (status.ok()) {
    status = encode_rows(encode, params, packed_v, packed, atom_cols, maps.packed_v);
  }
  return status;
}

}  // namespace sparseattn::sm90
