// Launches one instantiation of the portable attention kernel.
#pragma once

#include "sparseattn/attention.h"

namespace sparseattn::sm80 {

/// Instantiated in inst/: head_dim 64, 96, 128 with fp16 and bf16.
template <int kHeadDim, class Element>
Status launch_attention(const AttentionParams& params, cudaStream_t stream);

}  // namespace sparseattn::sm80
