// Sparse prefill on the GPU through the C++ API: heads of three patterns in one launch, the index
// of the vertical-slash head estimated on the device, nothing read back before the result. The
// result is compared with the CPU library's on the same index.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "data.h"
#include "sparseattn/attention.h"
#include "sparseattn/cpu.h"
#include "sparseattn/estimate.h"
#include "sparseattn/plan.h"

namespace {

using sparseattn::Pattern;
using sparseattn::PatternKind;
using sparseattn::Shape;

constexpr Shape kShape{/*batch=*/1,    /*q_heads=*/4,   /*kv_heads=*/2,
                       /*q_len=*/2000, /*kv_len=*/2048, /*head_dim=*/128};
constexpr int32_t kColumns = 64, kOffsets = 200;
constexpr Pattern kPatterns[] = {{PatternKind::kDense, 0, 0},
                                 {PatternKind::kAShape, 16, 256},
                                 {PatternKind::kVerticalSlash, kColumns, kOffsets},
                                 {PatternKind::kAShape, 0, 64}};

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
  std::exit(1);
}

void check(const sparseattn::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "sparseattn: %s\n", status.what);
  std::exit(1);
}

/// Device memory of one array.
template <class T>
class Device {
 public:
  explicit Device(size_t count) : count_(count) {
    check(cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(1, count) * sizeof(T)));
  }
  explicit Device(const std::vector<T>& host) : Device(host.size()) {
    check(cudaMemcpy(data_, host.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;
  ~Device() { cudaFree(data_); }
  T* get() const { return data_; }
  std::vector<T> host() const {
    std::vector<T> values(count_);
    check(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t count_;
};

std::vector<uint16_t> random_bf16(int64_t count, uint32_t seed) {
  std::vector<uint16_t> values;
  for (const float value : example::random_values(count, seed)) {
    values.push_back(example::to_bf16(value));
  }
  return values;
}

sparseattn::View q_view(void* data) {
  return example::contiguous(data, kShape.q_heads, kShape.q_len, kShape.head_dim);
}
sparseattn::View kv_view(void* data) {
  return example::contiguous(data, kShape.kv_heads, kShape.kv_len, kShape.head_dim);
}

/// The CPU library on the same inputs and index.
std::vector<uint16_t> on_cpu(std::vector<uint16_t> q, std::vector<uint16_t> k,
                             std::vector<uint16_t> v, const std::vector<int32_t>& columns,
                             const std::vector<int32_t>& offsets, float scale) {
  std::vector<sparseattn::cpu::HeadIndex> heads(kShape.q_heads);
  for (int32_t h = 0; h < kShape.q_heads; ++h) {
    heads[h].kind = kPatterns[h].kind;
    heads[h].sink = kPatterns[h].a;
    heads[h].window = kPatterns[h].b;
    heads[h].columns = columns.data();
    heads[h].offsets = offsets.data();
    heads[h].num_columns = kColumns;
    heads[h].num_offsets = kOffsets;
  }
  std::vector<uint16_t> out(q.size());
  const auto serial = [](int64_t n, const auto& body) { body(0, n); };
  check(sparseattn::cpu::sparse_attention(
      {kShape, sparseattn::DType::kBFloat16, q_view(q.data()), kv_view(k.data()), kv_view(v.data()),
       q_view(out.data()), nullptr, scale, heads.data()},
      serial));
  return out;
}

}  // namespace

int main() {
  const int64_t q_size = int64_t{kShape.q_heads} * kShape.q_len * kShape.head_dim;
  const int64_t kv_size = int64_t{kShape.kv_heads} * kShape.kv_len * kShape.head_dim;
  const auto q = random_bf16(q_size, 1), k = random_bf16(kv_size, 2), v = random_bf16(kv_size, 3);
  const Device<uint16_t> q_device(q), k_device(k), v_device(v), out(q_size);
  const Device<float> lse(int64_t{kShape.q_heads} * kShape.q_len);
  const float scale = 1 / std::sqrt(static_cast<float>(kShape.head_dim));
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));

  // The plan: all its memory is one workspace of the caller's.
  sparseattn::PlanSizes sizes{};
  sizes.shape = kShape;
  sizes.dtype = sparseattn::DType::kBFloat16;
  sizes.vs_heads = 1;
  sizes.max_columns = kColumns;
  sizes.max_offsets = kOffsets;
  sizes.block_q = sizes.block_kv = 64;
  const Device<char> plan_memory(sparseattn::plan_bytes(sizes));
  const sparseattn::Plan plan = sparseattn::carve_plan(sizes, plan_memory.get());
  check(sparseattn::plan_heads(plan, kPatterns, stream));

  // The index of the vertical-slash heads.
  const Device<int32_t> columns(kColumns), offsets(kOffsets);
  sparseattn::VerticalSlashEstimate estimate{};
  estimate.shape = kShape;
  estimate.dtype = sizes.dtype;
  estimate.q = q_view(q_device.get());
  estimate.k = kv_view(k_device.get());
  estimate.scale = scale;
  estimate.last_q = 64;
  estimate.sink = 30;
  estimate.local = 100;
  estimate.heads = sizes.vs_heads;
  estimate.head_ids = plan.vs_heads;
  estimate.max_columns = kColumns;
  estimate.max_offsets = kOffsets;
  estimate.columns = columns.get();
  estimate.offsets = offsets.get();
  const Device<char> estimate_memory(sparseattn::estimate_vertical_slash_bytes(estimate));
  check(sparseattn::estimate_vertical_slash(estimate, estimate_memory.get(), stream));
  check(sparseattn::plan_vertical_slash(
      plan, {columns.get(), false, kColumns, sizes.vs_heads * kColumns, kColumns, 1},
      {offsets.get(), false, kOffsets, sizes.vs_heads * kOffsets, kOffsets, 1}, stream));
  check(sparseattn::pack_columns(plan, estimate.k, kv_view(v_device.get()), stream));

  check(sparseattn::sparse_attention_sm80(
      {kShape, sizes.dtype, estimate.q, estimate.k, kv_view(v_device.get()), q_view(out.get()),
       lse.get(), scale, plan},
      stream));
  check(cudaStreamSynchronize(stream));

  const auto expected = on_cpu(q, k, v, columns.host(), offsets.host(), scale);
  const auto found = out.host();
  float largest = 0;
  for (int64_t i = 0; i < q_size; ++i) {
    largest =
        std::max(largest, std::abs(example::from_bf16(expected[i]) - example::from_bf16(found[i])));
  }
  check(cudaStreamDestroy(stream));
  std::printf("largest difference from the CPU: %.1e\n", largest);
  return largest < 0.05f ? 0 : 1;
}
