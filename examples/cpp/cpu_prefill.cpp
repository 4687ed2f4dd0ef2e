// Sparse prefill on the CPU through the C++ API: one A-shape head and one vertical-slash head that
// share a key/value head; checked against a plain loop over the same keys.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <thread>
#include <vector>

#include "data.h"
#include "sparseattn/cpu.h"

namespace {

using sparseattn::PatternKind;
using sparseattn::Shape;

constexpr Shape kShape{/*batch=*/1,   /*q_heads=*/2,  /*kv_heads=*/1,
                       /*q_len=*/500, /*kv_len=*/700, /*head_dim=*/64};
constexpr int32_t kColumns = 40, kOffsets = 120;

/// The caller's threads; a pool does as well.
void parallel_for(int64_t n, const std::function<void(int64_t, int64_t)>& body) {
  const int64_t pieces = std::min<int64_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < pieces; ++i) {
    threads.emplace_back(body, n * i / pieces, n * (i + 1) / pieces);
  }
  for (std::thread& thread : threads) thread.join();
}

/// Whether query row `row` of a head sees `key`: the definitions of the README.
bool sees(const sparseattn::cpu::HeadIndex& head, int32_t row, int32_t key) {
  const int32_t position = row + kShape.kv_len - kShape.q_len;
  if (key > position) return false;
  if (head.kind == PatternKind::kAShape) {
    return key < head.sink || position - key < head.window;
  }
  const int32_t end = kShape.tile_end(row / sparseattn::kTileRows);
  const auto covers = [&](int32_t offset) {
    return offset >= 0 && key >= end - 64 - offset && key < end - offset;
  };
  return std::find(head.columns, head.columns + head.num_columns, key) !=
             head.columns + head.num_columns ||
         std::any_of(head.offsets, head.offsets + head.num_offsets, covers);
}

/// Largest difference of `out` [q_len, head_dim] from attention over the keys that each row sees.
double largest_error(const sparseattn::cpu::HeadIndex& head, const float* q, const float* k,
                     const float* v, const float* out, double scale) {
  const int32_t dim = kShape.head_dim;
  double largest = 0;
  for (int32_t row = 0; row < kShape.q_len; ++row) {
    std::vector<double> sum(dim);
    double weights = 0;
    for (int32_t key = 0; key < kShape.kv_len; ++key) {
      if (!sees(head, row, key)) continue;
      double score = 0;
      for (int32_t d = 0; d < dim; ++d) score += double(q[row * dim + d]) * k[key * dim + d];
      const double weight = std::exp(score * scale);
      weights += weight;
      for (int32_t d = 0; d < dim; ++d) sum[d] += weight * v[key * dim + d];
    }
    for (int32_t d = 0; d < dim; ++d) {
      largest = std::max(largest, std::abs(sum[d] / weights - out[row * dim + d]));
    }
  }
  return largest;
}

bool report(const char* call, const sparseattn::Status& status) {
  if (!status.ok()) std::fprintf(stderr, "%s: %s\n", call, status.what);
  return status.ok();
}

}  // namespace

int main() {
  const int64_t q_size = int64_t{kShape.q_heads} * kShape.q_len * kShape.head_dim;
  const int64_t kv_size = int64_t{kShape.kv_heads} * kShape.kv_len * kShape.head_dim;
  auto q = example::random_values(q_size, 1), k = example::random_values(kv_size, 2),
       v = example::random_values(kv_size, 3);
  std::vector<float> out(q_size), lse(kShape.q_heads * kShape.q_len);
  const auto rows = [](std::vector<float>& x, int32_t heads, int32_t length) {
    return example::contiguous(x.data(), heads, length, kShape.head_dim);
  };
  const float scale = 1 / std::sqrt(static_cast<float>(kShape.head_dim));

  // The index of head 1, estimated from the last 64 query rows.
  const int32_t head = 1;
  std::vector<int32_t> columns(kColumns), offsets(kOffsets);
  sparseattn::cpu::VerticalSlashEstimate estimate{};
  estimate.shape = kShape;
  estimate.dtype = sparseattn::DType::kFloat32;
  estimate.q = rows(q, kShape.q_heads, kShape.q_len);
  estimate.k = rows(k, kShape.kv_heads, kShape.kv_len);
  estimate.scale = scale;
  estimate.last_q = 64;
  estimate.sink = 30;
  estimate.local = 100;
  estimate.heads = 1;
  estimate.head_ids = &head;
  estimate.max_columns = kColumns;
  estimate.max_offsets = kOffsets;
  estimate.columns = columns.data();
  estimate.offsets = offsets.data();
  if (!report("estimate_vertical_slash",
              sparseattn::cpu::estimate_vertical_slash(estimate, parallel_for))) {
    return 1;
  }

  std::vector<sparseattn::cpu::HeadIndex> heads(kShape.q_heads);
  heads[0].kind = PatternKind::kAShape;
  heads[0].sink = 8;
  heads[0].window = 100;
  heads[1].kind = PatternKind::kVerticalSlash;
  heads[1].columns = columns.data();
  heads[1].num_columns = kColumns;
  heads[1].offsets = offsets.data();
  heads[1].num_offsets = kOffsets;

  const sparseattn::cpu::AttentionParams params{kShape,
                                                sparseattn::DType::kFloat32,
                                                estimate.q,
                                                estimate.k,
                                                rows(v, kShape.kv_heads, kShape.kv_len),
                                                rows(out, kShape.q_heads, kShape.q_len),
                                                lse.data(),
                                                scale,
                                                heads.data()};
  if (!report("sparse_attention", sparseattn::cpu::sparse_attention(params, parallel_for))) {
    return 1;
  }

  bool right = true;
  for (int32_t h = 0; h < kShape.q_heads; ++h) {
    const int64_t begin = int64_t{h} * kShape.q_len * kShape.head_dim;
    const double error = largest_error(heads[h], &q[begin], k.data(), v.data(), &out[begin], scale);
    std::printf("head %d: largest error %.1e\n", h, error);
    right = right && error < 1e-4;
  }
  return right ? 0 : 1;
}
