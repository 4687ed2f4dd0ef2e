// Gram matrix and sum of keys, streamed.
//
// One work item is kFeatures rows of one sequence's Gram matrix. It takes 128 keys at a time: its
// own features transposed against all later features in panels, so the contraction over keys is the
// score kernel's. Products of 128 keys are summed in fp32, all beyond in fp64, in a fixed order.
#include <algorithm>
#include <cstdint>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

constexpr int32_t kFeatures = 64;
constexpr int32_t kBlockKeys = kMaxHeadDim;  // the score kernel's row of one feature

struct Block {
  explicit Block(int32_t panels) : later(static_cast<size_t>(panels) * kBlockKeys * kPanelRows) {}
  FloatBuffer keys{kBlockKeys * kMaxHeadDim};
  FloatBuffer own{kFeatures * kBlockKeys};  // [feature][key]
  FloatBuffer later;                        // [panel][key][kPanelRows features]
  FloatBuffer products{kFeatures * kPanelRows};
};

/// Spreads keys [first, first + count) over the item's features and the panels from its first on.
void load_block(const Kernels& kernels, const ShadowGram& p, int64_t sequence, int32_t first,
                int32_t count, int32_t first_feature, Block& block) {
  const int32_t dim = p.head_dim, width = p.kv_heads * dim;
  int32_t ids[kBlockKeys];
  for (int32_t i = 0; i < count; ++i) ids[i] = first + i;
  for (int32_t head = first_feature / dim; head < p.kv_heads; ++head) {
    const Rows rows = rows_of_head(p.k, p.dtype, sequence, head, 0);
    kernels.pack_keys(rows, ids, count, dim, block.keys.data());
    for (int32_t i = 0; i < count; ++i) {
      const float* key = block.keys.data() + i * kMaxHeadDim;
      for (int32_t d = std::max(0, first_feature - head * dim); d < dim; ++d) {
        const int32_t at = head * dim + d - first_feature;
        block.later
            .data()[(int64_t{at} / kPanelRows * kBlockKeys + i) * kPanelRows + at % kPanelRows] =
            key[d];
        if (at < kFeatures) block.own.data()[at * kBlockKeys + i] = key[d];
      }
    }
  }
  for (int32_t at = width - first_feature; at % kPanelRows != 0; ++at) {
    for (int32_t i = 0; i < count; ++i) {
      block.later
          .data()[(int64_t{at} / kPanelRows * kBlockKeys + i) * kPanelRows + at % kPanelRows] =
          0.0f;
    }
  }
  for (int32_t at = width - first_feature; at < kFeatures; ++at) {
    std::fill_n(block.own.data() + at * kBlockKeys, count, 0.0f);
  }
}

void add_item(const Kernels& kernels, const ShadowGram& p, int64_t sequence, int32_t first_feature,
              int32_t rows) {
  const int32_t width = p.kv_heads * p.head_dim;
  const int32_t features = std::min(kFeatures, width - first_feature);
  const int32_t panels = (width - first_feature + kPanelRows - 1) / kPanelRows;
  double* gram = p.gram + sequence * width * width;
  double* total = p.total + sequence * width + first_feature;
  Block block(panels);
  for (int32_t first = 0; first < rows; first += kBlockKeys) {
    const int32_t count = std::min(kBlockKeys, rows - first);
    load_block(kernels, p, sequence, first, count, first_feature, block);
    for (int32_t f = 0; f < features; ++f) {
      float sum = 0.0f;
      for (int32_t i = 0; i < count; ++i) sum += block.own.data()[f * kBlockKeys + i];
      total[f] += sum;
    }
    for (int32_t panel = 0; panel < panels; ++panel) {
      kernels.scores(block.later.data() + int64_t{panel} * kBlockKeys * kPanelRows,
                     block.own.data(), kFeatures, count, block.products.data());
      const int32_t column = first_feature + panel * kPanelRows;
      const int32_t columns = std::min(kPanelRows, width - column);
      for (int32_t f = 0; f < features; ++f) {
        double* row = gram + int64_t{first_feature + f} * width + column;
        for (int32_t c = 0; c < columns; ++c) row[c] += block.products.data()[f * kPanelRows + c];
      }
    }
  }
  // The lower triangle: columns of this item, which no other item writes.
  for (int64_t row = first_feature + features; row < width; ++row) {
    for (int64_t f = first_feature; f < first_feature + features; ++f) {
      gram[row * width + f] = gram[f * width + row];
    }
  }
}

}  // namespace

Status shadow_gram(const ShadowGram& p, const ParallelFor& parallel_for) {
  const Status status = check({p.batch, p.kv_heads, p.kv_heads, 1, 1, p.head_dim}, p.dtype);
  if (!status.ok()) return status;
  const Kernels& kernels = select_kernels();
  const int32_t width = p.kv_heads * p.head_dim;
  const int32_t blocks = (width + kFeatures - 1) / kFeatures;
  struct NoScratch {};
  for_each_item<NoScratch>(parallel_for, int64_t{p.batch} * blocks, [&](int64_t i, NoScratch&) {
    // The first features have the most others after them.
    const int64_t sequence = i % p.batch, block = i / p.batch;
    const int32_t rows = p.lens.at(sequence, p.rows);
    add_item(kernels, p, sequence, static_cast<int32_t>(block) * kFeatures, rows);
    if (block == 0) p.count[sequence] += rows;
  });
  return {};
}

}  // namespace sparseattn::cpu
