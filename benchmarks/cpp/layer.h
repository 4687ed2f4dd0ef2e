// One layer's tensors, and a plan with what it selects, in device memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "fill.h"
#include "indexes.h"
#include "options.h"
#include "sparseattn/attention.h"
#include "sparseattn/plan.h"

namespace bench {

struct LayerSpec {
  sparseattn::Shape shape;
  sparseattn::DType dtype;
  uint64_t seed;

  const char* dtype_name() const { return dtype == sparseattn::DType::kFloat16 ? "fp16" : "bf16"; }
  int64_t q_slots() const { return int64_t{shape.batch} * shape.q_heads; }
};

inline void add_layer_options(Options& options) {
  options.add("lengths", "N,...", "32768,131072", "tokens (queries and keys), multiples of 64");
  options.add("head-dims", "N,...", "128", "64, 96 or 128");
  options.add("dtypes", "T,...", "bf16", "bf16, fp16");
  options.add("batch", "N,...", "1", "sequences");
  options.add("heads", "N", "32", "query heads");
  options.add("kv-heads", "N", "8", "key/value heads, a divisor of --heads");
  options.add("seed", "N", "0", "of all random data");
}

/// Every combination of dtype, head dim, batch and length that the options ask for.
inline std::vector<LayerSpec> layer_specs(const Options& options) {
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
  const int64_t heads = options.integer("heads", 1, 4096);
  const int64_t kv_heads = options.integer("kv-heads", 1, 4096);
  if (heads % kv_heads != 0) {
    throw UsageError("--kv-heads: expected a divisor of " + std::to_string(heads) + ", got " +
                     std::to_string(kv_heads));
  }
  const auto seed = static_cast<uint64_t>(options.integer("seed", 0, INT32_MAX));
  std::vector<LayerSpec> specs;
  for (const std::string& dtype : options.words("dtypes", {"bf16", "fp16"})) {
    for (const int64_t head_dim : options.integers("head-dims", 1, 1024)) {
      bool known = false;
      for (const int32_t one : sparseattn::kHeadDims) known = known || one == head_dim;
      if (!known) {
        throw UsageError("--head-dims: expected 64, 96 or 128, got " + std::to_string(head_dim));
      }
      for (const int64_t batch : options.integers("batch", 1, 65536)) {
        for (const int64_t tokens : options.integers("lengths", 256, int64_t{1} << 30)) {
          if (tokens % kTile != 0) {
            throw UsageError("--lengths: expected multiples of 64, got " + std::to_string(tokens));
          }
          specs.push_back(
              {{small(batch), small(heads), small(kv_heads), small(tokens), small(tokens),
                small(head_dim)},
               dtype == "fp16" ? sparseattn::DType::kFloat16 : sparseattn::DType::kBFloat16,
               seed});
        }
      }
    }
  }
  return specs;
}

/// Sizes A:B of --vertical-slash that fit every length.
inline std::vector<std::pair<int32_t, int32_t>> vertical_slash_sizes(
    const Options& options, const std::vector<LayerSpec>& specs) {
  const auto sizes = options.pairs("vertical-slash");
  for (const LayerSpec& spec : specs) {
    for (const auto& [columns, offsets] : sizes) {
      const int32_t tokens = spec.shape.kv_len;
      if (columns > tokens || offsets > tokens - 2 * kTile) {
        throw UsageError("--vertical-slash: expected at most " + std::to_string(tokens) + ":" +
                         std::to_string(tokens - 2 * kTile) + " for " + std::to_string(tokens) +
                         " tokens, got " + std::to_string(columns) + ":" + std::to_string(offsets));
      }
    }
  }
  return sizes;
}

/// q, k, v and out, contiguous, filled with standard normal values.
class Layer {
 public:
  Layer(const LayerSpec& spec, cudaStream_t stream) : spec(spec) {
    const sparseattn::Shape& shape = spec.shape;
    q_ = make("q", shape.q_heads, 1, stream);
    k_ = make("k", shape.kv_heads, 2, stream);
    v_ = make("v", shape.kv_heads, 3, stream);
    out_ = make("out", shape.q_heads, 4, stream);
  }

  sparseattn::View q() const { return view(q_, spec.shape.q_heads); }
  sparseattn::View k() const { return view(k_, spec.shape.kv_heads); }
  sparseattn::View v() const { return view(v_, spec.shape.kv_heads); }
  sparseattn::View out() const { return view(out_, spec.shape.q_heads); }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(spec.shape.head_dim)); }

  const LayerSpec spec;

 private:
  Buffer<uint16_t> make(const char* name, int32_t heads, uint64_t which, cudaStream_t stream) {
    const sparseattn::Shape& shape = spec.shape;
    Buffer<uint16_t> buffer(name, int64_t{shape.batch} * heads * shape.kv_len * shape.head_dim);
    check(fill_normal(buffer.get(), spec.dtype, buffer.size(), 4 * spec.seed + which, stream),
          name);
    return buffer;
  }
  sparseattn::View view(const Buffer<uint16_t>& buffer, int32_t heads) const {
    const int64_t row = spec.shape.head_dim, head = row * spec.shape.kv_len;
    return {buffer.get(), head * heads, head, row};
  }

  Buffer<uint16_t> q_, k_, v_, out_;
};

/// A plan in which every head has the same pattern, with the memory that belongs to it.
struct PlanSet {
  sparseattn::Plan plan{};
  Buffer<char> workspace;
  Buffer<int32_t> columns, offsets;  // [batch, q_heads, n]
  Buffer<uint8_t> mask;              // [batch, q_heads, blocks, blocks]
  double pairs = 0;                  // selected, of all heads and sequences

