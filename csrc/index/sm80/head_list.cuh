// Which query heads an estimate was asked for.
#pragma once

#include <cstdint>

#include "common/cuda/team.cuh"

namespace sparseattn::index_sm80 {

/// Query head of ordinal i; a null list means 0, 1, 2, ...
__device__ __forceinline__ int32_t listed_head(const int32_t* head_ids, int32_t i) {
  return head_ids == nullptr ? i : head_ids[i];
}

/// Entry i of a list of budgets, within [0, limit]; a null list means `limit` for all.
__device__ __forceinline__ int32_t budget_of(const int32_t* budgets, int32_t i, int32_t limit) {
  return budgets == nullptr ? limit : min(max(budgets[i], 0), limit);
}

/// Entry i of a list of shares in millionths; a null list means `share` for all.
__device__ __forceinline__ int32_t share_of(const int32_t* shares, int32_t i, int32_t share) {
  return shares == nullptr ? share : shares[i];
}

/// Ordinal of `head` among the heads listed, -1 if it is not. The whole warp calls with the same
/// head.
__device__ __forceinline__ int32_t listed_ordinal(const int32_t* head_ids, int32_t heads,
                                                  int32_t head) {
  if (head_ids == nullptr) return head < heads ? head : -1;
  int32_t found = -1;
  for (int i = threadIdx.x % 32; i < heads; i += 32) {
    if (head_ids[i] == head) found = i;
  }
  return __reduce_max_sync(cuda::kFullWarp, found);
}

/// Whether `head` is among the heads listed. The whole warp calls with the same head.
__device__ __forceinline__ bool is_listed(const int32_t* head_ids, int32_t heads, int32_t head) {
  return listed_ordinal(head_ids, heads, head) >= 0;
}

}  // namespace sparseattn::index_sm80
