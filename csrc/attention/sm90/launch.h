// Launch of the Hopper attention kernel, one definition per head_dim and element type.
#pragma once

#include "sparseattn/attention.h"

namespace sparseattn::sm90 {

/// Instantiated in inst/: head_dim 64, 96, 128 with fp16 and bf16.
template <int kHeadDim, class Element>
Status launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace sparseattn::sm90
