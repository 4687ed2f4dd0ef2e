// Index lists as real heads have them, and how many (query, key) pairs they select. Host only.
//
// Pairs are counted as the kernels work: in each tile of 64 rows every run of covered keys counts
// in whole 64-wide tiles, and every column at or before the tile's last row that the cover does not
// hold counts once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <utility>
#include <vector>

#include "sparseattn/types.h"

namespace bench {

constexpr int64_t kTile = sparseattn::kTileRows;
constexpr int32_t kSinks = 30;
constexpr int32_t kRun = 51;  // offsets in one cluster

/// `count` distinct columns below `tokens`, ascending: 30 sinks, the rest uniform.
inline std::vector<int32_t> random_columns(int32_t tokens, int32_t count, std::mt19937_64& random) {
  std::vector<char> chosen(static_cast<size_t>(tokens), 0);
  int32_t found = std::min(count, kSinks);
  std::fill_n(chosen.begin(), found, 1);
  std::uniform_int_distribution<int32_t> any(0, tokens - 1);
  while (found < count) {
    char& one = chosen[static_cast<size_t>(any(random))];
    found += one == 0;
    one = 1;
  }
  std::vector<int32_t> columns;
  for (int32_t i = 0; i < tokens; ++i) {
    if (chosen[static_cast<size_t>(i)]) columns.push_back(i);
  }
  return columns;
}

/// `count` distinct offsets below `tokens`, ascending: the nearest 1000 (half of them, at least
/// 100, if not more than 1000 are asked for), then runs of 51 from log-uniform distances.
inline std::vector<int32_t> clustered_offsets(int32_t tokens, int32_t count,
                                              std::mt19937_64& random) {
  const int32_t local = count > 1000 ? 1000 : std::max(100, count / 2);
  std::vector<char> chosen(static_cast<size_t>(tokens), 0);
  int32_t found = std::min(count, local);
  std::fill_n(chosen.begin(), found, 1);
  std::uniform_real_distribution<double> place(std::log(static_cast<double>(local)),
                                               std::log(static_cast<double>(tokens - kTile)));
  while (found < count) {
    const auto start = static_cast<int32_t>(std::exp(place(random)));
    for (int32_t i = start; i < std::min(start + kRun, tokens); ++i) {
      found += chosen[static_cast<size_t>(i)] == 0;
      chosen[static_cast<size_t>(i)] = 1;
    }
  }
  std::vector<int32_t> offsets;
  for (int32_t i = 0; i < tokens && static_cast<int32_t>(offsets.size()) < count; ++i) {
    if (chosen[static_cast<size_t>(i)]) offsets.push_back(i);
  }
  return offsets;
}

/// Pairs of one head, q_len == kv_len == tokens.
inline double vertical_slash_pairs(const std::vector<int32_t>& columns,
                                   const std::vector<int32_t>& offsets, int32_t tokens) {
  const int64_t end = (tokens + kTile - 1) / kTile * kTile;  // of the last tile
  // Distances from a tile's end: offset o covers o .. o + 63.
  std::vector<char> cover(static_cast<size_t>(end), 0);
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (const int32_t offset : offsets) {  // ascending
    const int64_t first = offset, last = std::min<int64_t>(offset + kTile, end);
    if (runs.empty() || runs.back().second < first) runs.emplace_back(first, first);
    std::fill(cover.begin() + std::max(first, runs.back().second), cover.begin() + last, 1);
    runs.back().second = last;
  }
  double tiles = 0;  // 64-wide pieces of runs
  for (int64_t tile_end = kTile; tile_end <= end; tile_end += kTile) {
    for (const auto& [first, last] : runs) {
      if (first >= tile_end) break;
      tiles += static_cast<double>((std::min(last, tile_end) - first + kTile - 1) / kTile);
    }
  }
  // Tiles that see a column alone: uncovered distances in steps of a tile.
  std::vector<int32_t> alone(static_cast<size_t>(end));
  for (int64_t d = 0; d < end; ++d) {
    const int32_t before = d < kTile ? 0 : alone[static_cast<size_t>(d - kTile)];
    alone[static_cast<size_t>(d)] = before + (cover[static_cast<size_t>(d)] == 0);
  }
  double single = 0;
  for (const int32_t column : columns) single += alone[static_cast<size_t>(end - 1 - column)];
  return kTile * (tiles * kTile + single);
}

/// Visible pairs of one head.
inline double a_shape_pairs(int64_t tokens, int64_t sink, int64_t window) {
  double pairs = 0;
  for (int64_t seen = 1; seen <= tokens; ++seen) {  // keys at or before the row
    const int64_t recent = std::min(seen, window);
    pairs += static_cast<double>(recent + std::min(seen - recent, sink));
  }
  return pairs;
}

}  // namespace bench
