// Random device data by small kernels: the same values for the same seed, whatever the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "sparseattn/types.h"

namespace bench {

/// Normal values of mean 0, fp16 or bf16.
sparseattn::Status fill_normal(void* data, sparseattn::DType dtype, int64_t count, uint64_t seed,
                               cudaStream_t stream, float deviation = 1.0f);

/// bool mask [heads, blocks, blocks]: in every row the diagonal block and random earlier ones,
/// about `density` of those at or before the diagonal. `selected` (zeroed by the caller) counts
/// them.
sparseattn::Status fill_block_mask(uint8_t* mask, int64_t heads, int32_t blocks, double density,
                                   uint64_t seed, unsigned long long* selected,
                                   cudaStream_t stream);

}  // namespace bench
