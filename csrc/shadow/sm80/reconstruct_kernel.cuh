// Rebuilt keys written out: a CTA holds the basis of one head, its warps take 16 keys at a time.
#pragma once

#include "shadow/sm80/job.h"
#include "shadow/sm80/rebuild.cuh"

namespace sparseattn::shadow_sm80 {

template <int kHeadDim, class Element, class Factor>
__global__ void __launch_bounds__(32 * kMostWarps)
    reconstruct_kernel(const __grid_constant__ ReconstructJob job) {
  extern __shared__ __align__(16) unsigned char shared[];
  const LowRankReconstruct& in = job.in;
  const Layout& layout = job.layout;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int cta = blockIdx.x % job.ctas;
  const int64_t item = blockIdx.x / job.ctas;
  const int64_t sequence = item / in.kv_heads, head = item % in.kv_heads;

  Rebuilder<kHeadDim, Element, Factor> rebuild(in.keys, layout, shared, sequence, head);
  rebuild.start();
  rebuild.load_vectors(item);
  cuda::cp_async_commit();
  cuda::cp_async_wait<0>();
  __syncthreads();

  constexpr int kSourceRow = sizeof(Element) / sizeof(Factor);  // in elements of the factor
  const Factor* factor = head_rows<Factor>(in.keys.factor, sequence, 0);
  Element* out = head_rows<Element>(in.out, sequence, head);
  Factor* source = reinterpret_cast<Factor*>(shared + layout.source(warp));
  const int32_t* selected = in.selected + item * in.top_k;
  const int64_t count = int64_t{in.top_k} * in.keys.chunk;
  const int64_t stride = int64_t{kWarpKeys} * layout.warps * job.ctas;
  int64_t first = int64_t{kWarpKeys} * layout.warps * cta;
  // The loop is that of the CTA: streamed pieces are taken in step.
  for (; first < count; first += stride) {
    const int64_t base = first + kWarpKeys * warp, token = base + lane % kWarpKeys;
    KeyRef key = KeyRef::none();
    if (token < count) {
      key = token_of(in.keys, selected[token / in.keys.chunk],
                     static_cast<int32_t>(token % in.keys.chunk));
    }
    const bool live = base < count;
    __syncwarp();  // the last tile's source is read
    if (live) {
      copy_rows(source, kSourceRow * layout.source_row(), factor, in.keys.factor.row_stride,
                in.keys.rank * static_cast<int>(sizeof(Factor)) / 16, key.source, key.exists());
    }
    cuda::cp_async_commit();
    const float scale = rebuild.scale_of(sequence, key);
    cuda::cp_async_wait<0>();
    __syncwarp();
    float acc[kHeadDim / 8][4];
    rebuild(acc, source, key, scale, live);
    if (!live) continue;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane / 4 + 8 * i;
      const bool exists = __shfl_sync(~0u, static_cast<int>(key.exists()), row) != 0;
      if (base + row >= count) continue;
      Element* out_row = out + (base + row) * in.out.row_stride;
#pragma unroll
      for (int tile = 0; tile < kHeadDim / 8; ++tile) {
        const int column = rebuild.columns(tile / 2, tile % 2) + lane % 4 * 2;
        const uint32_t pair =
            exists ? round_pair<Element>(acc[tile][2 * i], acc[tile][2 * i + 1]) : 0;
        if (layout.scattered) {
          const int half = in.keys.rope.rotary_dim / 2;
          auto* words = reinterpret_cast<uint16_t*>(out_row);
          words[scattered_dim(column, half)] = static_cast<uint16_t>(pair & 0xffff);
          words[scattered_dim(column + 1, half)] = static_cast<uint16_t>(pair >> 16);
        } else {
          *reinterpret_cast<uint32_t*>(out_row + column) = pair;
        }
      }
    }
  }
}

}  // namespace sparseattn::shadow_sm80
