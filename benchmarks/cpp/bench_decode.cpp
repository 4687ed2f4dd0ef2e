// Times the operators of a ShadowKV decode step one by one, and the whole step.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "decode_layer.h"
#include "device.h"
#include "main.h"
#include "options.h"
#include "table.h"
#include "timer.h"

namespace {

using bench::DecodeLayer;
using bench::DecodeSpec;

/// Bytes that cannot stay where they are: in device memory, read and written, and over PCIe.
struct Traffic {
  double device = 0, pcie = 0;
  Traffic operator+(const Traffic& other) const {
    return {device + other.device, pcie + other.pcie};
  }
};

/// Traffic of the parts. Rows of the factor count once for each head that selects them; 2 bytes an
/// element, 4 a list entry.
struct Floors {
  explicit Floors(const DecodeSpec& spec) {
    const double lists = static_cast<double>(spec.lists()), dim = spec.head_dim;
    const double chunks = lists * spec.chunks(), selected = lists * spec.top_k;
    const double chunk_bytes = 2.0 * static_cast<double>(spec.chunk_size());
    const double missed = lists * (spec.top_k - spec.kept()) * chunk_bytes;
    const double keys = 2 * lists * spec.tokens * dim;
    const double queries = 2.0 * spec.batch * spec.q_heads() * dim;
    const double width = static_cast<double>(spec.width());
    const double rebuilt =
        selected * spec.chunk * spec.rank * 2 + lists * dim * (2.0 * spec.rank + 4);
    gram = {keys + 16 * spec.batch * width * (width + 1)};
    landmarks = {keys + chunks * (2 * dim + 4)};
    outliers = {4 * chunks + 4 * lists * spec.outliers};
    select = {chunks * (2 * dim + 1) + queries + 4 * selected};
    plan = {16 * lists * spec.slots + 16 * selected};
    gather_device = {2 * missed};
    gather_host = {missed, missed};
    reconstruct = {rebuilt + selected * chunk_bytes};
    attention = {rebuilt + selected * chunk_bytes + 4 * lists * spec.exact * dim + 2 * queries};
  }
  Traffic gram, landmarks, outliers, select, plan, gather_device, gather_host, reconstruct,
      attention;
};

using Call = void (DecodeLayer::*)() const;

struct Part {
  const char* name;
  Call call;
  Call before;  // outside the timed span; or null
  bool host;    // needs the store in pinned memory
  Traffic (*traffic)(const Floors&);
};

constexpr const char* kSteps[] = {"step_direct", "step_device", "step_host"};

const Part kParts[] = {
    {"gram", &DecodeLayer::gram, &DecodeLayer::zero_sums, false,
     [](const Floors& f) { return f.gram; }},
    {"landmarks", &DecodeLayer::landmarks, nullptr, false,
     [](const Floors& f) { return f.landmarks; }},
    {"outliers", &DecodeLayer::outliers, nullptr, false,
     [](const Floors& f) { return f.outliers; }},
    {"select", &DecodeLayer::select, nullptr, false, [](const Floors& f) { return f.select; }},
    {"plan", &DecodeLayer::plan, &DecodeLayer::restore, false,
     [](const Floors& f) { return f.plan; }},
    {"gather_device", &DecodeLayer::gather_device, nullptr, false,
     [](const Floors& f) { return f.gather_device; }},
    {"gather_host", &DecodeLayer::gather_host, nullptr, true,
     [](const Floors& f) { return f.gather_host; }},
    {"reconstruct", &DecodeLayer::reconstruct, nullptr, false,
     [](const Floors& f) { return f.reconstruct; }},
    {"attention", &DecodeLayer::attend, nullptr, false,
     [](const Floors& f) { return f.attention; }},
    {kSteps[0], &DecodeLayer::step_direct, nullptr, false,
     [](const Floors& f) { return f.select + f.attention; }},
    {kSteps[1], &DecodeLayer::step_device, &DecodeLayer::restore, false,
     [](const Floors& f) { return f.select + f.plan + f.gather_device + f.attention; }},
    {kSteps[2], &DecodeLayer::step_host, &DecodeLayer::restore, true,
     [](const Floors& f) { return f.select + f.plan + f.gather_host + f.attention; }},
};

std::vector<std::string> part_names() {
  std::vector<std::string> names;
  for (const Part& part : kParts) names.emplace_back(part.name);
  return names;
}

/// A call as a CUDA graph.
class Graph {
 public:
  Graph(const std::function<void()>& call, cudaStream_t stream) : stream_(stream) {
    bench::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    cudaGraph_t graph = nullptr;
    try {
      call();
    } catch (...) {
      cudaStreamEndCapture(stream, &graph);
      if (graph != nullptr) cudaGraphDestroy(graph);
      throw;
    }
    bench::check(cudaStreamEndCapture(stream, &graph), "capture");
    const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    bench::check(error, "graph");
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }
  void operator()() const { bench::check(cudaGraphLaunch(graph_, stream_), "graph"); }

 private:
  cudaStream_t stream_;
  cudaGraphExec_t graph_ = nullptr;
};

/// Norm of the difference over the norm; NaN where a value is not finite.
double difference(const std::vector<float>& out, const std::vector<float>& expected) {
  double norm = 0, apart = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    norm += double{expected[i]} * expected[i];
    apart += (double{out[i]} - expected[i]) * (double{out[i]} - expected[i]);
  }
  return std::sqrt(apart / norm);
}

