// Chooses the instantiation of the Hopper attention kernel.
#include "sparseattn/attention.h"

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include "attention/sm90/launch.h"

namespace sparseattn {
namespace {

template <class Element>
Status dispatch_head_dim(const AttentionParams& params, cudaStream_t stream) {
  switch (params.shape.head_dim) {
    case 64:
      return sm90::launch_attention<64, Element>(params, stream);
    case 96:
      return sm90::launch_attention<96, Element>(params, stream);
    case 128:
      return sm90::launch_attention<128, Element>(params, stream);
    default:
      return {1, "sparse_attention_sm90: head_dim must be 64, 96 or 128"};
  }
}

}  // namespace

Status sparse_attention_sm90(const AttentionParams& params, cudaStream_t stream) {
  switch (params.dtype) {
    case DType::kFloat16:
      return dispatch_head_dim<cutlass::half_t>(params, stream);
    case DType::kBFloat16:
      return dispatch_head_dim<cutlass::bfloat16_t>(params, stream);
    default:
      return {1, "sparse_attention_sm90: dtype must be fp16 or bf16"};
  }
}

}  // namespace sparseattn
