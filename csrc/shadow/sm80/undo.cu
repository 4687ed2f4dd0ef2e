// Keys before RoPE, heads side by side.
//
// A thread takes 16 dims of a row, as two pieces of eight that hold whole pairs, in all heads one
// after the other: their angles are the same in every head, so sines and cosines are computed once
// and stay in registers. Nothing is shared, nothing is synchronised. Where pairs lie `half` dims
// apart and half is no multiple of eight, a thread turns each of its dims by itself and reads the
// other of the pair beside it, from L1.
//
// Floor: keys are read once and written once, 40 us for 32K rows of 8 heads x 128 at 3.3 TB/s. A
// turn costs about 25 instructions, shared by the heads, and a key 100 for 16 dims: below half of
// what an SM issues in that time even with two heads.
#include <algorithm>

#include "common/cuda/convert.cuh"
#include "common/cuda/launch.h"
#include "shadow/sm80/checks.h"
#include "shadow/sm80/layout.h"
#include "shadow/sm80/rope.cuh"
#include "sparseattn/shadow.h"

namespace sparseattn {
namespace shadow_sm80 {

constexpr int kUndoRows = 16;          // of a CTA
constexpr int kMostUndoThreads = 128;  // kUndoRows * head_dim / 16
constexpr int kHeadsAtOnce = 2;        // whose loads are in flight

struct UndoJob {
  ShadowUndoRope in;
  int32_t ctas;  // of a sequence
  float inverse_scale;
};

/// Two pieces of eight dims.
struct TwoPieces {
  float low[8], high[8];
};

/// A thread's dims: low + i and high + i, i < 8.
struct Place {
  int low, high;
};

/// The two pieces of unit `unit` of head_dim / 16: together those of the head, each once. The first
/// `blocks` units hold the pairs of pieces that are `blocks` apart.
__device__ __forceinline__ Place place_of(int unit, int units, int blocks) {
  return unit < blocks ? Place{8 * unit, 8 * (unit + blocks)}
                       : Place{8 * (unit + blocks), 8 * (unit + units)};
}

/// Cosine and sine, over the scale, of a pair at a position.
__device__ __forceinline__ void turn_of(const UndoJob& job, float position, int pair, float& cosine,
                                        float& sine) {
  sin_cos(__fmul_rn(position, __ldg(job.in.rope.inv_freq + pair)), sine, cosine);
  cosine = __fmul_rn(cosine, job.inverse_scale);
  sine = __fmul_rn(sine, job.inverse_scale);
}

__device__ __forceinline__ void turn_back(float& a, float& b, float cosine, float sine) {
  const float x = a, y = b;
  a = __fmaf_rn(x, cosine, __fmul_rn(y, sine));
  b = __fmaf_rn(y, cosine, -__fmul_rn(x, sine));
}

/// The turns of a thread's dims at one position.
template <Pairing kPairing>
struct Turns;

template <>
struct Turns<Pairing::kBlocks> {  // pair i: (low[i], high[i])
  float cosine[8], sine[8];
  bool turns;

  __device__ __forceinline__ Turns(const UndoJob& job, float position, const Place& place)
      : turns(place.low < job.in.rope.rotary_dim / 2) {
    if (!turns) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) turn_of(job, position, place.low + i, cosine[i], sine[i]);
  }
  template <class Element>
  __device__ __forceinline__ void undo(TwoPieces& key, const Element*) const {
    if (!turns) return;
#pragma unroll
    for (int i = 0; i < 8; ++i) turn_back(key.low[i], key.high[i], cosine[i], sine[i]);
  }
};

template <>
struct Turns<Pairing::kAdjacent> {  // pair i: (2i, 2i + 1) of low, then of high
  float cosine[8], sine[8];
  int low_pairs, high_pairs;  // of the four of each piece, those that turn

