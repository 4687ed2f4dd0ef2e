// Which keys each query tile of a head attends to, as sorted runs.
#pragma once

#include <cstdint>
#include <vector>

#include "sparseattn/cpu.h"

namespace sparseattn::cpu {

/// Whole numbers begin .. end-1.
struct Run {
  int64_t begin;
  int64_t end;
};

/// The index of one query head in normal form: memory O(list). Relative to the end e of a query
/// tile the keys that the offsets cover are the same for every tile, so one list serves all.
class KeyList {
 public:
  KeyList() = default;
  KeyList(const HeadIndex& index, const Shape& shape);

  /// Keys that some row of `tile` may see, ascending, disjoint, none beyond the position of the
  /// tile's last real row. Within a run single rows may still not see a key: see `rows_of`.
  void tile_runs(int32_t tile, std::vector<Run>* runs) const;

  /// Rows of the tile that see `key` are [begin, end), rows counted from position `first`.
  Run rows_of(int64_t key, int64_t first) const;

 private:
  void slash_and_columns(int64_t tile_end, int64_t limit, std::vector<Run>* runs) const;
  void blocks(int32_t tile, int64_t limit, std::vector<Run>* runs) const;

  HeadIndex index_;
  Shape shape_{};
  std::vector<Run> distances_;    // keys e-end .. e-begin-1 are covered; ascending, disjoint
  std::vector<int64_t> columns_;  // ascending, distinct
};

}  // namespace sparseattn::cpu
