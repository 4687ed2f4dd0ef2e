// CUDA kernels of the operators: arguments to parameter structs, memory from torch's allocator.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "sparseattn/attention.h"
#include "sparseattn/estimate.h"
#include "sparseattn/plan.h"
#include "torch/arguments.h"
#include "torch/cuda.h"

namespace sparseattn::torch_layer {
namespace {

/// One attention call: the plan is laid out by `make_plan`, then filled by the caller.
class Call {
 public:
  Call(const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
       const std::optional<Tensor>& q_lens, const std::optional<Tensor>& kv_lens)
      : lengths(check_lengths(q_lens, kv_lens, q)),
        shape(check_qkv(support(), q, k, &v)),
        scale_(check_scale(scale, shape)),
        launch_(q),
        q_(aligned(q)),
        k_(aligned(k)),
        v_(aligned(v)) {}

  void make_plan(const std::vector<Pattern>& patterns, int32_t max_columns, int32_t max_offsets,
                 int32_t block_q, int32_t block_kv) {
    int32_t vs_heads = 0, bs_heads = 0;
    for (const Pattern& pattern : patterns) {
      vs_heads += pattern.kind == PatternKind::kVerticalSlash;
      bs_heads += pattern.kind == PatternKind::kBlockSparse;
    }
    const PlanSizes sizes{shape,    dtype_of(q_), vs_heads, max_columns, max_offsets,
                          bs_heads, block_q,      block_kv, lengths};
    memory_.push_back(scratch(q_, plan_bytes(sizes)));
    plan = carve_plan(sizes, memory_.back().data_ptr());
    check_status(plan_heads(plan, patterns.data(), stream()));
  }

  void use_lists(const IndexLists& columns, const IndexLists& offsets) {
    check_status(plan_vertical_slash(plan, columns, offsets, stream()));
    check_status(pack_columns(plan, view_of(k_), view_of(v_), stream()));
  }

  /// Estimates the index of the vertical-slash heads and plans it.
  void estimate_lists(bool any_share) {
    const PlanSizes& sizes = plan.sizes;
    const int64_t slots = static_cast<int64_t>(shape.batch) * sizes.vs_heads;
    const auto lists = [&](int32_t length) {
      memory_.push_back(scratch(q_, sizeof(int32_t) * slots * length));
      return static_cast<int32_t*>(memory_.back().data_ptr());
    };
    int32_t* columns = lists(sizes.max_columns);
    int32_t* offsets = lists(sizes.max_offsets);
    run_estimate(VerticalSlashEstimate{
        shape, dtype_of(q_), view_of(q_), view_of(k_), check_scale(std::nullopt, shape), 64, 30,
        100, sizes.vs_heads, plan.vs_heads, plan.vs_budget, plan.vs_budget + sizes.vs_heads,
        sizes.max_columns, sizes.max_offsets, columns, offsets, lengths, 0,
        any_share ? plan.vs_share : nullptr});
    const auto as_lists = [&](const int32_t* data, int64_t length) {
      return IndexLists{data,   false, static_cast<int32_t>(length), sizes.vs_heads * length,
                        length, 1};
    };
    use_lists(as_lists(columns, sizes.max_columns), as_lists(offsets, sizes.max_offsets));
  }

  /// Estimates the blocks of the block-sparse heads that score with `stride` straight into the
  /// plan.
  void estimate_blocks(int32_t max_top_k, bool any_share, int32_t stride) {
    run_estimate(BlockSparseEstimate{
        shape, dtype_of(q_), view_of(q_), view_of(k_), plan.sizes.block_q, plan.sizes.bs_heads,
        plan.bs_heads, plan.bs_budget, max_top_k, plan.block_bits, nullptr, lengths, 0,
        any_share ? plan.bs_share : nullptr, stride, plan.bs_stride});
  }

  std::tuple<Tensor, Tensor> attend(bool return_lse) {
    Outputs outputs = make_outputs(q_, shape, return_lse);
    check_status(
        sparseattn::sparse_attention({shape, dtype_of(q_), view_of(q_), view_of(k_), view_of(v_),
                                      view_of(outputs.out), outputs.lse_data, scale_, plan},
                                     stream()));
    return {outputs.out, outputs.lse};
  }

