// Chooses the instantiation of the Hopper attention kernel.
#include "attention/dispatch.h"
#include "attention/sm90/launch.h"

namespace sparseattn {

Status sparse_attention_sm90(const AttentionParams& params, cudaStream_t stream) {
  return dispatch(params, [&](auto head_dim, auto element) {
    return sm90::launch_attention<head_dim, decltype(element)>(params, stream);
  });
}

}  // namespace sparseattn
