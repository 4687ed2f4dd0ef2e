// Definition of launch_attention, included by the instantiation files alone.
#pragma once

#include <algorithm>

#include "attention/sm90/kernel.h"
#include "attention/sm90/launch.h"
#include "common/cuda/launch.h"

namespace sparseattn::sm90 {

template <int kHeadDim, class Element>
Status launch_attention(const AttentionParams& params, cudaStream_t stream) {
  using Config = Traits<kHeadDim, Element>;
  const Shape& shape = params.shape;
  const int64_t pairs = cuda::ceil_div(shape.q_tiles(), kConsumers);
  const int64_t tiles = static_cast<int64_t>(shape.batch) * shape.q_heads * pairs;
  if (tiles == 0) return {};
  if (tiles > INT32_MAX) return {1, "sparse_attention_sm90: more than 2^31 - 1 pairs of tiles"};
  TensorMaps maps;
  Status status = make_tensor_maps(params, Config::kAtomCols, maps);
  if (!status.ok()) return status;
  int device = 0, multiprocessors = 0;
  status = cuda::to_status(cudaGetDevice(&device));
  if (!status.ok()) return status;
  status = cuda::to_status(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (!status.ok()) return status;
  constexpr int kBytes = sizeof(typename Config::SharedStorage);
  const auto kernel = attention_kernel<Config>;
  status = cuda::to_status(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  if (!status.ok()) return status;
  status = cuda::to_status(
      cudaMemsetAsync(params.plan.next_tile, 0, sizeof(*params.plan.next_tile), stream));
  if (!status.ok()) return status;
  const auto ctas = static_cast<unsigned>(std::min<int64_t>(tiles, multiprocessors));
  kernel<<<ctas, Config::kThreads, kBytes, stream>>>(params, maps, static_cast<uint32_t>(tiles));
  return cuda::launch_status();
}

}  // namespace sparseattn::sm90
