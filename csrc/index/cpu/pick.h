// Picks the largest of a list of scores.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace sparseattn::cpu {

/// Rank of a candidate that goes before all others.
constexpr float kForced = std::numeric_limits<float>::infinity();

/// A score as a rank: below kForced, and NaN below everything, so that ranks are totally ordered.
inline float rank_of(float score) {
  constexpr float kLargest = std::numeric_limits<float>::max();
  return score != score ? -kForced : std::min(score, kLargest);
}

/// The `count` indexes (or all `n`) of the largest ranks, ascending; equal ranks go by index.
inline void pick_largest(const float* ranks, int32_t n, int32_t count,
                         std::vector<int32_t>* picked) {
  picked->resize(n);
  for (int32_t i = 0; i < n; ++i) (*picked)[i] = i;
  const int32_t kept = std::max(0, std::min(count, n));
  if (kept < n) {
    std::nth_element(picked->begin(), picked->begin() + kept, picked->end(),
                     [ranks](int32_t a, int32_t b) {
                       return ranks[a] != ranks[b] ? ranks[a] > ranks[b] : a < b;
                     });
    picked->resize(kept);
  }
  std::sort(picked->begin(), picked->end());
}

}  // namespace sparseattn::cpu
