// From the run-time head_dim and dtype of a call to the instantiation that takes them.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <type_traits>

#include "sparseattn/attention.h"

namespace sparseattn {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

template <class Element, class Launch>
Status dispatch_head_dim(const AttentionParams& params, const Launch& launch) {
  switch (params.shape.head_dim) {
    case 64:
      return launch(Constant<64>{}, Element{});
    case 96:
      return launch(Constant<96>{}, Element{});
    case 128:
      return launch(Constant<128>{}, Element{});
    default:
      return {1, "sparse_attention: head_dim must be 64, 96 or 128"};
  }
}

/// Calls launch(Constant<head_dim>, element).
template <class Launch>
Status dispatch(const AttentionParams& params, const Launch& launch) {
  switch (params.dtype) {
    case DType::kFloat16:
      return dispatch_head_dim<cutlass::half_t>(params, launch);
    case DType::kBFloat16:
      return dispatch_head_dim<cutlass::bfloat16_t>(params, launch);
    default:
      return {1, "sparse_attention: dtype must be fp16 or bf16"};
  }
}

}  // namespace sparseattn
