#include "shadow/cpu/rebuild.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "shadow/cpu/e4m3.h"

namespace sparseattn::cpu {
namespace {

/// Columns [first, ...) of rows.
Rows columns_from(const Rows& rows, int64_t first) {
  const int64_t element = rows.dtype == DType::kFloat32 ? 4 : 2;
  return {static_cast<char*>(rows.data) + element * first, rows.row_stride, rows.dtype};
}

}  // namespace

Status check(const LowRankKeys& keys, int32_t head_dim) {
  if (keys.rank < 16 || keys.rank % 16 != 0) return {1, "rank: expected a multiple of 16"};
  if (keys.chunk != 4 && keys.chunk != 8 && keys.chunk != 16 && keys.chunk != 32) {
    return {1, "chunk: expected 4, 8, 16 or 32"};
  }
  const int32_t rotary_dim = keys.rope.rotary_dim;
  if (rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    return {1, "rotary_dim: expected an even number up to head_dim"};
  }
  return {};
}

Rebuilder::Rebuilder(const Kernels& kernels, const LowRankKeys& keys, DType dtype, int32_t head_dim,
                     int64_t kv_heads, int64_t sequence, int64_t head)
    : kernels_(kernels),
      keys_(keys),
      head_dim_(head_dim),
      panels_((head_dim + kPanelRows - 1) / kPanelRows),
      factor_(rows_of_head(keys.factor, dtype, sequence, 0, 0)),
      e4m3_(e4m3_of_head(keys.factor, sequence, 0, 0)),
      scales_(keys.factor_scales.of_head(sequence, 0)),
      mean_(keys.mean == nullptr ? nullptr : keys.mean + (sequence * kv_heads + head) * head_dim),
      basis_(static_cast<size_t>(panels_) * keys.rank * kPanelRows) {
  const Rows basis = rows_of_head(keys.basis, dtype, sequence, head, 0);
  int32_t ids[kChunkKeys];
  std::fill_n(basis_.data(), static_cast<size_t>(panels_) * keys.rank * kPanelRows, 0.0f);
  for (int32_t first = 0; first < keys.rank; first += kChunkKeys) {
    const int32_t count = std::min(kChunkKeys, keys.rank - first);
    for (int32_t i = 0; i < count; ++i) ids[i] = first + i;
    kernels.pack_keys(basis, ids, count, head_dim, rows_.data());
    for (int32_t i = 0; i < count; ++i) {
      for (int32_t d = 0; d < head_dim; ++d) {
        basis_.data()[(int64_t{d} / kPanelRows * keys.rank + first + i) * kPanelRows +
                      d % kPanelRows] = rows_.data()[i * kMaxHeadDim + d];
      }
    }
  }
}

void Rebuilder::rebuild(const int32_t* tokens, int32_t count, float* out) {
  const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
  for (int32_t i = 0; i < padded; ++i) {
    float* key = out + i * kMaxHeadDim;
    if (i < count && mean_ != nullptr) {
      std::copy_n(mean_, head_dim_, key);
    } else {
      std::fill_n(key, head_dim_, 0.0f);
    }
  }
  // The score kernel contracts over at most kMaxHeadDim elements: the rank goes in pieces.
  for (int32_t first = 0; first < keys_.rank; first += kMaxHeadDim) {
    const int32_t length = std::min(kMaxHeadDim, keys_.rank - first);
    pack_factor(tokens, count, first, length);
    for (int32_t panel = 0; panel < panels_; ++panel) {
      const int32_t dims = std::min(kPanelRows, head_dim_ - panel * kPanelRows);
      kernels_.scores(basis_.data() + (int64_t{panel} * keys_.rank + first) * kPanelRows,
                      rows_.data(), padded, length, products_.data());
      for (int32_t i = 0; i < count; ++i) {
        float* key = out + i * kMaxHeadDim + panel * kPanelRows;
        for (int32_t d = 0; d < dims; ++d) key[d] += products_.data()[i * kPanelRows + d];
      }
    }
  }
  for (int32_t i = 0; i < count; ++i) rotate(tokens[i], out + i * kMaxHeadDim);
}

void Rebuilder::pack_factor(const int32_t* tokens, int32_t count, int32_t first, int32_t length) {
  if (!keys_.factor_scales.quantised()) {
    kernels_.pack_keys(columns_from(factor_, first), tokens, count, length, rows_.data());
    return;
  }
  const auto& numbers = e4m3_numbers();
  const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
  for (int32_t i = 0; i < padded; ++i) {
    float* row = rows_.data() + i * kMaxHeadDim;
    if (i >= count) {
      std::fill_n(row, length, 0.0f);
      continue;
    }
    const uint8_t* from = e4m3_ + tokens[i] * keys_.factor.row_stride + first;
    for (int32_t d = 0; d < length; ++d) row[d] = numbers[from[d]] * scales_[tokens[i]];
  }
}

void Rebuilder::rotate(int32_t token, float* key) const {
  const Rope& rope = keys_.rope;
  const int32_t half = rope.rotary_dim / 2;
  for (int32_t i = 0; i < half; ++i) {
    const float angle = static_cast<float>(token) * rope.inv_freq[i];
    const float cosine = std::cos(angle) * rope.scale, sine = std::sin(angle) * rope.scale;
    float& a = key[rope.interleaved ? 2 * i : i];
    float& b = key[rope.interleaved ? 2 * i + 1 : i + half];
    const float x = a, y = b;
    a = x * cosine - y * sine;
    b = y * cosine + x * sine;
  }
}

Status lowrank_reconstruct(const LowRankReconstruct& p, const ParallelFor& parallel_for) {
  Status status = check({p.batch, p.kv_heads, p.kv_heads, 1, 1, p.head_dim}, p.dtype);
  if (status.ok()) status = check(p.keys, p.head_dim);
  if (!status.ok()) return status;
  const Kernels& kernels = select_kernels();
  const int32_t chunk = p.keys.chunk, per_batch = kPanelRows / chunk;
  struct NoScratch {};
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  for_each_item<NoScratch>(parallel_for, heads, [&](int64_t item, NoScratch&) {
    const int64_t sequence = item / p.kv_heads, head = item % p.kv_heads;
    Rebuilder rebuilder(kernels, p.keys, p.dtype, p.head_dim, p.kv_heads, sequence, head);
    const FloatBuffer keys(kPanelRows * kMaxHeadDim), columns(kMaxHeadDim * kPanelRows);
    const int32_t* selected = p.selected + item * p.top_k;
    for (int32_t first = 0; first < p.top_k; first += per_batch) {
      const int32_t count = std::min(per_batch, p.top_k - first) * chunk;
      int32_t live = 0, tokens[kPanelRows], place[kPanelRows];
      float factor[kPanelRows];  // 0 stores zeros
      for (int32_t i = 0; i < count; ++i) {
        const int32_t id = selected[first + i / chunk];
        factor[i] = rebuilder.holds(id) ? 1.0f : 0.0f;
        if (!rebuilder.holds(id)) continue;
        tokens[live] = id * chunk + i % chunk;
        place[live++] = i;
      }
      rebuilder.rebuild(tokens, live, keys.data());
      for (int32_t i = 0; i < live; ++i) {
        const float* key = keys.data() + i * kMaxHeadDim;
        for (int32_t d = 0; d < p.head_dim; ++d) columns.data()[d * kPanelRows + place[i]] = key[d];
      }
      kernels.store(columns.data(), factor, count, p.head_dim,
                    rows_of_head(p.out, p.dtype, sequence, head, int64_t{first} * chunk));
    }
  });
  return {};
}

}  // namespace sparseattn::cpu
