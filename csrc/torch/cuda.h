// What the CUDA registrations share.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <iterator>

#include "sparseattn/attention.h"
#include "torch/arguments.h"

namespace sparseattn::torch_layer {

inline const Support& support() {
  static const Support kSupport{"cuda",
                                {ScalarType::Half, ScalarType::BFloat16},
                                {std::begin(kHeadDims), std::end(kHeadDims)}};
  return kSupport;
}

/// Makes the tensor's device current and finds its current stream.
class Launch {
 public:
  explicit Launch(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

/// Device memory on q's device and stream, given back to torch's allocator with the tensor.
inline Tensor scratch(const Tensor& q, size_t bytes) {
  return torch::stable::new_empty(q, {static_cast<int64_t>(std::max<size_t>(bytes, 1))},
                                  std::make_optional(ScalarType::Byte));
}

/// The kernels read rows in pieces of 16 bytes. A view whose rows do not start on such a boundary
/// is copied; all other strides are taken as they are.
inline Tensor aligned(const Tensor& tensor) {
  const auto element = static_cast<int64_t>(tensor.element_size());
  bool fits = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
    fits = fits && (tensor.size(i) == 1 || tensor.stride(i) * element % 16 == 0);
  }
  if (fits) return tensor;
  Tensor copy = torch::stable::new_empty(tensor, tensor.sizes());
  return torch::stable::copy_(copy, tensor);
}

}  // namespace sparseattn::torch_layer
