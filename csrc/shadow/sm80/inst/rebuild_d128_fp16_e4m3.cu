#include "shadow/sm80/launch.cuh"

namespace sparseattn::shadow_sm80 {
template Status launch_attention<128, __half, E4m3>(const AttentionJob&, cudaStream_t);
template Status launch_reconstruct<128, __half, E4m3>(const ReconstructJob&, cudaStream_t);
}  // namespace sparseattn::shadow_sm80
