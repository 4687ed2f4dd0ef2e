// Shared memory of the kernels that rebuild keys, and how the host fits it to a device.
//
// A CTA holds the basis of one head, and each of its warps the rows it works on: 16 keys' factor
// rows (or exact keys) and their values. Rows are padded to an odd number of 16-byte pieces, so
// that ldmatrix, and four lanes that read 16 bytes of a row, take eight rows without a bank
// conflict.
#pragma once

#include <cstdint>

#include "sparseattn/shadow.h"

namespace sparseattn::shadow_sm80 {

constexpr int kWarpKeys = 16;  // keys of a warp's tile
constexpr int kTileQueries = 16;
constexpr int kRowPad = 8;  // elements
constexpr int kMostWarps = 8;

/// How the pairs of a rotation lie in the columns of the shared basis.
enum class Pairing : int32_t {
  kAdjacent,   // (2i, 2i + 1), dims in order
  kBlocks,     // (i, half + i) with half a multiple of 8, dims in order
  kScattered,  // (i, half + i) with another half: dims are put in the order of kAdjacent
};

SPARSEATTN_HOST_DEVICE inline Pairing pairing_of(const Rope& rope) {
  if (rope.interleaved) return Pairing::kAdjacent;
  return rope.rotary_dim / 2 % 8 == 0 ? Pairing::kBlocks : Pairing::kScattered;
}

/// Bytes from the start of the CTA's shared memory; multiples of 16. Everything follows from the
/// sizes of the call, `warps` and `piece`.
struct Layout {
  int32_t head_dim;
  int32_t rank;
  int32_t warps;
  int32_t piece;  // ranks of the basis that are held at a time; `rank`: it is loaded once
  bool attends;   // queries and values as well
  bool scattered;
  bool quantised;  // the factor's rows are bytes

  SPARSEATTN_HOST_DEVICE int32_t row() const { return head_dim + kRowPad; }
  SPARSEATTN_HOST_DEVICE int32_t source_row() const {
    const int32_t factor = rank / (quantised ? 16 : 8), exact = attends ? head_dim / 8 : 0;
    return 8 * ((exact > factor ? exact : factor) | 1);
  }
  // float mean [head_dim], inv_freq [head_dim / 2], then float2 states [warps][kTileQueries]
  SPARSEATTN_HOST_DEVICE int32_t inv_freq() const { return 4 * head_dim; }
  SPARSEATTN_HOST_DEVICE int32_t states() const { return 6 * head_dim; }
  SPARSEATTN_HOST_DEVICE int32_t queries() const {
    return states() + (attends ? 8 * warps * kTileQueries : 0);
  }
  SPARSEATTN_HOST_DEVICE int32_t query_bytes() const {
    return attends ? 2 * kTileQueries * row() : 0;
  }
  /// Queries with their dims in the order of a scattered basis; otherwise the queries.
  SPARSEATTN_HOST_DEVICE int32_t reordered_queries() const {
    return queries() + (scattered ? query_bytes() : 0);
  }
  SPARSEATTN_HOST_DEVICE int32_t basis() const { return reordered_queries() + query_bytes(); }
  SPARSEATTN_HOST_DEVICE int32_t source(int warp) const {
    return basis() + 2 * piece * row() + warp * warp_bytes();
  }
  SPARSEATTN_HOST_DEVICE int32_t values(int warp) const {
    return source(warp) + 2 * kWarpKeys * source_row();
  }
  /// With values at least the 16 fp32 rows of row() that a warp leaves at the end.
  SPARSEATTN_HOST_DEVICE int32_t warp_bytes() const {
    return 2 * kWarpKeys * (source_row() + (attends ? row() : 0));
  }
  SPARSEATTN_HOST_DEVICE int32_t bytes() const { return source(warps); }
  SPARSEATTN_HOST_DEVICE bool streams() const { return piece < rank; }
};

/// The layout of most warps that fits: the whole basis with 8 or 4 warps, else pieces of it.
/// `warps` is 0 where nothing fits.
inline Layout fit_layout(const LowRankKeys& keys, int32_t head_dim, bool attends,
                         int32_t most_bytes) {
  Layout layout{head_dim,
                keys.rank,
                kMostWarps,
                keys.rank,
                attends,
                pairing_of(keys.rope) == Pairing::kScattered,
                keys.factor_scales.quantised()};
  for (; layout.warps >= 4; layout.warps /= 2) {
    if (layout.bytes() <= most_bytes) return layout;
  }
  for (layout.warps = 4; layout.warps > 0; layout.warps /= 2) {
    for (layout.piece = keys.rank - 16; layout.piece > 0; layout.piece -= 16) {
      if (layout.bytes() <= most_bytes) return layout;
    }
  }
  return layout;
}

}  // namespace sparseattn::shadow_sm80
