// A team: kWarps warps of a CTA that work on one problem, with a barrier and scans of their own.
#pragma once

#include <cstdint>

#include "common/cuda/ptx.cuh"

namespace sparseattn::cuda {

constexpr uint32_t kFullWarp = 0xffffffffu;

/// Teams lie side by side in the CTA; all warps of a team make the same calls.
template <int kWarps_>
struct Team {
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;

  static __device__ __forceinline__ int index() { return threadIdx.x / kThreads; }
  static __device__ __forceinline__ int rank() { return threadIdx.x % kThreads; }
  static __device__ __forceinline__ int warp() { return threadIdx.x / 32 % kWarps; }
  static __device__ __forceinline__ int lane() { return threadIdx.x % 32; }

  /// Barrier of the team; orders its accesses to shared and global memory. Team i uses hardware
  /// barrier 1 + i.
  static __device__ __forceinline__ void sync() {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      barrier_sync<kThreads>(1 + index());
    }
  }
};

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};

struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

/// Inclusive scan over the lanes of a warp.
template <class T, class Op>
__device__ __forceinline__ T warp_scan(T value, Op op) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const T other = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value = op(other, value);
  }
  return value;
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, distance);
  }
  return value;
}

/// Exclusive scan over the threads of a team; `total` receives the scan of all of them.
/// `scratch` has Team::kWarps entries and may be used again as soon as the call returns.
template <class Team, class T, class Op>
__device__ __forceinline__ T team_scan(T value, T identity, Op op, T* scratch, T& total) {
  const T inclusive = warp_scan(value, op);
  if (Team::lane() == 31) scratch[Team::warp()] = inclusive;
  T exclusive = __shfl_up_sync(kFullWarp, inclusive, 1);
  if (Team::lane() == 0) exclusive = identity;
  Team::sync();
  const T of_lane = Team::lane() < Team::kWarps ? scratch[Team::lane()] : identity;
  const T warps = warp_scan(of_lane, op);
  total = __shfl_sync(kFullWarp, warps, 31);
  const T before = __shfl_sync(kFullWarp, warps, (Team::warp() + 31) % 32);
  Team::sync();
  return Team::warp() == 0 ? exclusive : op(before, exclusive);
}

}  // namespace sparseattn::cuda
