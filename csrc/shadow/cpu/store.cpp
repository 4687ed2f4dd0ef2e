// Rows into a store and out of it, as they are or quantised.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/cpu/work.h"
#include "shadow/cpu/e4m3.h"
#include "shadow/cpu/numbers.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

constexpr int32_t kRowsOfItem = 256;

/// Row `row` of the store; x is its first row of x.
void store_row(const StoreRows& p, int64_t sequence, int64_t head, int64_t row, const Rows& x) {
  const int64_t element = p.dtype == DType::kFloat32 ? 4 : 2;
  const char* from = static_cast<const char*>(x.data);
  const int64_t stride = x.row_stride * element;
  if (!p.scales.quantised()) {
    char* to = static_cast<char*>(rows_of_head(p.store, p.dtype, sequence, head, row).data);
    for (int32_t i = 0; i < p.group; ++i) {
      std::memcpy(to + i * p.dim * element, from + i * stride, p.dim * element);
    }
    return;
  }
  float largest = 0.0f;
  for (int32_t i = 0; i < p.group; ++i) {
    for (int32_t d = 0; d < p.dim; ++d) {
      const float size = std::fabs(load(from + i * stride, d, p.dtype));
      if (size > largest) largest = size;  // NaN is not
    }
  }
  const float scale = largest / kLargestE4m3;
  p.scales.of_head(sequence, head)[row] = scale;
  uint8_t* to = e4m3_of_head(p.store, sequence, head, row);
  for (int32_t i = 0; i < p.group; ++i) {
    for (int32_t d = 0; d < p.dim; ++d) {
      const float number = load(from + i * stride, d, p.dtype);
      *to++ = to_e4m3(scale > 0.0f ? number / scale : number);
    }
  }
}

}  // namespace

Status store_rows(const StoreRows& p, const ParallelFor& parallel_for) {
  if (p.group < 1 || p.rows % p.group != 0) return {1, "rows: expected a multiple of group"};
  struct NoScratch {};
  const int64_t rows = p.rows / p.group;
  const int64_t items = (rows + kRowsOfItem - 1) / kRowsOfItem;
  for_each_item<NoScratch>(
      parallel_for, int64_t{p.batch} * p.heads * items, [&](int64_t item, NoScratch&) {
        const int64_t sequence = item / items / p.heads, head = item / items % p.heads;
        const int64_t first = item % items * kRowsOfItem;
        for (int64_t row = first; row < std::min(rows, first + kRowsOfItem); ++row) {
          store_row(p, sequence, head, p.first + row,
                    rows_of_head(p.x, p.dtype, sequence, head, row * p.group));
        }
      });
  return {};
}

Status gather_values(const GatherValues& p, const ParallelFor& parallel_for) {
  struct NoScratch {};
  const auto& numbers = e4m3_numbers();
  const int64_t elements = p.row_bytes / (p.dtype == DType::kFloat32 ? 4 : 2);
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  for_each_item<NoScratch>(parallel_for, heads, [&](int64_t head, NoScratch&) {
    const int64_t sequence = head / p.kv_heads, kv_head = head % p.kv_heads;
    const int32_t* misses = p.misses + head * p.top_k * 2;
    const int32_t count = std::min(p.miss_count[head], p.top_k);
    for (int32_t i = 0; i < count; ++i) {
      const int32_t slot = misses[2 * i], chunk = misses[2 * i + 1];
      if (slot < 0 || slot >= p.slots || chunk < 0 || chunk >= p.chunks) continue;
      void* to = rows_of_head(p.values, p.dtype, sequence, kv_head, slot).data;
      if (!p.store_scales.quantised()) {
        std::memcpy(to, rows_of_head(p.store, p.dtype, sequence, kv_head, chunk).data, p.row_bytes);
        continue;
      }
      const float scale = p.store_scales.of_head(sequence, kv_head)[chunk];
      const uint8_t* from = e4m3_of_head(p.store, sequence, kv_head, chunk);
      for (int64_t j = 0; j < elements; ++j) save(to, j, p.dtype, numbers[from[j]] * scale);
    }
  });
  return {};
}

}  // namespace sparseattn::cpu
