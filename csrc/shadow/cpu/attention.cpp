// Decode attention over exact rows and selected chunks.
//
// One work item is one key/value head of one sequence. All its query rows (query heads of the group
// times q_len, see QueryGroup) stay packed in panels, and the keys come by 128: exact rows as they
// are, then rebuilt keys with the values of their slots.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/panel.h"
#include "common/cpu/work.h"
#include "shadow/cpu/group.h"
#include "shadow/cpu/rebuild.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

class HeadCall {
 public:
  HeadCall(const ShadowAttention& p, const Kernels& kernels, int64_t sequence, int64_t head)
      : p_(p),
        kernels_(kernels),
        sequence_(sequence),
        head_(head),
        group_{p.q, p.dtype, p.shape.group(), p.shape.head_dim},
        q_rows_(p.q_lens.at(sequence, p.shape.q_len)),
        rows_(q_rows_ * group_.heads),
        tiles_((rows_ + kTileRows - 1) / kTileRows),
        queries_(tile_floats()),
        out_(tile_floats()),
        state_(static_cast<size_t>(tiles_) * kPanels) {
    for (int32_t tile = 0; tile < tiles_; ++tile) {
      const int32_t first = tile * kTileRows;
      group_.pack(kernels, sequence, head, first, std::min(kTileRows, rows_ - first), p.scale,
                  queries_.data() + int64_t{first} * p.shape.head_dim);
    }
    for (PanelState& state : state_) start(&state);
    std::fill_n(out_.data(), tile_floats(), 0.0f);
  }

  void run() {
    if (rows_ > 0) {
      exact_rows();
      selected_chunks();
    }
    finish();
  }

 private:
  size_t tile_floats() const { return static_cast<size_t>(tiles_) * kTileRows * p_.shape.head_dim; }

  void exact_rows() {
    const int32_t length = p_.exact_lens.at(sequence_, p_.shape.kv_len);
    const Rows k = rows_of_head(p_.k, p_.dtype, sequence_, head_, 0);
    const Rows v = rows_of_head(p_.v, p_.dtype, sequence_, head_, 0);
    int32_t ids[kChunkKeys];
    for (int32_t begin = start_of(p_.exact_starts, sequence_, length); begin < length;
         begin += kChunkKeys) {
      const int32_t count = std::min(kChunkKeys, length - begin);
      for (int32_t i = 0; i < count; ++i) {
        ids[i] = begin + i;
        // The last q_rows_ rows are those of the queries: row length - q_rows_ + i from query i on.
        first_[i] = std::max(0, begin + i - (length - q_rows_)) * group_.heads;
      }
      kernels_.pack_keys(k, ids, count, p_.shape.head_dim, keys_.data());
      kernels_.pack_values(v, ids, count, p_.shape.head_dim, values_.data());
      take(count);
    }
  }

  void selected_chunks() {
    const int32_t chunk = p_.keys.chunk;
    const int64_t list = (sequence_ * p_.shape.kv_heads + head_) * p_.top_k;
    Rebuilder rebuilder(kernels_, p_.keys, p_.dtype, p_.shape.head_dim, p_.shape.kv_heads,
                        sequence_, head_);
    Rows v = rows_of_head(p_.values, p_.dtype, sequence_, head_, 0);
    v.row_stride = p_.shape.head_dim;  // of a token: chunks lie one after the other
    int32_t tokens[kChunkKeys], value_rows[kChunkKeys];
    int32_t count = 0;
    std::fill_n(first_, kChunkKeys, 0);
    const auto flush = [&] {
      if (count == 0) return;
      rebuilder.rebuild(tokens, count, keys_.data());
      kernels_.pack_values(v, value_rows, count, p_.shape.head_dim, values_.data());
      take(count);
      count = 0;
    };
    for (int32_t j = 0; j < p_.top_k; ++j) {
      const int32_t id = p_.selected[list + j], slot = p_.slot_of[list + j];
      if (!rebuilder.holds(id) || slot < 0 || slot >= p_.slots) continue;
      for (int32_t i = 0; i < chunk; ++i, ++count) {
        tokens[count] = id * chunk + i;
        value_rows[count] = slot * chunk + i;
      }
      if (count == kChunkKeys) flush();
    }
    flush();
  }

