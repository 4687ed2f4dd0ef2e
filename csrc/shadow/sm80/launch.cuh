// Definitions of launch.h, included by the instantiation files alone.
#pragma once

#include "common/cuda/launch.h"
#include "shadow/sm80/attention_kernel.cuh"
#include "shadow/sm80/combine_kernel.cuh"
#include "shadow/sm80/launch.h"
#include "shadow/sm80/reconstruct_kernel.cuh"

namespace sparseattn::shadow_sm80 {

template <int kHeadDim, class Element, class Factor>
Status launch_attention(const AttentionJob& job, cudaStream_t stream) {
  const Shape& shape = job.in.shape;
  const int64_t units = int64_t{shape.batch} * shape.kv_heads * job.row_blocks;
  const auto kernel = attention_kernel<kHeadDim, Element, Factor>;
  const int bytes = job.layout.bytes();
  Status status = cuda::to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (!status.ok()) return status;
  kernel<<<static_cast<unsigned>(units * job.splits), 32 * job.layout.warps, bytes, stream>>>(job);
  status = cuda::launch_status();
  if (!status.ok() || job.splits == 1) return status;
  combine_kernel<kHeadDim, Element>
      <<<static_cast<unsigned>(units * job.rows), kCombineThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

template <int kHeadDim, class Element, class Factor>
Status launch_reconstruct(const ReconstructJob& job, cudaStream_t stream) {
  const int64_t ctas = int64_t{job.in.batch} * job.in.kv_heads * job.ctas;
  const auto kernel = reconstruct_kernel<kHeadDim, Element, Factor>;
  const int bytes = job.layout.bytes();
  const Status status = cuda::to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  if (!status.ok()) return status;
  kernel<<<static_cast<unsigned>(ctas), 32 * job.layout.warps, bytes, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::shadow_sm80
