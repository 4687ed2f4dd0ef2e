// Checks of what callers pass to the operators, shared by the CPU and the CUDA registrations.
//
// A refused argument throws std::runtime_error with "ValueError: <argument>: expected ..., got ..."
// (or "TypeError: ..."); torch turns that into a RuntimeError, and the Python functions of the
// package into the exception that the text names.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparseattn/types.h"

namespace sparseattn::torch_layer {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream text;
  ((text << "ValueError: ") << ... << parts);
  throw std::runtime_error(text.str());
}

template <class... Parts>
[[noreturn]] void type_error(const Parts&... parts) {
  std::ostringstream text;
  ((text << "TypeError: ") << ... << parts);
  throw std::runtime_error(text.str());
}

/// As the errors say it.
std::string dtype_name(ScalarType dtype);
std::string device_name(const Tensor& tensor);
std::string sizes_name(const Tensor& tensor);

/// "a, b or c"
template <class List, class Name>
std::string join(const List& list, const Name& name) {
  std::ostringstream text;
  for (size_t i = 0; i < list.size(); ++i) {
    text << (i == 0 ? "" : i + 1 == list.size() ? " or " : ", ") << name(list[i]);
  }
  return text.str();
}

/// Throws what a failed library call says.
inline void check_status(const Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string("sparseattn: ") + status.what);
}

/// What a device supports.
struct Support {
  const char* device;  // "cpu" or "cuda", as the errors name it
  std::vector<ScalarType> dtypes;
  std::vector<int64_t> head_dims;
};

/// Checks q and k, and v where it is given, and returns the sizes of the call.
Shape check_qkv(const Support& support, const Tensor& q, const Tensor& k, const Tensor* v);
DType dtype_of(const Tensor& tensor);
/// Element strides of a [batch, heads, rows, head_dim] tensor.
View view_of(const Tensor& tensor);
/// A given scale, or 1/sqrt(head_dim).
float check_scale(std::optional<double> scale, const Shape& shape);

/// A size argument: minimum <= value < 2^31.
int32_t check_size(const char* name, int64_t value, int64_t minimum);
void check_block(const char* name, int64_t block);
/// Index lists [batch, q_heads, n], int32 or int64, on q's device.
void check_list(const char* name, const Tensor& list, const Tensor& q);
/// Lengths of the sequences: int32 or int64 [batch] on q's device, each where it is given. Call it
/// before check_qkv: lengths on a GPU bring q on the CPU to the wrong kernel.
Lengths check_lengths(const std::optional<Tensor>& q_lens, const std::optional<Tensor>& kv_lens,
                      const Tensor& q);
/// bool [batch, q_heads, q_blocks, kv_blocks] on q's device.
void check_block_mask(const Tensor& mask, const Tensor& q, const Shape& shape, int64_t block_q,
                      int64_t block_kv);
/// A share as millionths; 0 for None.
int32_t check_share(std::optional<double> share);
/// The stride of antidiagonal scores; 0 for method "mean".
int32_t check_method(const std::string& method, int64_t stride);
/// Flat (code, a, b) triples, one for each query head. Bits 0 to 7 of a code are the kind, 8 to 15
/// the stride of antidiagonal scores, 16 to 35 the share in millionths.
std::vector<Pattern> check_patterns(const std::vector<int64_t>& flat, const Shape& shape);
/// The distinct strides of the block-sparse patterns, 0 for means; none where there are none.
std::vector<int32_t> strides_of(const std::vector<Pattern>& patterns);
/// The same pattern for every query head.
std::vector<Pattern> uniform_patterns(const Shape& shape, Pattern pattern);

/// Sizes of a vertical-slash estimate. `last_q` is at most 64.
struct VerticalSlashSizes {
  int32_t columns, offsets, last_q, sink, local;
};
VerticalSlashSizes check_vertical_slash_sizes(int64_t num_columns, int64_t num_offsets,
                                              int64_t last_q, int64_t sink, int64_t local);

/// out [batch, q_heads, q_len, head_dim] over [batch, q_len, q_heads, head_dim] storage; lse
/// [batch, q_heads, q_len] fp32, or an empty tensor.
struct Outputs {
  Tensor out;
  Tensor lse;
  float* lse_data;
};
Outputs make_outputs(const Tensor& q, const Shape& shape, bool return_lse);

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace sparseattn::torch_layer
