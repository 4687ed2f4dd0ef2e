#include "attention/cpu/key_list.h"

#include <algorithm>

namespace sparseattn::cpu {
namespace {

/// Appends a run that starts at or after the start of the last one; touching runs are joined.
void append(Run run, std::vector<Run>* runs) {
  if (run.begin >= run.end) return;
  if (!runs->empty() && run.begin <= runs->back().end) {
    runs->back().end = std::max(runs->back().end, run.end);
  } else {
    runs->push_back(run);
  }
}

/// Sorted distinct members of `list` in [0, limit).
std::vector<int64_t> normal_form(const int32_t* list, int32_t count, int64_t limit) {
  std::vector<int64_t> out;
  for (int32_t i = 0; i < count; ++i) {
    if (list[i] >= 0 && list[i] < limit) out.push_back(list[i]);
  }
  std::sort(out.begin(), out.end());
  out.erase(std::unique(out.begin(), out.end()), out.end());
  return out;
}

}  // namespace

KeyList::KeyList(const HeadIndex& index, const Shape& shape) : index_(index), shape_(shape) {
  if (index.kind != PatternKind::kVerticalSlash) return;
  columns_ = normal_form(index.columns, index.num_columns, shape.kv_len);
  // An offset o covers distances o .. o+63 from the tile's end, which is at most kv_len + 63.
  const int64_t span = int64_t{shape.kv_len} + kTileRows;
  for (int64_t o : normal_form(index.offsets, index.num_offsets, span)) {
    append({o, o + kTileRows}, &distances_);
  }
}

void KeyList::tile_runs(int32_t tile, std::vector<Run>* runs) const {
  runs->clear();
  const int64_t tile_end = int64_t{shape_.kv_len} - shape_.q_len + int64_t{kTileRows} * (tile + 1);
  const int64_t limit = std::min<int64_t>(tile_end, shape_.kv_len);
  switch (index_.kind) {
    case PatternKind::kDense:
      append({0, limit}, runs);
      break;
    case PatternKind::kAShape: {
      const int64_t first = tile_end - kTileRows;
      append({0, std::min<int64_t>(index_.sink, limit)}, runs);
      if (index_.window > 0) {
        append({std::max<int64_t>(0, first - index_.window + 1), limit}, runs);
      }
      break;
    }
    case PatternKind::kVerticalSlash:
      slash_and_columns(tile_end, limit, runs);
      break;
    case PatternKind::kBlockSparse:
      blocks(tile, limit, runs);
      break;
  }
}

void KeyList::slash_and_columns(int64_t tile_end, int64_t limit, std::vector<Run>* runs) const {
  // Both lists are walked by ascending key; a column inside a covered run is absorbed by it.
  auto column = columns_.begin();
  for (auto d = distances_.rbegin(); d != distances_.rend(); ++d) {
    const Run cover{std::max<int64_t>(0, tile_end - d->end),
                    std::min<int64_t>(limit, tile_end - d->begin)};
    if (cover.begin >= cover.end) continue;
    for (; column != columns_.end() && *column < cover.begin; ++column) {
      append({*column, *column + 1}, runs);
    }
    while (column != columns_.end() && *column < cover.end) ++column;
    append(cover, runs);
  }
  for (; column != columns_.end() && *column < limit; ++column) {
    append({*column, *column + 1}, runs);
  }
}

void KeyList::blocks(int32_t tile, int64_t limit, std::vector<Run>* runs) const {
  const int64_t row = int64_t{kTileRows} * tile / index_.block_q;
  const uint8_t* mask = index_.block_mask + row * index_.mask_row_stride;
  for (int64_t j = 0; j * index_.block_kv < limit; ++j) {
    if (mask[j * index_.mask_stride] == 0) continue;
    append({j * index_.block_kv, std::min<int64_t>(limit, (j + 1) * index_.block_kv)}, runs);
  }
}

Run KeyList::rows_of(int64_t key, int64_t first) const {
  Run rows{std::max<int64_t>(0, key - first), kTileRows};
  if (index_.kind == PatternKind::kAShape && key >= index_.sink) {
    rows.end = std::min<int64_t>(kTileRows, index_.window + key - first);
  }
  return rows;
}

}  // namespace sparseattn::cpu
