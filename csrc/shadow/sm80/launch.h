// Launches of one instantiation of the kernels that rebuild keys.
#pragma once

#include <cuda_runtime_api.h>

#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

struct AttentionJob;
struct ReconstructJob;

/// An element of a quantised factor.
struct E4m3 {
  unsigned char bits;
};

/// Instantiated in inst/: head_dim 64, 96, 128 with fp16 and bf16, and a factor of these or e4m3.
template <int kHeadDim, class Element, class Factor = Element>
Status launch_attention(const AttentionJob& job, cudaStream_t stream);
template <int kHeadDim, class Element, class Factor = Element>
Status launch_reconstruct(const ReconstructJob& job, cudaStream_t stream);

}  // namespace sparseattn::shadow_sm80
