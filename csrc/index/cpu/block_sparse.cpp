// Estimates the key blocks of each query block: mean queries against mean keys, the best kept. For
// antidiagonal scores a block has one mean for each residue of its rows, and residues that add up
// to stride - 1 meet.
//
// Mean keys are made once per key/value head; then one work item is 64 query blocks of one head,
// whose mean queries are treated as the 64 rows of a query tile.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "index/cpu/pick.h"
#include "index/cpu/share.h"
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
  Rows mean_keys;  // residue r of block j at row j * residues + r
  int64_t begin;
  int32_t count;
  int32_t residues;  // stride, or 1: plain means
};

/// Rows of block `block` of `size` that exist.
int32_t rows_of_block(int64_t block, int32_t size, int32_t length) {
  return static_cast<int32_t>(std::min<int64_t>(size, length - block * size));
}

/// Mean of the rows of a block of `count` rows from `first` on that are `residue` modulo
/// `residues`; zeros if there is none.
void mean_of_residue(const Kernels& kernels, const Rows& rows, int64_t first, int32_t count,
                     int32_t residue, int32_t residues, int32_t dim, float* mean) {
  if (residue >= count) {
    std::fill_n(mean, dim, 0.0f);
    return;
  }
  const int64_t element = rows.dtype == DType::kFloat32 ? 4 : 2;
  const Rows from{static_cast<char*>(rows.data) + element * (first + residue) * rows.row_stride,
                  rows.row_stride * residues, rows.dtype};
  kernels.mean(from, 0, (count - residue + residues - 1) / residues, dim, mean);
}

/// s.ranks [count][kv_blocks] += mean query . mean key of one residue of the queries.
void add_scores(const Kernels& kernels, const BlockSparseEstimate& p, const Item& item,
                int32_t residue, int32_t kv_blocks, Scratch& s) {
  const int32_t dim = item.shape.head_dim;
  for (int32_t i = 0; i < item.count; ++i) {
    const int64_t q_block = item.begin + i;
    mean_of_residue(kernels, item.q, q_block * p.block,
                    rows_of_block(q_block, p.block, item.shape.q_len), residue, item.residues, dim,
                    s.means.data() + i * dim);
  }
  const Rows means{s.means.data(), dim, DType::kFloat32};
  kernels.pack_queries(means, item.count, dim, 1.0f, s.queries.data());
  int32_t block[kChunkKeys];
  const int32_t key_residue = item.residues - 1 - residue;
  for (int32_t begin = 0; begin < kv_blocks; begin += kChunkKeys) {
    const int32_t count = std::min(kChunkKeys, kv_blocks - begin);
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    for (int32_t j = 0; j < count; ++j) {
      block[j] = (begin + j) * item.residues + key_residue;
    }
    kernels.pack_keys(item.mean_keys, block, count, dim, s.keys.data());
    for (int32_t row = 0; row < item.count; row += kPanelRows) {
      const float* scores = s.scores.data();
      kernels.scores(s.queries.data() + row * dim, s.keys.data(), padded, dim, s.scores.data());
      for (int32_t r = 0; r < std::min(kPanelRows, item.count - row); ++r) {
        float* out = s.ranks.data() + int64_t{row + r} * kv_blocks + begin;
        for (int32_t j = 0; j < count; ++j) out[j] += scores[j * kPanelRows + r];
      }
    }
  }
}

/// s.ranks [count][kv_blocks] = the scores of an item's blocks.
void score_blocks(const Kernels& kernels, const BlockSparseEstimate& p, const Item& item,
                  int32_t kv_blocks, Scratch& s) {
  s.ranks.assign(int64_t{kTileRows} * kv_blocks, 0.0f);
  for (int32_t r = 0; r < item.residues; ++r) add_scores(kernels, p, item, r, kv_blocks, s);
  for (int32_t i = 0; i < item.count; ++i) {
    const int32_t q_rows = rows_of_block(item.begin + i, p.block, item.shape.q_len);
    float* out = s.ranks.data() + int64_t{i} * kv_blocks;
    for (int32_t j = 0; j < kv_blocks; ++j) {
      const int32_t pairs = std::min(item.residues, q_rows) - item.residues +
                            std::min(item.residues, rows_of_block(j, p.block, item.shape.kv_len));
      out[j] = pairs > 0 ? rank_of(out[j] / static_cast<float>(pairs)) : 0.0f;
    }
  }
}

