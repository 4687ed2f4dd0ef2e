// The shortest prefix that weighs enough, by radix: find_threshold of select.cuh with weights in
// place of counts.
//
// Entries rank by a 32-bit key, largest first. Weights are integers, summed in shared memory, so
// the result does not depend on timing. Entries may be of kParts parts, whose weights are summed
// apart.
#pragma once

#include <cstdint>

#include "common/cuda/team.cuh"

namespace sparseattn::index_sm80 {

struct WeightedEntry {
  uint32_t key;
  int32_t part;
  uint64_t weight;  // 0: no entry
};

template <class Team, int kDigitBits_, int kParts_>
struct CutScratch {
  static constexpr int kDigitBits = kDigitBits_;
  static constexpr int kParts = kParts_;
  static constexpr int kBins = 1 << kDigitBits;
  unsigned long long bins[kParts][kBins];
  unsigned long long scan[Team::kWarps];
  unsigned long long above[kParts];
  unsigned long long equal[kParts];
  int32_t digit;
};

/// Where the prefix ends: the largest key for which the entries of this key and above are enough.
template <int kParts>
struct Cut {
  bool found;              // false: all entries together are not enough
  uint32_t key;            // 0 if not found
  uint64_t above[kParts];  // weights of the entries above the key; of all if not found
  uint64_t equal[kParts];  // weights of the entries of the key
};

/// The smallest t in [0, count] with holds(t); holds(count) is taken for granted.
template <class Holds>
__device__ __forceinline__ int32_t least(int32_t count, const Holds& holds) {
  int32_t low = 0, high = count;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (holds(middle)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

/// Adds one weight a lane. Lanes often share a bin, and 64-bit additions in shared memory are slow:
/// the lanes that agree with the first one, and then with the first of the others, go as one.
__device__ __forceinline__ void add_weights(unsigned long long* bins, int bin, uint64_t weight,
                                            bool counts) {
#pragma unroll
  for (int round = 0; round < 2; ++round) {
    const uint32_t voters = __ballot_sync(cuda::kFullWarp, counts);
    if (voters == 0) return;
    const int leader = __ffs(static_cast<int>(voters)) - 1;
    const int leader_bin = __shfl_sync(cuda::kFullWarp, bin, leader);  // every lane takes part
    const bool agrees = counts && bin == leader_bin;
    const unsigned long long sum = cuda::warp_sum<unsigned long long>(agrees ? weight : 0);
    if (static_cast<int>(threadIdx.x % 32) == leader) atomicAdd(bins + bin, sum);
    counts = counts && !agrees;
  }
  if (counts) atomicAdd(bins + bin, static_cast<unsigned long long>(weight));
}

/// The cut of entry_at(0), ..., entry_at(n - 1), where reached(weights) tells whether the weights
/// [kParts] of a prefix are enough; it never turns false as they grow, and is false for zeros. All
/// threads of the team call and receive the same; `scratch` may be used again after a barrier.
template <class Team, class Scratch, class EntryAt, class Reached>
__device__ __forceinline__ Cut<Scratch::kParts> find_cut(int32_t n, const EntryAt& entry_at,
                                                         const Reached& reached, Scratch& scratch) {
  constexpr int kParts = Scratch::kParts, kBins = Scratch::kBins, kBits = Scratch::kDigitBits;
  constexpr int kBinsPerThread = kBins > Team::kThreads ? kBins / Team::kThreads : 1;
  static_assert(32 % kBits == 0 && kBins % kBinsPerThread == 0);
  const int rank = Team::rank();
  Cut<kParts> cut{};
  uint32_t matched = 0;
  for (int shift = 32 - kBits; shift >= 0; shift -= kBits) {
    for (int i = rank; i < kParts * kBins; i += Team::kThreads) (&scratch.bins[0][0])[i] = 0;
    Team::sync();
    if (rank == 0) scratch.digit = -1;
    for (int64_t base = 0; base < n; base += Team::kThreads) {
      const int64_t at = base + rank;
      WeightedEntry entry{};
      if (at < n) entry = entry_at(static_cast<int32_t>(at));
      const bool counts = entry.weight != 0 && (entry.key & matched) == cut.key;
      const int bin = entry.part * kBins + static_cast<int>(entry.key >> shift & (kBins - 1));
      add_weights(&scratch.bins[0][0], bin, entry.weight, counts);
    }
    Team::sync();

    // Bins from the largest digit down, kBinsPerThread consecutive ones a thread.
    const int first = rank * kBinsPerThread;
    const bool has_bins = first < kBins;
    uint64_t before[kParts], all[kParts];
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      unsigned long long sum = 0, total;
#pragma unroll
      for (int i = 0; i < kBinsPerThread; ++i) {
        if (has_bins) sum += scratch.bins[part][kBins - 1 - (first + i)];
      }
      before[part] =
          cut.above[part] + cuda::team_scan<Team>(sum, 0ull, cuda::Add{}, scratch.scan, total);
      all[part] = cut.above[part] + total;
    }
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (!has_bins) break;
      const int digit = kBins - 1 - (first + i);
      uint64_t after[kParts];
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        after[part] = before[part] + scratch.bins[part][digit];
      }
      if (!reached(before) && reached(after)) {
        scratch.digit = digit;
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          scratch.above[part] = before[part];
          scratch.equal[part] = scratch.bins[part][digit];
        }
      }
#pragma unroll
      for (int part = 0; part < kParts; ++part) before[part] = after[part];
    }
    Team::sync();
    if (scratch.digit < 0) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        cut.above[part] = all[part];
        cut.equal[part] = 0;
      }
      return cut;
    }
    cut.found = true;
    cut.key |= static_cast<uint32_t>(scratch.digit) << shift;
    matched |= static_cast<uint32_t>(kBins - 1) << shift;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      cut.above[part] = scratch.above[part];
      cut.equal[part] = scratch.equal[part];
    }
  }
  return cut;
}

}  // namespace sparseattn::index_sm80
