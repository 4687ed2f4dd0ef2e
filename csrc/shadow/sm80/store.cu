// Rows into a store, as they are or quantised.
//
// A warp writes a row of the store: `group` rows of x side by side, in pieces of 8 elements. To
// quantise them it reads them twice, first for their scale; the second time they come from L1. The
// store may be host memory, to which the stores of a warp go in pieces of 256 bytes and more; rows
// that are copied as they are and lie one after the other go there by the copy engine.
#include <algorithm>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "shadow/sm80/e4m3.cuh"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kStoreThreads = 256;
constexpr int kStoreWarps = kStoreThreads / 32;
constexpr int64_t kStoreCtasPerSm = 8;

/// Calls take(sequence, head, row of the call) for this warp's rows of the store.
template <class Take>
__device__ __forceinline__ void for_each_row(const StoreRows& in, const Take& take) {
  const int64_t rows = in.rows / in.group;
  const int64_t all = rows * in.batch * in.heads;
  int64_t i = static_cast<int64_t>(blockIdx.x) * kStoreWarps + threadIdx.x / 32;
  for (; i < all; i += static_cast<int64_t>(gridDim.x) * kStoreWarps) {
    const int64_t list = i / rows;
    take(list / in.heads, list % in.heads, i % rows);
  }
}

/// Piece `piece` of a row of the store.
struct Pieces {
  const uint16_t* from;  // the group's first row of x
  int64_t stride;
  int of_row;  // pieces of a row of x
  int count;

  __device__ Pieces(const StoreRows& in, int64_t sequence, int64_t head, int64_t row)
      : from(static_cast<const uint16_t*>(in.x.data) + sequence * in.x.batch_stride +
             head * in.x.head_stride + row * in.group * in.x.row_stride),
        stride(in.x.row_stride),
        of_row(in.dim / 8),
        count(in.group * of_row) {}
  __device__ __forceinline__ uint4 operator[](int piece) const {
    return *reinterpret_cast<const uint4*>(from + piece / of_row * stride + piece % of_row * 8);
  }
};

__host__ __device__ __forceinline__ int64_t store_offset(const StoreRows& in, int64_t sequence,
                                                         int64_t head, int64_t row) {
  return sequence * in.store.batch_stride + head * in.store.head_stride +
         (in.first + row) * in.store.row_stride;
}

__global__ void __launch_bounds__(kStoreThreads)
    store_kernel(const __grid_constant__ StoreRows in, unsigned char* store) {
  for_each_row(in, [&](int64_t sequence, int64_t head, int64_t row) {
    const Pieces pieces(in, sequence, head, row);
    auto* to = reinterpret_cast<uint4*>(store + 2 * store_offset(in, sequence, head, row));
    for (int i = threadIdx.x % 32; i < pieces.count; i += 32) to[i] = pieces[i];
  });
}

template <class Element>
__global__ void __launch_bounds__(kStoreThreads)
    store_quantised_kernel(const __grid_constant__ StoreRows in, unsigned char* store) {
  const int lane = threadIdx.x % 32;
  for_each_row(in, [&](int64_t sequence, int64_t head, int64_t row) {
    const Pieces pieces(in, sequence, head, row);
    float numbers[8];
    float largest = 0.0f;
    for (int i = lane; i < pieces.count; i += 32) {
      cuda::unpack<Element>(pieces[i], numbers);
#pragma unroll
      for (int j = 0; j < 8; ++j) largest = fmaxf(largest, fabsf(numbers[j]));  // drops NaN
    }
    // Floats >= 0 are ordered as their bits.
    largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
    const float scale = __fdiv_rn(largest, kLargestE4m3);
    if (lane == 0) in.scales.of_head(sequence, head)[in.first + row] = scale;
    auto* to = reinterpret_cast<uint2*>(store + store_offset(in, sequence, head, row));
    for (int i = lane; i < pieces.count; i += 32) {
      cuda::unpack<Element>(pieces[i], numbers);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (scale > 0.0f) numbers[j] = __fdiv_rn(numbers[j], scale);
      }
      to[i] =
          make_uint2(round_e4m3(numbers[0], numbers[1]) | round_e4m3(numbers[2], numbers[3]) << 16,
                     round_e4m3(numbers[4], numbers[5]) | round_e4m3(numbers[6], numbers[7]) << 16);
    }
  });
}

