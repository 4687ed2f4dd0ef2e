// CPU kernels of the operators: arguments to parameter structs, nothing numeric.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "sparseattn/cpu.h"
#include "torch/arguments.h"
#include "torch/cpu.h"

namespace sparseattn::torch_layer {
namespace {

/// Index lists as contiguous int32 [batch, heads, n]; values that int32 cannot hold become -1.
std::vector<int32_t> copy_list(const Tensor& list) {
  std::vector<int32_t> copy;
  copy.reserve(list.numel());
  const bool wide = list.scalar_type() == ScalarType::Long;
  for (int64_t b = 0; b < list.size(0); ++b) {
    for (int64_t h = 0; h < list.size(1); ++h) {
      const int64_t row = b * list.stride(0) + h * list.stride(1);
      for (int64_t i = 0; i < list.size(2); ++i) {
        const int64_t at = row + i * list.stride(2);
        const int64_t value = wide ? static_cast<const int64_t*>(list.const_data_ptr())[at]
                                   : static_cast<const int32_t*>(list.const_data_ptr())[at];
        copy.push_back(value < 0 || value > INT32_MAX ? -1 : static_cast<int32_t>(value));
      }
    }
  }
  return copy;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k, const Tensor& v,
                                  const Shape& shape, const std::vector<cpu::HeadIndex>& heads,
                                  float scale, bool return_lse, const Lengths& lengths) {
  Outputs outputs = make_outputs(q, shape, return_lse);
  check_status(
      cpu::sparse_attention({shape, dtype_of(q), view_of(q), view_of(k), view_of(v),
                             view_of(outputs.out), outputs.lse_data, scale, heads.data(), lengths},
                            run_parallel));
  return {outputs.out, outputs.lse};
}

std::vector<cpu::HeadIndex> make_heads(const Shape& shape, PatternKind kind) {
  std::vector<cpu::HeadIndex> heads(static_cast<size_t>(shape.batch) * shape.q_heads);
  for (auto& head : heads) head.kind = kind;
  return heads;
}

std::tuple<Tensor, Tensor> a_shape_attention(Tensor q, Tensor k, Tensor v, int64_t sink,
                                             int64_t window, std::optional<double> scale,
                                             bool return_lse, std::optional<Tensor> q_lens,
                                             std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, &v);
  auto heads = make_heads(shape, PatternKind::kAShape);
  for (auto& head : heads) {
    head.sink = check_size("sink", sink, 0);
    head.window = check_size("window", window, 0);
  }
  return attend(q, k, v, shape, heads, check_scale(scale, shape), return_lse, lengths);
}

std::tuple<Tensor, Tensor> vertical_slash_attention(Tensor q, Tensor k, Tensor v, Tensor columns,
                                                    Tensor offsets, std::optional<double> scale,
                                                    bool return_lse, std::optional<Tensor> q_lens,
                                                    std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, &v);
  check_list("columns", columns, q);
  check_list("offsets", offsets, q);
  const auto column_copy = copy_list(columns), offset_copy = copy_list(offsets);
  const auto num_columns = static_cast<int32_t>(columns.size(2));
  const auto num_offsets = static_cast<int32_t>(offsets.size(2));
  auto heads = make_heads(shape, PatternKind::kVerticalSlash);
  for (size_t i = 0; i < heads.size(); ++i) {
    heads[i].columns = column_copy.data() + i * num_columns;
    heads[i].offsets = offset_copy.data() + i * num_offsets;
    heads[i].num_columns = num_columns;
    heads[i].num_offsets = num_offsets;
  }
  return attend(q, k, v, shape, heads, check_scale(scale, shape), return_lse, lengths);
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask,
                                                  int64_t block_q, int64_t block_kv,
                                                  std::optional<double> scale, bool return_lse,
                                                  std::optional<Tensor> q_lens,
                                                  std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, &v);
  check_block_mask(block_mask, q, shape, block_q, block_kv);
  auto heads = make_heads(shape, PatternKind::kBlockSparse);
  for (int32_t b = 0; b < shape.batch; ++b) {
    for (int32_t h = 0; h < shape.q_heads; ++h) {
      auto& head = heads[static_cast<size_t>(b) * shape.q_heads + h];
      head.block_mask = static_cast<const uint8_t*>(block_mask.const_data_ptr()) +
                        b * block_mask.stride(0) + h * block_mask.stride(1);
      head.mask_row_stride = block_mask.stride(2);
      head.mask_stride = block_mask.stride(3);
      head.block_q = static_cast<int32_t>(block_q);
      head.block_kv = static_cast<int32_t>(block_kv);
    }
  }
  return attend(q, k, v, shape, heads, check_scale(scale, shape), return_lse, lengths);
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v,
                                            std::vector<int64_t> patterns,
                                            std::optional<double> scale, bool return_lse,
                                            std::optional<Tensor> q_lens,
                                            std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, &v);
  const auto given = check_patterns(patterns, shape);
  const float default_scale = check_scale(std::nullopt, shape);
  constexpr int32_t kBlock = 64;

  std::vector<int32_t> vs_heads, bs_heads, num_columns, num_offsets, top_k;
  std::vector<int32_t> vs_shares, bs_shares, strides;
  for (int32_t h = 0; h < shape.q_heads; ++h) {
    if (given[h].kind == PatternKind::kVerticalSlash) {
      vs_heads.push_back(h);
      num_columns.push_back(std::min(given[h].a, shape.kv_len));
      num_offsets.push_back(std::min(given[h].b, shape.kv_len));
      vs_shares.push_back(given[h].share);
    } else if (given[h].kind == PatternKind::kBlockSparse) {
      bs_heads.push_back(h);
      top_k.push_back(given[h].a);
      bs_shares.push_back(given[h].share);
      strides.push_back(given[h].stride);
    }
  }
  const auto most = [](const std::vector<int32_t>& list) {
    return list.empty() ? 0 : *std::max_element(list.begin(), list.end());
  };
  const int32_t max_columns = most(num_columns), max_offsets = most(num_offsets);
  const auto vs_count = static_cast<int32_t>(vs_heads.size());
  const auto bs_count = static_cast<int32_t>(bs_heads.size());
  std::vector<int32_t> columns(static_cast<size_t>(shape.batch) * vs_count * max_columns);
  std::vector<int32_t> offsets(static_cast<size_t>(shape.batch) * vs_count * max_offsets);
  if (vs_count > 0) {
    check_status(cpu::estimate_vertical_slash(
        {shape, dtype_of(q), view_of(q), view_of(k), default_scale, 64, 30, 100, vs_count,
         vs_heads.data(), num_columns.data(), num_offsets.data(), max_columns, max_offsets,
         columns.data(), offsets.data(), lengths, 0, vs_shares.data()},
        run_parallel));
  }
  const int64_t q_blocks = ceil_div(shape.q_len, kBlock),
                kv_blocks = ceil_div(shape.kv_len, kBlock);
  std::vector<uint8_t> masks(static_cast<size_t>(shape.batch) * bs_count * q_blocks * kv_blocks);
  for (const int32_t stride : strides_of(given)) {
    check_status(
        cpu::estimate_block_sparse({shape, dtype_of(q), view_of(q), view_of(k), kBlock, bs_count,
                                    bs_heads.data(), top_k.data(), most(top_k), masks.data(),
                                    lengths, 0, bs_shares.data(), stride, strides.data()},
                                   run_parallel));
  }

  std::vector<cpu::HeadIndex> heads;
  heads.reserve(static_cast<size_t>(shape.batch) * shape.q_heads);
  for (int64_t b = 0; b < shape.batch; ++b) {
    int64_t vs_slot = b * vs_count, bs_slot = b * bs_count;
    for (int32_t h = 0; h < shape.q_heads; ++h) {
      cpu::HeadIndex head;
      head.kind = given[h].kind;
      if (head.kind == PatternKind::kAShape) {
        head.sink = given[h].a;
        head.window = given[h].b;
      } else if (head.kind == PatternKind::kVerticalSlash) {
        head.columns = columns.data() + vs_slot * max_columns;
        head.offsets = offsets.data() + vs_slot++ * max_offsets;
        head.num_columns = max_columns;
        head.num_offsets = max_offsets;
      } else if (head.kind == PatternKind::kBlockSparse) {
        head.block_mask = masks.data() + bs_slot++ * q_blocks * kv_blocks;
        head.mask_row_stride = kv_blocks;
      }
      heads.push_back(head);
    }
  }
  return attend(q, k, v, shape, heads, check_scale(scale, shape), return_lse, lengths);
}

