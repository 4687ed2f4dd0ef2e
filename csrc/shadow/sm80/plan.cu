// Which slots hold the values of the selected chunks, and which are to be fetched into which slot.
//
// One CTA plans for one key/value head. Selected chunks go into a hash table that every slot asks
// for its own chunk; slots of hits are stamped at once, so that whatever carries the new stamp is
// in use. Of the others as many as there are misses are chosen by (last used, slot) with the exact
// selection of the index, and sorted. Entries of the table lie where timing puts them, but what is
// found there does not depend on it: the chunks are distinct.
#include <algorithm>

#include "common/cuda/launch.h"
#include "index/sm80/select.cuh"
#include "shadow/sm80/checks.h"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kPlanDigitBits = 11;
using PlanTeam = cuda::Team<16>;
using PlanSelect = index_sm80::SelectScratch<PlanTeam, kPlanDigitBits>;
/// Shared memory of a CTA beside the arrays.
constexpr int64_t kPlanStaticBytes = sizeof(PlanSelect) + 1024;
constexpr int32_t kNoSlot = INT32_MAX;

/// The arrays of a head in shared memory, or in the workspace where there is no room. `room` is a
/// power of two, at least top_k.
struct PlanArrays {
  static constexpr int64_t kBytesPerChunk = 24;

  uint64_t* order;    // [room] (last used, slot) of the slots to fill
  int32_t* table;     // [2 * room] places in the list of selected chunks, -1: empty
  int32_t* missed;    // [room] place of each miss; takes the first half of the table
  int32_t* chosen;    // [room] slots to fill, ascending; takes the second half
  int32_t* selected;  // [room]
  int32_t* held;      // [room] the slot that holds each selected chunk, or kNoSlot

  __device__ PlanArrays(unsigned char* memory, int64_t room)
      : order(reinterpret_cast<uint64_t*>(memory)),
        table(reinterpret_cast<int32_t*>(order + room)),
        missed(table),
        chosen(table + room),
        selected(table + 2 * room),
        held(selected + room) {}
};

/// First place to look for a chunk; `mask` is the size of the table less one.
__device__ __forceinline__ uint32_t hash_of(int32_t chunk, uint32_t mask) {
  const uint32_t mixed = static_cast<uint32_t>(chunk) * 2654435769u;
  return (mixed ^ mixed >> 15) & mask;
}

/// Sorts n (a power of two) numbers ascending. A warp's pairs of step <= 32 stay in 64 numbers that
/// no other warp touches.
template <class Team>
__device__ __forceinline__ void sort_ascending(uint64_t* numbers, int32_t n) {
  for (int32_t size = 2; size <= n; size *= 2) {
    for (int32_t step = size / 2; step > 0; step /= 2) {
      for (int32_t i = Team::rank(); i < n / 2; i += Team::kThreads) {
        const int32_t a = 2 * i - (i & (step - 1)), b = a + step;
        const uint64_t x = numbers[a], y = numbers[b];
        if ((x > y) == ((a & size) == 0)) {
          numbers[a] = y;
          numbers[b] = x;
        }
      }
      const int32_t next = step > 1 ? step / 2 : size;
      if (step > 32 || next > 32) {
        Team::sync();
      } else {
        __syncwarp();
      }
    }
  }
  Team::sync();
}

