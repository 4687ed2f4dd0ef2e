// What the ShadowKV kernels require of their arguments, and facts of the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/cuda/launch.h"
#include "sparseattn/types.h"

namespace sparseattn::shadow_sm80 {

inline bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

inline bool is_head_dim(int32_t dim) { return dim == 64 || dim == 96 || dim == 128; }

/// Whether rows of 16-bit elements start on 16-byte boundaries.
inline bool is_aligned(const View& view, int64_t batch, int64_t heads, int64_t rows) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         (batch <= 1 || view.batch_stride % 8 == 0) && (heads <= 1 || view.head_stride % 8 == 0) &&
         (rows <= 1 || view.row_stride % 8 == 0);
}

/// The same for rows of bytes.
inline bool is_aligned_bytes(const View& view, int64_t batch, int64_t heads, int64_t rows) {
  return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
         (batch <= 1 || view.batch_stride % 16 == 0) &&
         (heads <= 1 || view.head_stride % 16 == 0) && (rows <= 1 || view.row_stride % 16 == 0);
}

/// Where the current device finds a store.
struct StorePlace {
  unsigned char* data;
  bool on_host;
};

/// Pinned memory of the host may be allocated or registered: the driver calls both
/// cudaMemoryTypeHost. `refused` is what is said of other memory.
inline Status find_store(const void* store, const char* refused, StorePlace* place) {
  cudaPointerAttributes attributes{};
  const Status status = cuda::to_status(cudaPointerGetAttributes(&attributes, store));
  if (!status.ok()) return status;
  if (attributes.type == cudaMemoryTypeUnregistered || attributes.devicePointer == nullptr) {
    return {1, refused};
  }
  *place = {static_cast<unsigned char*>(attributes.devicePointer),
            attributes.type == cudaMemoryTypeHost};
  return {};
}

/// An attribute of the current device; `otherwise` where there is none.
inline int device_attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    return otherwise;
  }
  return value;
}

/// Shared memory that a CTA may ask for.
inline int64_t shared_bytes_limit() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, 99 * 1024);
}

inline int64_t multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, 108); }

}  // namespace sparseattn::shadow_sm80
