#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fill.h"

namespace bench {
namespace {

constexpr int kThreads = 256;
constexpr int kCtas = 2048;  // each thread takes every kThreads * kCtas-th element

/// splitmix64: well mixed bits of a counter.
__device__ uint64_t mixed(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

__device__ void store(__half* to, float value) { *to = __float2half(value); }
__device__ void store(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }

template <class T>
__global__ void __launch_bounds__(kThreads)
    normal_kernel(T* data, int64_t count, uint64_t seed, float deviation) {
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += stride) {
    const uint64_t bits = mixed(seed * 0xd1342543de82ef95u + static_cast<uint64_t>(i));
    const float u = static_cast<float>((bits >> 40) + 1) * 0x1p-24f;  // (0, 1]
    const float angle = static_cast<float>(bits & 0xffffff) * 0x1p-24f;
    store(data + i, deviation * sqrtf(-2.0f * logf(u)) * cospif(2.0f * angle));
  }
}

__global__ void __launch_bounds__(kThreads)
    block_mask_kernel(uint8_t* mask, int64_t count, int32_t blocks, float density, uint64_t seed,
                      unsigned long long* selected) {
  const int64_t stride = int64_t{kThreads} * gridDim.x;
  unsigned long long found = 0;
  for (int64_t i = int64_t{kThreads} * blockIdx.x + threadIdx.x; i < count; i += stride) {
    const int32_t key = static_cast<int32_t>(i % blocks);
    const int32_t row = static_cast<int32_t>(i / blocks % blocks);
    const uint64_t bits = mixed(seed * 0xd1342543de82ef95u + static_cast<uint64_t>(i));
    const float u = static_cast<float>(bits >> 40) * 0x1p-24f;  // [0, 1)
    // The diagonal block is always there: the others are drawn so that the row has its share.
    const float share =
        (density * static_cast<float>(row + 1) - 1.0f) / static_cast<float>(max(row, 1));
    const bool chosen = key == row || (key < row && u < share);
    mask[i] = chosen;
    found += chosen;
  }
  if (found > 0) atomicAdd(selected, found);
}

sparseattn::Status launched() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return {};
  return {static_cast<int32_t>(error), cudaGetErrorString(error)};
}

}  // namespace

sparseattn::Status fill_normal(void* data, sparseattn::DType dtype, int64_t count, uint64_t seed,
                               cudaStream_t stream, float deviation) {
  if (dtype == sparseattn::DType::kFloat16) {
    normal_kernel<<<kCtas, kThreads, 0, stream>>>(static_cast<__half*>(data), count, seed,
                                                  deviation);
  } else if (dtype == sparseattn::DType::kBFloat16) {
    normal_kernel<<<kCtas, kThreads, 0, stream>>>(static_cast<__nv_bfloat16*>(data), count, seed,
                                                  deviation);
  } else {
    return {1, "fill_normal: dtype: expected fp16 or bf16"};
  }
  return launched();
}

sparseattn::Status fill_block_mask(uint8_t* mask, int64_t heads, int32_t blocks, double density,
                                   uint64_t seed, unsigned long long* selected,
                                   cudaStream_t stream) {
  const int64_t count = heads * blocks * blocks;
  block_mask_kernel<<<kCtas, kThreads, 0, stream>>>(mask, count, blocks,
                                                    static_cast<float>(density), seed, selected);
  return launched();
}

}  // namespace bench
