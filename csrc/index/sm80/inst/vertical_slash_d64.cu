// Instantiation of the vertical-slash estimate for head_dim 64.
#include "index/sm80/masses.cuh"
#include "index/sm80/row_sums.cuh"

namespace sparseattn::index_sm80 {

template Status launch_row_sums<64>(const VerticalSlashJob&, cudaStream_t);
template Status launch_masses<64>(const VerticalSlashJob&, cudaStream_t);

}  // namespace sparseattn::index_sm80
