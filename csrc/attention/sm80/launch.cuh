// Definition of launch_attention, included by the instantiation files alone.
#pragma once

#include "attention/sm80/kernel.h"
#include "attention/sm80/launch.h"

namespace sparseattn::sm80 {

template <int kHeadDim, class Element>
Status launch_attention(const AttentionParams& params, cudaStream_t stream) {
  using Config = Traits<kHeadDim, Element>;
  const Shape& shape = params.shape;
  const int64_t ctas = static_cast<int64_t>(shape.batch) * shape.q_heads * shape.q_tiles();
  if (ctas == 0) return {};
  if (ctas > INT32_MAX) return {1, "sparse_attention_sm80: more than 2^31 - 1 query tiles"};
  constexpr int kBytes = sizeof(typename Config::SharedStorage);
  const auto kernel = attention_kernel<Config>;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error == cudaSuccess) {
    kernel<<<static_cast<unsigned>(ctas), Config::kThreads, kBytes, stream>>>(params);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) return {static_cast<int32_t>(error), cudaGetErrorString(error)};
  return {};
}

}  // namespace sparseattn::sm80
