// Work sharing and scratch memory of the CPU operators.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

#include "common/cpu/kernels.h"
#include "sparseattn/cpu.h"

namespace sparseattn::cpu {

/// 64-byte aligned array of floats, uninitialised.
class FloatBuffer {
 public:
  explicit FloatBuffer(size_t count)
      : data_(static_cast<float*>(::operator new(count * sizeof(float), kAlignment))) {}
  ~FloatBuffer() { ::operator delete(data_, kAlignment); }
  FloatBuffer(const FloatBuffer&) = delete;
  FloatBuffer& operator=(const FloatBuffer&) = delete;
  float* data() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  float* data_;
};

/// Runs item(i, scratch) once for every i in [0, n). Items are unequal, so each thread that
/// `parallel_for` brings takes the next open item, in order, until none is left; the pieces that
/// `parallel_for` hands out are only used as threads. Give long items first.
template <class Scratch, class Item>
void for_each_item(const ParallelFor& parallel_for, int64_t n, const Item& item) {
  std::atomic<int64_t> next{0};
  parallel_for(n, [&](int64_t, int64_t) {
    int64_t i = next.fetch_add(1);
    if (i >= n) return;
    Scratch scratch;
    for (; i < n; i = next.fetch_add(1)) item(i, scratch);
  });
}

/// Rows of one head of `view`, from row `first` on.
inline Rows rows_of_head(const View& view, DType dtype, int64_t sequence, int64_t head,
                         int64_t first) {
  const int64_t element = dtype == DType::kFloat32 ? 4 : 2;
  char* data =
      static_cast<char*>(view.data) +
      element * (sequence * view.batch_stride + head * view.head_stride + first * view.row_stride);
  return {data, view.row_stride, dtype};
}

/// What all CPU operators require of their sizes.
inline Status check(const Shape& s, DType dtype) {
  if (dtype != DType::kFloat32 && dtype != DType::kBFloat16) {
    return {1, "dtype: expected fp32 or bf16"};
  }
  if (s.head_dim != 16 && s.head_dim != 32 && s.head_dim != 64 && s.head_dim != 96 &&
      s.head_dim != 128) {
    return {1, "head_dim: expected 16, 32, 64, 96 or 128"};
  }
  if (s.batch < 0 || s.q_heads < 1 || s.kv_heads < 1 || s.q_heads % s.kv_heads != 0) {
    return {1, "heads: expected batch >= 0 and q_heads a positive multiple of kv_heads"};
  }
  if (s.q_len < 1 || s.kv_len < s.q_len) return {1, "lengths: expected 1 <= q_len <= kv_len"};
  return {};
}

inline Status check_head_ids(const int32_t* head_ids, int32_t heads, int32_t q_heads) {
  if (heads < 0 || (head_ids == nullptr && heads > q_heads)) {
    return {1, "heads: expected 0 <= heads <= q_heads"};
  }
  for (int32_t i = 0; head_ids != nullptr && i < heads; ++i) {
    if (head_ids[i] < 0 || head_ids[i] >= q_heads) {
      return {1, "head_ids: expected 0 <= head_ids[i] < q_heads"};
    }
  }
  return {};
}

}  // namespace sparseattn::cpu
