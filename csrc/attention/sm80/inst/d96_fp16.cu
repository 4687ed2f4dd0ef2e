#include "attention/sm80/launch.cuh"

namespace sparseattn::sm80 {
template Status launch_attention<96, cutlass::half_t>(const AttentionParams&, cudaStream_t);
}  // namespace sparseattn::sm80
