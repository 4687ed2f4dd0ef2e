// Estimates the key blocks of each query block: mean queries against mean keys, the best kept.
//
// Mean keys are made once per key/value head; then one work item is 64 query blocks of one head,
// whose mean queries are treated as the 64 rows of a query tile.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "index/cpu/pick.h"
#include "sparseattn/cpu.h"

namespace sparseattn::cpu {
namespace {

struct NoScratch {};

struct Scratch {
  FloatBuffer means{kTileRows * kMaxHeadDim};
  FloatBuffer queries{kTileRows * kMaxHeadDim};
  FloatBuffer keys{kChunkKeys * kMaxHeadDim};
  FloatBuffer scores{kChunkKeys * kPanelRows};
  std::vector<float> ranks;  // [kTileRows][kv_blocks]
  std::vector<int32_t> picked;
};

/// Query blocks [begin, begin + count) of one head, all of which have rows.
struct Item {
  Shape shape;  // of the sequence
  Rows q;
  Rows mean_keys;
  int64_t begin;
  int32_t count;
};

/// s.ranks [count][kv_blocks] = mean query . mean key.
void score_blocks(const Kernels& kernels, const BlockSparseEstimate& p, const Item& item,
                  int32_t kv_blocks, Scratch& s) {
  const int32_t dim = item.shape.head_dim;
  for (int32_t i = 0; i < item.count; ++i) {
    const int64_t row = (item.begin + i) * p.block;
    kernels.mean(item.q, row, std::min<int64_t>(row + p.block, item.shape.q_len), dim,
                 s.means.data() + i * dim);
  }
  const Rows means{s.means.data(), dim, DType::kFloat32};
  kernels.pack_queries(means, item.count, dim, 1.0f, s.queries.data());
  s.ranks.resize(int64_t{kTileRows} * kv_blocks);
  int32_t block[kChunkKeys];
  for (int32_t begin = 0; begin < kv_blocks; begin += kChunkKeys) {
    const int32_t count = std::min(kChunkKeys, kv_blocks - begin);
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    for (int32_t j = 0; j < count; ++j) block[j] = begin + j;
    kernels.pack_keys(item.mean_keys, block, count, dim, s.keys.data());
    for (int32_t row = 0; row < item.count; row += kPanelRows) {
      const float* scores = s.scores.data();
      kernels.scores(s.queries.data() + row * dim, s.keys.data(), padded, dim, s.scores.data());
      for (int32_t r = 0; r < std::min(kPanelRows, item.count - row); ++r) {
        float* out = s.ranks.data() + int64_t{row + r} * kv_blocks + begin;
        for (int32_t j = 0; j < count; ++j) out[j] = rank_of(scores[j * kPanelRows + r]);
      }
    }
  }
}

/// Marks the best blocks of one query block in `mask`, which is all zeros.
void select(const Shape& shape, int32_t block, int64_t q_block, int32_t top_k, float* ranks,
            uint8_t* mask, std::vector<int32_t>* picked) {
  const int64_t history = int64_t{shape.kv_len} - shape.q_len;
  const int64_t first = q_block * block + history;
  const int64_t last = std::min<int64_t>((q_block + 1) * block, shape.q_len) - 1 + history;
  ranks[first / block] = kForced;
  pick_largest(ranks, static_cast<int32_t>(last / block) + 1, top_k, picked);
  for (int32_t j : *picked) mask[j] = 1;
}

}  // namespace

Status estimate_block_sparse(const BlockSparseEstimate& p, const ParallelFor& parallel_for) {
  const Shape& shape = p.shape;
  Status status = check(shape, p.dtype);
  if (status.ok()) status = check_head_ids(p.head_ids, p.heads, shape.q_heads);
  if (!status.ok()) return status;
  if (p.block < 1) return {1, "block: expected >= 1"};
  const Kernels& kernels = select_kernels();
  const int32_t dim = shape.head_dim;
  const auto blocks_of = [&p](int32_t length) { return (length + p.block - 1) / p.block; };
  const int32_t q_blocks = blocks_of(shape.q_len), kv_blocks = blocks_of(shape.kv_len);

  const int64_t kv_heads = int64_t{shape.batch} * shape.kv_heads;
  const FloatBuffer mean_keys(static_cast<size_t>(kv_heads * kv_blocks * dim));
  for_each_item<NoScratch>(parallel_for, kv_heads * kv_blocks, [&](int64_t i, NoScratch&) {
    const int64_t head = i / kv_blocks;
    const int64_t row = i % kv_blocks * p.block;
    const int32_t kv_len = sequence_shape(shape, p.lengths, head / shape.kv_heads).kv_len;
    if (row >= kv_len) return;
    const Rows k = rows_of_head(p.k, p.dtype, head / shape.kv_heads, head % shape.kv_heads, 0);
    kernels.mean(k, row, std::min<int64_t>(row + p.block, kv_len), dim, mean_keys.data() + i * dim);
  });

  const int32_t groups = (q_blocks + kTileRows - 1) / kTileRows;
  const int64_t items = int64_t{shape.batch} * p.heads * groups;
  for_each_item<Scratch>(parallel_for, items, [&](int64_t i, Scratch& s) {
    const int64_t head = i / groups;  // of batch * p.heads
    const int64_t sequence = head / p.heads;
    const int32_t ordinal = static_cast<int32_t>(head % p.heads);
    const int32_t q_head = p.head_ids == nullptr ? ordinal : p.head_ids[ordinal];
    const int64_t kv_head = sequence * shape.kv_heads + q_head / shape.group();
    const int64_t begin = i % groups * kTileRows;
    uint8_t* mask = p.block_mask + (head * q_blocks + begin) * kv_blocks;
    std::fill_n(mask, std::min<int64_t>(kTileRows, q_blocks - begin) * kv_blocks, uint8_t{0});

    const Shape own = sequence_shape(shape, p.lengths, sequence);
    const int64_t own_rows = std::min<int64_t>(kTileRows, blocks_of(own.q_len) - begin);
    if (own_rows <= 0) return;
    const int32_t own_columns = blocks_of(own.kv_len);
    const Item item{own, rows_of_head(p.q, p.dtype, sequence, q_head, 0),
                    Rows{mean_keys.data() + kv_head * kv_blocks * dim, dim, DType::kFloat32}, begin,
                    static_cast<int32_t>(own_rows)};
    score_blocks(kernels, p, item, own_columns, s);
    const int32_t top_k = p.top_k == nullptr ? p.max_top_k : p.top_k[ordinal];
    for (int32_t r = 0; r < item.count; ++r) {
      select(own, p.block, begin + r, std::min(top_k, p.max_top_k),
             s.ranks.data() + int64_t{r} * own_columns, mask + int64_t{r} * kv_blocks, &s.picked);
    }
  });
  return {};
}

}  // namespace sparseattn::cpu
