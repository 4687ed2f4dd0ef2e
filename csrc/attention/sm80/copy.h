// Global to shared memory: 64 rows by cp.async, rows past the count filled with zeros.
#pragma once

#include <cstdint>

#include "attention/sm80/traits.h"

namespace sparseattn::sm80 {

__device__ __forceinline__ void cp_async_16(void* smem, const void* global, bool valid) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const int bytes = valid ? 16 : 0;  // with 0 nothing is read, wherever `global` points
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n" ::"r"(address),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;\n"); }

__device__ __forceinline__ void cp_async_wait_all() {
  asm volatile("cp.async.wait_group 0;\n" ::: "memory");
}

/// A thread's share of a tile copy: 16-byte pieces of rows row, row + kRowsPerPass, ...
template <class Traits>
struct RowCopy {
  using Element = typename Traits::Element;
  static constexpr int kPerPiece = 16 / sizeof(Element);
  static constexpr int kPiecesPerRow = Traits::kAtomCols / kPerPiece;
  static constexpr int kRowsPerPass = Traits::kThreads / kPiecesPerRow;

  int row;        // first row of this thread
  int column;     // first element of this thread within a group of kAtomCols columns
  int smem_base;  // where (row, column) lies in a tile

  __device__ explicit RowCopy(int thread)
      : row(thread / kPiecesPerRow),
        column(thread % kPiecesPerRow * kPerPiece),
        smem_base(typename Traits::SmemTile{}(row, column)) {}

  /// Rows [start, start + count) of `source` (row stride in elements) to `tile`; the rest of the
  /// tile's 64 rows become zero without being read.
  __device__ __forceinline__ void operator()(Element* tile, const Element* source, int64_t stride,
                                             int start, int count) const {
    const Element* from = source + (start + row) * stride + column;
#pragma unroll
    for (int pass = 0; pass < Traits::kKeys / kRowsPerPass; ++pass) {
      const bool valid = row + pass * kRowsPerPass < count;
#pragma unroll
      for (int atom = 0; atom < Traits::kHeadDim / Traits::kAtomCols; ++atom) {
        // Passes advance by whole swizzle periods (8 rows), so offsets add up linearly.
        cp_async_16(tile + smem_base + pass * kRowsPerPass * Traits::kAtomCols +
                        atom * Traits::kKeys * Traits::kAtomCols,
                    from + atom * Traits::kAtomCols, valid);
      }
      from += kRowsPerPass * stride;
    }
  }
};

}  // namespace sparseattn::sm80
