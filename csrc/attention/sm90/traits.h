// Tile shapes, shared memory and tensor-core atoms of the Hopper attention kernel.
#pragma once

#include <cutlass/bfloat16.h>
#include <cutlass/half.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>
#include <type_traits>

#include "attention/sm90/box.h"
#include "common/cuda/ptx_sm90.cuh"

namespace sparseattn::sm90 {

/// Boxes go from the planner to the dealer in two batches of at most this many.
constexpr int kBatch = 16;
/// The most pairs that come of a batch and three boxes held.
constexpr int kBatchPairs = kBatch / 2 + 2;
/// Pairs that the dealer may be ahead of the loaders.
constexpr int kPairSlots = 16;
/// Tiles under way, from the planner to the consumer that stores them.
constexpr int kTileSlots = 4;

template <int kHeadDim_, class Element_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  /// A thread's, within the 168 that a launch gives each; accumulators set the consumers' need.
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 56 : 88;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 224 : 208;

  /// How far the softmax reference may be behind, in powers of two (softmax.h).
  static constexpr int kSlack = 8;

  /// Rows are cut into swizzled pieces of kAtomCols: 128 bytes, or 64 where head_dim is no
  /// multiple.
  static constexpr int kAtomCols = kHeadDim % 64 == 0 ? 64 : 32;
  /// The copy engine's swizzle: 16-byte pieces of a row are permuted by an exclusive or with this.
  static __device__ __forceinline__ int swizzle(int row) {
    return kAtomCols == 64 ? row % 8 : row / 2 % 4;
  }
  static constexpr int kPieces = kHeadDim / kAtomCols;
  static constexpr int kBoxElements = kBoxRows * kHeadDim;
  static constexpr uint32_t kBoxBytes = kBoxElements * sizeof(Element);
  /// A stage holds a pair of boxes, piece by piece: [pieces, 128 rows, kAtomCols].
  static constexpr int kStageElements = kStageRows * kHeadDim;
  static constexpr int kStages = kHeadDim == 128 ? 3 : kHeadDim == 96 ? 4 : 6;

  /// [128 keys, head_dim, stages], and the same memory read as values: [head_dim, 128, stages].
  using KeyAtom = std::conditional_t<kAtomCols == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                     cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using ValueAtom = std::conditional_t<kAtomCols == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                       cute::GMMA::Layout_MN_SW64_Atom<Element>>;
  using KeyLayout = decltype(cute::tile_to_shape(
      KeyAtom{}, cute::Shape<cute::Int<kStageRows>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using ValueLayout = decltype(cute::tile_to_shape(
      ValueAtom{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kStageRows>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  /// scores = query x keys^T, both in shared memory; output += probabilities (registers) x values.
  static constexpr auto score_atom() {
    using namespace cute::SM90::GMMA;
    constexpr auto kK = cute::GMMA::Major::K;
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
      return MMA_64x128x16_F32F16F16_SS<kK, kK>{};
    } else {
      return MMA_64x128x16_F32BF16BF16_SS<kK, kK>{};
    }
  }
  static constexpr auto output_atom() {
    using namespace cute::SM90::GMMA;
    constexpr auto kK = cute::GMMA::Major::K, kMn = cute::GMMA::Major::MN;
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
      if constexpr (kHeadDim == 64) return MMA_64x64x16_F32F16F16_RS<kK, kMn>{};
      if constexpr (kHeadDim == 96) return MMA_64x96x16_F32F16F16_RS<kK, kMn>{};
      if constexpr (kHeadDim == 128) return MMA_64x128x16_F32F16F16_RS<kK, kMn>{};
    } else {
      if constexpr (kHeadDim == 64) return MMA_64x64x16_F32BF16BF16_RS<kK, kMn>{};
      if constexpr (kHeadDim == 96) return MMA_64x96x16_F32BF16BF16_RS<kK, kMn>{};
      if constexpr (kHeadDim == 128) return MMA_64x128x16_F32BF16BF16_RS<kK, kMn>{};
    }
  }
  using ScoreMma = decltype(cute::make_tiled_mma(score_atom()));
  using OutputMma = decltype(cute::make_tiled_mma(output_atom()));
  using QueryLayout = decltype(cute::tile_to_shape(
      KeyAtom{}, cute::Shape<cute::Int<kTileRows>, cute::Int<kHeadDim>>{}));

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kBoxElements];
    alignas(1024) Element keys[kStages][kStageElements];
    alignas(1024) Element values[kStages][kStageElements];
    Box boxes[2][kBatch];    // planner to dealer
    Box held[3];             // the dealer's, without a partner yet
    Pair pairs[kPairSlots];  // dealer to loaders
    Pair stages[kStages];    // key loader to consumers, with the stage
    Tile tiles[kTileSlots];
    uint32_t box_count[2];  // boxes in the batch, and kLastBatch, kStop (producer.h)
    // full: one arrival by the side that writes; free: one by every reader (see kernel.h).
    cuda::MBarrier keys_full[kStages], keys_free[kStages];
    cuda::MBarrier values_full[kStages], values_free[kStages];
    cuda::MBarrier query_full, query_free;
    cuda::MBarrier tile_full[kTileSlots], tile_free[kTileSlots];
    cuda::MBarrier boxes_full[2], boxes_free[2], pairs_full[kPairSlots], pairs_free[kPairSlots];
  };
  static_assert(sizeof(SharedStorage) <= 227 * 1024);
};

/// A place in a ring and the parity of the phase that is waited for there.
template <int kStages>
struct RingPosition {
  int index = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

}  // namespace sparseattn::sm90