std::tuple<Tensor, Tensor> estimate_vertical_slash(Tensor q, Tensor k, int64_t num_columns,
                                                   int64_t num_offsets, int64_t last_q,
                                                   int64_t sink, int64_t local,
                                                   std::optional<double> share,
                                                   std::optional<Tensor> q_lens,
                                                   std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, nullptr);
  const VerticalSlashSizes sizes =
      check_vertical_slash_sizes(num_columns, num_offsets, last_q, sink, local);
  const int32_t millionths = check_share(share);
  using torch::stable::new_empty;
  const auto int32 = std::make_optional(ScalarType::Int);
  Tensor columns = new_empty(q, {shape.batch, shape.q_heads, sizes.columns}, int32);
  Tensor offsets = new_empty(q, {shape.batch, shape.q_heads, sizes.offsets}, int32);
  check_status(cpu::estimate_vertical_slash(
      {shape, dtype_of(q), view_of(q), view_of(k), check_scale(std::nullopt, shape), sizes.last_q,
       sizes.sink, sizes.local, shape.q_heads, nullptr, nullptr, nullptr, sizes.columns,
       sizes.offsets, static_cast<int32_t*>(columns.data_ptr()),
       static_cast<int32_t*>(offsets.data_ptr()), lengths, millionths},
      run_parallel));
  return {columns, offsets};
}

Tensor estimate_block_sparse(Tensor q, Tensor k, int64_t top_k, int64_t block,
                             std::optional<double> share, std::string method, int64_t stride,
                             std::optional<Tensor> q_lens, std::optional<Tensor> kv_lens) {
  const Lengths lengths = check_lengths(q_lens, kv_lens, q);
  const Shape shape = check_qkv(support(), q, k, nullptr);
  const int32_t blocks = check_size("top_k", top_k, 1);
  check_block("block", block);
  const int32_t millionths = check_share(share);
  const int32_t residues = check_method(method, stride);
  Tensor mask = torch::stable::new_empty(
      q, {shape.batch, shape.q_heads, ceil_div(shape.q_len, block), ceil_div(shape.kv_len, block)},
      std::make_optional(ScalarType::Bool));
  check_status(cpu::estimate_block_sparse(
      {shape, dtype_of(q), view_of(q), view_of(k), static_cast<int32_t>(block), shape.q_heads,
       nullptr, nullptr, blocks, static_cast<uint8_t*>(mask.data_ptr()), lengths, millionths,
       nullptr, residues},
      run_parallel));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseattn, CPU, m) {
  m.impl("a_shape_attention", TORCH_BOX(&a_shape_attention));
  m.impl("vertical_slash_attention", TORCH_BOX(&vertical_slash_attention));
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("estimate_vertical_slash", TORCH_BOX(&estimate_vertical_slash));
  m.impl("estimate_block_sparse", TORCH_BOX(&estimate_block_sparse));
}

}  // namespace sparseattn::torch_layer
