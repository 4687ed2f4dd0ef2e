// The query rows that share a key/value head, in panels.
#pragma once

#include <cstdint>

#include "common/cpu/kernels.h"
#include "common/cpu/panel.h"
#include "common/cpu/work.h"
#include "sparseattn/types.h"

namespace sparseattn::cpu {

/// Row r of a key/value head is query row r / heads of query head head * heads + r % heads: keys
/// that are visible from a query row on are visible from a row on.
struct QueryGroup {
  View q;
  DType dtype;
  int32_t heads;
  int32_t head_dim;

  Rows row(const View& view, int64_t sequence, int64_t head, int32_t r) const {
    return rows_of_head(view, dtype, sequence, head * heads + r % heads, r / heads);
  }

  /// panels [kPanels][head_dim][kPanelRows] = rows [first, first + count), scaled to log2 units.
  void pack(const Kernels& kernels, int64_t sequence, int64_t head, int32_t first, int32_t count,
            float scale, float* panels) const {
    alignas(64) float rows[kTileRows * kMaxHeadDim];
    constexpr int32_t kFirst = 0;
    for (int32_t i = 0; i < count; ++i) {
      alignas(64) float one[kKeyGroup * kMaxHeadDim];  // packed keys come in groups
      kernels.pack_keys(row(q, sequence, head, first + i), &kFirst, 1, head_dim, one);
      for (int32_t d = 0; d < head_dim; ++d) rows[i * kMaxHeadDim + d] = one[d];
    }
    kernels.pack_queries({rows, kMaxHeadDim, DType::kFloat32}, count, head_dim, scale * kLog2e,
                         panels);
  }
};

}  // namespace sparseattn::cpu
