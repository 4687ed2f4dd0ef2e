// One layer of ShadowKV decode: its tensors, the tables of its slots, and the operators on them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "device.h"
#include "fill.h"
#include "options.h"
#include "sparseattn/shadow.h"

namespace bench {

struct DecodeSpec {
  int32_t batch, kv_heads, group, head_dim, tokens, chunk, rank, top_k, slots, exact, outliers;
  double hits;
  sparseattn::DType dtype;
  uint64_t seed;

  const char* dtype_name() const { return dtype == sparseattn::DType::kFloat16 ? "fp16" : "bf16"; }
  int32_t q_heads() const { return kv_heads * group; }
  int32_t chunks() const { return tokens / chunk; }
  int64_t lists() const { return int64_t{batch} * kv_heads; }
  int64_t width() const { return int64_t{kv_heads} * head_dim; }
  int64_t chunk_size() const { return int64_t{chunk} * head_dim; }
  /// Selected chunks of a head that are in a slot when a step starts.
  int32_t kept() const { return static_cast<int32_t>(std::lround(hits * top_k)); }
};

constexpr int32_t kSinkChunks = 1;

inline void add_decode_options(Options& options) {
  options.add("batch", "N,...", "1", "sequences");
  options.add("tokens", "N,...", "124928", "tokens of the compressed prompt, multiples of --chunk");
  options.add("kv-heads", "N", "8", "key/value heads");
  options.add("group", "N", "4", "query heads of a key/value head");
  options.add("head-dim", "N", "128", "64, 96 or 128");
  options.add("chunk", "N", "8", "tokens of a chunk: 4, 8, 16 or 32");
  options.add("rank", "N", "160", "of the keys' factor, a multiple of 16");
  options.add("budget", "N", "2048", "selected tokens, a multiple of --chunk");
  options.add("slots", "N", "0",
              "chunks of values at hand for a head; 0: 3/2 of the selected ones");
  options.add("outliers", "N", "49", "chunks that stay exact, the first one among them");
  options.add("exact", "N", "456", "exact rows: outliers, sinks, tail and generated tokens");
  options.add("hits", "X", "0.35", "share of the selected chunks that is in a slot");
  options.add("dtypes", "T,...", "bf16", "bf16, fp16");
  options.add("seed", "N", "0", "of all random data");
}

/// Every combination of dtype, batch and length that the options ask for.
inline std::vector<DecodeSpec> decode_specs(const Options& options) {
  const auto integer = [&](const char* name, int64_t low, int64_t high) {
    return static_cast<int32_t>(options.integer(name, low, high));
  };
  const auto expect = [](bool good, const char* name, const std::string& expected, int64_t got) {
    if (!good) {
      throw UsageError(std::string("--") + name + ": expected " + expected + ", got " +
                       std::to_string(got));
    }
  };
  DecodeSpec spec{};
  spec.kv_heads = integer("kv-heads", 1, 128);
  spec.group = integer("group", 1, 64);
  spec.head_dim = integer("head-dim", 64, 128);
  expect(spec.head_dim == 64 || spec.head_dim == 96 || spec.head_dim == 128, "head-dim",
         "64, 96 or 128", spec.head_dim);
  spec.chunk = integer("chunk", 4, 32);
  expect((spec.chunk & (spec.chunk - 1)) == 0, "chunk", "4, 8, 16 or 32", spec.chunk);
  spec.rank = integer("rank", 16, 4096);
  expect(spec.rank % 16 == 0, "rank", "a multiple of 16", spec.rank);
  const int32_t budget = integer("budget", spec.chunk, 1 << 24);
  expect(budget % spec.chunk == 0, "budget", "a multiple of --chunk", budget);
  spec.top_k = budget / spec.chunk;
  spec.slots = integer("slots", 0, 1 << 24);
  if (spec.slots == 0) spec.slots = spec.top_k * 3 / 2;
  expect(spec.slots >= spec.top_k, "slots", "at least " + std::to_string(spec.top_k), spec.slots);
  spec.outliers = integer("outliers", kSinkChunks, 1 << 20);
  spec.exact = integer("exact", 1, 1 << 24);
  const std::vector<double> hits = options.numbers("hits", 0.0, 1.0);
  if (hits.size() != 1) throw UsageError("--hits: expected one number");
  spec.hits = hits[0];
  spec.seed = static_cast<uint64_t>(options.integer("seed", 0, INT32_MAX));
  std::vector<DecodeSpec> specs;
  for (const std::string& dtype : options.words("dtypes", {"bf16", "fp16"})) {
    spec.dtype = dtype == "fp16" ? sparseattn::DType::kFloat16 : sparseattn::DType::kBFloat16;
    for (const int64_t tokens : options.integers("tokens", spec.chunk, int64_t{1} << 30)) {
      spec.tokens = static_cast<int32_t>(tokens);
      expect(tokens % spec.chunk == 0, "tokens", "multiples of --chunk", tokens);
      const int64_t needed =
          int64_t{spec.chunk} * (int64_t{spec.top_k} + spec.slots + spec.outliers);
      expect(tokens >= needed, "tokens",
             "at least " + std::to_string(needed) + " for selected, slots and outliers", tokens);
      for (const int64_t batch : options.integers("batch", 1, 65536)) {
        spec.batch = static_cast<int32_t>(batch);
        specs.push_back(spec);
      }
    }
  }
  return specs;
}

/// Contiguous tensors of normal noise, with keys rebuilt from a factor whose product with the basis
/// has deviation 1. Landmarks, outliers and the selection are those of the operators themselves.
class DecodeLayer {
 public:
  DecodeLayer(const DecodeSpec& spec, bool host_store, cudaStream_t stream)
      : spec(spec), stream_(stream) {
    const int64_t lists = spec.lists(), chunks = spec.chunks(), dim = spec.head_dim;
    make_tensors();
    gram_ = Buffer<double>("gram", spec.batch * spec.width() * spec.width());
    total_ = Buffer<double>("total", spec.batch * spec.width());
    count_ = Buffer<int64_t>("count", spec.batch);
    min_cosine_ = Buffer<float>("min_cosine", lists * chunks);
    outliers_ = Buffer<int32_t>("outliers", lists * spec.outliers);
    selected_ = Buffer<int32_t>("selected", lists * spec.top_k);
    slot_of_ = Buffer<int32_t>("slot_of", lists * spec.top_k);
    misses_ = Buffer<int32_t>("misses", 2 * lists * spec.top_k);
    miss_count_ = Buffer<int32_t>("miss_count", lists);
    rebuilt_ = Buffer<uint16_t>("rebuilt keys", lists * spec.top_k * spec.chunk * dim);
    zero_sums();
    landmarks();
    outliers();
    make_excluded();
    select_space_ = space("select workspace", sparseattn::shadow_select_bytes(select_params()));
    select();
    make_tables();
    gram_space_ = space("gram workspace", sparseattn::shadow_gram_bytes(gram_params()));
    plan_space_ = space("plan workspace", sparseattn::shadow_plan_bytes(plan_params()));
    attention_space_ = space(
        "attention workspace",
        std::max(
            sparseattn::shadow_attention_bytes(attention_params(selected_, slot_of_, slots_)),
            sparseattn::shadow_attention_bytes(attention_params(selected_, selected_, store_))));
    fill_slots();
    plan();
    gather(store_.get());
    if (host_store) {
      host_store_ = PinnedBuffer("store", store_.size() * int64_t{sizeof(uint16_t)});
      check(
          cudaMemcpyAsync(host_store_.get(), store_.get(), static_cast<size_t>(host_store_.bytes()),
                          cudaMemcpyDeviceToHost, stream_),
          "store");
    }
    check(cudaStreamSynchronize(stream_), "layer");
  }

