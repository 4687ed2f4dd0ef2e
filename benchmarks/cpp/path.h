// Which attention kernel runs: the one place that knows their names.
#pragma once

#include <cuda_runtime_api.h>

#include <iterator>
#include <string>
#include <vector>

#include "options.h"
#include "sparseattn/attention.h"

namespace bench {

struct Path {
  const char* name;
  sparseattn::Status (*attend)(const sparseattn::AttentionParams&, cudaStream_t);
};

/// Every kernel that --path can name, the best one last.
constexpr Path kPaths[] = {{"sm80", sparseattn::sparse_attention_sm80}};

inline void add_path_option(Options& options) {
  options.add("path", "P", "auto", "attention kernel: sm80, or auto: the best that runs here");
}

/// The kernel that --path names. `auto` takes what runs on this device: every kernel, so far.
inline Path choose_path(const Options& options) {
  const std::string& wanted = options.text("path");
  std::vector<std::string> known{"auto"};
  for (const Path& path : kPaths) {
    if (wanted == path.name) return path;
    known.push_back(path.name);
  }
  options.words("path", known);
  return kPaths[std::size(kPaths) - 1];
}

}  // namespace bench
