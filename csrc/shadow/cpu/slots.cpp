// Which slots hold the values of the selected chunks.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "common/cpu/work.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

struct Scratch {
  std::vector<std::pair<int32_t, int32_t>> held;  // (chunk, slot) ascending
  std::vector<uint8_t> used;
  std::vector<std::pair<int32_t, int32_t>> free;  // (last used, slot) ascending
};

void plan_head(const ShadowPlan& p, int64_t head, Scratch& s) {
  const int32_t* selected = p.selected + head * p.top_k;
  int32_t* slot_chunk = p.slot_chunk + head * p.slots;
  int32_t* last_used = p.last_used + head * p.slots;
  int32_t* slot_of = p.slot_of + head * p.top_k;
  int32_t* misses = p.misses + head * p.top_k * 2;

  int32_t stamp = 0;
  s.held.clear();
  for (int32_t slot = 0; slot < p.slots; ++slot) {
    stamp = std::max(stamp, last_used[slot]);
    if (slot_chunk[slot] >= 0) s.held.emplace_back(slot_chunk[slot], slot);
  }
  ++stamp;
  std::sort(s.held.begin(), s.held.end());

  s.used.assign(p.slots, 0);
  for (int32_t i = 0; i < p.top_k; ++i) {
    slot_of[i] = -1;
    if (selected[i] < 0) continue;
    const auto at = std::lower_bound(s.held.begin(), s.held.end(), std::pair(selected[i], 0));
    if (at == s.held.end() || at->first != selected[i]) continue;
    slot_of[i] = at->second;
    s.used[at->second] = 1;
    last_used[at->second] = stamp;
  }
  s.free.clear();
  for (int32_t slot = 0; slot < p.slots; ++slot) {
    if (s.used[slot] == 0) s.free.emplace_back(last_used[slot], slot);
  }
  std::sort(s.free.begin(), s.free.end());

  int32_t count = 0;
  for (int32_t i = 0; i < p.top_k; ++i) {
    if (selected[i] < 0 || slot_of[i] >= 0) continue;
    const int32_t slot = s.free[count].second;
    slot_of[i] = slot;
    slot_chunk[slot] = selected[i];
    last_used[slot] = stamp;
    misses[2 * count] = slot;
    misses[2 * count + 1] = selected[i];
    ++count;
  }
  std::fill(misses + 2 * count, misses + 2 * p.top_k, -1);
  p.miss_count[head] = count;
}

}  // namespace

Status shadow_plan(const ShadowPlan& p, const ParallelFor& parallel_for) {
  if (p.slots < p.top_k) return {1, "slots: expected at least top_k"};
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  for_each_item<Scratch>(parallel_for, heads,
                         [&](int64_t head, Scratch& scratch) { plan_head(p, head, scratch); });
  return {};
}

}  // namespace sparseattn::cpu