/// What is wrong with the output of a step, or nothing.
std::string wrong(const DecodeLayer& layer, const Part& part, const std::function<void()>& call) {
  layer.step_direct();
  const std::vector<float> expected = layer.output();
  layer.fill_slots();
  call();
  const double apart = difference(layer.output(), expected);
  if (apart < 1e-2) return "";
  char text[96];
  std::snprintf(text, sizeof text,
                "%s: output differs from that of step_direct by %.3g of its norm", part.name,
                apart);
  return text;
}

void run(const bench::Options& options) {
  const auto specs = bench::decode_specs(options);
  const auto wanted = options.words("parts", part_names());
  const auto modes = options.words("modes", {"eager", "graph"});
  const double device_rate = 1e9 * static_cast<double>(options.integer("device-rate", 1, 1000000));
  const double pcie_rate = 1e9 * static_cast<double>(options.integer("pcie-rate", 1, 1000000));
  const bench::DeviceFacts facts = bench::device_facts();
  const bench::Stream stream;
  const bench::Timer timer(options, facts, stream.get());
  bench::Table table({{"dtype", "dtype", ""},
                      {"batch", "batch", ""},
                      {"tokens", "tokens", ""},
                      {"part", "part", ""},
                      {"mode", "mode", ""},
                      {"us", "us", "%.2f"},
                      {"us_min", "min", "%.2f"},
                      {"us_max", "max", "%.2f"},
                      {"repeats", "n", ""},
                      {"device_mb", "device MB", "%.3f"},
                      {"pcie_mb", "PCIe MB", "%.3f"},
                      {"gb_per_s", "GB/s", "%.1f"},
                      {"pcie_gb_per_s", "PCIe GB/s", "%.1f"},
                      {"floor_us", "floor us", "%.2f"},
                      {"hit_rate", "hits", "%.3f"},
                      {"note", "note", ""}});
  std::string failed;
  for (const DecodeSpec& spec : specs) {
    std::vector<bench::Cell> base{std::string(spec.dtype_name()), int64_t{spec.batch},
                                  int64_t{spec.tokens}};
    const auto chosen = [&](const Part& part) {
      return std::find(wanted.begin(), wanted.end(), part.name) != wanted.end();
    };
    const bool host = std::any_of(std::begin(kParts), std::end(kParts),
                                  [&](const Part& part) { return part.host && chosen(part); });
    try {
      const DecodeLayer layer(spec, host, stream.get());
      const double hit_rate = layer.hit_rate();
      for (const Part& part : kParts) {
        if (!chosen(part)) continue;
        const std::function<void()> eager = [&] { (layer.*part.call)(); };
        const auto before = [&] {
          if (part.before != nullptr) (layer.*part.before)();
        };
        const Traffic traffic = part.traffic(Floors(spec));
        const double floor = std::max(traffic.device / device_rate, traffic.pcie / pcie_rate);
        for (const std::string& mode : modes) {
          before();
          eager();  // loads the kernels, which a capture may not
          std::function<void()> call = eager;
          if (mode == "graph") {
            call = [graph = std::make_shared<Graph>(eager, stream.get())] { (*graph)(); };
          }
          std::string note;
          if (std::find(std::begin(kSteps), std::end(kSteps), std::string(part.name)) !=
              std::end(kSteps)) {
            note = wrong(layer, part, call);
          }
          if (!note.empty()) failed = note;
          const bench::Timing timing = timer(call, before);
          std::vector<bench::Cell> row = base;
          row.insert(row.end(),
                     {std::string(part.name), mode, 1e3 * timing.ms, 1e3 * timing.ms_min,
                      1e3 * timing.ms_max, int64_t{timing.repeats}, traffic.device / 1e6});
          row.insert(row.end(), {bench::Cell{}, traffic.device / timing.ms / 1e6, bench::Cell{},
                                 1e6 * floor, hit_rate, note});
          if (traffic.pcie > 0) {
            row[10] = traffic.pcie / 1e6;
            row[12] = traffic.pcie / timing.ms / 1e6;
          }
          if (note.empty()) row.pop_back();
          table.add(std::move(row));
          std::fprintf(stderr, ".");
        }
      }
    } catch (const bench::OutOfMemory& error) {
      base.resize(15);
      base.emplace_back(std::string(error.what()));
      table.add(std::move(base));
    }
  }
  std::fprintf(stderr, "\n");
  bench::report("cpp_decode", options, facts, table);
  if (!failed.empty()) throw std::runtime_error(failed);
}

}  // namespace

int main(int argc, char** argv) {
  bench::Options options(
      "bench_decode",
      "The operators of a ShadowKV decode step for one layer, and the whole step: \"direct\" "
      "attends to a store\non the device as it is, \"device\" and \"host\" plan and gather values "
      "into slots. Microseconds: median,\nsmallest and largest. MB are what a part must move at "
      "least, in device memory (read and written) and\nover PCIe; GB/s are these over the time, "
      "the floor is these at full rate. Tables of the slots are\nrestored before every call. Gram, "
      "landmarks and outliers belong to the prompt. Data are normal noise.\nExit status 1 if the "
      "steps' outputs differ.");
  bench::add_decode_options(options);
  options.add("parts", "P,...", bench::join(part_names(), ","), "which to time");
  options.add("modes", "M,...", "eager,graph", "launched one by one, or as a CUDA graph");
  options.add("device-rate", "N", "4300", "GB/s of device memory, for the floor");
  options.add("pcie-rate", "N", "55", "GB/s from pinned host memory, for the floor");
  bench::add_timer_options(options);
  bench::add_report_options(options);
  return bench::run_main("bench_decode", options, argc, argv, run);
}
