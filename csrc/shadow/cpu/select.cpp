// Chunks by landmark score.
//
// One work item is one key/value head. Its query rows (query heads of the group times q_len) are
// taken in tiles of 64 against all landmarks, twice: for the softmax of every row, then for the
// largest log-probability of every chunk.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "index/cpu/pick.h"
#include "shadow/cpu/group.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

struct Scratch {
  FloatBuffer queries{kTileRows * kMaxHeadDim};
  FloatBuffer landmarks{kChunkKeys * kMaxHeadDim};
  FloatBuffer scores{kChunkKeys * kPanelRows};
  std::vector<float> ranks;
  std::vector<int32_t> candidates;
  std::vector<int32_t> picked;
};

/// Calls body(first candidate, count, padded) with s.scores of one panel against all candidates.
template <class Body>
void for_each_block(const Kernels& kernels, const Rows& landmarks, int32_t dim, int32_t panel,
                    Scratch& s, const Body& body) {
  const auto candidates = static_cast<int32_t>(s.candidates.size());
  int32_t first[kChunkKeys], last[kChunkKeys];
  for (int32_t begin = 0; begin < candidates; begin += kChunkKeys) {
    const int32_t count = std::min(kChunkKeys, candidates - begin);
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    kernels.pack_keys(landmarks, s.candidates.data() + begin, count, dim, s.landmarks.data());
    kernels.scores(s.queries.data() + panel * kPanelRows * dim, s.landmarks.data(), padded, dim,
                   s.scores.data());
    if (padded != count) {
      for (int32_t i = 0; i < padded; ++i) {
        first[i] = 0;
        last[i] = i < count ? kTileRows : 0;
      }
      kernels.mask(first, last, padded, 0, s.scores.data());
    }
    body(begin, count, padded);
  }
}

/// s.ranks = max(s.ranks, log-probabilities of `rows` rows of a panel).
void rank_panel(const Kernels& kernels, const Rows& landmarks, int32_t dim, int32_t panel,
                int32_t rows, Scratch& s) {
  PanelState state;
  start(&state);
  for_each_block(kernels, landmarks, dim, panel, s, [&](int32_t, int32_t, int32_t padded) {
    kernels.softmax(s.scores.data(), padded, &state);
  });
  float lse[kPanelRows];
  for (int32_t r = 0; r < rows; ++r) lse[r] = state.max[r] + std::log2(state.sum[r]);
  for_each_block(kernels, landmarks, dim, panel, s, [&](int32_t begin, int32_t count, int32_t) {
    for (int32_t i = 0; i < count; ++i) {
      float rank = s.ranks[begin + i];
      for (int32_t r = 0; r < rows; ++r) {
        rank = std::max(rank, rank_of(s.scores.data()[i * kPanelRows + r] - lse[r]));
      }
      s.ranks[begin + i] = rank;
    }
  });
}

void select_head(const Kernels& kernels, const ShadowSelect& p, int64_t sequence, int64_t head,
                 Scratch& s) {
  const int64_t slot = sequence * p.kv_heads + head;
  const uint8_t* excluded = p.excluded == nullptr ? nullptr : p.excluded + slot * p.chunks;
  const int32_t chunks = p.num_chunks.at(sequence, p.chunks);
  s.candidates.clear();
  for (int32_t j = 0; j < chunks; ++j) {
    if (excluded == nullptr || excluded[j] == 0) s.candidates.push_back(j);
  }
  const QueryGroup group{p.q, p.dtype, p.q_heads / p.kv_heads, p.head_dim};
  const int32_t rows = p.q_lens.at(sequence, p.q_len) * group.heads;
  s.ranks.assign(s.candidates.size(), -kForced);
  const Rows landmarks = rows_of_head(p.landmarks, p.dtype, sequence, head, 0);
  for (int32_t tile = 0; tile < rows; tile += kTileRows) {
    const int32_t count = std::min(kTileRows, rows - tile);
    group.pack(kernels, sequence, head, tile, count, p.scale, s.queries.data());
    for (int32_t row = 0; row < count; row += kPanelRows) {
      rank_panel(kernels, landmarks, p.head_dim, row / kPanelRows,
                 std::min(kPanelRows, count - row), s);
    }
  }
  // Candidates ascend, so the smaller place is the smaller chunk.
  const int32_t asked = rows > 0 ? p.top_k : 0;
  pick_largest(s.ranks.data(), static_cast<int32_t>(s.candidates.size()), asked, &s.picked);
  int32_t* out = p.selected + slot * p.top_k;
  for (const int32_t place : s.picked) *out++ = s.candidates[place];
  std::fill(out, p.selected + (slot + 1) * p.top_k, -1);
}

}  // namespace

Status shadow_select(const ShadowSelect& p, const ParallelFor& parallel_for) {
  const Status status = check({p.batch, p.q_heads, p.kv_heads, 1, 1, p.head_dim}, p.dtype);
  if (!status.ok()) return status;
  const Kernels& kernels = select_kernels();
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  for_each_item<Scratch>(parallel_for, heads, [&](int64_t i, Scratch& scratch) {
    select_head(kernels, p, i / p.kv_heads, i % p.kv_heads, scratch);
  });
  return {};
}

}  // namespace sparseattn::cpu
