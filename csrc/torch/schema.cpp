// Operator schemas. The CPU library defines them; the CUDA library only adds its kernels.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparseattn, m) {
  m.def(
      "a_shape_attention(Tensor q, Tensor k, Tensor v, *, int sink, int window, "
      "float? scale=None, bool return_lse=False, Tensor? q_lens=None, Tensor? kv_lens=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "vertical_slash_attention(Tensor q, Tensor k, Tensor v, Tensor columns, Tensor offsets, *, "
      "float? scale=None, bool return_lse=False, Tensor? q_lens=None, Tensor? kv_lens=None) "
      "-> (Tensor, Tensor)");
  m.def(
      "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask, *, "
      "int block_q=64, int block_kv=64, float? scale=None, bool return_lse=False, "
      "Tensor? q_lens=None, Tensor? kv_lens=None) -> (Tensor, Tensor)");
  m.def(
      "sparse_attention(Tensor q, Tensor k, Tensor v, int[] patterns, *, float? scale=None, "
      "bool return_lse=False, Tensor? q_lens=None, Tensor? kv_lens=None) -> (Tensor, Tensor)");
  m.def(
      "estimate_vertical_slash(Tensor q, Tensor k, *, int num_columns, int num_offsets, "
      "int last_q=64, int sink=30, int local=100, float? share=None, Tensor? q_lens=None, "
      "Tensor? kv_lens=None) -> (Tensor, Tensor)");
  m.def(
      "estimate_block_sparse(Tensor q, Tensor k, *, int top_k, int block=64, float? share=None, "
      "str method=\"mean\", int stride=16, Tensor? q_lens=None, Tensor? kv_lens=None) -> Tensor");
}
