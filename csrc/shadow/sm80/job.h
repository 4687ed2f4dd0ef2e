// Calls as the kernels take them: what was passed, and what the host chose.
#pragma once

#include <vector_types.h>

#include "shadow/sm80/layout.h"
#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

struct ReconstructJob {
  LowRankReconstruct in;
  Layout layout;
  int32_t ctas;  // of one head
};

struct AttentionJob {
  ShadowAttention in;
  Layout layout;
  int32_t row_blocks;  // of a key/value head
  int32_t rows;        // of a block that are kept: all 16, or fewer where there are no more
  int32_t splits;
  float* partial;  // [unit][rows][splits][head_dim], unit = (sequence, kv_head, block); splits > 1
  float2* states;  // [unit][rows][splits] maximum in log2 units, sum relative to it
};

constexpr int kMostSplits = 128;  // the combine kernel has a thread for each

}  // namespace sparseattn::shadow_sm80
