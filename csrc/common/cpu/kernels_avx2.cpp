// AVX2 kernels: compiled with -mavx2 -mfma.
#include <cstdint>

namespace sparseattn::cpu {
namespace {
constexpr int32_t kVectorBytes = 32;
constexpr int32_t kGroupRows = 4;
constexpr int32_t kGroupVectors = 2;
}  // namespace
}  // namespace sparseattn::cpu

#include "common/cpu/kernels_impl.h"

namespace sparseattn::cpu {
const Kernels kAvx2Kernels = make_kernels("avx2");
}  // namespace sparseattn::cpu
