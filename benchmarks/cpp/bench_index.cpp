// Times the calls that build an index and a plan, one by one.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "layer.h"
#include "main.h"
#include "options.h"
#include "sparseattn/estimate.h"
#include "table.h"
#include "timer.h"

namespace {

using bench::Layer;
using bench::PlanSet;

/// A timed call: what it did, on what, and the bytes that it cannot do without moving.
struct Result {
  bench::Timing timing;
  double bytes;
};

struct Case {
  std::string call;
  std::string sizes;
  std::function<Result(const bench::Timer&, const Layer&, cudaStream_t)> run;
};

double bytes_of(const Layer& layer, int32_t heads) {
  const sparseattn::Shape& shape = layer.spec.shape;
  return 2.0 * shape.batch * heads * shape.kv_len * shape.head_dim;
}

Result estimate_vertical_slash(const bench::Timer& timer, const Layer& layer, int32_t columns,
                               int32_t offsets, cudaStream_t stream) {
  const int64_t slots = layer.spec.q_slots();
  const bench::Buffer<int32_t> column_lists("columns", slots * columns);
  const bench::Buffer<int32_t> offset_lists("offsets", slots * offsets);
  sparseattn::VerticalSlashEstimate params{};
  params.shape = layer.spec.shape;
  params.dtype = layer.spec.dtype;
  params.q = layer.q();
  params.k = layer.k();
  params.scale = layer.scale();
  params.last_q = 64;
  params.sink = 30;
  params.local = 100;
  params.heads = layer.spec.shape.q_heads;
  params.max_columns = columns;
  params.max_offsets = offsets;
  params.columns = column_lists.get();
  params.offsets = offset_lists.get();
  const auto size = static_cast<int64_t>(sparseattn::estimate_vertical_slash_bytes(params));
  const bench::Buffer<char> workspace("workspace", size);
  const auto timing = timer([&] {
    bench::check(sparseattn::estimate_vertical_slash(params, workspace.get(), stream),
                 "estimate_vertical_slash");
  });
  return {timing, bytes_of(layer, layer.spec.shape.kv_heads)};
}

Result estimate_block_sparse(const bench::Timer& timer, const Layer& layer, int32_t block,
                             int32_t top_k, cudaStream_t stream) {
  const int64_t blocks = (layer.spec.shape.kv_len + block - 1) / block;
  const bench::Buffer<uint32_t> bits("block bits",
                                     layer.spec.q_slots() * blocks * ((blocks + 31) / 32));
  sparseattn::BlockSparseEstimate params{};
  params.shape = layer.spec.shape;
  params.dtype = layer.spec.dtype;
  params.q = layer.q();
  params.k = layer.k();
  params.block = block;
  params.heads = layer.spec.shape.q_heads;
  params.max_top_k = top_k;
  params.block_bits = bits.get();
  const auto size = static_cast<int64_t>(sparseattn::estimate_block_sparse_bytes(params));
  const bench::Buffer<char> workspace("workspace", size);
  const auto timing = timer([&] {
    bench::check(sparseattn::estimate_block_sparse(params, workspace.get(), stream),
                 "estimate_block_sparse");
  });
  const sparseattn::Shape& shape = layer.spec.shape;
  return {timing, bytes_of(layer, shape.q_heads) + bytes_of(layer, shape.kv_heads) +
                      4.0 * static_cast<double>(bits.size())};
}

Result plan_vertical_slash(const bench::Timer& timer, const Layer& layer, int32_t columns,
                           int32_t offsets, cudaStream_t stream) {
  const PlanSet set = bench::make_vertical_slash(layer, columns, offsets, stream);
  const auto timing = timer([&] {
    bench::check(
        sparseattn::plan_vertical_slash(set.plan, set.column_lists(), set.offset_lists(), stream),
        "plan_vertical_slash");
  });
  // Lists in, columns, segments and cover out.
  const double words = 2.0 * columns + 3.0 * offsets + set.plan.sizes.cover_words();
  return {timing, 4.0 * static_cast<double>(layer.spec.q_slots()) * words};
}

Result pack_columns(const bench::Timer& timer, const Layer& layer, int32_t columns, int32_t offsets,
                    cudaStream_t stream) {
  const PlanSet set = bench::make_vertical_slash(layer, columns, offsets, stream);
  const auto timing = timer([&] {
    bench::check(sparseattn::pack_columns(set.plan, layer.k(), layer.v(), stream), "pack_columns");
  });
  // Keys and values, read and written, two bytes each.
  const double rows = static_cast<double>(layer.spec.q_slots()) * columns;
  return {timing, 8.0 * rows * layer.spec.shape.head_dim};
}

Result plan_block_sparse(const bench::Timer& timer, const Layer& layer, int32_t block,
                         cudaStream_t stream) {
  const PlanSet set = bench::make_block_sparse(layer, block, 0.1, stream);
  const auto timing = timer([&] {
    bench::check(sparseattn::plan_block_sparse(set.plan, set.block_mask(), stream),
                 "plan_block_sparse");
  });
  const double rows = static_cast<double>(layer.spec.q_slots()) * set.plan.sizes.q_blocks();
  return {timing, static_cast<double>(set.mask.size()) + 4.0 * rows * set.plan.sizes.block_words()};
}

std::vector<Case> cases(const bench::Options& options, const std::vector<bench::LayerSpec>& specs) {
  using VerticalSlashRun =
      Result (*)(const bench::Timer&, const Layer&, int32_t, int32_t, cudaStream_t);
  std::vector<Case> all;
  const auto top_ks = options.integers("top-k", 1, INT32_MAX);
  const auto blocks = options.words("blocks", {"64", "128"});
  const auto wanted =
      options.words("calls", {"estimate_vertical_slash", "plan_vertical_slash", "pack_columns",
                              "estimate_block_sparse", "plan_block_sparse"});
  for (const std::string& call : wanted) {
    const bool estimate = call == "estimate_block_sparse";
    if (estimate || call == "plan_block_sparse") {
      for (const std::string& text : blocks) {
        const int32_t block = text == "64" ? 64 : 128;
        if (!estimate) {
          all.push_back({call, text, [block](const auto& timer, const auto& layer, auto stream) {
                           return plan_block_sparse(timer, layer, block, stream);
                         }});
          continue;
        }
        for (const int64_t top_k : top_ks) {
          const auto count = static_cast<int32_t>(top_k);
          all.push_back({call, text + ":" + std::to_string(count),
                         [block, count](const auto& timer, const auto& layer, auto stream) {
                           return estimate_block_sparse(timer, layer, block, count, stream);
                         }});
        }
      }
      continue;
    }
    const VerticalSlashRun run = call == "pack_columns"          ? pack_columns
                                 : call == "plan_vertical_slash" ? plan_vertical_slash
                                                                 : estimate_vertical_slash;
    for (const auto& [columns, offsets] : bench::vertical_slash_sizes(options, specs)) {
      const int32_t c = columns, o = offsets;
      all.push_back({call, std::to_string(c) + ":" + std::to_string(o),
                     [run, c, o](const auto& timer, const auto& layer, auto stream) {
                       return run(timer, layer, c, o, stream);
                     }});
    }
  }
  return all;
}

void run(const bench::Options& options) {
  const auto specs = bench::layer_specs(options);
  const auto all = cases(options, specs);
  const bench::DeviceFacts facts = bench::device_facts();
  const bench::Stream stream;
  const bench::Timer timer(options, facts, stream.get());
  bench::Table table({{"dtype", "dtype", ""},
                      {"head_dim", "D", ""},
                      {"batch", "batch", ""},
                      {"tokens", "tokens", ""},
                      {"call", "call", ""},
                      {"sizes", "sizes", ""},
                      {"ms", "ms", "%.4f"},
                      {"ms_min", "min", "%.4f"},
                      {"ms_max", "max", "%.4f"},
                      {"repeats", "n", ""},
                      {"gb_per_s", "GB/s", "%.0f"},
                      {"note", "note", ""}});
  for (const bench::LayerSpec& spec : specs) {
    for (const Case& one : all) {
      std::vector<bench::Cell> row{std::string(spec.dtype_name()),
                                   int64_t{spec.shape.head_dim},
                                   int64_t{spec.shape.batch},
                                   int64_t{spec.shape.kv_len},
                                   one.call,
                                   one.sizes};
      try {
        const Layer layer(spec, stream.get());
        const Result result = one.run(timer, layer, stream.get());
        const bench::Timing& timing = result.timing;
        row.insert(row.end(), {timing.ms, timing.ms_min, timing.ms_max, int64_t{timing.repeats},
                               result.bytes / timing.ms / 1e6});
      } catch (const bench::OutOfMemory& error) {
        row.resize(11);
        row.emplace_back(std::string(error.what()));
      }
      table.add(std::move(row));
      std::fprintf(stderr, ".");
    }
  }
  std::fprintf(stderr, "\n");
  bench::report("cpp_index", options, facts, table);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(
      "bench_index",
      "The calls that build an index and a plan, one by one, for all heads of one layer. Median, "
      "smallest\nand largest of the timed calls. GB/s count the bytes that the call cannot do "
      "without moving: keys\n(and queries) once for an estimate, lists or mask and what the plan "
      "keeps of them for a plan.\nq, k and v are normal noise.");
  bench::add_layer_options(options);
  options.add("calls", "C,...",
              "estimate_vertical_slash,plan_vertical_slash,pack_columns,estimate_block_sparse,"
              "plan_block_sparse",
              "which to time");
  options.add("vertical-slash", "COLUMNS:OFFSETS,...", "1000:6096,512:2048,30:800,3500:100",
              "sizes of the vertical-slash calls");
  options.add("blocks", "N,...", "64,128", "block sizes of the block-sparse calls");
  options.add("top-k", "N,...", "100", "blocks a row that estimate_block_sparse selects");
  bench::add_timer_options(options);
  bench::add_report_options(options);
  return bench::run_main("bench_index", options, argc, argv, run);
}
