// Landmarks of chunks, and which chunks stay exact.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "common/cpu/kernels.h"
#include "common/cpu/work.h"
#include "index/cpu/pick.h"
#include "sparseattn/shadow.h"

namespace sparseattn::cpu {
namespace {

constexpr int32_t kMaxChunk = 32;

struct Scratch {
  FloatBuffer keys{kMaxChunk * kMaxHeadDim};
  FloatBuffer means{kMaxHeadDim * kPanelRows};  // [dim][chunk of the item]
};

double dot(const float* a, const float* b, int32_t dim) {
  double sum = 0.0;
  for (int32_t d = 0; d < dim; ++d) sum += double{a[d]} * b[d];
  return sum;
}

float smallest_cosine(const float* keys, int32_t count, const float* mean, int32_t dim) {
  const double mean_norm = std::sqrt(dot(mean, mean, dim));
  double smallest = INFINITY;
  for (int32_t i = 0; i < count; ++i) {
    const float* key = keys + i * kMaxHeadDim;
    const double norms = std::sqrt(dot(key, key, dim)) * mean_norm;
    const double cosine = norms == 0.0 ? 0.0 : dot(key, mean, dim) / norms;
    if (!(cosine >= smallest)) smallest = cosine;  // takes NaN, too
  }
  return static_cast<float>(smallest);
}

bool is_chunk(int32_t chunk) { return chunk == 4 || chunk == 8 || chunk == 16 || chunk == 32; }

/// Chunks [first, first + count) of one head's rows, count <= kPanelRows.
void make_landmarks(const Kernels& kernels, const ShadowLandmarks& p, int64_t sequence,
                    int64_t head, int32_t first, int32_t count, int32_t to, Scratch& s) {
  const int32_t dim = p.head_dim;
  const Rows rows = rows_of_head(p.k, p.dtype, sequence, head, 0);
  float mean[kMaxHeadDim];
  float ones[kPanelRows];
  std::fill_n(ones, kPanelRows, 1.0f);
  for (int32_t j = 0; j < count; ++j) {
    int32_t ids[kMaxChunk];
    for (int32_t i = 0; i < p.chunk; ++i) ids[i] = (first + j) * p.chunk + i;
    kernels.mean(rows, ids[0], ids[0] + p.chunk, dim, mean);
    for (int32_t d = 0; d < dim; ++d) s.means.data()[d * kPanelRows + j] = mean[d];
    if (p.min_cosine == nullptr) continue;
    kernels.pack_keys(rows, ids, p.chunk, dim, s.keys.data());
    p.min_cosine[(sequence * p.kv_heads + head) * p.chunks + to + j] =
        smallest_cosine(s.keys.data(), p.chunk, mean, dim);
  }
  kernels.store(s.means.data(), ones, count, dim,
                rows_of_head(p.landmarks, p.dtype, sequence, head, to));
}

}  // namespace

Status shadow_landmarks(const ShadowLandmarks& p, const ParallelFor& parallel_for) {
  const Status status = check({p.batch, p.kv_heads, p.kv_heads, 1, 1, p.head_dim}, p.dtype);
  if (!status.ok()) return status;
  if (!is_chunk(p.chunk)) return {1, "chunk: expected 4, 8, 16 or 32"};
  const Kernels& kernels = select_kernels();
  const int32_t most = p.rows / p.chunk;
  const int64_t blocks = (most + kPanelRows - 1) / kPanelRows;
  const int64_t items = int64_t{p.batch} * p.kv_heads * blocks;
  for_each_item<Scratch>(parallel_for, items, [&](int64_t i, Scratch& scratch) {
    const int64_t head = i / blocks, sequence = head / p.kv_heads;
    const int32_t first = static_cast<int32_t>(i % blocks) * kPanelRows;
    const int64_t to = int64_t{start_of(p.first_chunk, sequence, p.chunks)} + first;
    const int64_t count = std::min<int64_t>(
        {kPanelRows, p.lens.at(sequence, p.rows) / p.chunk - first, p.chunks - to});
    if (count <= 0) return;
    make_landmarks(kernels, p, sequence, head % p.kv_heads, first, static_cast<int32_t>(count),
                   static_cast<int32_t>(to), scratch);
  });
  return {};
}

Status shadow_outliers(const ShadowOutliers& p, const ParallelFor& parallel_for) {
  struct Ranks {
    std::vector<float> ranks;
    std::vector<int32_t> picked;
  };
  const int64_t heads = int64_t{p.batch} * p.kv_heads;
  for_each_item<Ranks>(parallel_for, heads, [&](int64_t head, Ranks& s) {
    const int32_t chunks = p.num_chunks.at(head / p.kv_heads, p.chunks);
    const float* min_cosine = p.min_cosine + head * p.chunks;
    s.ranks.resize(chunks);
    for (int32_t j = 0; j < chunks; ++j) {
      s.ranks[j] = j < p.sink_chunks ? kForced : rank_of(-min_cosine[j]);
    }
    pick_largest(s.ranks.data(), chunks, p.count, &s.picked);
    int32_t* out = p.outliers + head * p.count;
    std::fill(std::copy(s.picked.begin(), s.picked.end(), out), out + p.count, -1);
  });
  return {};
}

}  // namespace sparseattn::cpu
