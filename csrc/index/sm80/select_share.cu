// Selection of columns and offsets by a share of the mass; the rules are in index/mass.h.
//
// launch_select_indices has listed the columns that the limit has room for. A first kernel adds the
// offsets of every run; then one CTA for each head lists the runs that the limit has room for,
// finds where the ranking of columns and runs covers the share, and keeps what lies before.
#include "common/cuda/launch.h"
#include "index/mass.h"
#include "index/sm80/head_list.cuh"
#include "index/sm80/select.cuh"
#include "index/sm80/vertical_slash_job.h"
#include "index/sm80/weighted_select.cuh"

namespace sparseattn::index_sm80 {
namespace {

constexpr int kRunThreads = 256;
constexpr int kRunsPerCta = kRunThreads / 32;
using ShareTeam = cuda::Team<16>;

/// What chunk c >= 1 adds to the offset, see masses.cuh.
__device__ __forceinline__ float spilled_mass(const VerticalSlashJob& job, const SequenceScope& own,
                                              int64_t row, int32_t offset) {
  const int64_t keys = static_cast<int64_t>(own.origin) - offset;
  if (keys <= 0) return 0.f;
  const int64_t chunk = (keys + job.chunk_keys - 1) / job.chunk_keys;
  const int64_t diagonal = chunk * job.chunk_keys - keys;
  if (chunk >= own.chunks || diagonal >= 64) return 0.f;
  return job.spill[(row * job.max_chunks + chunk) * 64 + diagonal];
}

/// Runs of a sequence; rows of the intermediates have job.runs entries.
__device__ __forceinline__ int32_t runs_of(const SequenceScope& own) {
  return own.kv_len / index::kRunOffsets + (own.kv_len % index::kRunOffsets != 0);
}

}  // namespace

/// A warp for each run of offsets and the columns of the same numbers.
__global__ void __launch_bounds__(kRunThreads)
    run_masses_kernel(const __grid_constant__ VerticalSlashJob job, int32_t ctas_per_row) {
  const VerticalSlashEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const int64_t row = blockIdx.x / ctas_per_row;
  const int run = static_cast<int>(blockIdx.x % ctas_per_row) * kRunsPerCta + threadIdx.x / 32;
  const int64_t unit = job.first_unit + row / group;
  const int kv_head = static_cast<int>(unit % shape.kv_heads);
  const int head = kv_head * group + static_cast<int>(row % group);
  const int ordinal = listed_ordinal(in.head_ids, in.heads, head);
  const SequenceScope own = sequence_scope(job, unit / shape.kv_heads);
  if (run >= runs_of(own) || ordinal < 0 || share_of(in.shares, ordinal, in.share) <= 0) return;

  const float* column_mass = job.column_mass + row * job.mass_stride;
  const float* offset_mass = job.offset_mass + row * job.mass_stride;
  unsigned long long columns = 0, offsets = 0;
#pragma unroll
  for (int i = 0; i < index::kRunOffsets / 32; ++i) {
    const int64_t at = static_cast<int64_t>(run) * index::kRunOffsets + 32 * i + threadIdx.x % 32;
    if (at < own.kv_len) {
      const float spilled = spilled_mass(job, own, row, static_cast<int32_t>(at));
      columns += index::fixed_mass(column_mass[at]);
      offsets += index::fixed_mass(offset_mass[at] + spilled);
    }
  }
  columns = cuda::warp_sum(columns);
  offsets = cuda::warp_sum(offsets);
  if (threadIdx.x % 32 == 0) {
    job.column_sum[row * job.runs + run] = columns;
    job.run_mass[row * job.runs + run] = index::clean_mass(index::mass_of_fixed(offsets));
  }
}

namespace {

struct ShareScratch {
  union {
    SelectScratch<ShareTeam, 11> select;
    CutScratch<ShareTeam, 8, 2> cut;
  };
  unsigned long long scan[ShareTeam::kWarps];
};

__device__ __forceinline__ uint32_t mass_key(float mass) {
  return __float_as_uint(index::clean_mass(mass));
}

/// Lists value_at(i) for every i of [0, n), ascending, that `threshold` selects by key_at(i), and
/// returns how many there are. `out` may be the array that the two read at i: it is written at or
/// before the entries read so far.
template <class KeyAt, class ValueAt>
__device__ __forceinline__ int32_t keep(int32_t n, const Threshold& threshold, const KeyAt& key_at,
                                        const ValueAt& value_at, int32_t* out,
                                        unsigned long long* scan) {
  unsigned long long before = 0;  // keys equal to the threshold's above bit 32, above it below
  for (int64_t base = 0; base < n; base += ShareTeam::kThreads) {
    const int64_t at = base + ShareTeam::rank();
    const uint32_t key = at < n ? key_at(static_cast<int32_t>(at)) : 0;
    const int32_t value = at < n ? value_at(static_cast<int32_t>(at)) : 0;
    const bool is_above = at < n && key > threshold.key;
    const bool is_equal = at < n && key == threshold.key;
    const unsigned long long own = static_cast<unsigned long long>(is_equal) << 32 | is_above;
    unsigned long long total;
    const unsigned long long earlier =
        before + cuda::team_scan<ShareTeam>(own, 0ull, cuda::Add{}, scan, total);
    const int32_t ties = static_cast<int32_t>(earlier >> 32);
    if (is_above || (is_equal && ties < threshold.ties)) {
      out[static_cast<int32_t>(earlier & 0xffffffffu) + min(ties, threshold.ties)] = value;
    }
    before += total;
  }
  ShareTeam::sync();
  return static_cast<int32_t>(before & 0xffffffffu) +
         min(static_cast<int32_t>(before >> 32), threshold.ties);
}

__device__ __forceinline__ uint64_t team_sum(unsigned long long value, unsigned long long* scan) {
  unsigned long long total;
  cuda::team_scan<ShareTeam>(value, 0ull, cuda::Add{}, scan, total);
  return total;
}

/// The offsets of the runs listed, behind the forced ones; -1 up to `length`.
__device__ __forceinline__ void write_offsets(const int32_t* runs, int32_t count, int32_t forced,
                                              int32_t kv_len, int32_t* out, int32_t length) {
  constexpr int kRun = index::kRunOffsets;
  const int rank = ShareTeam::rank();
  for (int i = rank; i < forced; i += ShareTeam::kThreads) out[i] = i;
  // Only the first run may be cut, by the forced offsets, and the last, by kv_len.
  const int32_t cut = count > 0 ? max(forced - runs[0] * kRun, 0) : 0;
  for (int64_t i = rank; i < static_cast<int64_t>(count) * kRun; i += ShareTeam::kThreads) {
    const int64_t offset = static_cast<int64_t>(runs[i / kRun]) * kRun + i % kRun;
    if (offset >= forced && offset < kv_len) out[forced + i - cut] = static_cast<int32_t>(offset);
  }
  int64_t end = forced;
  if (count > 0) {
    const int64_t last = (static_cast<int64_t>(runs[count - 1]) + 1) * kRun;
    end += static_cast<int64_t>(count) * kRun - cut - (last > kv_len ? last - kv_len : 0);
  }
  for (int64_t i = end + rank; i < length; i += ShareTeam::kThreads) out[i] = -1;
}

/// Where the prefix that covers the share ends, among columns and among runs.
struct ShareThresholds {
  Threshold columns;
  Threshold runs;
};

template <class EntryAt>
__device__ __forceinline__ ShareThresholds find_thresholds(int32_t n, const EntryAt& entry_at,
                                                           const index::Coverage& coverage,
                                                           ShareScratch& scratch) {
  if (coverage.reached(0, 0)) return {{kForcedKey - 1, 0}, {kForcedKey - 1, 0}};
  const auto reached = [coverage](const uint64_t (&kept)[2]) {
    return coverage.reached(kept[0], kept[1]);
  };
  const Cut<2> cut = find_cut<ShareTeam>(n, entry_at, reached, scratch.cut);
  if (!cut.found) return {{0, 0}, {0, 0}};
  // Entries of one key and part have one mass.
  const float mass = __uint_as_float(cut.key);
  const uint64_t column = index::fixed_mass(mass / index::kColumnsPerRun);
  const uint64_t run = index::fixed_mass(mass);
  const auto columns = static_cast<int32_t>(cut.equal[0] == 0 ? 0 : cut.equal[0] / column);
  const auto runs = static_cast<int32_t>(cut.equal[1] == 0 ? 0 : cut.equal[1] / run);
  const auto with_columns = [&](int32_t t) {
    return coverage.reached(cut.above[0] + t * column, cut.above[1]);
  };
  const auto with_runs = [&](int32_t t) {
    return coverage.reached(cut.above[0] + cut.equal[0], cut.above[1] + t * run);
  };
  if (with_columns(columns)) {
    return {{cut.key, least(columns, with_columns)}, {cut.key, 0}};
  }
  return {{cut.key, columns}, {cut.key, least(runs, with_runs)}};
}

}  // namespace

/// A CTA for each head entry.
__global__ void __launch_bounds__(ShareTeam::kThreads, 1)
    select_share_kernel(const __grid_constant__ VerticalSlashJob job) {
  __shared__ ShareScratch scratch;
  const VerticalSlashEstimate& in = job.in;
  const Shape& shape = in.shape;
  const int group = shape.q_heads / shape.kv_heads;
  const int64_t entry = blockIdx.x;
  const int sequence = static_cast<int>(entry / in.heads);
  const int ordinal = static_cast<int>(entry % in.heads);
  const int head = listed_head(in.head_ids, ordinal);
  const int share = share_of(in.shares, ordinal, in.share);
  const int64_t unit = static_cast<int64_t>(sequence) * shape.kv_heads + head / group;
  if (share <= 0 || unit < job.first_unit || unit >= job.first_unit + job.units) return;
  const int64_t row = (unit - job.first_unit) * group + head % group;

  const int rank = ShareTeam::rank();
  const SequenceScope own = sequence_scope(job, sequence);
  const int32_t n = own.kv_len, runs = runs_of(own);
  const int32_t num_columns = min(budget_of(in.num_columns, ordinal, in.max_columns), n);
  const int32_t num_offsets = min(budget_of(in.num_offsets, ordinal, in.max_offsets), n);
  const int32_t forced_columns = min(in.sink, num_columns);
  const int32_t forced_offsets = min(in.local, num_offsets);
  int32_t* columns = in.columns + entry * in.max_columns;  // num_columns are listed
  const float* column_mass = job.column_mass + row * job.mass_stride;
  const float* run_mass = job.run_mass + row * job.runs;
  int32_t* run_list = job.run_list + row * job.runs;

  unsigned long long column_total = 0, run_total = 0;
  for (int i = rank; i < runs; i += ShareTeam::kThreads) {
    column_total += job.column_sum[row * job.runs + i];
    run_total += index::fixed_mass(run_mass[i]);
  }
  column_total = team_sum(column_total, scratch.scan);
  run_total = team_sum(run_total, scratch.scan);
  const index::Coverage coverage(column_total, run_total, own.query_rows, share);

  const int32_t room = min((num_offsets - forced_offsets) / index::kRunOffsets, runs);
  const auto run_key = [run_mass](int32_t j) { return mass_key(run_mass[j]); };
  const Threshold limit = find_threshold<ShareTeam, 11>(runs, room, run_key, scratch.select);
  const int32_t listed =
      keep(runs, limit, run_key, [](int32_t j) { return j; }, run_list, scratch.scan);

  // A mass that is 0 in fixed point is no entry, and its key 0.
  const auto column_entry = [=](int32_t i) -> WeightedEntry {
    const float mass = columns[i] < forced_columns ? 0.f : column_mass[columns[i]];
    const uint64_t fixed = index::fixed_mass(mass);
    const uint32_t key = __float_as_uint(index::clean_mass(mass) * index::kColumnsPerRun);
    return {fixed == 0 ? 0 : key, 0, fixed};
  };
  const auto run_entry = [=](int32_t i) -> WeightedEntry {
    const float mass = run_mass[run_list[i]];
    const uint64_t fixed = index::fixed_mass(mass);
    return {fixed == 0 ? 0 : mass_key(mass), 1, fixed};
  };
  const auto entry_at = [=](int32_t i) {
    return i < num_columns ? column_entry(i) : run_entry(i - num_columns);
  };
  const ShareThresholds cut = find_thresholds(num_columns + listed, entry_at, coverage, scratch);

  const int32_t kept_columns = keep(
      num_columns, cut.columns,
      [=](int32_t i) { return columns[i] < forced_columns ? kForcedKey : column_entry(i).key; },
      [=](int32_t i) { return columns[i]; }, columns, scratch.scan);
  for (int i = kept_columns + rank; i < num_columns; i += ShareTeam::kThreads) columns[i] = -1;
  const int32_t kept_runs = keep(
      listed, cut.runs, [=](int32_t i) { return run_entry(i).key; },
      [=](int32_t i) { return run_list[i]; }, run_list, scratch.scan);
  write_offsets(run_list, kept_runs, forced_offsets, n, in.offsets + entry * in.max_offsets,
                in.max_offsets);
}

Status launch_select_share(const VerticalSlashJob& job, cudaStream_t stream) {
  const int64_t ctas_per_row = cuda::ceil_div(job.runs, kRunsPerCta);
  const int64_t ctas = static_cast<int64_t>(job.in.shape.batch) * job.in.heads;
  if (!cuda::grid_fits(job.rows() * ctas_per_row) || !cuda::grid_fits(ctas)) {
    return {1, "estimate_vertical_slash: more runs of offsets than a grid can hold"};
  }
  run_masses_kernel<<<static_cast<unsigned>(job.rows() * ctas_per_row), kRunThreads, 0, stream>>>(
      job, static_cast<int32_t>(ctas_per_row));
  const Status status = cuda::launch_status();
  if (!status.ok()) return status;
  select_share_kernel<<<static_cast<unsigned>(ctas), ShareTeam::kThreads, 0, stream>>>(job);
  return cuda::launch_status();
}

}  // namespace sparseattn::index_sm80