  __device__ __forceinline__ Turns(const UndoJob& job, float position, const Place& place) {
    const int half = job.in.rope.rotary_dim / 2;
    low_pairs = half - place.low / 2;
    high_pairs = half - place.high / 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < low_pairs) turn_of(job, position, place.low / 2 + i, cosine[i], sine[i]);
      if (i < high_pairs) turn_of(job, position, place.high / 2 + i, cosine[i + 4], sine[i + 4]);
    }
  }
  template <class Element>
  __device__ __forceinline__ void undo(TwoPieces& key, const Element*) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < low_pairs) turn_back(key.low[2 * i], key.low[2 * i + 1], cosine[i], sine[i]);
      if (i < high_pairs) {
        turn_back(key.high[2 * i], key.high[2 * i + 1], cosine[i + 4], sine[i + 4]);
      }
    }
  }
};

template <>
struct Turns<Pairing::kScattered> {  // every dim by itself
  float cosine[16], sine[16];        // of low, then of high; sines of the second of a pair negated
  Place place;
  int half;

  __device__ __forceinline__ Turns(const UndoJob& job, float position, const Place& own)
      : place(own), half(job.in.rope.rotary_dim / 2) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int dim = dim_of(i);
      if (dim >= 2 * half) continue;
      turn_of(job, position, dim < half ? dim : dim - half, cosine[i], sine[i]);
      if (dim >= half) sine[i] = -sine[i];
    }
  }
  __device__ __forceinline__ int dim_of(int i) const {
    return i < 8 ? place.low + i : place.high + i - 8;
  }
  template <class Element>
  __device__ __forceinline__ void undo(TwoPieces& key, const Element* row) const {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int dim = dim_of(i);
      if (dim >= 2 * half) continue;
      const auto other = static_cast<float>(__ldg(row + (dim < half ? dim + half : dim - half)));
      float& own = i < 8 ? key.low[i] : key.high[i - 8];
      own = __fmaf_rn(own, cosine[i], __fmul_rn(other, sine[i]));
    }
  }
};

/// x -= mean [8], on a 16-byte boundary.
__device__ __forceinline__ void subtract(float (&x)[8], const float* mean) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 part = __ldg(reinterpret_cast<const float4*>(mean + i));
    x[i] = __fsub_rn(x[i], part.x);
    x[i + 1] = __fsub_rn(x[i + 1], part.y);
    x[i + 2] = __fsub_rn(x[i + 2], part.z);
    x[i + 3] = __fsub_rn(x[i + 3], part.w);
  }
}

/// kUndoRows * head_dim / 16 threads, a thread for each 16 dims of a row.
template <class Element, Pairing kPairing>
__global__ void __launch_bounds__(kMostUndoThreads)
    undo_rope_kernel(const __grid_constant__ UndoJob job) {
  const ShadowUndoRope& in = job.in;
  const int units = in.head_dim / 16;
  const int64_t sequence = blockIdx.x / job.ctas;
  const int64_t row = static_cast<int64_t>(blockIdx.x % job.ctas) * kUndoRows + threadIdx.x / units;
  if (row >= in.rows) return;
  const int blocks = kPairing == Pairing::kBlocks ? in.rope.rotary_dim / 16 : 0;
  const Place place = place_of(threadIdx.x % units, units, blocks);
  const Element* from =
      static_cast<const Element*>(in.k.data) + sequence * in.k.batch_stride + row * in.k.row_stride;
  Element* to =
      static_cast<Element*>(in.out.data) + sequence * in.out.batch_stride + row * in.out.row_stride;
  const float* mean = in.mean == nullptr ? nullptr : in.mean + sequence * in.kv_heads * in.head_dim;
  const Turns<kPairing> turns(job, static_cast<float>(in.first + static_cast<int32_t>(row)), place);

  for (int head = 0; head < in.kv_heads; head += kHeadsAtOnce) {
    uint4 low[kHeadsAtOnce], high[kHeadsAtOnce];
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      if (head + i >= in.kv_heads) continue;
      const Element* key = from + (head + i) * in.k.head_stride;
      low[i] = __ldg(reinterpret_cast<const uint4*>(key + place.low));
      high[i] = __ldg(reinterpret_cast<const uint4*>(key + place.high));
    }
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      if (head + i >= in.kv_heads) continue;
      TwoPieces key;
      cuda::unpack<Element>(low[i], key.low);
      cuda::unpack<Element>(high[i], key.high);
      turns.undo(key, from + (head + i) * in.k.head_stride);
      if (mean != nullptr) {
        subtract(key.low, mean + (head + i) * in.head_dim + place.low);
        subtract(key.high, mean + (head + i) * in.head_dim + place.high);
      }
      Element* out = to + (head + i) * in.out.head_stride;
      *reinterpret_cast<uint4*>(out + place.low) = cuda::round_elements<Element>(key.low);
      *reinterpret_cast<uint4*>(out + place.high) = cuda::round_elements<Element>(key.high);
    }
  }
}