/// A CTA for each head of [batch, kv_heads].
__global__ void __launch_bounds__(PlanTeam::kThreads)
    plan_kernel(const __grid_constant__ ShadowPlan in, int32_t room, unsigned char* workspace) {
  using Team = PlanTeam;
  extern __shared__ __align__(16) unsigned char smem[];
  __shared__ PlanSelect select;
  __shared__ int32_t scan[Team::kWarps];
  const int64_t head = blockIdx.x;
  const PlanArrays s(
      workspace == nullptr ? smem : workspace + head * room * PlanArrays::kBytesPerChunk, room);
  const int32_t rank = Team::rank(), top_k = in.top_k, slots = in.slots;
  const int32_t* selected = in.selected + head * top_k;
  int32_t* slot_chunk = in.slot_chunk + head * slots;
  int32_t* last_used = in.last_used + head * slots;
  int32_t* slot_of = in.slot_of + head * top_k;
  int32_t* misses = in.misses + head * top_k * 2;

  for (int32_t i = rank; i < 2 * room; i += Team::kThreads) s.table[i] = -1;
  for (int32_t i = rank; i < top_k; i += Team::kThreads) {
    s.selected[i] = selected[i];
    s.held[i] = kNoSlot;
  }
  Team::sync();
  const uint32_t mask = 2 * static_cast<uint32_t>(room) - 1;
  for (int32_t i = rank; i < top_k; i += Team::kThreads) {
    const int32_t chunk = s.selected[i];
    if (chunk < 0) continue;
    uint32_t at = hash_of(chunk, mask);
    while (atomicCAS(s.table + at, -1, i) != -1) at = (at + 1) & mask;
  }
  Team::sync();

  int32_t latest = 0;
  for (int32_t slot = rank; slot < slots; slot += Team::kThreads) {
    const int32_t chunk = slot_chunk[slot];
    latest = max(latest, last_used[slot]);
    if (chunk < 0) continue;
    uint32_t at = hash_of(chunk, mask);
    for (int32_t i = s.table[at]; i >= 0; i = s.table[at]) {
      if (s.selected[i] == chunk) {
        atomicMin(s.held + i, slot);
        break;
      }
      at = (at + 1) & mask;
    }
  }
  int32_t stamp;
  cuda::team_scan<Team>(latest, 0, cuda::Max{}, scan, stamp);
  ++stamp;

  // The scan was a barrier: the table is free, and all stamps were read.
  int32_t count = 0;
  for (int32_t base = 0; base < top_k; base += Team::kThreads) {
    const int32_t i = base + rank;
    const bool exists = i < top_k;
    const int32_t slot = exists ? s.held[i] : 0;
    const bool miss = exists && slot == kNoSlot && s.selected[i] >= 0;
    int32_t found;
    const int32_t before =
        cuda::team_scan<Team>(static_cast<int32_t>(miss), 0, cuda::Add{}, scan, found);
    if (miss) s.missed[count + before] = i;
    if (exists && !miss) slot_of[i] = slot == kNoSlot ? -1 : slot;
    if (exists && slot != kNoSlot) last_used[slot] = stamp;
    count += found;
  }
  Team::sync();

  const auto key_at = [last_used, stamp](int32_t slot) {
    const int32_t used = last_used[slot];
    return used == stamp ? 0u : max(1u, ~(static_cast<uint32_t>(used) ^ 0x80000000u));
  };
  const index_sm80::Threshold threshold =
      index_sm80::find_threshold<Team, kPlanDigitBits>(slots, count, key_at, select);
  index_sm80::write_selected<Team>(slots, count, threshold, key_at, s.chosen, count, scan);
  Team::sync();
  int32_t length = 1;
  while (length < count) length *= 2;
  for (int32_t i = rank; i < length; i += Team::kThreads) {
    uint64_t entry = ~uint64_t{0};
    if (i < count) {
      const int32_t slot = s.chosen[i];
      entry = static_cast<uint64_t>(static_cast<uint32_t>(last_used[slot]) ^ 0x80000000u) << 32 |
              static_cast<uint32_t>(slot);
    }
    s.order[i] = entry;
  }
  Team::sync();
  sort_ascending<Team>(s.order, length);

  for (int32_t j = rank; j < top_k; j += Team::kThreads) {
    int32_t slot = -1, chunk = -1;
    if (j < count) {
      const int32_t i = s.missed[j];
      slot = static_cast<int32_t>(s.order[j] & 0xffffffffu);
      chunk = s.selected[i];
      slot_of[i] = slot;
      slot_chunk[slot] = chunk;
      last_used[slot] = stamp;
    }
    misses[2 * j] = slot;
    misses[2 * j + 1] = chunk;
  }
  if (rank == 0) in.miss_count[head] = count;
}

inline int64_t plan_room(const ShadowPlan& in) {
  int64_t room = 1;
  while (room < in.top_k) room *= 2;
  return room;
}

inline bool plan_is_shared(const ShadowPlan& in) {
  return plan_room(in) * PlanArrays::kBytesPerChunk + kPlanStaticBytes <= shared_bytes_limit();
}

}  // namespace shadow_sm80

size_t shadow_plan_bytes(const ShadowPlan& in) {
  using namespace shadow_sm80;
  if (plan_is_shared(in)) return 0;
  return static_cast<size_t>(in.batch) * in.kv_heads * plan_room(in) * PlanArrays::kBytesPerChunk;
}

Status shadow_plan(const ShadowPlan& in, void* workspace, cudaStream_t stream) {
  using namespace shadow_sm80;
  if (in.batch < 0 || in.kv_heads < 0 || in.top_k < 0) {
    return {1, "shadow_plan: sizes: expected numbers >= 0"};
  }
  if (in.slots < in.top_k) return {1, "shadow_plan: slots: expected at least top_k"};
  if (in.top_k > 1 << 29) return {1, "shadow_plan: top_k: expected at most 2^29"};
  const int64_t heads = static_cast<int64_t>(in.batch) * in.kv_heads;
  if (heads == 0) return {};
  if (!cuda::grid_fits(heads)) return {1, "shadow_plan: more heads than a grid can hold"};
  const int64_t room = plan_room(in);
  const bool is_shared = plan_is_shared(in);
  if (!is_shared && workspace == nullptr) {
    return {1, "shadow_plan: workspace: expected the bytes of shadow_plan_bytes, got none"};
  }
  const int64_t bytes = is_shared ? room * PlanArrays::kBytesPerChunk : 0;
  const Status status = cuda::to_status(cudaFuncSetAttribute(
      plan_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (!status.ok()) return status;
  plan_kernel<<<static_cast<unsigned>(heads), PlanTeam::kThreads, bytes, stream>>>(
      in, static_cast<int32_t>(room), is_shared ? nullptr : static_cast<unsigned char*>(workspace));
  return cuda::launch_status();
}

}  // namespace sparseattn
