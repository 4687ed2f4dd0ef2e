// Instantiation of the vertical-slash estimate for head_dim 96.
#include "index/sm80/masses.cuh"
#include "index/sm80/row_sums.cuh"

namespace sparseattn::index_sm80 {

template Status launch_row_sums<96>(const VerticalSlashJob&, cudaStream_t);
template Status launch_masses<96>(const VerticalSlashJob&, cudaStream_t);

}  // namespace sparseattn::index_sm80
