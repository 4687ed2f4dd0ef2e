// Landmarks of chunks with the smallest cosine of their keys.
//
// kLanes neighbouring threads hold a chunk in registers, 16 bytes of each of its keys a thread: all
// loads of a chunk are in flight at once and every key is read once. Sums over a chunk run in order
// of the keys, as on the CPU, so landmarks are the same to the bit.
//
// Floor: keys are read once, 60 us for 122K tokens of 8 heads x 128 at 4.2 TB/s.
#include <algorithm>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "common/cuda/team.cuh"
#include "shadow/sm80/checks.h"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kLandmarkThreads = 128;

/// Sum over the kLanes neighbouring threads of a chunk; all receive it.
template <int kLanes>
__device__ __forceinline__ float sum_lanes(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(cuda::kFullWarp, value, distance);
  }
  return value;
}

template <class Element, int kChunk, int kLanes>
__global__ void __launch_bounds__(kLandmarkThreads)
    landmarks_kernel(const __grid_constant__ ShadowLandmarks in, int32_t ctas_per_head) {
  constexpr int kChunks = kLandmarkThreads / kLanes;
  const int64_t head = blockIdx.x / ctas_per_head;  // of [batch, kv_heads]
  const int64_t sequence = head / in.kv_heads, kv_head = head % in.kv_heads;
  const int64_t from = static_cast<int64_t>(blockIdx.x % ctas_per_head) * kChunks;
  const int64_t own = in.lens.at(sequence, in.rows) / kChunk;
  const int64_t to = start_of(in.first_chunk, sequence, in.chunks);
  if (from >= own || to + from >= in.chunks) return;

  const int piece = threadIdx.x % kLanes;
  const int64_t chunk = from + threadIdx.x / kLanes;
  const bool active = chunk < own && to + chunk < in.chunks;
  const bool loads = active && 8 * piece < in.head_dim;
  const Element* keys = static_cast<const Element*>(in.k.data) + sequence * in.k.batch_stride +
                        kv_head * in.k.head_stride + 8 * piece;
  uint4 rows[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    rows[i] =
        loads ? __ldg(reinterpret_cast<const uint4*>(keys + (chunk * kChunk + i) * in.k.row_stride))
              : make_uint4(0, 0, 0, 0);
  }
  float mean[8] = {};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) cuda::add_elements<Element>(mean, rows[i]);
#pragma unroll
  for (int d = 0; d < 8; ++d) mean[d] /= static_cast<float>(kChunk);
  if (loads) {
    Element* out = static_cast<Element*>(in.landmarks.data) + sequence * in.landmarks.batch_stride +
                   kv_head * in.landmarks.head_stride + (to + chunk) * in.landmarks.row_stride +
                   8 * piece;
    *reinterpret_cast<uint4*>(out) = cuda::round_elements<Element>(mean);
  }
  if (in.min_cosine == nullptr) return;

  float mean_square = 0.f;
#pragma unroll
  for (int d = 0; d < 8; ++d) mean_square = fmaf(mean[d], mean[d], mean_square);
  const float mean_norm = sqrtf(sum_lanes<kLanes>(mean_square));
  float smallest = INFINITY;
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    float key[8] = {};
    cuda::add_elements<Element>(key, rows[i]);
    float dot = 0.f, square = 0.f;
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      dot = fmaf(key[d], mean[d], dot);
      square = fmaf(key[d], key[d], square);
    }
    const float norms = sqrtf(sum_lanes<kLanes>(square)) * mean_norm;
    dot = sum_lanes<kLanes>(dot);
    const float cosine = norms == 0.f ? 0.f : dot / norms;
    if (!(cosine >= smallest)) smallest = cosine;  // takes NaN, too
  }
  if (active && piece == 0) in.min_cosine[head * in.chunks + to + chunk] = smallest;
}

template <class Element, int kChunk, int kLanes>
Status launch_landmarks(const ShadowLandmarks& in, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(in.batch) * in.kv_heads;
  const int64_t most = std::min(in.rows / kChunk, in.chunks);
  const int64_t ctas_per_head = cuda::ceil_div(most, kLandmarkThreads / kLanes);
  const int64_t ctas = heads * ctas_per_head;
  if (ctas == 0) return {};
  if (!cuda::grid_fits(ctas)) return {1, "shadow_landmarks: more chunks than a grid can hold"};
  landmarks_kernel<Element, kChunk, kLanes>
      <<<static_cast<unsigned>(ctas), kLandmarkThreads, 0, stream>>>(
          in, static_cast<int32_t>(ctas_per_head));
  return cuda::launch_status();
}

template <class Element, int kChunk>
Status launch_dim(const ShadowLandmarks& in, cudaStream_t stream) {
  return in.head_dim == 64 ? launch_landmarks<Element, kChunk, 8>(in, stream)
                           : launch_landmarks<Element, kChunk, 16>(in, stream);
}

template <class Element>
Status launch_chunk(const ShadowLandmarks& in, cudaStream_t stream) {
  switch (in.chunk) {
    case 4:
      return launch_dim<Element, 4>(in, stream);
    case 8:
      return launch_dim<Element, 8>(in, stream);
    case 16:
      return launch_dim<Element, 16>(in, stream);
    case 32:
      return launch_dim<Element, 32>(in, stream);
  }
  return {1, "shadow_landmarks: chunk: expected 4, 8, 16 or 32"};
}

}  // namespace shadow_sm80

Status shadow_landmarks(const ShadowLandmarks& in, cudaStream_t stream) {
  using namespace shadow_sm80;
  if (!is_half(in.dtype)) return {1, "shadow_landmarks: dtype: expected fp16 or bf16"};
  if (!is_head_dim(in.head_dim)) return {1, "shadow_landmarks: head_dim: expected 64, 96 or 128"};
  if (in.batch < 0 || in.kv_heads < 1 || in.rows < 0 || in.chunks < 0) {
    return {1, "shadow_landmarks: sizes: expected batch, rows, chunks >= 0 and kv_heads >= 1"};
  }
  if (!is_aligned(in.k, in.batch, in.kv_heads, in.rows) ||
      !is_aligned(in.landmarks, in.batch, in.kv_heads, in.chunks)) {
    return {1, "shadow_landmarks: k, landmarks: expected rows that start on 16-byte boundaries"};
  }
  return in.dtype == DType::kFloat16 ? launch_chunk<__half>(in, stream)
                                     : launch_chunk<__nv_bfloat16>(in, stream);
}

}  // namespace sparseattn
