// The chunks that stay exact: one CTA selects for one key/value head.
#include "common/cuda/launch.h"
#include "shadow/sm80/rank.cuh"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kOutlierDigitBits = 11;
using OutlierTeam = cuda::Team<32>;

/// A CTA for each head of [batch, kv_heads].
__global__ void __launch_bounds__(OutlierTeam::kThreads)
    outliers_kernel(const __grid_constant__ ShadowOutliers in) {
  __shared__ index_sm80::SelectScratch<OutlierTeam, kOutlierDigitBits> scratch;
  __shared__ int32_t scan[OutlierTeam::kWarps];
  const int64_t head = blockIdx.x;
  const int32_t n = in.num_chunks.at(head / in.kv_heads, in.chunks);
  const int32_t k = min(in.count, n);
  const float* min_cosine = in.min_cosine + head * in.chunks;
  const int32_t sinks = in.sink_chunks;
  const auto key_at = [min_cosine, sinks](int32_t i) {
    return i < sinks ? index_sm80::kForcedKey : rank_key(-min_cosine[i]);
  };
  const index_sm80::Threshold threshold =
      index_sm80::find_threshold<OutlierTeam, kOutlierDigitBits>(n, k, key_at, scratch);
  index_sm80::write_selected<OutlierTeam>(n, k, threshold, key_at, in.outliers + head * in.count,
                                          in.count, scan);
}

}  // namespace shadow_sm80

Status shadow_outliers(const ShadowOutliers& in, cudaStream_t stream) {
  if (in.batch < 0 || in.kv_heads < 0 || in.chunks < 0 || in.count < 0 || in.sink_chunks < 0) {
    return {1, "shadow_outliers: sizes: expected numbers >= 0"};
  }
  const int64_t heads = static_cast<int64_t>(in.batch) * in.kv_heads;
  if (heads == 0 || in.count == 0) return {};
  if (!cuda::grid_fits(heads)) return {1, "shadow_outliers: more heads than a grid can hold"};
  shadow_sm80::outliers_kernel<<<static_cast<unsigned>(heads), shadow_sm80::OutlierTeam::kThreads,
                                 0, stream>>>(in);
  return cuda::launch_status();
}

}  // namespace sparseattn
