// Exact sparse attention on the CPU, in tiles of 64 query rows.
//
// One work item is one query tile of one head. Its keys are gathered kChunkKeys at a time into
// packed scratch (fp32, whatever the input type), then each panel of query rows takes the chunk
// into its running softmax. Only keys of the tile's runs are ever loaded, so what lies outside the
// mask of all rows of a tile cannot reach a sum.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention/cpu/key_list.h"
#include "common/cpu/kernels.h"
#include "common/cpu/panel.h"
#include "common/cpu/work.h"
#include "sparseattn/cpu.h"

namespace sparseattn::cpu {
namespace {

struct Scratch {
  FloatBuffer queries{kTileRows * kMaxHeadDim};
  FloatBuffer keys{kChunkKeys * kMaxHeadDim};
  FloatBuffer values{kPackedValues};
  FloatBuffer scores{kChunkKeys * kPanelRows};
  FloatBuffer out{kTileRows * kMaxHeadDim};
  PanelState state[kPanels];
  std::vector<Run> runs;
  int32_t key[kChunkKeys];    // positions of the keys of the chunk
  int32_t first[kChunkKeys];  // rows [first, last) of the tile see the key
  int32_t last[kChunkKeys];
};

/// Hands out the keys of a list of runs, a chunk at a time.
class KeyWalker {
 public:
  explicit KeyWalker(const std::vector<Run>& runs) : runs_(runs) {
    if (!runs.empty()) at_ = runs[0].begin;
  }
  int32_t next(int32_t* keys) {
    int32_t count = 0;
    while (count < kChunkKeys && run_ < runs_.size()) {
      keys[count++] = static_cast<int32_t>(at_++);
      if (at_ == runs_[run_].end && ++run_ < runs_.size()) at_ = runs_[run_].begin;
    }
    return count;
  }

