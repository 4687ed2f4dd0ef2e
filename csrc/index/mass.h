// Attention mass in fixed point, and when a selection covers a share of it. Plain functions, the
// same on the CPU and on the device, so that both decide by the same integers.
//
// The share of a vertical-slash head is counted over the probabilities of the last `rows` query
// rows. What the forced columns and offsets hold is covered from the start; the masses of all other
// columns and offsets are taken over the rest only, so nothing that is forced is counted again as a
// column (recent keys) or as an offset (those that lead to the sinks).
//
// Candidates are single columns and runs, the offsets [64 j, 64 j + 64). They rank by mass per
// price in 64-wide tiles of keys. A run adds its cover, one tile where a neighbour is kept:
// price 1. A column adds 1/64 tile, but is priced at 1/16: within 64 rows a diagonal of mass m also
// shows as 64 columns of m/64, which would cost what the diagonal costs although no other row sees
// it there. At 1/16 a run goes before its own trace, be it cut in two by the edge of a run, and a
// column before the trace that it leaves in the offsets.
//
// Every probability lies on one column and on one offset. As if the two were independent, a
// selection that leaves columns of mass c out of C and runs of mass s out of S leaves c s / S
// uncovered (C = S but for rounding). The cover of an offset is wider than its diagonal, which is
// not counted.
#pragma once

#include <cmath>
#include <cstdint>

#include "sparseattn/types.h"

#ifdef __CUDACC__
#define SPARSEATTN_BOTH __host__ __device__
#else
#define SPARSEATTN_BOTH
#endif

namespace sparseattn::index {

constexpr int32_t kRunOffsets = 64;
/// Columns that rank like one run of the same mass.
constexpr float kColumnsPerRun = 16.f;
/// One probability of 1. Masses are at most 64 of them.
constexpr float kMassUnit = 1099511627776.f;  // 2^40

/// A mass as it ranks: NaN and less than 0 are 0.
SPARSEATTN_BOTH inline float clean_mass(float mass) {
  return mass > 0.f ? (mass < 64.f ? mass : 64.f) : 0.f;
}
SPARSEATTN_BOTH inline uint64_t fixed_mass(float mass) {
  return static_cast<uint64_t>(rintf(clean_mass(mass) * kMassUnit));
}
/// The fp32 mass of a run: fixed_mass of it is what sums use.
SPARSEATTN_BOTH inline float mass_of_fixed(uint64_t fixed) {
  return static_cast<float>(fixed) * (1.f / kMassUnit);
}

/// Whether a vertical-slash selection covers the share.
struct Coverage {
  uint64_t columns;  // C, fixed point
  uint64_t runs;     // S
  double allowed;    // what may stay uncovered, times S

  SPARSEATTN_BOTH Coverage(uint64_t columns, uint64_t runs, int32_t rows, int32_t share)
      : columns(columns),
        runs(runs),
        allowed(static_cast<double>(kWholeShare - share) / kWholeShare *
                (rows * static_cast<double>(kMassUnit)) * static_cast<double>(runs)) {}

  SPARSEATTN_BOTH bool reached(uint64_t kept_columns, uint64_t kept_runs) const {
    return static_cast<double>(columns - kept_columns) * static_cast<double>(runs - kept_runs) <=
           allowed;
  }
};

/// Weight of a score in a row whose largest is `top`; `scale` carries log2(e). Sums of them decide
/// when the blocks of a row reach a share.
constexpr float kWeightUnit = 1073741824.f;  // 2^30

SPARSEATTN_BOTH inline float clean_score(float score) {
  constexpr float kLargest = 3.402823466e+38f;
  return score > -kLargest ? (score < kLargest ? score : kLargest) : -kLargest;
}
SPARSEATTN_BOTH inline uint64_t fixed_weight(float score, float top, float scale) {
  return static_cast<uint64_t>(rintf(exp2f((clean_score(score) - top) * scale) * kWeightUnit));
}
SPARSEATTN_BOTH inline bool share_reached(uint64_t kept, uint64_t total, int32_t share) {
  return static_cast<double>(kept) * kWholeShare >= static_cast<double>(total) * share;
}

}  // namespace sparseattn::index
