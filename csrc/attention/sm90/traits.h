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

/// Planned boxes wait in two batches of at most this many.
constexpr int kBatch = 32;
/// Rounds that the dealer may be ahead of the consumers.
constexpr int kRounds = 8;

template <int kHeadDim_, class Element_>
struct Traits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  /// A thread's, within the 168 that a launch gives each; accumulators set the consumers' need.
  static constexpr int kProducerRegisters = kHeadDim == 128 ? 40 : 88;
  static constexpr int kConsumerRegisters = kHeadDim == 128 ? 232 : 208;

  /// Rows are cut into swizzled pieces of kAtomCols: 128 bytes, or 64 where head_dim is no
  /// multiple.
  static constexpr int kAtomCols = kHeadDim % 64 == 0 ? 64 : 32;
  /// The copy engine's swizzle: 16-byte pieces of a row are permuted by an exclusive or with this.
  static __device__ __forceinline__ int swizzle(int row) {
    return kAtomCols == 64 ? row % 8 : row / 2 % 4;
  }
  static constexpr int kBoxElements = kBoxRows * kHeadDim;
  static constexpr uint32_t kBoxBytes = kBoxElements * sizeof(Element);
  static constexpr int kStages = kHeadDim == 128 ? 6 : kHeadDim == 96 ? 8 : 12;

  /// [64 keys, head_dim, stages], and the same memory read as values: [head_dim, 64 keys, stages].
  /// A piece of kAtomCols columns is contiguous over all 64 rows, as the copy writes it.
  using KeyAtom = std::conditional_t<kAtomCols == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                     cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using ValueAtom = std::conditional_t<kAtomCols == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                       cute::GMMA::Layout_MN_SW64_Atom<Element>>;
  using KeyLayout = decltype(cute::tile_to_shape(
      KeyAtom{}, cute::Shape<cute::Int<kBoxRows>, cute::Int<kHeadDim>, cute::Int<kStages>>{}));
  using ValueLayout = decltype(cute::tile_to_shape(
      ValueAtom{}, cute::Shape<cute::Int<kHeadDim>, cute::Int<kBoxRows>, cute::Int<kStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));

  /// scores = query (registers) x keys^T; output += probabilities (registers) x values.
  template <int kColumns, cute::GMMA::Major kMajor>
  static constexpr auto atom() {
    using namespace cute::SM90::GMMA;
    constexpr auto kK = cute::GMMA::Major::K;
    if constexpr (std::is_same_v<Element, cutlass::half_t>) {
      if constexpr (kColumns == 64) return MMA_64x64x16_F32F16F16_RS<kK, kMajor>{};
      if constexpr (kColumns == 96) return MMA_64x96x16_F32F16F16_RS<kK, kMajor>{};
      if constexpr (kColumns == 128) return MMA_64x128x16_F32F16F16_RS<kK, kMajor>{};
    } else {
      if constexpr (kColumns == 64) return MMA_64x64x16_F32BF16BF16_RS<kK, kMajor>{};
      if constexpr (kColumns == 96) return MMA_64x96x16_F32BF16BF16_RS<kK, kMajor>{};
      if constexpr (kColumns == 128) return MMA_64x128x16_F32BF16BF16_RS<kK, kMajor>{};
    }
  }
  using ScoreMma = decltype(cute::make_tiled_mma(atom<kBoxRows, cute::GMMA::Major::K>()));
  using OutputMma = decltype(cute::make_tiled_mma(atom<kHeadDim, cute::GMMA::Major::MN>()));

  struct SharedStorage {
    alignas(1024) Element query[kConsumers][kBoxElements];
    alignas(1024) Element keys[kStages][kBoxElements];
    alignas(1024) Element values[kStages][kBoxElements];
    Box planned[2][kBatch];                // planner to loaders and dealer
    Box boxes[kStages];                    // to consumers, with the keys of the stage
    uint32_t rounds[kConsumers][kRounds];  // RoundWords, dealer to consumers
    Tile tiles[2];
    uint32_t batch[2];  // boxes in it, and kBatch* flags
    // full: one arrival by the side that writes; free: one by every reader (see kernel.h).
    cuda::MBarrier keys_full[kStages], keys_free[kStages];
    cuda::MBarrier values_full[kStages], values_free[kStages];
    cuda::MBarrier query_full, query_free;
    cuda::MBarrier round_full[kConsumers][kRounds], round_free[kConsumers][kRounds];
    cuda::MBarrier tile_full[2], tile_free[2];
    cuda::MBarrier batch_full[2], batch_free[2];
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
