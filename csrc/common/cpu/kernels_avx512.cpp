// AVX-512 kernels: compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma.
#include <cstdint>

namespace sparseattn::cpu {
namespace {
constexpr int32_t kVectorBytes = 64;
constexpr int32_t kGroupRows = 8;
constexpr int32_t kGroupVectors = 2;
}  // namespace
}  // namespace sparseattn::cpu

#include "common/cpu/kernels_impl.h"

namespace sparseattn::cpu {
const Kernels kAvx512Kernels = make_kernels("avx512");
}  // namespace sparseattn::cpu
