// Keys before RoPE, heads side by side.
//
// The angles of a row are the same for all heads: their sines and cosines are computed once.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "shadow/cpu/numbers.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

constexpr int32_t kRowsOfItem = 64;

struct Turns {
  float cosine[kMaxHeadDim / 2];
  float sine[kMaxHeadDim / 2];
};

void undo_row(const ShadowUndoRope& p, int64_t sequence, int32_t row, Turns& turns) {
  const int32_t dim = p.head_dim, half = p.rope.rotary_dim / 2;
  const auto position = static_cast<float>(p.first + row);
  for (int32_t i = 0; i < half; ++i) {
    const float angle = position * p.rope.inv_freq[i];
    turns.cosine[i] = std::cos(angle) / p.rope.scale;
    turns.sine[i] = std::sin(angle) / p.rope.scale;
  }
  const int32_t step = p.rope.interleaved ? 2 : 1, apart = p.rope.interleaved ? 1 : half;
  for (int64_t head = 0; head < p.kv_heads; ++head) {
    const void* from = rows_of_head(p.k, p.dtype, sequence, head, row).data;
    void* to = rows_of_head(p.out, p.dtype, sequence, head, row).data;
    float key[kMaxHeadDim];
    for (int32_t d = 0; d < dim; ++d) key[d] = load(from, d, p.dtype);
    for (int32_t i = 0; i < half; ++i) {
      float& a = key[step * i];
      float& b = key[step * i + apart];
      const float x = a, y = b;
      a = x * turns.cosine[i] + y * turns.sine[i];
      b = y * turns.cosine[i] - x * turns.sine[i];
    }
    if (p.mean != nullptr) {
      const float* mean = p.mean + (sequence * p.kv_heads + head) * dim;
      for (int32_t d = 0; d < dim; ++d) key[d] -= mean[d];
    }
    for (int32_t d = 0; d < dim; ++d) save(to, d, p.dtype, key[d]);
  }
}

}  // namespace

Status shadow_undo_rope(const ShadowUndoRope& p, const ParallelFor& parallel_for) {
  const Status status = check({p.batch, p.kv_heads, p.kv_heads, 1, 1, p.head_dim}, p.dtype);
  if (!status.ok()) return status;
  const int32_t rotary_dim = p.rope.rotary_dim;
  if (rotary_dim < 0 || rotary_dim > p.head_dim || rotary_dim % 2 != 0) {
    return {1, "rotary_dim: expected an even number up to head_dim"};
  }
  if (p.rows < 0 || p.first < 0 || p.first > INT32_MAX - p.rows) {
    return {1, "first: expected rows, first >= 0 with first + rows < 2^31"};
  }
  if (p.rope.scale == 0.0f) return {1, "scale: expected a number that is not 0"};
  const int64_t items = (int64_t{p.rows} + kRowsOfItem - 1) / kRowsOfItem;
  for_each_item<Turns>(parallel_for, p.batch * items, [&](int64_t i, Turns& turns) {
    const auto first = static_cast<int32_t>(i % items * kRowsOfItem);
    const int32_t count = std::min(kRowsOfItem, p.rows - first);
    for (int32_t j = 0; j < count; ++j) undo_row(p, i / items, first + j, turns);
  });
  return {};
}

}  // namespace sparseattn::cpu
