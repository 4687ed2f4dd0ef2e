// Exact top-k by radix: the largest keys, equal keys by the smaller index.
//
// A team finds the k-th largest of n 32-bit keys digit by digit, from the top: count the keys of
// each digit among those that match the digits found so far, then take the digit in which the k-th
// falls. Counters are integers in shared memory, so the result does not depend on timing.
#pragma once

#include <cstdint>

#include "common/cuda/team.cuh"

namespace sparseattn::index_sm80 {

constexpr uint32_t kForcedKey = 0xffffffffu;

/// Unsigned order of the result is the order of `value`; both zeros are equal.
__host__ __device__ inline uint32_t order_key(float value) {
#ifdef __CUDA_ARCH__
  const uint32_t bits = __float_as_uint(value + 0.f);
#else
  const float sum = value + 0.f;
  uint32_t bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
#endif
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

/// Selects every key above `key` and the first `ties` keys equal to it.
struct Threshold {
  uint32_t key;
  int32_t ties;
};

template <class Team, int kDigitBits>
struct SelectScratch {
  static constexpr int kBins = 1 << kDigitBits;
  int32_t bins[kBins];
  int32_t scan[Team::kWarps];
  int32_t digit;
  int32_t rest;  // how many are still to be taken from the bin chosen
};

/// Counts one key a lane. Many lanes often share a bin (masses have few exponents), which would
/// serialise the atomics: the lanes that agree with the first one are counted by one addition.
__device__ __forceinline__ void count_digits(int32_t* bins, uint32_t bin, bool counts) {
  const uint32_t voters = __ballot_sync(cuda::kFullWarp, counts);
  if (voters == 0) return;
  const int leader = __ffs(static_cast<int>(voters)) - 1;
  const uint32_t leader_bin = __shfl_sync(cuda::kFullWarp, bin, leader);
  const uint32_t agree = __ballot_sync(cuda::kFullWarp, counts && bin == leader_bin);
  if (static_cast<int>(threadIdx.x % 32) == leader) {
    atomicAdd(bins + leader_bin, __popc(agree));
  } else if (counts && bin != leader_bin) {
    atomicAdd(bins + bin, 1);
  }
}

/// The threshold that selects k of the keys key_at(0), ..., key_at(n - 1); 0 <= k <= n. All threads
/// of the team call and receive the same.
template <class Team, int kDigitBits, class KeyAt>
__device__ __forceinline__ Threshold find_threshold(int32_t n, int32_t k, const KeyAt& key_at,
                                                    SelectScratch<Team, kDigitBits>& scratch) {
  constexpr int kBins = 1 << kDigitBits;
  constexpr int kBinsPerThread = kBins / Team::kThreads;
  constexpr int kBatch = 8;  // keys a thread reads ahead
  static_assert(kBins % Team::kThreads == 0);
  if (k <= 0) return {kForcedKey, 0};
  if (k >= n) return {0, n};

  const int rank = Team::rank();
  uint32_t prefix = 0, matched = 0;
  for (int top = 32; top > 0; top -= kDigitBits) {
    const int shift = max(top - kDigitBits, 0);
    const uint32_t digit_mask = (1u << (top - shift)) - 1;
    for (int bin = rank; bin < kBins; bin += Team::kThreads) scratch.bins[bin] = 0;
    Team::sync();
    for (int64_t start = 0; start < n; start += kBatch * Team::kThreads) {
      const int64_t base = start + rank;
      uint32_t keys[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int64_t at = base + i * Team::kThreads;
        keys[i] = at < n ? key_at(static_cast<int32_t>(at)) : 0;
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const bool counts = base + i * Team::kThreads < n && (keys[i] & matched) == prefix;
        count_digits(scratch.bins, keys[i] >> shift & digit_mask, counts);
      }
    }
    Team::sync();

    // Bins from the largest digit down, kBinsPerThread consecutive ones a thread.
    int32_t counts[kBinsPerThread];
    int32_t sum = 0;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      counts[i] = scratch.bins[kBins - 1 - (rank * kBinsPerThread + i)];
      sum += counts[i];
    }
    int32_t total;
    int32_t above = cuda::team_scan<Team>(sum, 0, cuda::Add{}, scratch.scan, total);
#pragma unroll
    for (int i = 0; i < kBinsPerThread; ++i) {
      if (above < k && k <= above + counts[i]) {
        scratch.digit = kBins - 1 - (rank * kBinsPerThread + i);
        scratch.rest = k - above;
      }
      above += counts[i];
    }
    Team::sync();
    prefix |= static_cast<uint32_t>(scratch.digit) << shift;
    matched |= digit_mask << shift;
    k = scratch.rest;
  }
  return {prefix, k};
}

/// Keys [begin, end) of a team's n keys that a warp looks at when their order matters. Pieces are
/// multiples of 32.
struct WarpRange {
  int32_t begin;
  int32_t end;
};

template <class Team>
__device__ __forceinline__ WarpRange warp_range(int32_t n) {
  const int64_t piece = (static_cast<int64_t>(n) + Team::kThreads - 1) / Team::kThreads * 32;
  const int64_t begin = piece * Team::warp();
  return {static_cast<int32_t>(begin < n ? begin : n),
          static_cast<int32_t>(begin + piece < n ? begin + piece : n)};
}

struct SameId {
  __device__ int32_t operator()(int32_t i) const { return i; }
};

/// Writes id_at(i) of the k selected keys i in ascending order, then -1 up to `length`. Each warp
/// counts its own range first, so that it knows where to write. `scratch` has Team::kWarps entries.
template <class Team, class KeyAt, class IdAt = SameId>
__device__ __forceinline__ void write_selected(int32_t n, int32_t k, const Threshold& threshold,
                                               const KeyAt& key_at, int32_t* out, int32_t length,
                                               int32_t* scratch, const IdAt& id_at = {}) {
  const int lane = Team::lane();
  const WarpRange range = warp_range<Team>(n);
  int32_t above = 0, equal = 0;
#pragma unroll 8
  for (int i = range.begin + lane; i < range.end; i += 32) {
    const uint32_t key = key_at(i);
    above += key > threshold.key;
    equal += key == threshold.key;
  }
  above = cuda::warp_sum(above);
  equal = cuda::warp_sum(equal);
  int32_t total;
  const int32_t from_lane_0 = lane == 0;
  int32_t above_before = cuda::team_scan<Team>(from_lane_0 * above, 0, cuda::Add{}, scratch, total);
  int32_t equal_before = cuda::team_scan<Team>(from_lane_0 * equal, 0, cuda::Add{}, scratch, total);
  above_before = __shfl_sync(cuda::kFullWarp, above_before, 0);
  equal_before = __shfl_sync(cuda::kFullWarp, equal_before, 0);

  constexpr int kBatch = 8;
  const uint32_t lanes_below = (1u << lane) - 1;
  for (int64_t base = range.begin; base < range.end; base += 32 * kBatch) {
    uint32_t keys[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = base + 32 * i + lane;
      keys[i] = at < range.end ? key_at(static_cast<int32_t>(at)) : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = base + 32 * i + lane;
      const bool is_above = at < range.end && keys[i] > threshold.key;
      const bool is_equal = at < range.end && keys[i] == threshold.key;
      const uint32_t all_above = __ballot_sync(cuda::kFullWarp, is_above);
      const uint32_t all_equal = __ballot_sync(cuda::kFullWarp, is_equal);
      if ((all_above | all_equal) == 0) continue;
      const int32_t ties = equal_before + __popc(all_equal & lanes_below);
      if (is_above || (is_equal && ties < threshold.ties)) {
        out[above_before + __popc(all_above & lanes_below) + min(ties, threshold.ties)] =
            id_at(static_cast<int32_t>(at));
      }
      above_before += __popc(all_above);
      equal_before += __popc(all_equal);
    }
  }
  for (int i = k + Team::rank(); i < length; i += Team::kThreads) out[i] = -1;
}

}  // namespace sparseattn::index_sm80
