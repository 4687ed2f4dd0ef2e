// ShadowKV operators: what callers pass, checked, as parameter structs. Shared by the CPU and the
// CUDA registrations, which only launch.
#pragma once

#include "sparseattn/shadow.h"
#include "torch/arguments.h"

namespace sparseattn::torch_layer {

using MaybeTensor = std::optional<Tensor>;

ShadowUndoRope undo_rope_arguments(const Support& support, const Tensor& k, const Tensor& out,
                                   const Tensor& inv_freq, const MaybeTensor& mean, int64_t first,
                                   bool interleaved, double rope_scale);

ShadowGram gram_arguments(const Support& support, const Tensor& k, const Tensor& gram,
                          const Tensor& total, const Tensor& count, const MaybeTensor& kv_lens);

ShadowLandmarks landmark_arguments(const Support& support, const Tensor& k, const Tensor& landmarks,
                                   const MaybeTensor& min_cosine, int64_t chunk,
                                   const MaybeTensor& first_chunk, const MaybeTensor& kv_lens);

struct OutlierCall {
  ShadowOutliers params;
  Tensor outliers;
};
OutlierCall outlier_arguments(const Tensor& min_cosine, int64_t count, int64_t sink_chunks,
                              const MaybeTensor& num_chunks);

struct SelectCall {
  ShadowSelect params;
  Tensor selected;
};
SelectCall select_arguments(const Support& support, const Tensor& q, const Tensor& landmarks,
                            int64_t top_k, const MaybeTensor& excluded,
                            const MaybeTensor& num_chunks, const MaybeTensor& q_lens,
                            std::optional<double> scale);

struct PlanCall {
  ShadowPlan params;
  Tensor slot_of, misses, miss_count;
};
PlanCall plan_arguments(const Tensor& selected, const Tensor& slot_chunk, const Tensor& last_used);

/// The store may be on the CPU where x and the values are not.
StoreRows store_arguments(const Support& support, const Tensor& x, const Tensor& store,
                          const MaybeTensor& scale, int64_t first);
GatherValues gather_arguments(const Support& support, const Tensor& store, const Tensor& values,
                              const Tensor& misses, const Tensor& miss_count,
                              const MaybeTensor& store_scale);

/// Arguments that rebuilding keys takes.
struct LowRankArguments {
  const Tensor& factor;
  const Tensor& basis;
  const MaybeTensor& mean;
  const MaybeTensor& inv_freq;
  bool interleaved;
  double rope_scale;
  const MaybeTensor& factor_scale;
};

struct ReconstructCall {
  LowRankReconstruct params;
  Tensor out;
};
ReconstructCall reconstruct_arguments(const Support& support, const Tensor& selected,
                                      const LowRankArguments& keys, int64_t chunk);

/// Everything but the outputs, which are those of `make_outputs`.
ShadowAttention attention_arguments(const Support& support, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& selected, const Tensor& slot_of,
                                    const Tensor& values, const LowRankArguments& keys,
                                    std::optional<double> scale, const MaybeTensor& q_lens,
                                    const MaybeTensor& exact_lens, const MaybeTensor& exact_starts);

}  // namespace sparseattn::torch_layer
