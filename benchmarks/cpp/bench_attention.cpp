// Times the attention kernel alone: plans are built, columns packed, before the clock runs.
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
#include "path.h"
#include "table.h"
#include "timer.h"

namespace {

using bench::Layer;
using bench::PlanSet;

struct Case {
  std::string pattern;
  std::string sizes;
  std::function<PlanSet(const Layer&, cudaStream_t)> make;
};

std::string pair_text(const std::pair<int32_t, int32_t>& sizes) {
  return std::to_string(sizes.first) + ":" + std::to_string(sizes.second);
}

std::vector<Case> cases(const bench::Options& options, const std::vector<bench::LayerSpec>& specs) {
  std::vector<Case> all;
  const auto a_shapes = options.pairs("a-shape");
  const auto densities = options.numbers("density", 0, 1);
  for (const std::string& pattern : options.words(
           "patterns",
           {"dense", "a_shape", "vertical_slash", "block_sparse_64", "block_sparse_128"})) {
    if (pattern == "dense") {
      all.push_back({pattern, "", bench::make_dense});
    } else if (pattern == "a_shape") {
      for (const auto& sizes : a_shapes) {
        all.push_back({pattern, pair_text(sizes), [sizes](const Layer& layer, cudaStream_t s) {
                         return bench::make_a_shape(layer, sizes.first, sizes.second, s);
                       }});
      }
    } else if (pattern == "vertical_slash") {
      for (const auto& sizes : bench::vertical_slash_sizes(options, specs)) {
        all.push_back({pattern, pair_text(sizes), [sizes](const Layer& layer, cudaStream_t s) {
                         return bench::make_vertical_slash(layer, sizes.first, sizes.second, s);
                       }});
      }
    } else {
      const int32_t block = pattern == "block_sparse_64" ? 64 : 128;
      for (const double density : densities) {
        char text[32];
        std::snprintf(text, sizeof text, "%g", density);
        all.push_back({pattern, text, [block, density](const Layer& layer, cudaStream_t s) {
                         return bench::make_block_sparse(layer, block, density, s);
                       }});
      }
    }
  }
  return all;
}

bench::Timing time_case(const bench::Timer& timer, const bench::Path& path, const Layer& layer,
                        const PlanSet& set, cudaStream_t stream) {
  sparseattn::AttentionParams params{};
  params.shape = layer.spec.shape;
  params.dtype = layer.spec.dtype;
  params.q = layer.q();
  params.k = layer.k();
  params.v = layer.v();
  params.out = layer.out();
  params.scale = layer.scale();
  params.plan = set.plan;
  return timer([&] { bench::check(path.attend(params, stream), "attention"); });
}

void run(const bench::Options& options) {
  const auto specs = bench::layer_specs(options);
  const auto all = cases(options, specs);
  const bench::Path path = bench::choose_path(options);
  const bench::DeviceFacts facts = bench::device_facts();
  const bench::Stream stream;
  const bench::Timer timer(options, facts, stream.get());
  bench::Table table({{"path", "path", ""},
                      {"dtype", "dtype", ""},
                      {"head_dim", "D", ""},
                      {"batch", "batch", ""},
                      {"tokens", "tokens", ""},
                      {"pattern", "pattern", ""},
                      {"sizes", "sizes", ""},
                      {"density", "density", "%.3f"},
                      {"ms", "ms", "%.3f"},
                      {"ms_min", "min", "%.3f"},
                      {"ms_max", "max", "%.3f"},
                      {"repeats", "n", ""},
                      {"tflops", "TFLOP/s", "%.0f"},
                      {"note", "note", ""}});
  for (const bench::LayerSpec& spec : specs) {
    for (const Case& one : all) {
      std::vector<bench::Cell> row{std::string(path.name),
                                   std::string(spec.dtype_name()),
                                   int64_t{spec.shape.head_dim},
                                   int64_t{spec.shape.batch},
                                   int64_t{spec.shape.kv_len},
                                   one.pattern,
                                   one.sizes};
      try {
        const Layer layer(spec, stream.get());
        const PlanSet set = one.make(layer, stream.get());
        const bench::Timing timing = time_case(timer, path, layer, set, stream.get());
        const double tokens = spec.shape.kv_len;
        const double causal = static_cast<double>(spec.q_slots()) * tokens * tokens / 2;
        row.insert(row.end(), {set.pairs / causal, timing.ms, timing.ms_min, timing.ms_max,
                               int64_t{timing.repeats},
                               4.0 * spec.shape.head_dim * set.pairs / timing.ms / 1e9});
      } catch (const bench::OutOfMemory& error) {
        row.resize(13);
        row.emplace_back(std::string(error.what()));
      }
      table.add(std::move(row));
      std::fprintf(stderr, ".");
    }
  }
  std::fprintf(stderr, "\n");
  bench::report("cpp_attention", options, facts, table);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(
      "bench_attention",
      "Attention of one layer, every head with the same pattern: the kernel alone, with the plan "
      "built\nand columns packed before. Median, smallest and largest of the timed calls. TFLOP/s "
      "count\n4 * head_dim operations a selected (query, key) pair, pairs in whole 64-wide tiles "
      "and blocks;\ndensity is those pairs over half the square.");
  bench::add_layer_options(options);
  options.add("patterns", "P,...", "dense,a_shape,vertical_slash,block_sparse_64,block_sparse_128",
              "which to time");
  options.add("a-shape", "SINK:WINDOW,...", "1024:4096", "sizes of a_shape");
  options.add("vertical-slash", "COLUMNS:OFFSETS,...", "1000:6096,512:2048,30:800,3500:100",
              "sizes of vertical_slash; offsets are clustered as real ones are");
  options.add("density", "X,...", "0.1,0.5", "share of the causal blocks of block_sparse");
  bench::add_path_option(options);
  bench::add_timer_options(options);
  bench::add_report_options(options);
  return bench::run_main("bench_attention", options, argc, argv, run);
}
