// Selections by share of attention mass; the rules are in index/mass.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "index/cpu/pick.h"
#include "index/mass.h"

namespace sparseattn::cpu {

/// A column (first) or a run of offsets that may be kept.
struct Candidate {
  float rank;
  bool is_run;
  int32_t index;
  uint64_t mass;
  bool operator<(const Candidate& other) const {
    if (rank != other.rank) return rank > other.rank;
    if (is_run != other.is_run) return other.is_run;
    return index < other.index;
  }
};

struct ShareScratch {
  std::vector<float> runs;
  std::vector<Candidate> candidates;
  std::vector<int32_t> picked;
};

/// What a head's selection may use.
struct ShareLimits {
  int32_t kv_len;
  int32_t rows;     // whose probabilities are counted
  int32_t sink;     // forced columns, at most num_columns
  int32_t local;    // forced offsets, at most num_offsets
  int32_t columns;  // at most kv_len, as is the next
  int32_t offsets;
  int32_t share;
};

/// Appends the `count` largest of `masses` that are not 0 to the candidates and adds up all masses.
inline uint64_t add_candidates(const float* masses, int32_t n, int32_t count, bool is_run,
                               float price, ShareScratch* s) {
  uint64_t total = 0;
  for (int32_t i = 0; i < n; ++i) total += index::fixed_mass(masses[i]);
  pick_largest(masses, n, count, &s->picked);
  for (int32_t i : s->picked) {
    const uint64_t mass = index::fixed_mass(masses[i]);
    if (mass != 0) s->candidates.push_back({masses[i] * price, is_run, i, mass});
  }
  return total;
}

/// Lists the columns and offsets kept, in no order. The masses [kv_len] leave out what the forced
/// ones hold; they are cleaned in place.
inline void select_by_share(float* column_mass, float* offset_mass, const ShareLimits& limits,
                            ShareScratch* s, std::vector<int32_t>* columns,
                            std::vector<int32_t>* offsets) {
  const int32_t n = limits.kv_len;
  const int32_t runs = (n + index::kRunOffsets - 1) / index::kRunOffsets;
  const auto end_of = [n](int32_t run) {
    return static_cast<int32_t>(std::min<int64_t>(n, (int64_t{run} + 1) * index::kRunOffsets));
  };
  for (int32_t i = 0; i < n; ++i) column_mass[i] = index::clean_mass(column_mass[i]);
  s->runs.resize(runs);
  for (int32_t j = 0; j < runs; ++j) {
    uint64_t sum = 0;
    for (int32_t o = j * index::kRunOffsets; o < end_of(j); ++o) {
      sum += index::fixed_mass(offset_mass[o]);
    }
    s->runs[j] = index::clean_mass(index::mass_of_fixed(sum));
  }
  s->candidates.clear();
  const uint64_t column_total =
      add_candidates(column_mass, n, limits.columns - limits.sink, false, index::kColumnsPerRun, s);
  const uint64_t run_total = add_candidates(
      s->runs.data(), runs, (limits.offsets - limits.local) / index::kRunOffsets, true, 1.f, s);
  std::sort(s->candidates.begin(), s->candidates.end());

  columns->resize(limits.sink);
  for (int32_t i = 0; i < limits.sink; ++i) (*columns)[i] = i;
  offsets->resize(limits.local);
  for (int32_t i = 0; i < limits.local; ++i) (*offsets)[i] = i;
  const index::Coverage coverage(column_total, run_total, limits.rows, limits.share);
  uint64_t kept_columns = 0, kept_runs = 0;
  for (const Candidate& candidate : s->candidates) {
    if (coverage.reached(kept_columns, kept_runs)) break;
    if (candidate.is_run) {
      kept_runs += candidate.mass;
      const int32_t first = std::max(candidate.index * index::kRunOffsets, limits.local);
      for (int32_t o = first; o < end_of(candidate.index); ++o) offsets->push_back(o);
    } else {
      kept_columns += candidate.mass;
      columns->push_back(candidate.index);
    }
  }
}

/// Drops the blocks of a row that its share does not need. `picked` are the blocks that top_k
/// allows, `forced` among them; `scores` [n] of all candidates. `scale` carries log2(e).
inline void cut_to_share(const float* scores, int32_t n, int32_t forced, float scale, int32_t share,
                         std::vector<int32_t>* picked) {
  float top = index::clean_score(scores[0]);
  for (int32_t i = 1; i < n; ++i) top = std::max(top, index::clean_score(scores[i]));
  uint64_t total = 0;
  for (int32_t i = 0; i < n; ++i) total += index::fixed_weight(scores[i], top, scale);
  std::sort(picked->begin(), picked->end(), [scores, forced](int32_t a, int32_t b) {
    if ((a == forced) != (b == forced)) return a == forced;
    return scores[a] != scores[b] ? scores[a] > scores[b] : a < b;
  });
  uint64_t kept = 0;
  size_t count = 0;
  while (count < picked->size() && (count == 0 || !index::share_reached(kept, total, share))) {
    kept += index::fixed_weight(scores[(*picked)[count++]], top, scale);
  }
  picked->resize(count);
}

}  // namespace sparseattn::cpu
