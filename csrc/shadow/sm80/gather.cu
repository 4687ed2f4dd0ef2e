// Missed chunks from the store into their slots.
//
// A warp copies a chunk with 16-byte loads, kInFlight of them before the first store: 2 KiB rows
// are in flight whole. Reads of pinned host memory take microseconds, so that 55 GB/s over PCIe
// need some 110 KB in flight; kHostCtas small CTAs have four times as much and leave the SMs to
// others. A store on the device gets a grid that fills it.
//
// Copies are numbered through the heads, not head by head: the first misses of all heads come
// first, and the warps share them evenly.
#include <algorithm>

#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kGatherThreads = 128;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kInFlight = 8;
constexpr int64_t kHostCtas = 64;
constexpr int64_t kDeviceCtasPerSm = 8;

__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherValues in, const unsigned char* store) {
  const int64_t heads = static_cast<int64_t>(in.batch) * in.kv_heads;
  const int64_t copies = heads * in.top_k;
  const int lane = threadIdx.x % 32;
  const int pieces = static_cast<int>(in.row_bytes / 16);
  int64_t copy = static_cast<int64_t>(blockIdx.x) * kGatherWarps + threadIdx.x / 32;
  for (; copy < copies; copy += static_cast<int64_t>(gridDim.x) * kGatherWarps) {
    const int64_t head = copy % heads;
    const int32_t i = static_cast<int32_t>(copy / heads);
    if (i >= in.miss_count[head]) continue;
    const int32_t* miss = in.misses + (head * in.top_k + i) * 2;
    const int32_t slot = miss[0], chunk = miss[1];
    if (slot < 0 || slot >= in.slots || chunk < 0 || chunk >= in.chunks) continue;
    const int64_t sequence = head / in.kv_heads, kv_head = head % in.kv_heads;
    const auto* from = reinterpret_cast<const uint4*>(
        store + 2 * (sequence * in.store.batch_stride + kv_head * in.store.head_stride +
                     chunk * in.store.row_stride));
    auto* to = reinterpret_cast<uint4*>(static_cast<unsigned char*>(in.values.data) +
                                        2 * (sequence * in.values.batch_stride +
                                             kv_head * in.values.head_stride +
                                             slot * in.values.row_stride));
    for (int base = lane; base < pieces; base += 32 * kInFlight) {
      uint4 data[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (base + 32 * j < pieces) data[j] = __ldcs(from + base + 32 * j);
      }
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (base + 32 * j < pieces) to[base + 32 * j] = data[j];
      }
    }
  }
}

}  // namespace shadow_sm80

Status gather_values(const GatherValues& in, cudaStream_t stream) {
  using namespace shadow_sm80;
  if (!is_half(in.dtype)) return {1, "gather_values: dtype: expected fp16 or bf16"};
  if (in.batch < 0 || in.kv_heads < 0 || in.top_k < 0 || in.chunks < 0 || in.slots < 0) {
    return {1, "gather_values: sizes: expected numbers >= 0"};
  }
  if (in.row_bytes < 0 || in.row_bytes % 16 != 0 || in.row_bytes > INT32_MAX) {
    return {1, "gather_values: row_bytes: expected a multiple of 16 below 2^31"};
  }
  if (!is_aligned(in.store, in.batch, in.kv_heads, in.chunks) ||
      !is_aligned(in.values, in.batch, in.kv_heads, in.slots)) {
    return {1, "gather_values: store, values: expected rows that start on 16-byte boundaries"};
  }
  const int64_t copies = static_cast<int64_t>(in.batch) * in.kv_heads * in.top_k;
  if (copies == 0 || in.chunks == 0 || in.row_bytes == 0) return {};

  cudaPointerAttributes attributes{};
  const Status status = cuda::to_status(cudaPointerGetAttributes(&attributes, in.store.data));
  if (!status.ok()) return status;
  // Pinned memory may be allocated or registered: the driver calls both cudaMemoryTypeHost.
  if (attributes.type == cudaMemoryTypeUnregistered || attributes.devicePointer == nullptr) {
    return {1,
            "gather_values: store: expected device memory or pinned host memory, got host "
            "memory that the device cannot read"};
  }
  const int64_t most =
      attributes.type == cudaMemoryTypeHost ? kHostCtas : kDeviceCtasPerSm * multiprocessors();
  const int64_t ctas = std::min(most, cuda::ceil_div(copies, kGatherWarps));
  gather_kernel<<<static_cast<unsigned>(ctas), kGatherThreads, 0, stream>>>(
      in, static_cast<const unsigned char*>(attributes.devicePointer));
  return cuda::launch_status();
}

}  // namespace sparseattn
