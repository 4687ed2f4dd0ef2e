// CUDA kernels of the ShadowKV operators that rebuild keys.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "sparseattn/shadow.h"
#include "torch/cuda.h"
#include "torch/shadow_arguments.h"

namespace sparseattn::torch_layer {
namespace {

/// The factor [batch, rows, rank] as rows of one head.
View factor_view(const Tensor& factor) {
  return {factor.data_ptr(), factor.stride(0), 0, factor.stride(1)};
}

Tensor lowrank_reconstruct(Tensor selected, Tensor factor, Tensor basis, MaybeTensor mean,
                           MaybeTensor inv_freq, int64_t chunk, bool interleaved, double rope_scale,
                           MaybeTensor factor_scale) {
  ReconstructCall call = reconstruct_arguments(
      support(), selected, {factor, basis, mean, inv_freq, interleaved, rope_scale, factor_scale},
      chunk);
  const Launch launch(basis);
  const Tensor rows = aligned(factor), columns = aligned(basis);
  call.params.keys.factor = factor_view(rows);
  call.params.keys.basis = view_of(columns);
  check_status(sparseattn::lowrank_reconstruct(call.params, launch.stream()));
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
  const Launch launch(q);
  const Tensor queries = aligned(q), exact_k = aligned(k), exact_v = aligned(v);
  const Tensor slots = aligned(values), rows = aligned(factor), columns = aligned(basis);
  params.q = view_of(queries);
  params.k = view_of(exact_k);
  params.v = view_of(exact_v);
  params.values = view_of(slots);
  params.keys.factor = factor_view(rows);
  params.keys.basis = view_of(columns);
  const Outputs outputs = make_outputs(q, params.shape, return_lse);
  params.out = view_of(outputs.out);
  params.lse = outputs.lse_data;
  const Tensor workspace = scratch(q, shadow_attention_bytes(params));
  check_status(sparseattn::shadow_attention(params, workspace.data_ptr(), launch.stream()));
  return {outputs.out, outputs.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseattn, CUDA, m) {
  m.impl("lowrank_reconstruct", TORCH_BOX(&lowrank_reconstruct));
  m.impl("shadow_attention", TORCH_BOX(&shadow_attention));
}

}  // namespace sparseattn::torch_layer