  const DecodeSpec spec;

  // --- the operators ---------------------------------------------------------------------------

  void zero_sums() const {
    clear(gram_);
    clear(total_);
    clear(count_);
  }
  void gram() const {
    check(sparseattn::shadow_gram(gram_params(), gram_space_.get(), stream_), "shadow_gram");
  }
  void landmarks() const {
    sparseattn::ShadowLandmarks params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.rows = spec.tokens;
    params.head_dim = spec.head_dim;
    params.chunk = spec.chunk;
    params.chunks = spec.chunks();
    params.dtype = spec.dtype;
    params.k = view(k_, spec.kv_heads, spec.tokens, spec.head_dim);
    params.landmarks = view(landmarks_, spec.kv_heads, spec.chunks(), spec.head_dim);
    params.min_cosine = min_cosine_.get();
    check(sparseattn::shadow_landmarks(params, stream_), "shadow_landmarks");
  }
  void outliers() const {
    sparseattn::ShadowOutliers params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.chunks = spec.chunks();
    params.count = spec.outliers;
    params.sink_chunks = kSinkChunks;
    params.min_cosine = min_cosine_.get();
    params.outliers = outliers_.get();
    check(sparseattn::shadow_outliers(params, stream_), "shadow_outliers");
  }
  void select() const {
    check(sparseattn::shadow_select(select_params(), select_space_.get(), stream_),
          "shadow_select");
  }
  void plan() const {
    check(sparseattn::shadow_plan(plan_params(), plan_space_.get(), stream_), "shadow_plan");
  }
  void gather(void* store) const {
    check(sparseattn::gather_values(gather_params(store), stream_), "gather_values");
  }
  void gather_device() const { gather(store_.get()); }
  void gather_host() const { gather(host_store_.get()); }
  void reconstruct() const {
    sparseattn::LowRankReconstruct params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.head_dim = spec.head_dim;
    params.top_k = spec.top_k;
    params.dtype = spec.dtype;
    params.keys = low_rank();
    params.selected = selected_.get();
    params.out = view(rebuilt_, spec.kv_heads, int64_t{spec.top_k} * spec.chunk, spec.head_dim);
    check(sparseattn::lowrank_reconstruct(params, stream_), "lowrank_reconstruct");
  }
  void attend() const { attend(attention_params(selected_, slot_of_, slots_)); }