/// Whether a head's rows lie one after the other, and heads not too far apart for a copy.
bool is_one_copy_a_sequence(const StoreRows& in) {
  const int64_t bytes = 2 * static_cast<int64_t>(in.rows) * in.dim;
  const auto fits = [&](int64_t head_stride) {
    return in.heads == 1 || (2 * head_stride >= bytes && 2 * head_stride <= INT32_MAX);
  };
  return in.x.row_stride == in.dim && bytes <= INT32_MAX && fits(in.x.head_stride) &&
         fits(in.store.head_stride);
}

Status copy_to_host(const StoreRows& in, cudaStream_t stream) {
  const size_t bytes = 2 * static_cast<size_t>(in.rows) * in.dim;
  for (int32_t sequence = 0; sequence < in.batch; ++sequence) {
    const auto pitch = [&](int64_t head_stride) {
      return in.heads == 1 ? bytes : 2 * static_cast<size_t>(head_stride);
    };
    const cudaError_t error = cudaMemcpy2DAsync(
        static_cast<unsigned char*>(in.store.data) + 2 * store_offset(in, sequence, 0, 0),
        pitch(in.store.head_stride),
        static_cast<const unsigned char*>(in.x.data) + 2 * sequence * in.x.batch_stride,
        pitch(in.x.head_stride), bytes, in.heads, cudaMemcpyDeviceToHost, stream);
    const Status status = cuda::to_status(error);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace shadow_sm80

Status store_rows(const StoreRows& in, cudaStream_t stream) {
  using namespace shadow_sm80;
  if (!is_half(in.dtype)) return {1, "store_rows: dtype: expected fp16 or bf16"};
  if (in.batch < 0 || in.heads < 0 || in.rows < 0 || in.first < 0) {
    return {1, "store_rows: sizes: expected numbers >= 0"};
  }
  if (in.group < 1 || in.rows % in.group != 0) {
    return {1, "store_rows: rows: expected a multiple of group"};
  }
  if (in.dim < 8 || in.dim % 8 != 0 || static_cast<int64_t>(in.dim) * in.group > INT32_MAX) {
    return {1, "store_rows: dim: expected a multiple of 8"};
  }
  const int64_t rows = in.rows / in.group;
  const bool quantised = in.scales.quantised();
  if (!is_aligned(in.x, in.batch, in.heads, in.rows) ||
      !(quantised ? is_aligned_bytes(in.store, in.batch, in.heads, in.first + rows)
                  : is_aligned(in.store, in.batch, in.heads, in.first + rows))) {
    return {1, "store_rows: x, store: expected rows that start on 16-byte boundaries"};
  }
  const int64_t all = rows * in.batch * in.heads;
  if (all == 0) return {};
  StorePlace place{};
  const Status status =
      find_store(in.store.data,
                 "store_rows: store: expected device memory or pinned host memory, got host memory "
                 "that the device cannot write",
                 &place);
  if (!status.ok()) return status;
  if (place.on_host && !quantised && is_one_copy_a_sequence(in)) return copy_to_host(in, stream);
  const auto ctas = static_cast<unsigned>(
      std::min(kStoreCtasPerSm * multiprocessors(), cuda::ceil_div(all, kStoreWarps)));
  if (!quantised) {
    store_kernel<<<ctas, kStoreThreads, 0, stream>>>(in, place.data);
  } else if (in.dtype == DType::kFloat16) {
    store_quantised_kernel<__half><<<ctas, kStoreThreads, 0, stream>>>(in, place.data);
  } else {
    store_quantised_kernel<__nv_bfloat16><<<ctas, kStoreThreads, 0, stream>>>(in, place.data);
  }
  return cuda::launch_status();
}

}  // namespace sparseattn
