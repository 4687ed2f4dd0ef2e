// PTX instructions of sm_90a under names: mbarriers, bulk tensor copies, register budgets.
#pragma once

#include <cstdint>

namespace sparseattn::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A shared-memory barrier: a phase ends when `count` arrivals and all announced bytes are in.
struct alignas(8) MBarrier {
  uint64_t state;

  __device__ __forceinline__ void init(uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(this)),
                 "r"(count));
  }
  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(this))
                 : "memory");
  }
  __device__ __forceinline__ void arrive(uint32_t count) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(this)),
                 "r"(count)
                 : "memory");
  }
  /// Arrives, and announces `bytes` that copies will write.
  __device__ __forceinline__ void arrive_expect(uint32_t bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(this)),
        "r"(bytes)
        : "memory");
  }
  /// Whether the phase of this parity has ended; may suspend the thread for a while.
  __device__ __forceinline__ bool try_wait(uint32_t parity) {
    uint32_t ended;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return ended != 0;
  }
  /// The same without suspending.
  __device__ __forceinline__ bool test_wait(uint32_t parity) {
    uint32_t ended;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(ended)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return ended != 0;
  }
  /// Suspended for up to 10 ms at a time: a warp that asks again and again takes issue slots, and
  /// power, from those that compute.
  __device__ __forceinline__ void wait(uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1, %2;\n"
        "@p bra done;\n"
        "bra again;\n"
        "done:\n"
        "}\n" ::"r"(shared_address(this)),
        "r"(parity), "r"(10000000)
        : "memory");
  }
};

/// Makes barrier initialisation visible to the copy engine.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

/// Orders ordinary writes to shared memory before accesses by the copy engine and tensor cores.
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

/// What the L2 should do with the lines of a copy.
enum class L2Policy : uint64_t {
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

/// A box of a 5-D tensor, at coordinates given from the innermost dimension, to shared memory;
/// what lies outside the tensor becomes zero. Completes on `barrier`.
__device__ __forceinline__ void load_box(void* to, const void* map, MBarrier* barrier,
                                         L2Policy policy, int c0, int c1, int c2, int c3, int c4) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;\n" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
      "l"(static_cast<uint64_t>(policy))
      : "memory");
}

/// Arrives at named barrier `id` (1 .. 15) of kThreads threads without waiting.
template <int kThreads>
__device__ __forceinline__ void barrier_arrive(int id) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(id), "n"(kThreads) : "memory");
}

/// Sets the warpgroup's registers a thread. All its warps call this.
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

}  // namespace sparseattn::cuda
