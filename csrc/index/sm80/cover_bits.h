// Bit arithmetic of covers, one 32-bit word at a time. Plain functions, so that the host can test
// what the device runs.
//
// Offset o covers the distances [o, o + 64). Runs are the maximal intervals of covered distances;
// a run is cut into segments of 64 from its near end, the last one may be shorter. The cover of a
// pair of tiles is the cover and the same moved by one tile: runs of it are at least 128 long.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace sparseattn::index_sm80 {

/// 32 distances of a cover from the offset bits of the same 32 distances and of the two words
/// before. Bit b is set if an offset lies in the 64 distances that end at b: in `word` at or below
/// b, anywhere in `before_1`, or in `before_2` above b.
__host__ __device__ inline uint32_t cover_word(uint32_t word, uint32_t before_1,
                                               uint32_t before_2) {
  const uint32_t from_lowest = 0u - (word & (0u - word));
  uint32_t below_highest = before_2;
  below_highest |= below_highest >> 1;
  below_highest |= below_highest >> 2;
  below_highest |= below_highest >> 4;
  below_highest |= below_highest >> 8;
  below_highest |= below_highest >> 16;
  below_highest >>= 1;
  return before_1 != 0 ? ~0u : from_lowest | below_highest;
}

/// The part of a word that lies below `span`; `first` is the word's first distance.
__host__ __device__ inline uint32_t clip_word(uint32_t word, int32_t first, int32_t span) {
  if (span - first >= 32) return word;
  return span <= first ? 0 : word & ((1u << (span - first)) - 1);
}

__host__ __device__ inline int32_t lowest_bit(uint32_t word) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}

/// Distance at which a run starts inside the word, or -1. There is at most one: a run is 64 long
/// unless it is clipped by the end of the last word.
__host__ __device__ inline int32_t run_start(uint32_t cover, bool before, int32_t first) {
  const uint32_t starts = cover & ~(cover << 1 | static_cast<uint32_t>(before));
  return starts == 0 ? -1 : first + lowest_bit(starts);
}

/// Distance inside the word at which the run that began at `start`, in an earlier word, and goes
/// on into this one is cut; or -1.
__host__ __device__ inline int32_t run_cut(uint32_t cover, bool before, int32_t first,
                                           int32_t start) {
  const uint32_t bit = static_cast<uint32_t>(start - first) & 63u;
  if (!before || bit >= 32) return -1;
  const uint32_t up_to_bit = (2u << bit) - 1;
  return (~cover & up_to_bit) == 0 ? first + static_cast<int32_t>(bit) : -1;
}

/// Distances [first, first + 64) of a bitmap given word by word; `first` may be negative. `word_at`
/// is 0 outside the bitmap.
template <class WordAt>
__host__ __device__ inline uint64_t bits_from(const WordAt& word_at, int32_t first) {
  const int32_t word = first >> 5, shift = first & 31;
  uint64_t bits = static_cast<uint64_t>(word_at(word + 1)) << 32 | word_at(word);
  if (shift == 0) return bits;
  return bits >> shift | static_cast<uint64_t>(word_at(word + 2)) << (64 - shift);
}

/// How many of the lowest bits are set in a row.
__host__ __device__ inline int32_t trailing_ones(uint64_t bits) {
  const uint32_t gap_low = ~static_cast<uint32_t>(bits);
  const uint32_t gap_high = ~static_cast<uint32_t>(bits >> 32);
  if (gap_low != 0) return lowest_bit(gap_low);
  return gap_high != 0 ? 32 + lowest_bit(gap_high) : 64;
}

}  // namespace sparseattn::index_sm80
