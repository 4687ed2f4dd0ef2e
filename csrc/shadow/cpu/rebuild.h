// Keys from their low-rank factor.
#pragma once

#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {

/// What LowRankKeys require of their sizes.
Status check(const LowRankKeys& keys, int32_t head_dim);

/// Rebuilds keys of one head of one sequence.
class Rebuilder {
 public:
  Rebuilder(const Kernels& kernels, const LowRankKeys& keys, DType dtype, int32_t head_dim,
            int64_t kv_heads, int64_t sequence, int64_t head);

  /// Whether `chunk` is the id of a chunk whose tokens all have a factor.
  bool holds(int32_t chunk) const {
    return chunk >= 0 && (int64_t{chunk} + 1) * keys_.chunk <= keys_.rows;
  }

  /// out [count, then zero rows up to a multiple of kKeyGroup][kMaxHeadDim] = keys of tokens;
  /// count <= kChunkKeys.
  void rebuild(const int32_t* tokens, int32_t count, float* out);

 private:
  /// rows_ [count][kMaxHeadDim] = columns [first, first + length) of the factor, padded as
  /// `rebuild` pads.
  void pack_factor(const int32_t* tokens, int32_t count, int32_t first, int32_t length);
  void rotate(int32_t token, float* key) const;

  const Kernels& kernels_;
  const LowRankKeys& keys_;
  const int32_t head_dim_;
  const int32_t panels_;
  const Rows factor_;    // where it is not quantised
  const uint8_t* e4m3_;  // where it is, its rows and scales
  const float* scales_;
  const float* mean_;  // or null
  FloatBuffer basis_;  // [panels_][rank][kPanelRows dims]
  FloatBuffer rows_{kChunkKeys * kMaxHeadDim};
  FloatBuffer products_{kChunkKeys * kPanelRows};
};

}  // namespace sparseattn::cpu
