// Kernels for any CPU (SSE2, NEON): compiled with no extra flags.
#include <cstdint>

namespace sparseattn::cpu {
namespace {
constexpr int32_t kVectorBytes = 16;
constexpr int32_t kGroupRows = 4;
constexpr int32_t kGroupVectors = 2;
}  // namespace
}  // namespace sparseattn::cpu

#include "common/cpu/kernels_impl.h"

namespace sparseattn::cpu {
const Kernels kGenericKernels = make_kernels("generic");
}  // namespace sparseattn::cpu
