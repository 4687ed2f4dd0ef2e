// Decode attention and rebuilt keys: sizes of the launch, and the choice of the instantiation.
//
// Splits: keys are split over as many CTAs as fill the multiprocessors in whole waves, one CTA on
// each at a time. The number follows from batch, kv_heads, the blocks of 16 query rows, the room
// for keys and the device, never from a length that lies on the device.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <type_traits>

#include "common/cuda/launch.h"
#include "shadow/sm80/job.h"
#include "shadow/sm80/launch.h"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {
namespace {

constexpr size_t kAlignment = 256;
/// No CTA is made for less: a tile for each of a multiprocessor's tensor cores.
constexpr int64_t kFewestTiles = 4;

struct Device {
  int multiprocessors = 1;
  int shared_bytes = 0;  // that a CTA may have
};

Status find_device(Device* found) {
  int device = 0;
  Status status = cuda::to_status(cudaGetDevice(&device));
  if (status.ok()) {
    status = cuda::to_status(
        cudaDeviceGetAttribute(&found->multiprocessors, cudaDevAttrMultiProcessorCount, device));
  }
  if (status.ok()) {
    status = cuda::to_status(cudaDeviceGetAttribute(
        &found->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  }
  return status;
}

Status check_keys(const LowRankKeys& keys, int32_t head_dim, int64_t top_k) {
  if (keys.rank < 16 || keys.rank % 16 != 0) {
    return {1, "rank: expected a multiple of 16"};
  }
  if (keys.chunk != 4 && keys.chunk != 8 && keys.chunk != 16 && keys.chunk != 32) {
    return {1, "chunk: expected 4, 8, 16 or 32"};
  }
  if (keys.rope.rotary_dim < 0 || keys.rope.rotary_dim > head_dim || keys.rope.rotary_dim % 2) {
    return {1, "rotary_dim: expected an even number up to head_dim"};
  }
  if (top_k * keys.chunk > INT32_MAX - kWarpKeys) {
    return {1, "top_k: expected fewer than 2^31 selected tokens"};
  }
  return {};
}

/// CTAs that one unit of work is spread over: the whole waves of CTAs that leave fewest
/// multiprocessors idle, fewer waves where that gains little.
int32_t spread(int64_t units, int64_t most, int64_t multiprocessors) {
  int64_t best = 1;
  double best_use = 0;
  for (int64_t waves = 1; waves <= 4; ++waves) {
    const int64_t wanted = multiprocessors * waves / units;
    const int64_t count = std::max<int64_t>(1, std::min(wanted, most));
    const int64_t ctas = units * count;
    const double use =
        static_cast<double>(ctas) / (cuda::ceil_div(ctas, multiprocessors) * multiprocessors);
    if (use > best_use + 0.05) {
      best_use = use;
      best = count;
    }
  }
  return static_cast<int32_t>(best);
}

/// Sizes of the launch, then the pieces of the workspace from `workspace` on; `bytes` is what they
/// take.
Status plan_attention(const ShadowAttention& in, void* workspace, AttentionJob* job,
                      size_t* bytes) {
  *bytes = 0;
  const Shape& shape = in.shape;
  Status status = check_keys(in.keys, shape.head_dim, in.top_k);
  if (!status.ok()) return status;
  if (shape.kv_heads < 1 || shape.q_heads % shape.kv_heads != 0) {
    return {1, "kv_heads: expected a number that divides q_heads"};
  }
  if (int64_t{in.slots} * in.keys.chunk > INT32_MAX) {
    return {1, "slots: expected fewer than 2^31 tokens in slots"};
  }
  if (int64_t{shape.q_len} * shape.group() > INT32_MAX - kTileQueries) {
    return {1, "q_len: expected fewer than 2^31 query rows of a key/value head"};
  }
  Device device;
  status = find_device(&device);
  if (!status.ok()) return status;
  job->in = in;
  job->layout = fit_layout(in.keys, shape.head_dim, true, device.shared_bytes);
  if (job->layout.warps == 0)
    return {1, "shadow_attention: the device has too little shared memory"};
  const int32_t rows = shape.q_len * shape.group();
  job->row_blocks = static_cast<int32_t>(cuda::ceil_div(rows, kTileQueries));
  job->rows = std::min(rows, kTileQueries);
  const int64_t units = int64_t{shape.batch} * shape.kv_heads * job->row_blocks;
  if (units == 0) return {};
  const int64_t tiles = cuda::ceil_div(int64_t{in.top_k} * in.keys.chunk, kWarpKeys) +
                        cuda::ceil_div(shape.kv_len, kWarpKeys);
  const int64_t most = std::min<int64_t>(kMostSplits, cuda::ceil_div(tiles, kFewestTiles));
  job->splits = spread(units, most, device.multiprocessors);
  if (!cuda::grid_fits(units * std::max(job->splits, job->rows))) {
    return {1, "shadow_attention: more than 2^31 - 1 CTAs"};
  }
  if (job->splits == 1) return {};

  const auto take = [&](size_t size) {
    void* piece = workspace == nullptr ? nullptr : static_cast<unsigned char*>(workspace) + *bytes;
    *bytes += (size + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  };
  const size_t parts = static_cast<size_t>(units) * job->rows * job->splits;
  job->partial = static_cast<float*>(take(parts * shape.head_dim * sizeof(float)));
  job->states = static_cast<float2*>(take(parts * sizeof(float2)));
  return {};
}

template <class Element, class Launch>
Status with_head_dim(int32_t head_dim, const Launch& launch) {
  switch (head_dim) {
    case 64:
      return launch(std::integral_constant<int, 64>{}, Element{});
    case 96:
      return launch(std::integral_constant<int, 96>{}, Element{});
    case 128:
      return launch(std::integral_constant<int, 128>{}, Element{});
    default:
      return {1, "head_dim: expected 64, 96 or 128"};
  }
}

/// Calls launch(head_dim, element) with the instantiation's types.
template <class Launch>
Status dispatch(int32_t head_dim, DType dtype, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat16:
      return with_head_dim<__half>(head_dim, launch);
    case DType::kBFloat16:
      return with_head_dim<__nv_bfloat16>(head_dim, launch);
    default:
      return {1, "dtype: expected fp16 or bf16"};
  }
}

}  // namespace
}  // namespace shadow_sm80

size_t shadow_attention_bytes(const ShadowAttention& params) {
  shadow_sm80::AttentionJob job{};
  size_t bytes = 0;
  // What is wrong is told by the launch.
  return shadow_sm80::plan_attention(params, nullptr, &job, &bytes).ok() ? bytes : 0;
}

Status shadow_attention(const ShadowAttention& params, void* workspace, cudaStream_t stream) {
  shadow_sm80::AttentionJob job{};
  size_t bytes = 0;
  const Status status = shadow_sm80::plan_attention(params, workspace, &job, &bytes);
  if (!status.ok() || job.splits == 0) return status;
  return shadow_sm80::dispatch(
      params.shape.head_dim, params.dtype, [&](auto head_dim, auto element) {
        using Element = decltype(element);
        return job.layout.quantised
                   ? shadow_sm80::launch_attention<head_dim, Element, shadow_sm80::E4m3>(job,
                                                                                         stream)
                   : shadow_sm80::launch_attention<head_dim, Element>(job, stream);
      });
}

Status lowrank_reconstruct(const LowRankReconstruct& params, cudaStream_t stream) {
  using namespace shadow_sm80;
  Status status = check_keys(params.keys, params.head_dim, params.top_k);
  if (!status.ok()) return status;
  Device device;
  status = find_device(&device);
  if (!status.ok()) return status;
  ReconstructJob job{params, fit_layout(params.keys, params.head_dim, false, device.shared_bytes),
                     0};
  if (job.layout.warps == 0) {
    return {1, "lowrank_reconstruct: the device has too little shared memory"};
  }
  const int64_t units = int64_t{params.batch} * params.kv_heads;
  const int64_t tokens = int64_t{params.top_k} * params.keys.chunk;
  if (units == 0 || tokens == 0) return {};
  job.ctas =
      spread(units, cuda::ceil_div(tokens, kWarpKeys * job.layout.warps), device.multiprocessors);
  if (!cuda::grid_fits(units * job.ctas))
    return {1, "lowrank_reconstruct: more than 2^31 - 1 CTAs"};
  return dispatch(params.head_dim, params.dtype, [&](auto head_dim, auto element) {
    using Element = decltype(element);
    return job.layout.quantised ? launch_reconstruct<head_dim, Element, E4m3>(job, stream)
                                : launch_reconstruct<head_dim, Element>(job, stream);
  });
}

}  // namespace sparseattn
