// Where the parts of a plan lie in its workspace.
#include <cstdint>

#include "sparseattn/plan.h"

namespace sparseattn {
namespace {

constexpr size_t kAlignment = 256;

/// Hands out aligned pieces of a workspace; with a null workspace it only counts.
class Carver {
 public:
  explicit Carver(void* workspace) : base_(static_cast<unsigned char*>(workspace)) {}

  void* take_bytes(size_t bytes) {
    void* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  size_t used() const { return used_; }

 private:
  unsigned char* base_;
  size_t used_ = 0;
};

Plan carve(const PlanSizes& sizes, Carver& carver) {
  const Shape& shape = sizes.shape;
  const size_t batch = shape.batch;
  const size_t vs_slots = batch * sizes.vs_heads;
  const size_t bs_slots = batch * sizes.bs_heads;
  const size_t cover_words = vs_slots * sizes.cover_words();
  const size_t element = sizes.dtype == DType::kFloat32 ? 4 : 2;
  const size_t packed_bytes = vs_slots * sizes.packed_rows() * shape.head_dim * element;
  // Without block-sparse heads block_q and block_kv may be zero.
  const size_t block_words =
      sizes.bs_heads == 0 ? 0 : bs_slots * sizes.q_blocks() * sizes.block_words();
  Plan plan{};
  plan.sizes = sizes;
  plan.heads = carver.take<HeadTask>(batch * shape.q_heads);
  plan.vs_heads = carver.take<int32_t>(sizes.vs_heads);
  plan.vs_budget = carver.take<int32_t>(2 * static_cast<size_t>(sizes.vs_heads));
  plan.vs_share = carver.take<int32_t>(sizes.vs_heads);
  plan.bs_heads = carver.take<int32_t>(sizes.bs_heads);
  plan.bs_budget = carver.take<int32_t>(sizes.bs_heads);
  plan.bs_share = carver.take<int32_t>(sizes.bs_heads);
  plan.bs_stride = carver.take<int32_t>(sizes.bs_heads);
  plan.num_segments = carver.take<int32_t>(vs_slots);
  plan.num_columns = carver.take<int32_t>(vs_slots);
  plan.segments = carver.take<Segment>(vs_slots * sizes.max_segments());
  plan.num_pair_segments = carver.take<int32_t>(vs_slots);
  plan.pair_segments = carver.take<PairSegment>(vs_slots * sizes.max_pair_segments());
  plan.columns = carver.take<int32_t>(vs_slots * sizes.max_columns);
  plan.cover = carver.take<uint32_t>(cover_words);
  plan.column_bits = carver.take<uint32_t>(cover_words);
  plan.offset_bits = carver.take<uint32_t>(cover_words);
  plan.packed_k = carver.take_bytes(packed_bytes);
  plan.packed_v = carver.take_bytes(packed_bytes);
  plan.block_bits = carver.take<uint32_t>(block_words);
  plan.next_tile = carver.take<uint32_t>(1);
  return plan;
}

}  // namespace

size_t plan_bytes(const PlanSizes& sizes) {
  Carver carver(nullptr);
  carve(sizes, carver);
  return carver.used();
}

Plan carve_plan(const PlanSizes& sizes, void* workspace) {
  Carver carver(workspace);
  return carve(sizes, carver);
}

}  // namespace sparseattn
