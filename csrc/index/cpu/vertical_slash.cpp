// Estimates the columns and offsets that carry a head's attention mass.
//
// Two passes over the keys, a chunk at a time: the first finds each row's softmax maximum and sum,
// the second sums the probabilities per column and per offset. One head is one work item, so every
// sum has a fixed order. Memory per thread: O(kv_len) masses.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/panel.h"
#include "common/cpu/work.h"
#include "index/cpu/pick.h"
#include "index/cpu/share.h"
#include "sparseattn/cpu.h"

namespace sparseattn::cpu {
namespace {

struct Scratch {
  FloatBuffer queries{kTileRows * kMaxHeadDim};
  FloatBuffer keys{kChunkKeys * kMaxHeadDim};
  FloatBuffer scores{kChunkKeys * kPanelRows};
  PanelState state[kPanels];
  alignas(64) float factor[kPanels][kPanelRows];  // 1 / sum; 0 for rows that do not exist
  std::vector<float> columns;
  std::vector<float> offsets;  // offset o is at o + kOffsetBase: padding rows may reach below 0
  std::vector<int32_t> picked;
  std::vector<int32_t> picked_offsets;
  ShareScratch share;
};
constexpr int64_t kOffsetBase = kTileRows + kChunkKeys;

struct Head {
  Rows q;  // the rows used
  Rows k;
  int32_t rows;
};

/// What a pass leaves out besides later keys: columns [0, sink), offsets [0, local).
struct Hidden {
  int32_t sink;
  int32_t local;
};

/// Calls body(panel, first key, padded count) with the masked scores of every chunk of keys.
template <class Body>
void for_each_chunk(const Kernels& kernels, const Shape& shape, const Head& head,
                    const Hidden& hidden, Scratch& s, const Body& body) {
  // Key k is visible from row k - first_position on.
  const int64_t first_position = int64_t{shape.kv_len} - head.rows - hidden.local;
  int32_t key[kChunkKeys];
  int32_t first[kChunkKeys];
  int32_t last[kChunkKeys];
  for (int64_t begin = 0; begin < shape.kv_len; begin += kChunkKeys) {
    const int32_t count = static_cast<int32_t>(std::min<int64_t>(kChunkKeys, shape.kv_len - begin));
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    for (int32_t i = 0; i < padded; ++i) {
      key[i] = static_cast<int32_t>(begin) + i;
      first[i] = static_cast<int32_t>(
          std::min<int64_t>(kTileRows, std::max<int64_t>(0, begin + i - first_position)));
      last[i] = i < count && begin + i >= hidden.sink ? kTileRows : 0;
    }
    kernels.pack_keys(head.k, key, count, shape.head_dim, s.keys.data());
    for (int32_t panel = 0; panel * kPanelRows < head.rows; ++panel) {
      const int32_t row = panel * kPanelRows;
      kernels.scores(s.queries.data() + row * shape.head_dim, s.keys.data(), padded, shape.head_dim,
                     s.scores.data());
      if (begin + padded > first_position || begin < hidden.sink) {
        kernels.mask(first, last, padded, row, s.scores.data());
      }
      body(panel, begin, padded);
    }
  }
}

/// Fills s.columns and s.offsets with the masses of one head, less what is hidden.
void sum_masses(const Kernels& kernels, const Shape& shape, float scale, const Head& head,
                const Hidden& hidden, Scratch& s) {
  kernels.pack_queries(head.q, head.rows, shape.head_dim, scale * kLog2e, s.queries.data());
  for (PanelState& state : s.state) start(&state);
  for_each_chunk(kernels, shape, head, {0, 0}, s, [&](int32_t panel, int64_t, int32_t padded) {
    kernels.softmax(s.scores.data(), padded, &s.state[panel]);
  });
  for (int32_t r = 0; r < kTileRows; ++r) {
    const float sum = s.state[r / kPanelRows].sum[r % kPanelRows];
    s.factor[r / kPanelRows][r % kPanelRows] = r < head.rows ? 1.0f / sum : 0.0f;
  }
  s.columns.assign(shape.kv_len + kKeyGroup, 0.0f);
  s.offsets.assign(shape.kv_len + kOffsetBase + kTileRows, 0.0f);
  const int64_t first_position = int64_t{shape.kv_len} - head.rows;
  for_each_chunk(
      kernels, shape, head, hidden, s, [&](int32_t panel, int64_t begin, int32_t padded) {
        kernels.probabilities(s.scores.data(), padded, s.state[panel].max, s.factor[panel]);
        const int64_t offset = first_position + panel * kPanelRows - begin;
        kernels.add_mass(s.scores.data(), padded, s.columns.data() + begin,
                         s.offsets.data() + kOffsetBase + offset);
      });
}

/// Writes a list ascending, then -1 to `length`.
void write_list(std::vector<int32_t>* list, int32_t length, int32_t* out) {
  std::sort(list->begin(), list->end());
  std::fill(std::copy(list->begin(), list->end(), out), out + length, -1);
}

/// Writes the `count` largest of `masses` (the first `forced` before all), ascending, then -1.
void select(float* masses, int32_t n, int32_t forced, int32_t count, int32_t length, int32_t* out,
            std::vector<int32_t>* picked) {
  for (int32_t i = 0; i < n; ++i) masses[i] = i < forced ? kForced : rank_of(masses[i]);
  pick_largest(masses, n, std::min(count, length), picked);
  std::fill(std::copy(picked->begin(), picked->end(), out), out + length, -1);
}

}  // namespace

Status estimate_vertical_slash(const VerticalSlashEstimate& p, const ParallelFor& parallel_for) {
  const Shape& shape = p.shape;
  Status status = check(shape, p.dtype);
  if (status.ok()) status = check_head_ids(p.head_ids, p.heads, shape.q_heads);
  if (!status.ok()) return status;
  if (p.last_q < 1 || p.last_q > kTileRows) return {1, "last_q: expected 1 <= last_q <= 64"};
  if (p.max_columns < 0 || p.max_offsets < 0) {
    return {1, "max_columns, max_offsets: expected >= 0"};
  }
  const Kernels& kernels = select_kernels();
  const int64_t items = int64_t{shape.batch} * p.heads;
  for_each_item<Scratch>(parallel_for, items, [&](int64_t item, Scratch& s) {
    const int64_t sequence = item / p.heads;
    const Shape own = sequence_shape(shape, p.lengths, sequence);
    const int32_t ordinal = static_cast<int32_t>(item % p.heads);
    const int32_t q_head = p.head_ids == nullptr ? ordinal : p.head_ids[ordinal];
    const int32_t rows = std::min(p.last_q, own.q_len);
    const Head head{
        rows_of_head(p.q, p.dtype, sequence, q_head, own.q_len - rows),
        rows_of_head(p.k, p.dtype, sequence, q_head / shape.group(), 0),
        rows,
    };
    int32_t* columns = p.columns + item * p.max_columns;
    int32_t* offsets = p.offsets + item * p.max_offsets;
    const int32_t num_columns = p.num_columns == nullptr ? p.max_columns : p.num_columns[ordinal];
    const int32_t num_offsets = p.num_offsets == nullptr ? p.max_offsets : p.num_offsets[ordinal];
    const int32_t share = p.shares == nullptr ? p.share : p.shares[ordinal];
    if (share > 0) {
      ShareLimits limits{own.kv_len, rows, 0, 0, 0, 0, share};
      limits.columns = std::min({num_columns, p.max_columns, own.kv_len});
      limits.offsets = std::min({num_offsets, p.max_offsets, own.kv_len});
      limits.sink = std::min(p.sink, limits.columns);
      limits.local = std::min(p.local, limits.offsets);
      sum_masses(kernels, own, p.scale, head, {limits.sink, limits.local}, s);
      select_by_share(s.columns.data(), s.offsets.data() + kOffsetBase, limits, &s.share, &s.picked,
                      &s.picked_offsets);
      write_list(&s.picked, p.max_columns, columns);
      write_list(&s.picked_offsets, p.max_offsets, offsets);
      return;
    }
    sum_masses(kernels, own, p.scale, head, {0, 0}, s);
    select(s.columns.data(), own.kv_len, p.sink, num_columns, p.max_columns, columns, &s.picked);
    select(s.offsets.data() + kOffsetBase, own.kv_len, p.local, num_offsets, p.max_offsets, offsets,
           &s.picked);
  });
  return {};
}

}  // namespace sparseattn::cpu
