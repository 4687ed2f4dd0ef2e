// Tile shapes, shared-memory layouts and tensor-core atoms of the portable attention kernel.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/tensor.hpp>
#include <type_traits>

#include "attention/sm80/walker.h"
#include "sparseattn/types.h"

namespace sparseattn::sm80 {

/// What the main loop needs to know of its tile. It lives in shared memory: the accumulators leave
/// no registers for it.
template <class Element>
struct TileContext {
  HeadTask task;
  int32_t sequence, head, tile;
  int32_t rows;      // query rows of the tile that its sequence has, at least one
  TileScope scope;   // their positions
  const Element* k;  // of the key/value head
  const Element* v;
  const Element* packed_k;  // of the slot
  const Element* packed_v;
  const int32_t* columns;
};

/// One CTA computes 64 query rows; a step consumes up to 64 keys. Two warps of 32 rows each: every
/// key and value fragment read from shared memory feeds two MMAs, which 16 rows a warp would not.
template <int kHeadDim_, class Element_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kRows = kTileRows;
  static constexpr int kKeys = 64;
  static constexpr int kWarps = 2;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowTiles = kRows / (16 * kWarps);  // 16-row tiles of a warp
  /// Four CTAs on an SM hide each other's latencies: 255 registers a thread, and 48 KiB of shared
  /// memory at head_dim 128.
  static constexpr int kCtasPerSm = 4;

  using MmaOp =
      std::conditional_t<std::is_same_v<Element, cutlass::half_t>,
                         cute::SM80_16x8x16_F32F16F16F32_TN, cute::SM80_16x8x16_F32BF16BF16F32_TN>;
  using TiledMma = cute::TiledMMA<cute::MMA_Atom<MmaOp>,
                                  cute::Layout<cute::Shape<cute::Int<kWarps>, cute::_1, cute::_1>>,
                                  cute::Tile<cute::Int<16 * kWarps>, cute::_16, cute::_16>>;

  /// Tiles are stored as swizzled atoms of 8 rows x 128 bytes (64 bytes where head_dim is not a
  /// multiple of 64), so that ldmatrix reads eight rows without a bank conflict.
  static constexpr int kAtomCols = kHeadDim % 64 == 0 ? 64 : 32;
  using SmemAtom =
      decltype(cute::composition(cute::Swizzle<kAtomCols == 64 ? 3 : 2, 3, 3>{},
                                 cute::Layout<cute::Shape<cute::_8, cute::Int<kAtomCols>>,
                                              cute::Stride<cute::Int<kAtomCols>, cute::_1>>{}));
  /// [64 rows, head_dim]; the same memory read as [head_dim, 64 rows].
  using SmemTile = decltype(cute::tile_to_shape(
      SmemAtom{}, cute::Shape<cute::Int<kKeys>, cute::Int<kHeadDim>>{}));
  using SmemTileT = decltype(cute::composition(
      SmemTile{}, cute::make_layout(cute::Shape<cute::Int<kHeadDim>, cute::Int<kKeys>>{},
                                    cute::GenRowMajor{})));
  using SmemTileTPlain = decltype(cute::get_nonswizzle_portion(SmemTileT{}));

  using CopyRows = cute::Copy_Atom<cute::SM75_U32x4_LDSM_N, Element>;
  using CopyTransposed = cute::Copy_Atom<cute::SM75_U16x8_LDSM_T, Element>;

  struct SharedStorage {
    Step steps[kMaxSteps];
    int num_steps;
    TileContext<Element> context;
    alignas(128) Element query[kRows * kHeadDim];
    alignas(128) Element keys[kKeys * kHeadDim];
    alignas(128) Element values[kKeys * kHeadDim];
  };
  static_assert(kKeys == kRows, "queries, keys and values share one tile layout");
};

}  // namespace sparseattn::sm80
