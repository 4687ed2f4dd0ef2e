// Boxes two by two: the halves of a stage, 128 keys that one product takes.
//
// Boxes with the same owners become pairs, masked ones with each other as far as that goes; one
// without a partner is held until the next batch. At the end of a tile at most three are left, one
// of each set of owners: they are paired with each other, hidden from those who did not own them,
// and the last by itself with a copy that is hidden.
#pragma once

#include "attention/sm90/box.h"

namespace sparseattn::sm90 {

__device__ __forceinline__ int lanes_below(unsigned ballot, int lane) {
  return __popc(ballot & ((1u << lane) - 1));
}

/// Of one tile. All functions are called by a whole warp; `held` are three boxes in shared memory.
class Pairing {
 public:
  static_assert(kConsumers == 2, "three sets of owners");

  /// Pairs the boxes of the lanes below `count` and those held. Returns how many pairs were
  /// written, pair i to place(i): shared ones first, then alternately those of either consumer.
  template <class Place>
  __device__ int add(const Box& box, int count, int lane, Box* held, const Place& place) {
    const uint32_t owners = lane < count ? box.owners() : 0;
    const bool masked = owners != 0 && box.masked();
    const unsigned all_masked = __ballot_sync(~0u, masked);
    const uint32_t leads = masked_leads_;
    unsigned ballots[4];
    int totals[4];
#pragma unroll
    for (int set = 1; set < 4; ++set) {
      ballots[set] = __ballot_sync(~0u, owners == set);
      totals[set] = __popc(ballots[set]) + (held_ >> set & 1);
      // The kind of the last one, that may be held, leads next time.
      const bool leading = leads >> set & 1;
      const bool both = ballots[set] & (leading ? ~all_masked : all_masked);
      if (both) masked_leads_ ^= 1u << set;
    }
    const Order order{totals[3] / 2, min(totals[1], totals[2]) / 2};
    Box first;
    const bool completes = lane >= 1 && lane < 4 && held_ >> lane & 1 &&
                           (lane == 1   ? totals[1]
                            : lane == 2 ? totals[2]
                                        : totals[3]) > 1;
    if (completes) first = held[lane - 1];
    __syncwarp();
    if (completes) place(order.of(lane, 0))[0] = first;
    if (owners != 0) {
      const unsigned ballot = owners == 1 ? ballots[1] : owners == 2 ? ballots[2] : ballots[3];
      const int total = owners == 1 ? totals[1] : owners == 2 ? totals[2] : totals[3];
      const unsigned kind = ballot & (masked ? all_masked : ~all_masked);
      const bool leading = masked == (leads >> owners & 1);
      const int before = leading ? 0 : __popc(ballot & ~kind);
      const int rank = before + lanes_below(kind, lane) + (held_ >> owners & 1);
      if (rank / 2 < total / 2) {
        place(order.of(owners, rank / 2))[rank % 2] = box;
      } else {
        held[owners - 1] = box;
      }
    }
    __syncwarp();
    held_ = (totals[1] & 1) << 1 | (totals[2] & 1) << 2 | (totals[3] & 1) << 3;
    return totals[1] / 2 + totals[2] / 2 + totals[3] / 2;
  }

  /// Pairs what is left; returns how many pairs were written.
  template <class Place>
  __device__ int finish(int lane, const Box* held, const Place& place) {
    const int left = __popc(held_), pairs = (left + 1) / 2;
    if (lane < 2 * pairs) {
      Box box = held[left_over(min(lane, left - 1)) - 1];
      const uint32_t owners = box.owners() | held[left_over(min(lane ^ 1, left - 1)) - 1].owners();
      const uint32_t own = lane < left ? box.owners() : 0;
#pragma unroll
      for (int w = 0; w < kConsumers; ++w) {
        if (owners >> w & 1 && !(own >> w & 1)) box.hide_from(w);
      }
      place(lane / 2)[lane % 2] = box;
    }
    held_ = masked_leads_ = 0;  // or a tile's order would depend on the one before
    return pairs;
  }

 private:
  struct Order {
    int shared;       // pairs
    int alternating;  // of each consumer

    __device__ int of(uint32_t owners, int pair) const {
      if (owners == 3) return pair;
      const int w = static_cast<int>(owners) - 1;
      return shared + (pair < alternating ? 2 * pair + w : alternating + pair);
    }
  };

  /// Owners of the `index`-th box that is held, shared ones first.
  __device__ uint32_t left_over(int index) const {
    if (held_ >> 3 & 1 && index-- == 0) return 3;
    return held_ >> 1 & 1 && index == 0 ? 1 : 2;
  }

  uint32_t held_ = 0;          // bit: owners of a box that is held
  uint32_t masked_leads_ = 0;  // bit: owners whose masked boxes come before the others
};

}  // namespace sparseattn::sm90
