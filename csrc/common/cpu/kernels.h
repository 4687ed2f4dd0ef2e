// The numeric inner loops of the CPU operators, one table of them per instruction set.
//
// All of them see query rows in vector lanes: a panel holds kPanelRows query rows transposed, so
// scores, probabilities and the output accumulator are [key or dim][row] arrays, softmax needs no
// sums across lanes, and one key or value element is broadcast against all rows of a panel.
// Panels, packed keys and packed values are scratch of the calling thread, 64-byte aligned.
#pragma once

#include <cstdint>

#include "sparseattn/types.h"

namespace sparseattn::cpu {

constexpr int32_t kPanelRows = 32;
constexpr int32_t kPanels = kTileRows / kPanelRows;
constexpr int32_t kMaxHeadDim = 128;
constexpr int32_t kChunkKeys = 128;  // keys packed and attended to at a time
constexpr int32_t kKeyGroup = 8;     // chunks are padded with zero keys to a multiple of this
constexpr int32_t kDimGroup = 8;     // every head_dim is a multiple of this
// Floats from one group of dims to the next in packed values; not a multiple of 4 KiB, so that the
// groups of one row do not compete for one cache set.
constexpr int32_t kValueGroup = kChunkKeys * kDimGroup + 16;
constexpr int32_t kPackedValues = kMaxHeadDim / kDimGroup * kValueGroup;

/// Rows of one head of q, k, v or out.
struct Rows {
  void* data;
  int64_t row_stride;  // elements
  DType dtype;         // fp32 or bf16
};

/// Running softmax of one panel, in the log2 domain: max, sum, and the factor by which the latest
/// chunk shrinks what was summed before.
struct alignas(64) PanelState {
  float max[kPanelRows];
  float sum[kPanelRows];
  float decay[kPanelRows];
};

struct Kernels {
  const char* name;

  /// panels [kPanels][head_dim][kPanelRows] = rows[0, count) * factor; missing rows are 0.
  void (*pack_queries)(const Rows& rows, int32_t count, int32_t head_dim, float factor,
                       float* panels);
  /// packed [count, then zero rows up to a multiple of kKeyGroup][kMaxHeadDim] = rows[keys[i]].
  void (*pack_keys)(const Rows& rows, const int32_t* keys, int32_t count, int32_t head_dim,
                    float* packed);
  /// packed [head_dim / kDimGroup] groups, kValueGroup apart, of [kChunkKeys][kDimGroup], padded in
  /// the same way.
  void (*pack_values)(const Rows& rows, const int32_t* keys, int32_t count, int32_t head_dim,
                      float* packed);
  /// scores [count][kPanelRows] = keys . panel; count is a multiple of kKeyGroup.
  void (*scores)(const float* panel, const float* keys, int32_t count, int32_t head_dim,
                 float* scores);
  /// Key i stays visible to rows first[i] <= row < last[i] of the tile, else its score is -inf.
  /// `row` is the tile's row in lane 0 of the panel.
  void (*mask)(const int32_t* first, const int32_t* last, int32_t count, int32_t row,
               float* scores);
  /// Takes a chunk into the running softmax; scores become probabilities relative to state->max.
  void (*softmax)(float* scores, int32_t count, PanelState* state);
  /// scores become exp2(score - max) * factor, per row.
  void (*probabilities)(float* scores, int32_t count, const float* max, const float* factor);
  /// out [head_dim][kPanelRows] = out * decay + values . probabilities.
  void (*accumulate)(const float* probabilities, const float* values, int32_t count,
                     int32_t head_dim, const float* decay, float* out);
  /// rows[0, count) = out * factor, transposed back.
  void (*store)(const float* out, const float* factor, int32_t count, int32_t head_dim,
                const Rows& rows);
  /// columns[i] += sum of probabilities[i]; offsets[row - i] += probabilities[i][row].
  void (*add_mass)(const float* probabilities, int32_t count, float* columns, float* offsets);
  /// mean [head_dim] of rows [begin, end).
  void (*mean)(const Rows& rows, int64_t begin, int64_t end, int32_t head_dim, float* mean);
};

extern const Kernels kGenericKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

/// The widest table that this CPU runs.
const Kernels& select_kernels();

}  // namespace sparseattn::cpu