  /// Values missing in slots come from the store.
  void step(void* store) const {
    select();
    plan();
    gather(store);
    attend();
  }
  void step_device() const { step(store_.get()); }
  void step_host() const { step(host_store_.get()); }
  /// The store of the device is its own slots.
  void step_direct() const {
    select();
    attend(attention_params(selected_, selected_, store_));
  }

  /// The tables as they were before the first plan.
  void restore() const {
    copy(slot_chunk_, kept_chunk_);
    copy(last_used_, kept_used_);
  }
  /// Restores the tables and puts into the slots what they say.
  void fill_slots() const {
    restore();
    clear(slots_);
    sparseattn::GatherValues params = gather_params(store_.get());
    params.top_k = spec.slots;
    params.misses = all_slots_.get();
    params.miss_count = slot_count_.get();
    check(sparseattn::gather_values(params, stream_), "gather_values");
  }

  /// Share of the selected chunks that the last plan found in slots.
  double hit_rate() const {
    const auto counts = read(miss_count_);
    const double missed = std::accumulate(counts.begin(), counts.end(), 0.0);
    return 1.0 - missed / static_cast<double>(spec.lists() * spec.top_k);
  }
  std::vector<float> output() const {
    std::vector<float> values;
    for (const uint16_t bits : read(out_)) values.push_back(number(bits));
    return values;
  }

 private:
  template <class T>
  void clear(const Buffer<T>& buffer) const {
    check(cudaMemsetAsync(buffer.get(), 0, static_cast<size_t>(buffer.size()) * sizeof(T), stream_),
          "clear");
  }
  template <class T>
  void copy(const Buffer<T>& to, const Buffer<T>& from) const {
    check(cudaMemcpyAsync(to.get(), from.get(), static_cast<size_t>(to.size()) * sizeof(T),
                          cudaMemcpyDeviceToDevice, stream_),
          "copy");
  }
  template <class T>
  std::vector<T> read(const Buffer<T>& buffer) const {
    std::vector<T> host(static_cast<size_t>(buffer.size()));
    check(cudaMemcpyAsync(host.data(), buffer.get(), host.size() * sizeof(T),
                          cudaMemcpyDeviceToHost, stream_),
          "read");
    check(cudaStreamSynchronize(stream_), "read");
    return host;
  }
  float number(uint16_t bits) const {
    if (spec.dtype == sparseattn::DType::kBFloat16) {
      const uint32_t wide = static_cast<uint32_t>(bits) << 16;
      float value;
      std::memcpy(&value, &wide, sizeof value);
      return value;
    }
    const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
    float value = std::ldexp(static_cast<float>(fraction), -24);
    if (exponent == 31) {
      value = fraction == 0 ? INFINITY : NAN;
    } else if (exponent > 0) {
      value = std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
    }
    return bits >> 15 ? -value : value;
  }

  static Buffer<char> space(const char* name, size_t bytes) {
    return Buffer<char>(name, static_cast<int64_t>(bytes));
  }
  Buffer<uint16_t> normal(const char* name, int64_t count, uint64_t which,
                          float deviation = 1.0f) const {
    Buffer<uint16_t> buffer(name, count);
    check(fill_normal(buffer.get(), spec.dtype, count, 16 * spec.seed + which, stream_, deviation),
          name);
    return buffer;
  }
  static sparseattn::View view(const Buffer<uint16_t>& buffer, int64_t heads, int64_t rows,
                               int64_t row) {
    return {buffer.get(), heads * rows * row, rows * row, row};
  }