template <class Element>
Status launch_undo_rope(const UndoJob& job, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(static_cast<int64_t>(job.in.batch) * job.ctas);
  const auto threads = static_cast<unsigned>(kUndoRows * (job.in.head_dim / 16));
  switch (pairing_of(job.in.rope)) {
    case Pairing::kAdjacent:
      undo_rope_kernel<Element, Pairing::kAdjacent><<<grid, threads, 0, stream>>>(job);
      break;
    case Pairing::kBlocks:
      undo_rope_kernel<Element, Pairing::kBlocks><<<grid, threads, 0, stream>>>(job);
      break;
    case Pairing::kScattered:
      undo_rope_kernel<Element, Pairing::kScattered><<<grid, threads, 0, stream>>>(job);
      break;
  }
  return cuda::launch_status();
}

}  // namespace shadow_sm80

Status shadow_undo_rope(const ShadowUndoRope& in, cudaStream_t stream) {
  using namespace shadow_sm80;
  if (!is_half(in.dtype)) return {1, "shadow_undo_rope: dtype: expected fp16 or bf16"};
  if (!is_head_dim(in.head_dim)) return {1, "shadow_undo_rope: head_dim: expected 64, 96 or 128"};
  if (in.batch < 0 || in.kv_heads < 1 || in.rows < 0) {
    return {1, "shadow_undo_rope: sizes: expected batch, rows >= 0 and kv_heads >= 1"};
  }
  if (in.first < 0 || in.first > INT32_MAX - in.rows) {
    return {1, "shadow_undo_rope: first: expected first >= 0 with first + rows < 2^31"};
  }
  const int32_t rotary_dim = in.rope.rotary_dim;
  if (rotary_dim < 0 || rotary_dim > in.head_dim || rotary_dim % 2 != 0) {
    return {1, "shadow_undo_rope: rotary_dim: expected an even number up to head_dim"};
  }
  if (in.rope.scale == 0.0f) return {1, "shadow_undo_rope: scale: expected a number that is not 0"};
  if (!is_aligned(in.k, in.batch, in.kv_heads, in.rows) ||
      !is_aligned(in.out, in.batch, in.kv_heads, in.rows) ||
      reinterpret_cast<uintptr_t>(in.mean) % 16 != 0) {
    return {1, "shadow_undo_rope: k, out, mean: expected rows that start on 16-byte boundaries"};
  }
  const int64_t ctas = cuda::ceil_div(in.rows, kUndoRows);
  if (ctas == 0 || in.batch == 0) return {};
  if (!cuda::grid_fits(in.batch * ctas)) {
    return {1, "shadow_undo_rope: more rows than a grid can hold"};
  }
  const UndoJob job{in, static_cast<int32_t>(ctas), 1.0f / in.rope.scale};
  return in.dtype == DType::kFloat16 ? launch_undo_rope<__half>(job, stream)
                                     : launch_undo_rope<__nv_bfloat16>(job, stream);
}

}  // namespace sparseattn
