// Body of one table of kernels. Included once by each kernels_<instruction set>.cpp, which is
// compiled with that set's flags and defines the three constants below first.
//
// Everything here has internal linkage and nothing of the standard library is called: an inline
// function compiled with wide instructions could otherwise be the copy that the linker keeps for
// callers on CPUs without them.
//
//   kVectorBytes   width of a vector register
//   kGroupRows     keys (or head dims) per register block; divides kKeyGroup and kDimGroup
//   kGroupVectors  vectors of query rows per register block
//   Register block: kGroupRows * kGroupVectors accumulators, kGroupVectors operands, 1 broadcast.
#pragma once

#include <cstdint>

#include "common/cpu/kernels.h"

namespace sparseattn::cpu {
namespace {

typedef float Vec __attribute__((vector_size(kVectorBytes), may_alias));
typedef int32_t IntVec __attribute__((vector_size(kVectorBytes), may_alias));
typedef float LooseVec __attribute__((vector_size(kVectorBytes), may_alias, aligned(4)));
// kDimGroup elements of a row: fp32, bf16 as stored, bf16 while it is widened.
typedef float FloatGroup __attribute__((vector_size(kDimGroup * 4)));
typedef uint16_t HalfGroup __attribute__((vector_size(kDimGroup * 2)));
typedef uint32_t WideGroup __attribute__((vector_size(kDimGroup * 4)));

constexpr int32_t kLanes = kVectorBytes / 4;
constexpr int32_t kPanelVectors = kPanelRows / kLanes;
constexpr int32_t kBlockLanes = kGroupVectors * kLanes;
static_assert(kPanelRows % kBlockLanes == 0, "a panel is a whole number of register blocks");
static_assert(kKeyGroup % kGroupRows == 0 && kDimGroup % kGroupRows == 0, "blocks fill groups");

constexpr float kInfinity = __builtin_inff();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store_vec(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }
inline IntVec as_int(Vec v) { return reinterpret_cast<IntVec&>(v); }
inline Vec as_float(IntVec v) { return reinterpret_cast<Vec&>(v); }

/// Round to nearest even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

/// Calls put(d, first kDimGroup elements from d on) for one row, d = 0, kDimGroup, ...
template <class Put>
inline void for_each_group(const Rows& rows, int64_t row, int32_t head_dim, const Put& put) {
  if (rows.dtype == DType::kFloat32) {
    const float* in = static_cast<const float*>(rows.data) + row * rows.row_stride;
    for (int32_t d = 0; d < head_dim; d += kDimGroup) {
      FloatGroup group;
      __builtin_memcpy(&group, in + d, sizeof(group));
      put(d, group);
    }
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(rows.data) + row * rows.row_stride;
    for (int32_t d = 0; d < head_dim; d += kDimGroup) {
      HalfGroup half;
      __builtin_memcpy(&half, in + d, sizeof(half));
      const WideGroup wide = __builtin_convertvector(half, WideGroup) << 16;
      FloatGroup group;
      __builtin_memcpy(&group, &wide, sizeof(group));
      put(d, group);
    }
  }
}

inline void load_row(const Rows& rows, int64_t row, int32_t head_dim, float* out) {
  for_each_group(rows, row, head_dim, [out](int32_t d, const FloatGroup& x) {
    __builtin_memcpy(out + d, &x, sizeof(x));
  });
}

/// 2^x for x <= 0, relative error about 1e-7: polynomial in the fraction, exponent by bits.
/// Below -126 (and at -inf) exactly 0; NaN gives NaN.
inline Vec exp2_vec(Vec x) {
  const Vec floor_x = splat(-126.0f);
  const Vec clamped = x < floor_x ? floor_x : x;
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec shifted = clamped + magic;
  const Vec f = clamped - (shifted - magic);
  Vec p = splat(0.0001535336f);
  p = p * f + 0.0013398874f;
  p = p * f + 0.0096184374f;
  p = p * f + 0.0555033247f;
  p = p * f + 0.2402264791f;
  p = p * f + 0.6931472029f;
  p = p * f + 1.0f;
  const Vec power = as_float((as_int(shifted) - as_int(magic) + 127) << 23);
  return x < floor_x ? Vec{} : p * power;
}

void pack_queries(const Rows& rows, int32_t count, int32_t head_dim, float factor, float* panels) {
  float row[kMaxHeadDim];
  for (int32_t r = 0; r < kTileRows; ++r) {
    float* out = panels + (r / kPanelRows) * head_dim * kPanelRows + r % kPanelRows;
    if (r < count) load_row(rows, r, head_dim, row);
    for (int32_t d = 0; d < head_dim; ++d) out[d * kPanelRows] = r < count ? row[d] * factor : 0.0f;
  }
}

void pack_keys(const Rows& rows, const int32_t* keys, int32_t count, int32_t head_dim,
               float* packed) {
  for (int32_t i = 0; i < count; ++i) load_row(rows, keys[i], head_dim, packed + i * kMaxHeadDim);
  for (int32_t i = count; i % kKeyGroup != 0; ++i) {
    for (int32_t d = 0; d < head_dim; ++d) packed[i * kMaxHeadDim + d] = 0.0f;
  }
}

void pack_values(const Rows& rows, const int32_t* keys, int32_t count, int32_t head_dim,
                 float* packed) {
  for (int32_t i = 0; i < count; ++i) {
    float* out = packed + i * kDimGroup;
    for_each_group(rows, keys[i], head_dim, [out](int32_t d, const FloatGroup& x) {
      __builtin_memcpy(out + d / kDimGroup * kValueGroup, &x, sizeof(x));
    });
  }
  for (int32_t i = count; i % kKeyGroup != 0; ++i) {
    for (int32_t d = 0; d < head_dim; ++d) {
      packed[d / kDimGroup * kValueGroup + i * kDimGroup + d % kDimGroup] = 0.0f;
    }
  }
}

/// acc[r][c] = sum over i < steps of scalars[r * scalar_stride + i * scalar_step] * lanes[i][c].
struct Block {
  Vec acc[kGroupRows][kGroupVectors];

