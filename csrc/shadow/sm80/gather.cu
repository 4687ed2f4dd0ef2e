// Missed chunks from the store into their slots.
//
// A warp copies a chunk with 16-byte loads, kInFlight of them before the first store: 2 KiB rows
// are in flight whole. Reads of pinned host memory take microseconds, so that 55 GB/s over PCIe
// need some 110 KB in flight; kHostCtas small CTAs have four times as much and leave the SMs to
// others. A store on the device gets a grid that fills it.
//
// Quantised chunks are half as many bytes, widened on the way: a lane has 16 numbers at a time.
//
// Copies are numbered through the heads, not head by head: the first misses of all heads come
// first, and the warps share them evenly.
#include <algorithm>

#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "shadow/sm80/e4m3.cuh"
#include "shadow/sm80/rebuild.cuh"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kGatherThreads = 128;
constexpr int kGatherWarps = kGatherThreads / 32;
constexpr int kInFlight = 8;
constexpr int64_t kHostCtas = 64;
constexpr int64_t kDeviceCtasPerSm = 8;

/// Calls move(sequence, kv_head, slot, chunk) for this warp's copies.
template <class Move>
__device__ __forceinline__ void for_each_copy(const GatherValues& in, const Move& move) {
  const int64_t heads = static_cast<int64_t>(in.batch) * in.kv_heads;
  const int64_t copies = heads * in.top_k;
  int64_t copy = static_cast<int64_t>(blockIdx.x) * kGatherWarps + threadIdx.x / 32;
  for (; copy < copies; copy += static_cast<int64_t>(gridDim.x) * kGatherWarps) {
    const int64_t head = copy % heads;
    const int32_t i = static_cast<int32_t>(copy / heads);
    if (i >= in.miss_count[head]) continue;
    const int32_t* miss = in.misses + (head * in.top_k + i) * 2;
    const int32_t slot = miss[0], chunk = miss[1];
    if (slot < 0 || slot >= in.slots || chunk < 0 || chunk >= in.chunks) continue;
    move(head / in.kv_heads, head % in.kv_heads, slot, chunk);
  }
}

/// A row of the store, whose elements have `size` bytes.
__device__ __forceinline__ const uint4* row_of(const unsigned char* store, const View& view,
                                               int size, int64_t sequence, int64_t kv_head,
                                               int64_t chunk) {
  return reinterpret_cast<const uint4*>(
      store +
      size * (sequence * view.batch_stride + kv_head * view.head_stride + chunk * view.row_stride));
}

__device__ __forceinline__ uint4* slot_row(const GatherValues& in, int64_t sequence,
                                           int64_t kv_head, int64_t slot) {
  return reinterpret_cast<uint4*>(static_cast<unsigned char*>(in.values.data) +
                                  2 * (sequence * in.values.batch_stride +
                                       kv_head * in.values.head_stride +
                                       slot * in.values.row_stride));
}

__global__ void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherValues in, const unsigned char* store) {
  const int lane = threadIdx.x % 32;
  const int pieces = static_cast<int>(in.row_bytes / 16);
  for_each_copy(in, [&](int64_t sequence, int64_t kv_head, int32_t slot, int32_t chunk) {
    const uint4* from = row_of(store, in.store, 2, sequence, kv_head, chunk);
    uint4* to = slot_row(in, sequence, kv_head, slot);
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
  });
}

/// Eight numbers in e4m3 times `scale`, rounded.
template <class Element>
__device__ __forceinline__ uint4 widen_eight(uint32_t first, uint32_t second, float scale) {
  const uint32_t words[4] = {first, first >> 16, second, second >> 16};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t halves = widen_e4m3<__half>(words[i]);
    const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&halves));
    out[i] = round_pair<Element>(pair.x * scale, pair.y * scale);
  }
  return make_uint4(out[0], out[1], out[2], out[3]);
}

template <class Element>
__global__ void __launch_bounds__(kGatherThreads)
    gather_quantised_kernel(const __grid_constant__ GatherValues in, const unsigned char* store) {
  const int lane = threadIdx.x % 32;
  const int pieces = static_cast<int>(in.row_bytes / 32);
  for_each_copy(in, [&](int64_t sequence, int64_t kv_head, int32_t slot, int32_t chunk) {
    const uint4* from = row_of(store, in.store, 1, sequence, kv_head, chunk);
    const float scale = in.store_scales.of_head(sequence, kv_head)[chunk];
    uint4* to = slot_row(in, sequence, kv_head, slot);
    for (int base = lane; base < pieces; base += 32 * kInFlight / 2) {
      uint4 data[kInFlight / 2];
#pragma unroll
      for (int j = 0; j < kInFlight / 2; ++j) {
        if (base + 32 * j < pieces) data[j] = __ldcs(from + base + 32 * j);
      }
#pragma unroll
      for (int j = 0; j < kInFlight / 2; ++j) {
        const int piece = base + 32 * j;
        if (piece >= pieces) continue;
        to[2 * piece] = widen_eight<Element>(data[j].x, data[j].y, scale);
        to[2 * piece + 1] = widen_eight<Element>(data[j].z, data[j].w, scale);
      }
    }
  });
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
  const bool quantised = in.store_scales.quantised();
  if (quantised && in.row_bytes % 32 != 0) {
    return {1, "gather_values: row_bytes: expected rows of a multiple of 16 numbers in e4m3"};
  }
  if (!(quantised ? is_aligned_bytes(in.store, in.batch, in.kv_heads, in.chunks)
                  : is_aligned(in.store, in.batch, in.kv_heads, in.chunks)) ||
      !is_aligned(in.values, in.batch, in.kv_heads, in.slots)) {
    return {1, "gather_values: store, values: expected rows that start on 16-byte boundaries"};
  }
  const int64_t copies = static_cast<int64_t>(in.batch) * in.kv_heads * in.top_k;
  if (copies == 0 || in.chunks == 0 || in.row_bytes == 0) return {};

  StorePlace place{};
  const Status status =
      find_store(in.store.data,
                 "gather_values: store: expected device memory or pinned host memory, got host "
                 "memory that the device cannot read",
                 &place);
  if (!status.ok()) return status;
  const int64_t host_ctas = quantised ? 2 * kHostCtas : kHostCtas;  // as many bytes in flight
  const int64_t most = place.on_host ? host_ctas : kDeviceCtasPerSm * multiprocessors();
  const auto ctas = static_cast<unsigned>(std::min(most, cuda::ceil_div(copies, kGatherWarps)));
  if (!quantised) {
    gather_kernel<<<ctas, kGatherThreads, 0, stream>>>(in, place.data);
  } else if (in.dtype == DType::kFloat16) {
    gather_quantised_kernel<__half><<<ctas, kGatherThreads, 0, stream>>>(in, place.data);
  } else {
    gather_quantised_kernel<__nv_bfloat16><<<ctas, kGatherThreads, 0, stream>>>(in, place.data);
  }
  return cuda::launch_status();
}

}  // namespace sparseattn