/// Marks the best blocks of one query block in `mask`, which is all zeros.
void select(const Shape& shape, int32_t block, int64_t q_block, int32_t top_k, int32_t share,
            float* ranks, uint8_t* mask, std::vector<int32_t>* picked) {
  const int64_t history = int64_t{shape.kv_len} - shape.q_len;
  const int64_t first = q_block * block + history;
  const int64_t last = std::min<int64_t>((q_block + 1) * block, shape.q_len) - 1 + history;
  const int32_t forced = static_cast<int32_t>(first / block);
  const int32_t candidates = static_cast<int32_t>(last / block) + 1;
  const float forced_score = ranks[forced];
  ranks[forced] = kForced;
  pick_largest(ranks, candidates, top_k, picked);
  if (share > 0) {
    ranks[forced] = forced_score;
    const float scale = 1.44269504f / std::sqrt(static_cast<float>(shape.head_dim));
    cut_to_share(ranks, candidates, forced, scale, share, picked);
  }
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
  const int32_t residues = std::max(1, p.stride);
  const int64_t head_means = int64_t{kv_blocks} * residues * dim;
  const FloatBuffer mean_keys(static_cast<size_t>(kv_heads * head_means));
  for_each_item<NoScratch>(parallel_for, kv_heads * kv_blocks, [&](int64_t i, NoScratch&) {
    const int64_t head = i / kv_blocks;
    const int64_t block = i % kv_blocks;
    const int32_t kv_len = sequence_shape(shape, p.lengths, head / shape.kv_heads).kv_len;
    const int32_t rows = rows_of_block(block, p.block, kv_len);
    if (rows <= 0) return;
    const Rows k = rows_of_head(p.k, p.dtype, head / shape.kv_heads, head % shape.kv_heads, 0);
    for (int32_t r = 0; r < residues; ++r) {
      mean_of_residue(kernels, k, block * p.block, rows, r, residues, dim,
                      mean_keys.data() + (i * residues + r) * dim);
    }
  });

  const int32_t groups = (q_blocks + kTileRows - 1) / kTileRows;
  const int64_t items = int64_t{shape.batch} * p.heads * groups;
  for_each_item<Scratch>(parallel_for, items, [&](int64_t i, Scratch& s) {
    const int64_t head = i / groups;  // of batch * p.heads
    const int64_t sequence = head / p.heads;
    const int32_t ordinal = static_cast<int32_t>(head % p.heads);
    if (p.strides != nullptr && p.strides[ordinal] != p.stride) return;
    const int32_t q_head = p.head_ids == nullptr ? ordinal : p.head_ids[ordinal];
    const int64_t kv_head = sequence * shape.kv_heads + q_head / shape.group();
    const int64_t begin = i % groups * kTileRows;
    uint8_t* mask = p.block_mask + (head * q_blocks + begin) * kv_blocks;
    std::fill_n(mask, std::min<int64_t>(kTileRows, q_blocks - begin) * kv_blocks, uint8_t{0});

    const Shape own = sequence_shape(shape, p.lengths, sequence);
    const int64_t own_rows = std::min<int64_t>(kTileRows, blocks_of(own.q_len) - begin);
    if (own_rows <= 0) return;
    const int32_t own_columns = blocks_of(own.kv_len);
    const Item item{own,
                    rows_of_head(p.q, p.dtype, sequence, q_head, 0),
                    Rows{mean_keys.data() + kv_head * head_means, dim, DType::kFloat32},
                    begin,
                    static_cast<int32_t>(own_rows),
                    residues};
    score_blocks(kernels, p, item, own_columns, s);
    const int32_t top_k = p.top_k == nullptr ? p.max_top_k : p.top_k[ordinal];
    const int32_t share = p.shares == nullptr ? p.share : p.shares[ordinal];
    for (int32_t r = 0; r < item.count; ++r) {
      select(own, p.block, begin + r, std::min(top_k, p.max_top_k), share,
             s.ranks.data() + int64_t{r} * own_columns, mask + int64_t{r} * kv_blocks, &s.picked);
    }
  });
  return {};
}

}  // namespace sparseattn::cpu