  template <int32_t kScalarStride, int32_t kScalarStep>
  inline __attribute__((always_inline)) void run(const float* scalars, const float* lanes,
                                                 int32_t steps) {
    Vec sum[kGroupRows][kGroupVectors] = {};
    for (int32_t i = 0; i < steps; ++i) {
      Vec x[kGroupVectors];
#pragma GCC unroll 16
      for (int32_t c = 0; c < kGroupVectors; ++c) x[c] = load(lanes + c * kLanes);
#pragma GCC unroll 16
      for (int32_t r = 0; r < kGroupRows; ++r) {
        const Vec y = splat(scalars[r * kScalarStride]);
#pragma GCC unroll 16
        for (int32_t c = 0; c < kGroupVectors; ++c) sum[r][c] += y * x[c];
      }
      lanes += kPanelRows;
      scalars += kScalarStep;
    }
#pragma GCC unroll 16
    for (int32_t r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 16
      for (int32_t c = 0; c < kGroupVectors; ++c) acc[r][c] = sum[r][c];
    }
  }
};

void scores(const float* panel, const float* keys, int32_t count, int32_t head_dim, float* scores) {
  for (int32_t i = 0; i < count; i += kGroupRows) {
    for (int32_t lane = 0; lane < kPanelRows; lane += kBlockLanes) {
      Block block;
      block.run<kMaxHeadDim, 1>(keys + i * kMaxHeadDim, panel + lane, head_dim);
#pragma GCC unroll 16
      for (int32_t r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 16
        for (int32_t c = 0; c < kGroupVectors; ++c) {
          store_vec(scores + (i + r) * kPanelRows + lane + c * kLanes, block.acc[r][c]);
        }
      }
    }
  }
}

void accumulate(const float* probabilities, const float* values, int32_t count, int32_t head_dim,
                const float* decay, float* out) {
  for (int32_t d = 0; d < head_dim; d += kGroupRows) {
    const float* group = values + d / kDimGroup * kValueGroup + d % kDimGroup;
    for (int32_t lane = 0; lane < kPanelRows; lane += kBlockLanes) {
      Block block;
      block.run<1, kDimGroup>(group, probabilities + lane, count);
#pragma GCC unroll 16
      for (int32_t r = 0; r < kGroupRows; ++r) {
#pragma GCC unroll 16
        for (int32_t c = 0; c < kGroupVectors; ++c) {
          float* o = out + (d + r) * kPanelRows + lane + c * kLanes;
          store_vec(o, load(o) * load(decay + lane + c * kLanes) + block.acc[r][c]);
        }
      }
    }
  }
}

void mask(const int32_t* first, const int32_t* last, int32_t count, int32_t row, float* scores) {
  IntVec lane;
  for (int32_t i = 0; i < kLanes; ++i) lane[i] = row + i;
  for (int32_t i = 0; i < count; ++i) {
    if (first[i] <= row && last[i] >= row + kPanelRows) continue;
    for (int32_t c = 0; c < kPanelVectors; ++c) {
      const IntVec at = lane + c * kLanes;
      float* s = scores + i * kPanelRows + c * kLanes;
      const IntVec visible = (at >= first[i]) & (at < last[i]);
      store_vec(s, visible ? load(s) : splat(-kInfinity));
    }
  }
}

/// A row that has seen nothing yet has max -inf; 0 in its place keeps -inf - max from being NaN.
inline Vec finite_max(Vec max) { return max == splat(-kInfinity) ? Vec{} : max; }

void softmax(float* scores, int32_t count, PanelState* state) {
  for (int32_t c = 0; c < kPanelVectors; ++c) {
    float* s = scores + c * kLanes;
    const Vec old_max = load(state->max + c * kLanes);
    Vec max0 = old_max;
    Vec max1 = old_max;
    for (int32_t i = 0; i < count; i += 2) {
      const Vec x0 = load(s + i * kPanelRows);
      const Vec x1 = load(s + (i + 1) * kPanelRows);
      max0 = x0 > max0 ? x0 : max0;
      max1 = x1 > max1 ? x1 : max1;
    }
    const Vec new_max = max1 > max0 ? max1 : max0;
    const Vec base = finite_max(new_max);
    Vec sum0 = {};
    Vec sum1 = {};
    for (int32_t i = 0; i < count; i += 2) {
      const Vec p0 = exp2_vec(load(s + i * kPanelRows) - base);
      const Vec p1 = exp2_vec(load(s + (i + 1) * kPanelRows) - base);
      store_vec(s + i * kPanelRows, p0);
      store_vec(s + (i + 1) * kPanelRows, p1);
      sum0 += p0;
      sum1 += p1;
    }
    const Vec decay = exp2_vec(old_max - base);
    store_vec(state->decay + c * kLanes, decay);
    store_vec(state->sum + c * kLanes, load(state->sum + c * kLanes) * decay + (sum0 + sum1));
    store_vec(state->max + c * kLanes, new_max);
  }
}

void probabilities(float* scores, int32_t count, const float* max, const float* factor) {
  for (int32_t c = 0; c < kPanelVectors; ++c) {
    const Vec base = finite_max(load(max + c * kLanes));
    const Vec scale = load(factor + c * kLanes);
    for (int32_t i = 0; i < count; ++i) {
      float* s = scores + i * kPanelRows + c * kLanes;
      store_vec(s, exp2_vec(load(s) - base) * scale);
    }
  }
}

void store(const float* out, const float* factor, int32_t count, int32_t head_dim,
           const Rows& rows) {
  for (int32_t r = 0; r < count; ++r) {
    const float f = factor[r];
    // A row that saw nothing is 0 even where its accumulator met a NaN of another row.
    if (rows.dtype == DType::kFloat32) {
      float* to = static_cast<float*>(rows.data) + r * rows.row_stride;
      for (int32_t d = 0; d < head_dim; ++d) to[d] = f == 0 ? 0.0f : out[d * kPanelRows + r] * f;
    } else {
      uint16_t* to = static_cast<uint16_t*>(rows.data) + r * rows.row_stride;
      for (int32_t d = 0; d < head_dim; ++d) {
        to[d] = f == 0 ? uint16_t{0} : to_bf16(out[d * kPanelRows + r] * f);
      }
    }
  }
}

void add_mass(const float* probabilities, int32_t count, float* columns, float* offsets) {
  for (int32_t i = 0; i < count; ++i) {
    const float* p = probabilities + i * kPanelRows;
    Vec sum = {};
    for (int32_t c = 0; c < kPanelVectors; ++c) {
      const Vec x = load(p + c * kLanes);
      LooseVec* to = reinterpret_cast<LooseVec*>(offsets - i + c * kLanes);
      *to += x;
      sum += x;
    }
    float total = 0.0f;
    for (int32_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
    columns[i] += total;
  }
}

void mean(const Rows& rows, int64_t begin, int64_t end, int32_t head_dim, float* mean) {
  float row[kMaxHeadDim];
  for (int32_t d = 0; d < head_dim; ++d) mean[d] = 0.0f;
  for (int64_t r = begin; r < end; ++r) {
    load_row(rows, r, head_dim, row);
    for (int32_t d = 0; d < head_dim; ++d) mean[d] += row[d];
  }
  for (int32_t d = 0; d < head_dim; ++d) mean[d] /= static_cast<float>(end - begin);
}

constexpr Kernels make_kernels(const char* name) {
  return {name,    pack_queries,  pack_keys,  pack_values, scores,   mask,
          softmax, probabilities, accumulate, store,       add_mass, mean};
}

}  // namespace
}  // namespace sparseattn::cpu