  void make_tensors() {
    const int64_t lists = spec.lists(), dim = spec.head_dim;
    q_ = normal("q", int64_t{spec.batch} * spec.q_heads() * dim, 1);
    k_ = normal("k", lists * spec.tokens * dim, 2);
    store_ = normal("store", lists * spec.tokens * dim, 3);
    exact_k_ = normal("exact keys", lists * spec.exact * dim, 4);
    exact_v_ = normal("exact values", lists * spec.exact * dim, 5);
    factor_ = normal("factor", int64_t{spec.batch} * spec.tokens * spec.rank, 6);
    basis_ = normal("basis", lists * spec.rank * dim, 7,
                    1.0f / std::sqrt(static_cast<float>(spec.rank)));
    landmarks_ = Buffer<uint16_t>("landmarks", lists * spec.chunks() * dim);
    slots_ = Buffer<uint16_t>("slots", lists * spec.slots * spec.chunk_size());
    out_ = Buffer<uint16_t>("out", q_.size());
    std::mt19937_64 random(spec.seed);
    std::normal_distribution<float> normal_number;
    std::vector<float> mean(static_cast<size_t>(lists * dim));
    for (float& one : mean) one = normal_number(random);
    mean_ = Buffer<float>("mean", mean, stream_);
    std::vector<float> inv_freq;
    for (int32_t i = 0; i < dim; i += 2) {
      inv_freq.push_back(std::pow(5e5f, -static_cast<float>(i) / static_cast<float>(dim)));
    }
    inv_freq_ = Buffer<float>("inv_freq", inv_freq, stream_);
  }

  void make_excluded() {
    const int64_t chunks = spec.chunks();
    std::vector<uint8_t> mask(static_cast<size_t>(spec.lists() * chunks), 0);
    const auto found = read(outliers_);
    for (size_t i = 0; i < found.size(); ++i) {
      const int64_t list = static_cast<int64_t>(i) / spec.outliers;
      if (found[i] >= 0) mask[static_cast<size_t>(list * chunks + found[i])] = 1;
    }
    excluded_ = Buffer<uint8_t>("excluded", mask, stream_);
  }

  /// Tables that hold `kept` of every head's selected chunks, and other chunks in the other slots.
  void make_tables() {
    const auto selected = read(selected_);
    std::mt19937_64 random(spec.seed + 1);
    std::uniform_int_distribution<int32_t> any(0, spec.chunks() - 1);
    std::vector<int32_t> table, used, pairs;
    for (int64_t list = 0; list < spec.lists(); ++list) {
      std::vector<int32_t> own(selected.begin() + list * spec.top_k,
                               selected.begin() + (list + 1) * spec.top_k);
      std::vector<char> taken(static_cast<size_t>(spec.chunks()), 0);
      for (const int32_t chunk : own) {
        if (chunk < 0) throw std::runtime_error("shadow_select: expected a full list");
        taken[static_cast<size_t>(chunk)] = 1;
      }
      std::shuffle(own.begin(), own.end(), random);
      own.resize(static_cast<size_t>(spec.kept()));
      while (static_cast<int32_t>(own.size()) < spec.slots) {
        const int32_t chunk = any(random);
        if (taken[static_cast<size_t>(chunk)]) continue;
        taken[static_cast<size_t>(chunk)] = 1;
        own.push_back(chunk);
      }
      std::shuffle(own.begin(), own.end(), random);
      std::vector<int32_t> stamps(own.size());
      std::iota(stamps.begin(), stamps.end(), 1);
      std::shuffle(stamps.begin(), stamps.end(), random);
      for (int32_t slot = 0; slot < spec.slots; ++slot) {
        pairs.insert(pairs.end(), {slot, own[static_cast<size_t>(slot)]});
      }
      table.insert(table.end(), own.begin(), own.end());
      used.insert(used.end(), stamps.begin(), stamps.end());
    }
    slot_chunk_ = Buffer<int32_t>("slot_chunk", table, stream_);
    kept_chunk_ = Buffer<int32_t>("slot_chunk", table, stream_);
    last_used_ = Buffer<int32_t>("last_used", used, stream_);
    kept_used_ = Buffer<int32_t>("last_used", used, stream_);
    all_slots_ = Buffer<int32_t>("all slots", pairs, stream_);
    slot_count_ = Buffer<int32_t>(
        "slot count", std::vector<int32_t>(static_cast<size_t>(spec.lists()), spec.slots), stream_);
  }

