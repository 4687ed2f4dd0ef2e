// The blocks of a row that reach a share of its softmax weights; see index/mass.h.
#pragma once

#include <cstdint>

#include "index/mass.h"
#include "index/sm80/select.cuh"
#include "index/sm80/weighted_select.cuh"

namespace sparseattn::index_sm80 {

template <class Team>
struct RowCutScratch {
  CutScratch<Team, 8, 1> cut;
  float tops[Team::kWarps];
};

/// The score with that key, up to the sign of zero.
__device__ __forceinline__ float score_of_key(uint32_t key) {
  return __uint_as_float(key >> 31 != 0 ? key & 0x7fffffffu : ~key);
}

/// Tightens `limit`, which selects the top_k of a row's keys (order_key of its scores, the forced
/// block's kForcedKey), to the fewest of them that reach the share. `scale` carries log2(e).
template <class Team>
__device__ __forceinline__ Threshold cut_to_share(const float* scores, int32_t n, int32_t forced,
                                                  const Threshold& limit, float scale,
                                                  int32_t share, RowCutScratch<Team>& scratch) {
  const int rank = Team::rank();
  float top = index::clean_score(scores[forced]);
  for (int i = rank; i < n; i += Team::kThreads) top = fmaxf(top, index::clean_score(scores[i]));
  float row_top;
  cuda::team_scan<Team>(top, top, cuda::Max{}, scratch.tops, row_top);
  unsigned long long sum = 0, total;
  for (int i = rank; i < n; i += Team::kThreads) {
    sum += index::fixed_weight(scores[i], row_top, scale);
  }
  cuda::team_scan<Team>(sum, 0ull, cuda::Add{}, scratch.cut.scan, total);

  const auto entry_at = [=](int32_t i) -> WeightedEntry {
    const uint32_t key = i == forced ? kForcedKey : order_key(scores[i]);
    const bool is_above = key > limit.key;  // the others that `limit` selects are added below
    return {key, 0, is_above ? index::fixed_weight(scores[i], row_top, scale) : 0};
  };
  const auto is_enough = [=](uint64_t kept) { return index::share_reached(kept, total, share); };
  const auto reached = [=](const uint64_t (&kept)[1]) { return is_enough(kept[0]); };
  const Cut<1> cut = find_cut<Team>(n, entry_at, reached, scratch.cut);
  const uint32_t key = cut.found ? cut.key : limit.key;
  if (key == kForcedKey || key == 0) return {key, cut.found ? 1 : limit.ties};
  const uint64_t weight = index::fixed_weight(score_of_key(key), row_top, scale);
  const int32_t ties = cut.found ? static_cast<int32_t>(cut.equal[0] / weight) : limit.ties;
  return {key, least(ties, [=](int32_t t) { return is_enough(cut.above[0] + t * weight); })};
}

}  // namespace sparseattn::index_sm80
