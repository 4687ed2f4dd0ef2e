// Candidates of long lists: what the whole device can do for a selection that one CTA ends.
//
// Pieces of a list are counted by the first digit of their keys, together; then the keys at or
// above the digit in which the k-th falls are written to the list's candidates, in order: pieces
// count theirs first, so that each knows where to write. There are few, as a digit has the sign,
// the exponent and two bits of the mantissa. If there are more than kMostCandidates, nothing is
// written, and the selection looks at the list itself. Sums are of integers, so nothing depends on
// timing.
#include "common/cuda/launch.h"
#include "index/sm80/list_scope.cuh"

namespace sparseattn::index_sm80 {
namespace {

using PieceTeam = cuda::Team<16>;
constexpr int kBinsPerThread = kFirstBins / PieceTeam::kThreads;
constexpr int kVector = 4;  // keys that a thread loads at once
constexpr int kStride = kVector * PieceTeam::kThreads;

struct Piece {
  int32_t begin, end;

  __device__ Piece(const VerticalSlashJob& job, const ListScope& list, int32_t index) {
    const int64_t length = cuda::ceil_div(cuda::ceil_div(list.n, job.pieces), kStride) * kStride;
    begin = static_cast<int32_t>(min(index * length, static_cast<int64_t>(list.n)));
    end = static_cast<int32_t>(min(begin + length, static_cast<int64_t>(list.n)));
  }
};

/// Calls take(first, keys, count) for kVector keys a thread, the same number of times in all
/// threads; `count` of the keys exist. Rows of masses are padded to 64, so whole vectors are read.
template <class Take>
__device__ __forceinline__ void for_keys(const ListScope& list, const Piece& piece,
                                         const Take& take) {
  for (int32_t base = piece.begin; base < piece.end; base += kStride) {
    const int32_t first = base + kVector * PieceTeam::rank();
    const int32_t count = max(0, min(kVector, piece.end - first));
    uint32_t keys[kVector] = {};
    if (count > 0) {
      const float4 mass = *reinterpret_cast<const float4*>(list.mass + first);
      const float values[kVector] = {mass.x, mass.y, mass.z, mass.w};
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        keys[i] = first + i < list.forced ? kForcedKey : order_key(values[i]);
      }
    }
    take(first, keys, count);
  }
}

/// The first digit of the k-th largest key.
__device__ __forceinline__ uint32_t first_digit(const VerticalSlashJob& job, const ListScope& list,
                                                int32_t* scratch, int32_t& shared_digit) {
  const int32_t* bins = job.histogram + list.slot() * kFirstBins;
  int32_t counts[kBinsPerThread], sum = 0;
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    counts[i] = bins[kFirstBins - 1 - (PieceTeam::rank() * kBinsPerThread + i)];
    sum += counts[i];
  }
  int32_t total;
  int32_t above = cuda::team_scan<PieceTeam>(sum, 0, cuda::Add{}, scratch, total);
#pragma unroll
  for (int i = 0; i < kBinsPerThread; ++i) {
    if (above < list.k && list.k <= above + counts[i]) {
      shared_digit = kFirstBins - 1 - (PieceTeam::rank() * kBinsPerThread + i);
    }
    above += counts[i];
  }
  PieceTeam::sync();
  return static_cast<uint32_t>(shared_digit);
}

}  // namespace

/// CTA p of list l is l * pieces + p, here and below.
__global__ void __launch_bounds__(PieceTeam::kThreads)
    count_digits_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ int32_t bins[kFirstBins];
  const ListScope list(job, blockIdx.x / job.pieces);
  if (!list.has_candidates(job)) return;
  const Piece piece(job, list, static_cast<int32_t>(blockIdx.x % job.pieces));
  for (int i = PieceTeam::rank(); i < kFirstBins; i += PieceTeam::kThreads) bins[i] = 0;
  if (list.is_offsets) list.add_spill(job, piece.begin, piece.end);
  __syncthreads();
  for_keys(list, piece, [&](int32_t, const uint32_t (&keys)[kVector], int32_t count) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) count_digits(bins, keys[i] >> kFirstShift, i < count);
  });
  __syncthreads();
  int32_t* all = job.histogram + list.slot() * kFirstBins;
  for (int i = PieceTeam::rank(); i < kFirstBins; i += PieceTeam::kThreads) {
    if (bins[i] != 0) atomicAdd(all + i, bins[i]);
  }
}

__global__ void __launch_bounds__(PieceTeam::kThreads)
    count_candidates_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ int32_t scratch[PieceTeam::kWarps];
  __shared__ int32_t digit;
  const ListScope list(job, blockIdx.x / job.pieces);
  if (!list.has_candidates(job)) return;
  const int32_t index = static_cast<int32_t>(blockIdx.x % job.pieces);
  const Piece piece(job, list, index);
  const uint32_t least = first_digit(job, list, scratch, digit) << kFirstShift;
  int32_t found = 0;
  for_keys(list, piece, [&](int32_t, const uint32_t (&keys)[kVector], int32_t count) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) found += i < count && keys[i] >= least;
  });
  int32_t total;
  cuda::team_scan<PieceTeam>(found, 0, cuda::Add{}, scratch, total);
  if (PieceTeam::rank() == 0) job.piece_count[list.slot() * job.pieces + index] = total;
}

__global__ void __launch_bounds__(PieceTeam::kThreads)
    write_candidates_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ int32_t scratch[PieceTeam::kWarps];
  __shared__ int32_t digit;
  const ListScope list(job, blockIdx.x / job.pieces);
  if (!list.has_candidates(job)) return;
  const int32_t index = static_cast<int32_t>(blockIdx.x % job.pieces);
  const int32_t* counts = job.piece_count + list.slot() * job.pieces;
  int32_t before = 0, total = 0;
  for (int32_t p = 0; p < job.pieces; ++p) {
    if (p < index) before += counts[p];
    total += counts[p];
  }
  if (total > kMostCandidates) return;
  const Piece piece(job, list, index);
  const uint32_t least = first_digit(job, list, scratch, digit) << kFirstShift;
  int32_t* out = job.candidates + list.slot() * kMostCandidates;
  for_keys(list, piece, [&](int32_t first, const uint32_t (&keys)[kVector], int32_t count) {
    bool taken[kVector];
    int32_t own = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      taken[i] = i < count && keys[i] >= least;
      own += taken[i];
    }
    int32_t found;
    int32_t at = before + cuda::team_scan<PieceTeam>(own, 0, cuda::Add{}, scratch, found);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      if (taken[i]) out[at++] = first + i;
    }
    before += found;
  });
}

Status launch_select_candidates(const VerticalSlashJob& job, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(2 * job.rows()) * kFirstBins * sizeof(int32_t);
  const Status status = cuda::to_status(cudaMemsetAsync(job.histogram, 0, bytes, stream));
  if (!status.ok()) return status;
  const int64_t lists = 2 * static_cast<int64_t>(job.in.shape.batch) * job.in.heads;
  const auto ctas = static_cast<unsigned>(lists * job.pieces);
  count_digits_kernel<<<ctas, PieceTeam::kThreads, 0, stream>>>(job);
  count_candidates_kernel<<<ctas, PieceTeam::kThreads, 0, stream>>>(job);
  write_candidates_kernel<<<ctas, PieceTeam::kThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