  sparseattn::ShadowGram gram_params() const {
    sparseattn::ShadowGram params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.rows = spec.tokens;
    params.head_dim = spec.head_dim;
    params.dtype = spec.dtype;
    params.k = view(k_, spec.kv_heads, spec.tokens, spec.head_dim);
    params.gram = gram_.get();
    params.total = total_.get();
    params.count = count_.get();
    return params;
  }
  sparseattn::ShadowSelect select_params() const {
    sparseattn::ShadowSelect params{};
    params.batch = spec.batch;
    params.q_heads = spec.q_heads();
    params.kv_heads = spec.kv_heads;
    params.q_len = 1;
    params.chunks = spec.chunks();
    params.head_dim = spec.head_dim;
    params.top_k = spec.top_k;
    params.dtype = spec.dtype;
    params.q = view(q_, spec.q_heads(), 1, spec.head_dim);
    params.landmarks = view(landmarks_, spec.kv_heads, spec.chunks(), spec.head_dim);
    params.excluded = excluded_.get();
    params.scale = scale();
    params.selected = selected_.get();
    return params;
  }
  sparseattn::ShadowPlan plan_params() const {
    sparseattn::ShadowPlan params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.top_k = spec.top_k;
    params.slots = spec.slots;
    params.selected = selected_.get();
    params.slot_chunk = slot_chunk_.get();
    params.last_used = last_used_.get();
    params.slot_of = slot_of_.get();
    params.misses = misses_.get();
    params.miss_count = miss_count_.get();
    return params;
  }
  sparseattn::GatherValues gather_params(void* store) const {
    sparseattn::GatherValues params{};
    params.batch = spec.batch;
    params.kv_heads = spec.kv_heads;
    params.top_k = spec.top_k;
    params.chunks = spec.chunks();
    params.slots = spec.slots;
    params.row_bytes = spec.chunk_size() * int64_t{sizeof(uint16_t)};
    params.dtype = spec.dtype;
    params.store = view(store_, spec.kv_heads, spec.chunks(), spec.chunk_size());
    params.store.data = store;
    params.values = view(slots_, spec.kv_heads, spec.slots, spec.chunk_size());
    params.misses = misses_.get();
    params.miss_count = miss_count_.get();
    return params;
  }
  sparseattn::LowRankKeys low_rank() const {
    sparseattn::LowRankKeys keys{};
    keys.rows = spec.tokens;
    keys.rank = spec.rank;
    keys.chunk = spec.chunk;
    keys.factor = view(factor_, 1, spec.tokens, spec.rank);
    keys.basis = view(basis_, spec.kv_heads, spec.rank, spec.head_dim);
    keys.mean = mean_.get();
    keys.rope = {inv_freq_.get(), spec.head_dim, false, 1.0f};
    return keys;
  }
  /// `values`: the slots, or the store with as many slots as chunks.
  sparseattn::ShadowAttention attention_params(const Buffer<int32_t>& selected,
                                               const Buffer<int32_t>& slot_of,
                                               const Buffer<uint16_t>& values) const {
    sparseattn::ShadowAttention params{};
    params.shape = {spec.batch, spec.q_heads(), spec.kv_heads, 1, spec.exact, spec.head_dim};
    params.dtype = spec.dtype;
    params.q = view(q_, spec.q_heads(), 1, spec.head_dim);
    params.k = view(exact_k_, spec.kv_heads, spec.exact, spec.head_dim);
    params.v = view(exact_v_, spec.kv_heads, spec.exact, spec.head_dim);
    params.out = view(out_, spec.q_heads(), 1, spec.head_dim);
    params.scale = scale();
    params.keys = low_rank();
    params.top_k = spec.top_k;
    params.slots = static_cast<int32_t>(values.size() / (spec.lists() * spec.chunk_size()));
    params.selected = selected.get();
    params.slot_of = slot_of.get();
    params.values = view(values, spec.kv_heads, params.slots, spec.chunk_size());
    return params;
  }
  void attend(const sparseattn::ShadowAttention& params) const {
    check(sparseattn::shadow_attention(params, attention_space_.get(), stream_),
          "shadow_attention");
  }
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(spec.head_dim)); }

  cudaStream_t stream_;
  Buffer<uint16_t> q_, k_, store_, exact_k_, exact_v_, factor_, basis_, landmarks_, slots_, out_;
  Buffer<uint16_t> rebuilt_;
  Buffer<float> mean_, inv_freq_, min_cosine_;
  Buffer<double> gram_, total_;
  Buffer<int64_t> count_;
  Buffer<uint8_t> excluded_;
  Buffer<int32_t> outliers_, selected_, slot_of_, misses_, miss_count_;
  Buffer<int32_t> slot_chunk_, kept_chunk_, last_used_, kept_used_, all_slots_, slot_count_;
  Buffer<char> gram_space_, select_space_, plan_space_, attention_space_;
  PinnedBuffer host_store_;
};

}  // namespace bench
