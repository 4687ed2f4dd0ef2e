// The Hopper attention kernel: a persistent CTA of one producer and two consumer warpgroups.
//
// Barriers, with the arrivals that end a phase, a warp counting once (kArrivingLanes):
//   keys_full, values_full   1: the loader, with the bytes of the copy
//   keys_free                8: every consumer warp, also where it only reads the pair's word
//   values_free              8: every consumer warp, or the loader for one that owns no box there
//   query_full / query_free  1: the dealer / 8: every consumer warp, after the tile's last scores
//   tile_full / tile_free    1: the planner / 11: loaders, dealer and every consumer warp
//   boxes_full / boxes_free  1: the planner / 1: the dealer
//   pairs_full / pairs_free  1: the dealer / 2: the loaders
// Named barriers 1 and 2, 256 threads: the turns of the consumers (consumer.h).
#pragma once

#include "attention/sm90/consumer.h"
#include "attention/sm90/producer.h"

namespace sparseattn::sm90 {

template <class Storage>
__device__ __forceinline__ void init_barriers(Storage& smem) {
  constexpr int kWarp = kArrivingLanes, kReaders = kConsumers * kConsumerWarps * kWarp;
  for (auto& barrier : smem.keys_full) barrier.init(1);
  for (auto& barrier : smem.keys_free) barrier.init(kReaders);
  for (auto& barrier : smem.values_full) barrier.init(1);
  for (auto& barrier : smem.values_free) barrier.init(kReaders);
  smem.query_full.init(1);
  smem.query_free.init(kReaders);
  for (auto& barrier : smem.tile_full) barrier.init(1);
  for (auto& barrier : smem.tile_free) barrier.init(kReaders + 3 * kWarp);
  for (int i = 0; i < 2; ++i) {
    smem.boxes_full[i].init(kWarp);
    smem.boxes_free[i].init(kWarp);
  }
  for (auto& barrier : smem.pairs_full) barrier.init(kWarp);
  for (auto& barrier : smem.pairs_free) barrier.init(2 * kWarp);
  cuda::fence_barrier_init();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    attention_kernel(const __grid_constant__ AttentionParams params,
                     const __grid_constant__ TensorMaps maps, uint32_t tiles) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  auto& smem = *reinterpret_cast<typename Traits::SharedStorage*>(smem_bytes);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) init_barriers(smem);
  __syncthreads();
  if (warp < 4) {
    cuda::lower_registers<Traits::kProducerRegisters>();
    const int lane = threadIdx.x % 32;
    if (warp == 0) {
      Planner<Traits>(params, smem, lane).run(tiles);
    } else if (warp == 1) {
      Loader<Traits, true>(params, maps, smem, lane).run();
    } else if (warp == 2) {
      Loader<Traits, false>(params, maps, smem, lane).run();
    } else {
      Dealer<Traits>(params, maps, smem, lane).run();
    }
  } else {
    cuda::raise_registers<Traits::kConsumerRegisters>();
    Consumer<Traits>(params, smem, warp / 4 - 1, threadIdx.x % 128).run();
  }
}

}  // namespace sparseattn::sm90
