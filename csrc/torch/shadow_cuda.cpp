// CUDA kernels of the ShadowKV operators that select chunks and move values. What is read may have
// any strides: a view whose rows do not start on 16-byte boundaries is copied. What is written in
// place, and a store, must have such rows.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/cuda.h"
#include "torch/shadow_arguments.h"

namespace sparseattn::torch_layer {
namespace {

void check_rows(const char* name, const Tensor& tensor) {
  const auto element = static_cast<int64_t>(tensor.element_size());
  if (reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 != 0) {
    value_error(name, ": expected rows that start on 16-byte boundaries, got data at an address ",
                "that is no multiple of 16");
  }
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    if (tensor.size(i) > 1 && tensor.stride(i) * element % 16 != 0) {
      value_error(name, ": expected rows that start on 16-byte boundaries, got stride ",
                  tensor.stride(i), " in dimension ", i);
    }
  }
}

void shadow_undo_rope_(Tensor k, Tensor out, Tensor inv_freq, MaybeTensor mean, int64_t first,
                       bool interleaved, double rope_scale) {
  ShadowUndoRope params =
      undo_rope_arguments(support(), k, out, inv_freq, mean, first, interleaved, rope_scale);
  check_rows("out", out);
  const Launch launch(k);
  const Tensor keys = aligned(k);
  params.k = view_of(keys);
  if (mean) {
    mean = aligned(*mean);
    params.mean = static_cast<const float*>(mean->const_data_ptr());
  }
  check_status(sparseattn::shadow_undo_rope(params, launch.stream()));
}

void shadow_gram_(Tensor k, Tensor gram, Tensor total, Tensor count, MaybeTensor kv_lens) {
  ShadowGram params = gram_arguments(support(), k, gram, total, count, kv_lens);
  const Launch launch(k);
  const Tensor keys = aligned(k);
  params.k = view_of(keys);
  const Tensor workspace = scratch(k, shadow_gram_bytes(params));
  check_status(sparseattn::shadow_gram(params, workspace.data_ptr(), launch.stream()));
}

void shadow_landmarks_(Tensor k, Tensor landmarks, MaybeTensor min_cosine, int64_t chunk,
                       MaybeTensor first_chunk, MaybeTensor kv_lens) {
  ShadowLandmarks params =
      landmark_arguments(support(), k, landmarks, min_cosine, chunk, first_chunk, kv_lens);
  check_rows("landmarks", landmarks);
  const Launch launch(k);
  const Tensor keys = aligned(k);
  params.k = view_of(keys);
  check_status(sparseattn::shadow_landmarks(params, launch.stream()));
}

Tensor shadow_outliers(Tensor min_cosine, int64_t count, int64_t sink_chunks,
                       MaybeTensor num_chunks) {
  const OutlierCall call = outlier_arguments(min_cosine, count, sink_chunks, num_chunks);
  const Launch launch(min_cosine);
  check_status(sparseattn::shadow_outliers(call.params, launch.stream()));
  return call.outliers;
}

Tensor shadow_select(Tensor q, Tensor landmarks, int64_t top_k, MaybeTensor excluded,
                     MaybeTensor num_chunks, MaybeTensor q_lens, std::optional<double> scale) {
  SelectCall call =
      select_arguments(support(), q, landmarks, top_k, excluded, num_chunks, q_lens, scale);
  const Launch launch(q);
  const Tensor queries = aligned(q), means = aligned(landmarks);
  call.params.q = view_of(queries);
  call.params.landmarks = view_of(means);
  const Tensor workspace = scratch(q, shadow_select_bytes(call.params));
  check_status(sparseattn::shadow_select(call.params, workspace.data_ptr(), launch.stream()));
  return call.selected;
}

std::tuple<Tensor, Tensor, Tensor> shadow_plan_(Tensor selected, Tensor slot_chunk,
                                                Tensor last_used) {
  const PlanCall call = plan_arguments(selected, slot_chunk, last_used);
  const Launch launch(selected);
  const Tensor workspace = scratch(selected, shadow_plan_bytes(call.params));
  check_status(sparseattn::shadow_plan(call.params, workspace.data_ptr(), launch.stream()));
  return {call.slot_of, call.misses, call.miss_count};
}

void store_rows_(Tensor x, Tensor store, MaybeTensor scale, int64_t first) {
  StoreRows params = store_arguments(support(), x, store, scale, first);
  if (!x.is_cuda()) value_error("x: expected device cuda, got ", device_name(x));
  check_rows("store", store);
  const Launch launch(x);
  const Tensor rows = aligned(x);
  params.x = view_of(rows);
  check_status(sparseattn::store_rows(params, launch.stream()));
}

void gather_values_(Tensor store, Tensor values, Tensor misses, Tensor miss_count,
                    MaybeTensor store_scale) {
  const GatherValues params =
      gather_arguments(support(), store, values, misses, miss_count, store_scale);
  if (!values.is_cuda()) {
    value_error("values: expected device cuda, got ", device_name(values));
  }
  check_rows("store", store);
  check_rows("values", values);
  const Launch launch(values);
  check_status(sparseattn::gather_values(params, launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseattn, CUDA, m) {
  m.impl("shadow_undo_rope_", TORCH_BOX(&shadow_undo_rope_));
  m.impl("shadow_gram_", TORCH_BOX(&shadow_gram_));
  m.impl("shadow_landmarks_", TORCH_BOX(&shadow_landmarks_));
  m.impl("shadow_outliers", TORCH_BOX(&shadow_outliers));
  m.impl("shadow_select", TORCH_BOX(&shadow_select));
  m.impl("shadow_plan_", TORCH_BOX(&shadow_plan_));
  m.impl("store_rows_", TORCH_BOX(&store_rows_));
  m.impl("gather_values_", TORCH_BOX(&gather_values_));
}

}  // namespace sparseattn::torch_layer