  sparseattn::IndexLists column_lists() const { return lists(columns, plan.sizes.max_columns); }
  sparseattn::IndexLists offset_lists() const { return lists(offsets, plan.sizes.max_offsets); }
  sparseattn::BlockMask block_mask() const {
    const int64_t blocks = plan.sizes.kv_blocks(), head = blocks * blocks;
    return {mask.get(), head * plan.sizes.shape.q_heads, head, blocks, 1};
  }

 private:
  sparseattn::IndexLists lists(const Buffer<int32_t>& data, int32_t length) const {
    const int64_t sequence = int64_t{plan.sizes.shape.q_heads} * length;
    return {data.get(), false, length, sequence, length, 1};
  }
};

inline PlanSet make_plan(const Layer& layer, sparseattn::PlanSizes sizes,
                         sparseattn::Pattern pattern, cudaStream_t stream) {
  sizes.shape = layer.spec.shape;
  sizes.dtype = layer.spec.dtype;
  if (sizes.block_q == 0) sizes.block_q = sizes.block_kv = 64;
  PlanSet set;
  set.workspace = Buffer<char>("plan", static_cast<int64_t>(sparseattn::plan_bytes(sizes)));
  set.plan = sparseattn::carve_plan(sizes, set.workspace.get());
  const std::vector<sparseattn::Pattern> patterns(static_cast<size_t>(sizes.shape.q_heads),
                                                  pattern);
  check(sparseattn::plan_heads(set.plan, patterns.data(), stream), "plan_heads");
  return set;
}

inline PlanSet make_dense(const Layer& layer, cudaStream_t stream) {
  PlanSet set = make_plan(layer, {}, {sparseattn::PatternKind::kDense, 0, 0}, stream);
  const double tokens = layer.spec.shape.kv_len;
  set.pairs = static_cast<double>(layer.spec.q_slots()) * tokens * tokens / 2;
  return set;
}

inline PlanSet make_a_shape(const Layer& layer, int32_t sink, int32_t window, cudaStream_t stream) {
  PlanSet set = make_plan(layer, {}, {sparseattn::PatternKind::kAShape, sink, window}, stream);
  set.pairs = static_cast<double>(layer.spec.q_slots()) *
              a_shape_pairs(layer.spec.shape.kv_len, sink, window);
  return set;
}

/// Clustered lists, each head's own; planned and packed.
inline PlanSet make_vertical_slash(const Layer& layer, int32_t num_columns, int32_t num_offsets,
                                   cudaStream_t stream) {
  sparseattn::PlanSizes sizes{};
  sizes.vs_heads = layer.spec.shape.q_heads;
  sizes.max_columns = num_columns;
  sizes.max_offsets = num_offsets;
  PlanSet set = make_plan(
      layer, sizes, {sparseattn::PatternKind::kVerticalSlash, num_columns, num_offsets}, stream);
  std::mt19937_64 random(layer.spec.seed);
  std::vector<int32_t> columns, offsets;
  for (int64_t slot = 0; slot < layer.spec.q_slots(); ++slot) {
    const int32_t tokens = layer.spec.shape.kv_len;
    const auto head_columns = random_columns(tokens, num_columns, random);
    const auto head_offsets = clustered_offsets(tokens, num_offsets, random);
    columns.insert(columns.end(), head_columns.begin(), head_columns.end());
    offsets.insert(offsets.end(), head_offsets.begin(), head_offsets.end());
    set.pairs += vertical_slash_pairs(head_columns, head_offsets, tokens);
  }
  set.columns = Buffer<int32_t>("columns", columns, stream);
  set.offsets = Buffer<int32_t>("offsets", offsets, stream);
  check(sparseattn::plan_vertical_slash(set.plan, set.column_lists(), set.offset_lists(), stream),
        "plan_vertical_slash");
  check(sparseattn::pack_columns(set.plan, layer.k(), layer.v(), stream), "pack_columns");
  return set;
}

/// The diagonal and random earlier blocks of `block` x `block`, about `density` of the causal ones.
inline PlanSet make_block_sparse(const Layer& layer, int32_t block, double density,
                                 cudaStream_t stream) {
  sparseattn::PlanSizes sizes{};
  sizes.bs_heads = layer.spec.shape.q_heads;
  sizes.block_q = sizes.block_kv = block;
  PlanSet set = make_plan(layer, sizes, {sparseattn::PatternKind::kBlockSparse, 0, 0}, stream);
  const int32_t blocks = set.plan.sizes.kv_blocks();
  const int64_t heads = layer.spec.q_slots();
  set.mask = Buffer<uint8_t>("block mask", heads * blocks * blocks);
  const Buffer<unsigned long long> selected("count", std::vector<unsigned long long>{0}, stream);
  check(fill_block_mask(set.mask.get(), heads, blocks, density, layer.spec.seed, selected.get(),
                        stream),
        "block mask");
  check(sparseattn::plan_block_sparse(set.plan, set.block_mask(), stream), "plan_block_sparse");
  unsigned long long count = 0;
  check(cudaMemcpyAsync(&count, selected.get(), sizeof count, cudaMemcpyDeviceToHost, stream),
        "count");
  check(cudaStreamSynchronize(stream), "block mask");
  set.pairs = static_cast<double>(count) * block * block;
  return set;
}

}  // namespace bench