  /// Takes `count` packed keys into every panel; key i is visible from row first_[i] on.
  void take(int32_t count) {
    const int32_t padded = (count + kKeyGroup - 1) / kKeyGroup * kKeyGroup;
    const int32_t dim = p_.shape.head_dim;
    bool masked = padded != count;
    for (int32_t i = 0; i < padded; ++i) {
      last_[i] = i < count ? rows_ + kTileRows : 0;  // rows past the last one never count
      masked = masked || first_[i] > 0;
    }
    for (int32_t row = 0; row < rows_; row += kPanelRows) {
      PanelState& state = state_[row / kPanelRows];
      kernels_.scores(queries_.data() + int64_t{row} * dim, keys_.data(), padded, dim,
                      scores_.data());
      if (masked) kernels_.mask(first_, last_, padded, row, scores_.data());
      kernels_.softmax(scores_.data(), padded, &state);
      kernels_.accumulate(scores_.data(), values_.data(), padded, dim, state.decay,
                          out_.data() + int64_t{row} * dim);
    }
  }

  void finish() const {
    const int32_t dim = p_.shape.head_dim;
    const size_t bytes = size_t(dim) * (p_.dtype == DType::kFloat32 ? 4 : 2);
    alignas(4) char stored[kPanelRows * kMaxHeadDim * 4];
    for (int32_t r = 0; r < p_.shape.q_len * group_.heads; ++r) {
      const int32_t lane = r % kPanelRows;
      float lse = -INFINITY;
      if (r < rows_) {
        const PanelState& state = state_[r / kPanelRows];
        lse = lse_of(state, lane);
        if (lane == 0) {
          float factor[kPanelRows];
          for (int32_t i = 0; i < kPanelRows; ++i) factor[i] = out_factor(state, i);
          kernels_.store(out_.data() + int64_t{r} * dim, factor, std::min(kPanelRows, rows_ - r),
                         dim, {stored, dim, p_.dtype});
        }
      }
      void* to = group_.row(p_.out, sequence_, head_, r).data;
      if (r < rows_) {
        std::memcpy(to, stored + lane * bytes, bytes);
      } else {
        std::memset(to, 0, bytes);
      }
      if (p_.lse == nullptr) continue;
      const int64_t q_head = head_ * group_.heads + r % group_.heads;
      p_.lse[(sequence_ * p_.shape.q_heads + q_head) * p_.shape.q_len + r / group_.heads] = lse;
    }
  }

  const ShadowAttention& p_;
  const Kernels& kernels_;
  const int64_t sequence_, head_;
  const QueryGroup group_;
  const int32_t q_rows_;  // of this sequence
  const int32_t rows_;    // of the group
  const int32_t tiles_;
  FloatBuffer queries_;            // [tile][panel][dim][kPanelRows]
  FloatBuffer out_;                // the same
  std::vector<PanelState> state_;  // [tile][panel]
  FloatBuffer keys_{kChunkKeys * kMaxHeadDim};
  FloatBuffer values_{kPackedValues};
  FloatBuffer scores_{kChunkKeys * kPanelRows};
  int32_t first_[kChunkKeys];
  int32_t last_[kChunkKeys];
};

}  // namespace

Status shadow_attention(const ShadowAttention& p, const ParallelFor& parallel_for) {
  const Shape& shape = p.shape;
  Status status =
      check({shape.batch, shape.q_heads, shape.kv_heads, 1, 1, shape.head_dim}, p.dtype);
  if (status.ok()) status = check(p.keys, shape.head_dim);
  if (!status.ok()) return status;
  const Kernels& kernels = select_kernels();
  struct NoScratch {};
  const int64_t heads = int64_t{shape.batch} * shape.kv_heads;
  for_each_item<NoScratch>(parallel_for, heads, [&](int64_t i, NoScratch&) {
    HeadCall(p, kernels, i / shape.kv_heads, i % shape.kv_heads).run();
  });
  return {};
}

}  // namespace sparseattn::cpu
