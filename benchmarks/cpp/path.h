// Which attention kernel runs: the one place that knows their names.
#pragma once

#include <cuda_runtime_api.h>

#include <iterator>
#include <string>
#include <vector>

#include "device.h"
#include "options.h"
#include "sparseattn/attention.h"

namespace bench {

struct Path {
  const char* name;
  sparseattn::Status (*attend)(const sparseattn::AttentionParams&, cudaStream_t);
};

/// Every kernel that --path can name, the best one last.
constexpr Path kPaths[] = {{"sm80", sparseattn::sparse_attention_sm80},
                           {"sm90", sparseattn::sparse_attention_sm90}};

inline void add_path_option(Options& options) {
  options.add("path", "P", "auto",
              "attention kernel: sm80, sm90, or auto: the best that runs here");
}

/// The kernel that --path names. `auto` takes what the library would take on this device.
inline Path choose_path(const Options& options) {
  const std::string& wanted = options.text("path");
  std::vector<std::string> known{"auto"};
  for (const Path& path : kPaths) {
    if (wanted == path.name) return path;
    known.push_back(path.name);
  }
  options.words("path", known);
  int device = 0, major = 0, minor = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "device");
  const bool hopper = sparseattn::attention_path(major, minor) == sparseattn::AttentionPath::kSm90;
  return kPaths[hopper ? 1 : 0];
}

}  // namespace bench