 private:
  const std::vector<Run>& runs_;
  size_t run_ = 0;
  int64_t at_ = 0;
};

/// Which rows see each key of the chunk; padding keys are seen by none.
struct ChunkMask {
  bool needed;        // some key is hidden from some row
  int32_t first_row;  // no row before this one sees any key of the chunk
};

ChunkMask fill_mask(const KeyList& list, int64_t first_position, int32_t count, int32_t padded,
                    Scratch& s) {
  ChunkMask mask{padded != count, kTileRows};
  for (int32_t i = 0; i < count; ++i) {
    const Run rows = list.rows_of(s.key[i], first_position);
    s.first[i] = static_cast<int32_t>(rows.begin);
    s.last[i] = static_cast<int32_t>(rows.end);
    mask.needed |= rows.begin > 0 || rows.end < kTileRows;
    if (s.first[i] < mask.first_row) mask.first_row = s.first[i];
  }
  for (int32_t i = count; i < padded; ++i) {
    s.first[i] = kTileRows;
    s.last[i] = 0;
  }
  return mask;
}

void start_panels(int32_t head_dim, Scratch& s) {
  for (PanelState& state : s.state) start(&state);
  for (int32_t i = 0; i < kTileRows * head_dim; ++i) s.out.data()[i] = 0.0f;
}

void finish_panel(const Kernels& kernels, int32_t panel, int32_t rows, int32_t head_dim,
                  const Rows& out, float* lse, Scratch& s) {
  const PanelState& state = s.state[panel];
  float factor[kPanelRows];
  for (int32_t r = 0; r < rows; ++r) {
    factor[r] = out_factor(state, r);
    if (lse != nullptr) lse[r] = lse_of(state, r);
  }
  kernels.store(s.out.data() + panel * head_dim * kPanelRows, factor, rows, head_dim, out);
}

/// Rows past the end of a sequence.
void clear_rows(const Rows& out, int32_t count, int32_t head_dim, float* lse) {
  const size_t element = out.dtype == DType::kFloat32 ? 4 : 2;
  for (int32_t r = 0; r < count; ++r) {
    std::memset(static_cast<char*>(out.data) + r * out.row_stride * element, 0, head_dim * element);
    if (lse != nullptr) lse[r] = -INFINITY;
  }
}

void attend_tile(const AttentionParams& p, const Kernels& kernels, const KeyList& list,
                 int64_t sequence, int32_t head, int32_t tile, Scratch& s) {
  const Shape shape = sequence_shape(p.shape, p.lengths, sequence);
  const int32_t dim = shape.head_dim;
  const int64_t row = int64_t{kTileRows} * tile;
  const auto rows_before = [row](int32_t length) {
    return static_cast<int32_t>(std::clamp<int64_t>(length - row, 0, kTileRows));
  };
  const int32_t rows = rows_before(shape.q_len), padded_rows = rows_before(p.shape.q_len);
  const int64_t first_position = row + shape.kv_len - shape.q_len;
  const auto rows_at = [&](const View& view, int64_t view_head, int64_t offset) {
    return rows_of_head(view, p.dtype, sequence, view_head, offset);
  };
  float* lse = nullptr;
  if (p.lse != nullptr) lse = p.lse + (sequence * shape.q_heads + head) * p.shape.q_len + row;
  clear_rows(rows_at(p.out, head, row + rows), padded_rows - rows, dim,
             lse == nullptr ? nullptr : lse + rows);
  if (rows == 0) return;
  const Rows k = rows_at(p.k, head / shape.group(), 0);
  const Rows v = rows_at(p.v, head / shape.group(), 0);

  kernels.pack_queries(rows_at(p.q, head, row), rows, dim, p.scale * kLog2e, s.queries.data());
  start_panels(dim, s);
  list.tile_runs(tile, &s.runs);
  KeyWalker walker(s.runs);
  while (const int32_t count = walker.next(s.key)) {
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    kernels.pack_keys(k, s.key, count, dim, s.keys.data());
    kernels.pack_values(v, s.key, count, dim, s.values.data());
    const ChunkMask mask = fill_mask(list, first_position, count, padded, s);
    for (int32_t panel = 0; panel < kPanels; ++panel) {
      const int32_t panel_row = panel * kPanelRows;
      if (panel_row >= rows || mask.first_row >= panel_row + kPanelRows) continue;
      float* scores = s.scores.data();
      kernels.scores(s.queries.data() + panel_row * dim, s.keys.data(), padded, dim, scores);
      if (mask.needed) kernels.mask(s.first, s.last, padded, panel_row, scores);
      kernels.softmax(scores, padded, &s.state[panel]);
      kernels.accumulate(scores, s.values.data(), padded, dim, s.state[panel].decay,
                         s.out.data() + panel_row * dim);
    }
  }
  for (int32_t r = 0; r < rows; r += kPanelRows) {
    finish_panel(kernels, r / kPanelRows, std::min(kPanelRows, rows - r), dim,
                 rows_at(p.out, head, row + r), lse == nullptr ? nullptr : lse + r, s);
  }
}

Status check_heads(const AttentionParams& p) {
  for (int64_t i = 0; i < int64_t{p.shape.batch} * p.shape.q_heads; ++i) {
    const HeadIndex& head = p.heads[i];
    if (head.kind == PatternKind::kAShape && (head.sink < 0 || head.window < 0)) {
      return {1, "a_shape: expected sink >= 0 and window >= 0"};
    }
    if (head.kind == PatternKind::kBlockSparse &&
        (head.block_q < kTileRows || head.block_q % kTileRows != 0 || head.block_kv < 1)) {
      return {1, "block_sparse: expected block_q a multiple of 64 and block_kv >= 1"};
    }
  }
  return {};
}

}  // namespace

Status sparse_attention(const AttentionParams& params, const ParallelFor& parallel_for) {
  const Shape& shape = params.shape;
  Status status = check(shape, params.dtype);
  if (status.ok()) status = check_heads(params);
  if (!status.ok()) return status;
  const int64_t heads = int64_t{shape.batch} * shape.q_heads;
  if (heads == 0) return {};
  const Kernels& kernels = select_kernels();

  struct NoScratch {};
  std::vector<KeyList> lists(heads);
  for_each_item<NoScratch>(parallel_for, heads, [&](int64_t i, NoScratch&) {
    lists[i] = KeyList(params.heads[i], sequence_shape(shape, params.lengths, i / shape.q_heads));
  });
  // Heads in order and tiles from the last, longest one down: threads share a head's keys in cache
  // and the call ends on short items.
  const int32_t tiles = shape.q_tiles();
  for_each_item<Scratch>(parallel_for, heads * tiles, [&](int64_t i, Scratch& scratch) {
    const int64_t head = i / tiles;
    const int32_t tile = tiles - 1 - static_cast<int32_t>(i % tiles);
    attend_tile(params, kernels, lists[head], head / shape.q_heads,
                static_cast<int32_t>(head % shape.q_heads), tile, scratch);
  });
  return {};
}

}  // namespace sparseattn::cpu