  cudaStream_t stream() const { return launch_.stream(); }

  const Lengths lengths;
  const Shape shape;
  Plan plan{};

 private:
  void run_estimate(const VerticalSlashEstimate& params) {
    const Tensor workspace = scratch(q_, estimate_vertical_slash_bytes(params));
    check_status(sparseattn::estimate_vertical_slash(params, workspace.data_ptr(), stream()));
  }
  void run_estimate(const BlockSparseEstimate& params) {
    const Tensor workspace = scratch(q_, estimate_block_sparse_bytes(params));
    check_status(sparseattn::estimate_block_sparse(params, workspace.data_ptr(), stream()));
  }

  const float scale_;
  const Launch launch_;
  const Tensor q_, k_, v_;
  std::vector<Tensor> memory_;
};

std::tuple<Tensor, Tensor> a_shape_attention(Tensor q, Tensor k, Tensor v, int64_t sink,
                                             int64_t window, std::optional<double> scale,
                                             bool return_lse, std::optional<Tensor> q_lens,
                                             std::optional<Tensor> kv_lens) {
  Call call(q, k, v, scale, q_lens, kv_lens);
  const Pattern pattern{PatternKind::kAShape, check_size("sink", sink, 0),
                        check_size("window", window, 0)};
  call.make_plan(uniform_patterns(call.shape, pattern), 0, 0, 64, 64);
  return call.attend(return_lse);
}

std::tuple<Tensor, Tensor> vertical_slash_attention(Tensor q, Tensor k, Tensor v, Tensor columns,
                                                    Tensor offsets, std::optional<double> scale,
                                                    bool return_lse, std::optional<Tensor> q_lens,
                                                    std::optional<Tensor> kv_lens) {
  Call call(q, k, v, scale, q_lens, kv_lens);
  check_list("columns", columns, q);
  check_list("offsets", offsets, q);
  const auto as_lists = [](const Tensor& list) {
    return IndexLists{list.const_data_ptr(),
                      list.scalar_type() == ScalarType::Long,
                      static_cast<int32_t>(list.size(2)),
                      list.stride(0),
                      list.stride(1),
                      list.stride(2)};
  };
  const IndexLists column_lists = as_lists(columns), offset_lists = as_lists(offsets);
  const Pattern pattern{PatternKind::kVerticalSlash, column_lists.length, offset_lists.length};
  call.make_plan(uniform_patterns(call.shape, pattern), column_lists.length, offset_lists.length,
                 64, 64);
  call.use_lists(column_lists, offset_lists);
  return call.attend(return_lse);
}

std::tuple<Tensor, Tensor> block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor block_mask,
                                                  int64_t block_q, int64_t block_kv,
                                                  std::optional<double> scale, bool return_lse,
                                                  std::optional<Tensor> q_lens,
                                                  std::optional<Tensor> kv_lens) {
  Call call(q, k, v, scale, q_lens, kv_lens);
  check_block_mask(block_mask, q, call.shape, block_q, block_kv);
  call.make_plan(uniform_patterns(call.shape, {PatternKind::kBlockSparse, 0, 0}), 0, 0,
                 static_cast<int32_t>(block_q), static_cast<int32_t>(block_kv));
  const BlockMask mask{static_cast<const uint8_t*>(block_mask.const_data_ptr()),
                       block_mask.stride(0), block_mask.stride(1), block_mask.stride(2),
                       block_mask.stride(3)};
  check_status(plan_block_sparse(call.plan, mask, call.stream()));
  return call.attend(return_lse);
}

std::tuple<Tensor, Tensor> sparse_attention(Tensor q, Tensor k, Tensor v,
                                            std::vector<int64_t> patterns,
                                            std::optional<double> scale, bool return_lse,
                                            std::optional<Tensor> q_lens,
                                            std::optional<Tensor> kv_lens) {
  Call call(q, k, v, scale, q_lens, kv_lens);
  const auto given = check_patterns(patterns, call.shape);
  int32_t max_columns = 0, max_offsets = 0, max_top_k = 0;
  bool slashes = false, any_share = false;
  for (const Pattern& pattern : given) {
    any_share = any_share || pattern.share > 0;
    if (pattern.kind == PatternKind::kVerticalSlash) {
      slashes = true;
      max_columns = std::max(max_columns, std::min(pattern.a, call.shape.kv_len));
      max_offsets = std::max(max_offsets, std::min(pattern.b, call.shape.kv_len));
    } else if (pattern.kind == PatternKind::kBlockSparse) {
      max_top_k = std::max(max_top_k, pattern.a);
    }
  }
  call.make_plan(given, max_columns, max_offsets, 64, 64);
  if (slashes) call.estimate_lists(any_share);
  for (const int32_t stride : strides_of(given)) {
    call.estimate_blocks(max_top_k, any_share, stride);
  }
  return call.attend(return_lse);
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
  const Launch launch(q);
  const Tensor queries = aligned(q), keys = aligned(k);
  using torch::stable::new_empty;
  const auto int32 = std::make_optional(ScalarType::Int);
  Tensor columns = new_empty(q, {shape.batch, shape.q_heads, sizes.columns}, int32);
  Tensor offsets = new_empty(q, {shape.batch, shape.q_heads, sizes.offsets}, int32);
  const VerticalSlashEstimate params{shape,
                                     dtype_of(q),
                                     view_of(queries),
                                     view_of(keys),
                                     check_scale(std::nullopt, shape),
                                     sizes.last_q,
                                     sizes.sink,
                                     sizes.local,
                                     shape.q_heads,
                                     nullptr,
                                     nullptr,
                                     nullptr,
                                     sizes.columns,
                                     sizes.offsets,
                                     static_cast<int32_t*>(columns.data_ptr()),
                                     static_cast<int32_t*>(offsets.data_ptr()),
                                     lengths,
                                     millionths};
  const Tensor workspace = scratch(q, estimate_vertical_slash_bytes(params));
  check_status(sparseattn::estimate_vertical_slash(params, workspace.data_ptr(), launch.stream()));
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
  const Launch launch(q);
  const Tensor queries = aligned(q), keys = aligned(k);
  const int64_t q_blocks = ceil_div(shape.q_len, block), kv_blocks = ceil_div(shape.kv_len, block);
  const int64_t rows = q_blocks * shape.q_heads * shape.batch;
  Tensor mask = torch::stable::new_empty(q, {shape.batch, shape.q_heads, q_blocks, kv_blocks},
                                         std::make_optional(ScalarType::Bool));
  const Tensor bits = scratch(q, sizeof(uint32_t) * rows * ceil_div(kv_blocks, 32));
  const BlockSparseEstimate params{shape,
                                   dtype_of(q),
                                   view_of(queries),
                                   view_of(keys),
                                   static_cast<int32_t>(block),
                                   shape.q_heads,
                                   nullptr,
                                   nullptr,
                                   blocks,
                                   static_cast<uint32_t*>(bits.data_ptr()),
                                   static_cast<uint8_t*>(mask.data_ptr()),
                                   lengths,
                                   millionths,
                                   nullptr,
                                   residues};
  const Tensor workspace = scratch(q, estimate_block_sparse_bytes(params));
  check_status(sparseattn::estimate_block_sparse(params, workspace.data_ptr(), launch.stream()));
  return mask;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sparseattn, CUDA, m) {
  m.impl("a_shape_attention", TORCH_BOX(&a_shape_attention));
  m.impl("vertical_slash_attention", TORCH_BOX(&vertical_slash_attention));
  m.impl("block_sparse_attention", TORCH_BOX(&block_sparse_attention));
  m.impl("sparse_attention", TORCH_BOX(&sparse_attention));
  m.impl("estimate_vertical_slash", TORCH_BOX(&estimate_vertical_slash));
  m.impl("estimate_block_sparse", TORCH_BOX(&estimate_block_sparse));
}

}  // namespace sparseattn::torch_layer
