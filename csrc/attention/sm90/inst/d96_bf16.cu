#include "attention/sm90/launch.cuh"

namespace sparseattn::sm90 {
template Status launch_attention<96, cutlass::bfloat16_t>(const AttentionParams&, cudaStream_t);
}  // namespace sparseattn::sm90
