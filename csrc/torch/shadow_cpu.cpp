// CPU kernels of the ShadowKV operators.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/cpu.h"
#include "torch/shadow_arguments.h"

namespace sparseattn::torch_layer {
namespace {

void shadow_undo_rope_(Tensor k, Tensor out, Tensor inv_freq, MaybeTensor mean, int64_t first,
                       bool interleaved, double rope_scale) {
  check_status(cpu::shadow_undo_rope(
      undo_rope_arguments(support(), k, out, inv_freq, mean, first, interleaved, rope_scale),
      run_parallel));
}

void shadow_gram_(Tensor k, Tensor gram, Tensor total, Tensor count, MaybeTensor kv_lens) {
  check_status(
      cpu::shadow_gram(gram_arguments(support(), k, gram, total, count, kv_lens), run_parallel));
}

void shadow_landmarks_(Tensor k, Tensor landmarks, MaybeTensor min_cosine, int64_t chunk,
                       MaybeTensor first_chunk, MaybeTensor kv_lens) {
  check_status(cpu::shadow_landmarks(
      landmark_arguments(support(), k, landmarks, min_cosine, chunk, first_chunk, kv_lens),
      run_parallel));
}

Tensor shadow_outliers(Tensor min_cosine, int64_t count, int64_t sink_chunks,
                       MaybeTensor num_chunks) {
  const OutlierCall call = outlier_arguments(min_cosine, count, sink_chunks, num_chunks);
  check_status(cpu::shadow_outliers(call.params, run_parallel));
  return call.outliers;
}

Tensor shadow_select(Tensor q, Tensor landmarks, int64_t top_k, MaybeTensor excluded,
                     MaybeTensor num_chunks, MaybeTensor q_lens, std::optional<double> scale) {
  const SelectCall call =
      select_arguments(support(), q, landmarks, top_k, excluded, num_chunks, q_lens, scale);
  check_status(cpu::shadow_select(call.params, run_parallel));
  return call.selected;
}

std::tuple<Tensor, Tensor, Tensor> shadow_plan_(Tensor selected, Tensor slot_chunk,
                                                Tensor last_used) {
  const PlanCall call = plan_arguments(selected, slot_chunk, last_used);
  check_status(cpu::shadow_plan(call.params, run_parallel));
  return {call.slot_of, call.misses, call.miss_count};
}

void store_rows_(Tensor x, Tensor store, MaybeTensor scale, int64_t first) {
  check_status(cpu::store_rows(store_arguments(support(), x, store, scale, first), run_parallel));
}

void gather_values_(Tensor store, Tensor values, Tensor misses, Tensor miss_count,
                    MaybeTensor store_scale) {
  check_status(cpu::gather_values(
      gather_arguments(support(), store, values, misses, miss_count, store_scale), run_parallel));
}

Tensor lowrank_reconstruct(Tensor selected, Tensor factor, Tensor basis, MaybeTensor mean,
                           MaybeTensor inv_freq, int64_t chunk, bool interleaved, double rope_scale,
                           MaybeTensor factor_scale) {
  const ReconstructCall call = reconstruct_arguments(
      support(), selected, {factor, basis, mean, inv_freq, interleaved, rope_scale, factor_scale},
      chunk);
  check_status(cpu::lowrank_reconstruct(call.params, run_parallel));
  return call.out;
}

std::tuple<Tensor, Tensor> shadow_attention(Tensor q, Tensor k, Tensor v, Tensor selected,
                                            Tensor slot_of, Tensor values, Tensor factor,
                                            Tensor basis, MaybeTensor mean, MaybeTensor inv_freq,
                                            bool interleaved, double rope_scale,
                                            std::optional<double> scale, bool return_lse,
                                            MaybeTensor q_lens, MaybeTensor exact_lens,
                                            MaybeTensor exact_starts, MaybeTensor factor_scale) {
  ShadowAttention params =
      attention_arguments(support(), q, k, v, selected, slot_of, values,
                          {factor, basis, mean, inv_freq, interleaved, rope_scale, factor_scale},
                          scale, q_lens, exact_lens, exact_starts);
  const Outputs outputs = make_outputs(q, params.shape, return_lse);
  params.out = view_of(outputs.out);
  params.lse = outputs.lse_data;
  check_status(cpu::shadow_attention(params, run_parallel));
  return {outputs.out, outputs.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseattn, CPU, m) {
  m.impl("shadow_undo_rope_", TORCH_BOX(&shadow_undo_rope_));
  m.impl("shadow_gram_", TORCH_BOX(&shadow_gram_));
  m.impl("shadow_landmarks_", TORCH_BOX(&shadow_landmarks_));
  m.impl("shadow_outliers", TORCH_BOX(&shadow_outliers));
  m.impl("shadow_select", TORCH_BOX(&shadow_select));
  m.impl("shadow_plan_", TORCH_BOX(&shadow_plan_));
  m.impl("store_rows_", TORCH_BOX(&store_rows_));
  m.impl("gather_values_", TORCH_BOX(&gather_values_));
  m.impl("lowrank_reconstruct", TORCH_BOX(&lowrank_reconstruct));
  m.impl("shadow_attention", TORCH_BOX(&shadow_attention));
}

}  // namespace sparseattn::torch_layer
