#include "attention/sm80/launch.cuh"

namespace sparseattn::sm80 {
template Status launch_attention<128, cutlass::bfloat16_t>(const AttentionParams&, cudaStream_t);
}  // namespace sparseattn::sm80
