// Chooses the instantiation of the portable attention kernel.
#include "attention/dispatch.h"
#include "attention/sm80/launch.h"

namespace sparseattn {

Status sparse_attention_sm80(const AttentionParams& params, cudaStream_t stream) {
  return dispatch(params, [&](auto head_dim, auto element) {
    return sm80::launch_attention<head_dim, decltype(element)>(params, stream);
  });
}

}  // namespace sparseattn
