// Patterns to head tasks. The host array travels as kernel arguments, so that the call neither
// copies nor waits and may be captured into a graph.
#include <algorithm>

#include "common/cuda/launch.h"
#include "sparseattn/plan.h"

namespace sparseattn {
namespace index_sm80 {

/// Kernel arguments may take 4 KB in all.
constexpr int kHeadsPerLaunch = 128;
constexpr int kThreads = 256;

/// Heads [first, first + count). `ordinal` counts the earlier heads of the same kind.
struct HeadPiece {
  int32_t first;
  int32_t count;
  Pattern patterns[kHeadsPerLaunch];
  int32_t ordinals[kHeadsPerLaunch];
};

__global__ void __launch_bounds__(kThreads)
    plan_heads_kernel(const __grid_constant__ Plan plan, const __grid_constant__ HeadPiece piece) {
  const PlanSizes& sizes = plan.sizes;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int sequence = static_cast<int>(index / piece.count);
  const int i = static_cast<int>(index % piece.count);
  if (sequence >= sizes.shape.batch) return;
  const Pattern pattern = piece.patterns[i];
  const int ordinal = piece.ordinals[i];
  const int head = piece.first + i;

  HeadTask task{pattern.kind, 0, kNoWindow, 0};
  if (pattern.kind == PatternKind::kAShape) {
    task.sink = pattern.a;
    task.window = pattern.b;
  } else if (pattern.kind == PatternKind::kVerticalSlash) {
    task.slot = sequence * sizes.vs_heads + ordinal;
  } else if (pattern.kind == PatternKind::kBlockSparse) {
    task.slot = sequence * sizes.bs_heads + ordinal;
  }
  plan.heads[static_cast<int64_t>(sequence) * sizes.shape.q_heads + head] = task;

  if (sequence != 0) return;
  if (pattern.kind == PatternKind::kVerticalSlash) {
    plan.vs_heads[ordinal] = head;
    plan.vs_budget[ordinal] = pattern.a;
    plan.vs_budget[sizes.vs_heads + ordinal] = pattern.b;
    plan.vs_share[ordinal] = pattern.share;
  } else if (pattern.kind == PatternKind::kBlockSparse) {
    plan.bs_heads[ordinal] = head;
    plan.bs_budget[ordinal] = pattern.a;
    plan.bs_share[ordinal] = pattern.share;
    plan.bs_stride[ordinal] = pattern.stride;
  }
}

}  // namespace index_sm80

Status plan_heads(const Plan& plan, const Pattern* patterns, cudaStream_t stream) {
  using namespace index_sm80;
  const PlanSizes& sizes = plan.sizes;
  const int heads = sizes.shape.q_heads;
  int vs_heads = 0, bs_heads = 0;
  for (int head = 0; head < heads; ++head) {
    const Pattern& pattern = patterns[head];
    if (pattern.a < 0 || pattern.b < 0) return {1, "plan_heads: patterns has a negative size"};
    switch (pattern.kind) {
      case PatternKind::kDense:
      case PatternKind::kAShape:
        break;
      case PatternKind::kVerticalSlash:
        ++vs_heads;
        break;
      case PatternKind::kBlockSparse:
        ++bs_heads;
        break;
      default:
        return {1, "plan_heads: patterns has an unknown kind"};
    }
  }
  if (vs_heads != sizes.vs_heads) {
    return {1, "plan_heads: patterns holds another number of vertical-slash heads than the plan"};
  }
  if (bs_heads != sizes.bs_heads) {
    return {1, "plan_heads: patterns holds another number of block-sparse heads than the plan"};
  }
  if (sizes.shape.batch == 0) return {};

  vs_heads = bs_heads = 0;
  for (int first = 0; first < heads; first += kHeadsPerLaunch) {
    HeadPiece piece{};
    piece.first = first;
    piece.count = std::min(kHeadsPerLaunch, heads - first);
    for (int i = 0; i < piece.count; ++i) {
      piece.patterns[i] = patterns[first + i];
      const PatternKind kind = piece.patterns[i].kind;
      if (kind == PatternKind::kVerticalSlash) piece.ordinals[i] = vs_heads++;
      if (kind == PatternKind::kBlockSparse) piece.ordinals[i] = bs_heads++;
    }
    const int64_t tasks = static_cast<int64_t>(sizes.shape.batch) * piece.count;
    const int64_t ctas = cuda::ceil_div(tasks, kThreads);
    if (!cuda::grid_fits(ctas)) return {1, "plan_heads: batch is too large"};
    plan_heads_kernel<<<static_cast<unsigned>(ctas), kThreads, 0, stream>>>(plan, piece);
    const Status status = cuda::launch_status();
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace sparseattn
