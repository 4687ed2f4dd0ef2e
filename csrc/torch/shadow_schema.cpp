// Schemas of the ShadowKV operators; see schema.cpp.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(sparseattn, m) {
  m.def(
      "shadow_undo_rope_(Tensor k, Tensor(a!) out, Tensor inv_freq, Tensor? mean=None, *, "
      "int first=0, bool interleaved=False, float rope_scale=1.0) -> ()");
  m.def(
      "shadow_gram_(Tensor k, Tensor(a!) gram, Tensor(b!) total, Tensor(c!) count, *, "
      "Tensor? kv_lens=None) -> ()");
  m.def(
      "shadow_landmarks_(Tensor k, Tensor(a!) landmarks, Tensor(b!)? min_cosine=None, *, "
      "int chunk, Tensor? first_chunk=None, Tensor? kv_lens=None) -> ()");
  m.def(
      "shadow_outliers(Tensor min_cosine, *, int count, int sink_chunks=0, "
      "Tensor? num_chunks=None) -> Tensor");
  m.def(
      "shadow_select(Tensor q, Tensor landmarks, *, int top_k, Tensor? excluded=None, "
      "Tensor? num_chunks=None, Tensor? q_lens=None, float? scale=None) -> Tensor");
  m.def(
      "shadow_plan_(Tensor selected, Tensor(a!) slot_chunk, Tensor(b!) last_used) "
      "-> (Tensor, Tensor, Tensor)");
  m.def("store_rows_(Tensor x, Tensor(a!) store, Tensor(b!)? scale=None, *, int first=0) -> ()");
  m.def(
      "gather_values_(Tensor store, Tensor(a!) values, Tensor misses, Tensor miss_count, *, "
      "Tensor? store_scale=None) -> ()");
  m.def(
      "lowrank_reconstruct(Tensor selected, Tensor factor, Tensor basis, Tensor? mean=None, "
      "Tensor? inv_freq=None, *, int chunk, bool interleaved=False, float rope_scale=1.0, "
      "Tensor? factor_scale=None) -> Tensor");
  m.def(
      "shadow_attention(Tensor q, Tensor k, Tensor v, Tensor selected, Tensor slot_of, "
      "Tensor values, Tensor factor, Tensor basis, Tensor? mean=None, Tensor? inv_freq=None, *, "
      "bool interleaved=False, float rope_scale=1.0, float? scale=None, bool return_lse=False, "
      "Tensor? q_lens=None, Tensor? exact_lens=None, Tensor? exact_starts=None, "
      "Tensor? factor_scale=None) -> (Tensor, Tensor)");
}
