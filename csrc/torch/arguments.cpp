#include "torch/arguments.h"

#include <algorithm>
#include <cmath>
#include <string>

namespace sparseattn::torch_layer {
std::string dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::Float8_e4m3fn:
      return "torch.float8_e4m3fn";
    default:
      return torch::headeronly::toString(dtype);
  }
}

std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

std::string sizes_name(const Tensor& tensor) {
  std::ostringstream text;
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "[") << tensor.size(i);
  return tensor.dim() ? text.str() + "]" : "[]";
}

namespace {

void check_device(const char* name, const Tensor& tensor, const Tensor& q) {
  if (device_name(tensor) != device_name(q)) {
    value_error(name, ": expected device ", device_name(q), " (that of q), got ",
                device_name(tensor));
  }
}

void check_integers(const char* name, const Tensor& tensor, const Tensor& q) {
  const auto dtype = tensor.scalar_type();
  if (dtype != ScalarType::Int && dtype != ScalarType::Long) {
    type_error(name, ": expected dtype torch.int32 or torch.int64, got ", dtype_name(dtype));
  }
  check_device(name, tensor, q);
}

LengthList check_length_list(const char* name, const std::optional<Tensor>& list, const Tensor& q) {
  if (!list) return {};
  check_integers(name, *list, q);
  if (q.dim() == 4 && (list->dim() != 1 || list->size(0) != q.size(0))) {
    value_error(name, ": expected shape [", q.size(0), "] (batch of q), got ", sizes_name(*list));
  }
  if (list->dim() != 1) return {};  // as q is wrong, too: check_qkv tells
  return {list->const_data_ptr(), list->scalar_type() == ScalarType::Long, list->stride(0)};
}

void check_operand(const char* name, const char* shape, const Tensor& tensor, const Tensor& q) {
  if (!tensor.defined()) type_error(name, ": expected a tensor, got None");
  if (tensor.dim() != 4) {
    value_error(name, ": expected 4 dimensions ", shape, ", got ", sizes_name(tensor));
  }
  check_device(name, tensor, q);
  if (tensor.scalar_type() != q.scalar_type()) {
    type_error(name, ": expected dtype ", dtype_name(q.scalar_type()), " (that of q), got ",
               dtype_name(tensor.scalar_type()));
  }
  if (tensor.size(3) > 1 && tensor.stride(3) != 1) {
    value_error(name, ": expected the last dimension contiguous (stride 1), got stride ",
                tensor.stride(3));
  }
}

}  // namespace

Shape check_qkv(const Support& support, const Tensor& q, const Tensor& k, const Tensor* v) {
  check_operand("q", "[batch, q_heads, q_len, head_dim]", q, q);
  check_operand("k", "[batch, kv_heads, kv_len, head_dim]", k, q);
  if (v != nullptr) check_operand("v", "[batch, kv_heads, kv_len, head_dim]", *v, q);
  const auto dtype = q.scalar_type();
  if (std::find(support.dtypes.begin(), support.dtypes.end(), dtype) == support.dtypes.end()) {
    type_error("q: expected dtype ", join(support.dtypes, dtype_name), " on ", support.device,
               ", got ", dtype_name(dtype));
  }
  const int64_t head_dim = q.size(3);
  if (std::find(support.head_dims.begin(), support.head_dims.end(), head_dim) ==
      support.head_dims.end()) {
    value_error("q: expected head_dim ", join(support.head_dims, [](int64_t d) { return d; }),
                " on ", support.device, ", got ", head_dim);
  }
  if (k.size(3) != head_dim) {
    value_error("k: expected head_dim ", head_dim, " (that of q), got ", k.size(3));
  }
  if (k.size(0) != q.size(0)) {
    value_error("k: expected batch ", q.size(0), " (that of q), got ", k.size(0));
  }
  if (k.size(1) < 1 || q.size(1) < 1 || q.size(1) % k.size(1) != 0) {
    value_error("k: expected a number of heads that divides q's ", q.size(1), ", got ", k.size(1));
  }
  if (q.size(2) < 1) value_error("q: expected q_len >= 1, got ", q.size(2));
  if (k.size(2) < q.size(2)) {
    value_error("k: expected kv_len >= q_len = ", q.size(2), ", got ", k.size(2));
  }
  constexpr int64_t kMost = INT32_MAX - 2 * kTileRows;
  if (k.size(2) > kMost) value_error("k: expected kv_len <= ", kMost, ", got ", k.size(2));
  if (v != nullptr) {
    for (int64_t i = 0; i < 4; ++i) {
      if (v->size(i) != k.size(i)) {
        value_error("v: expected shape ", sizes_name(k), " (that of k), got ", sizes_name(*v));
      }
    }
  }
  return {static_cast<int32_t>(q.size(0)), static_cast<int32_t>(q.size(1)),
          static_cast<int32_t>(k.size(1)), static_cast<int32_t>(q.size(2)),
          static_cast<int32_t>(k.size(2)), static_cast<int32_t>(head_dim)};
}

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      return DType::kFloat32;
  }
}

View view_of(const Tensor& tensor) {
  return {tensor.data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}

float check_scale(std::optional<double> scale, const Shape& shape) {
  if (!scale) return static_cast<float>(1.0 / std::sqrt(static_cast<double>(shape.head_dim)));
  if (!std::isfinite(*scale) || *scale <= 0) {
    value_error("scale: expected a finite number > 0, got ", *scale);
  }
  return static_cast<float>(*scale);
}

int32_t check_size(const char* name, int64_t value, int64_t minimum) {
  if (value < minimum || value > INT32_MAX) {
    value_error(name, ": expected ", minimum, " <= ", name, " < 2^31, got ", value);
  }
  return static_cast<int32_t>(value);
}

void check_block(const char* name, int64_t block) {
  if (block != 64 && block != 128) value_error(name, ": expected 64 or 128, got ", block);
}

void check_list(const char* name, const Tensor& list, const Tensor& q) {
  if (!list.defined()) type_error(name, ": expected a tensor, got None");
  check_integers(name, list, q);
  if (list.dim() != 3 || list.size(0) != q.size(0) || list.size(1) != q.size(1)) {
    value_error(name, ": expected shape [", q.size(0), ", ", q.size(1),
                ", n] (batch and query heads of q), got ", sizes_name(list));
  }
  if (list.size(2) > INT32_MAX) {
    value_error(name, ": expected at most 2^31 - 1 entries a head, got ", list.size(2));
  }
}

Lengths check_lengths(const std::optional<Tensor>& q_lens, const std::optional<Tensor>& kv_lens,
                      const Tensor& q) {
  return {check_length_list("q_lens", q_lens, q), check_length_list("kv_lens", kv_lens, q)};
}

void check_block_mask(const Tensor& mask, const Tensor& q, const Shape& shape, int64_t block_q,
                      int64_t block_kv) {
  check_block("block_q", block_q);
  check_block("block_kv", block_kv);
  if (!mask.defined()) type_error("block_mask: expected a tensor, got None");
  if (mask.scalar_type() != ScalarType::Bool) {
    type_error("block_mask: expected dtype torch.bool, got ", dtype_name(mask.scalar_type()));
  }
  check_device("block_mask", mask, q);
  const int64_t q_blocks = ceil_div(shape.q_len, block_q);
  const int64_t kv_blocks = ceil_div(shape.kv_len, block_kv);
  if (mask.dim() != 4 || mask.size(0) != shape.batch || mask.size(1) != shape.q_heads ||
      mask.size(2) != q_blocks || mask.size(3) != kv_blocks) {
    value_error("block_mask: expected shape [", shape.batch, ", ", shape.q_heads, ", ", q_blocks,
                ", ", kv_blocks, "] (batch, query heads, query blocks of ", block_q,
                ", key blocks of ", block_kv, "), got ", sizes_name(mask));
  }
}

int32_t check_share(std::optional<double> share) {
  if (!share) return 0;
  // Also refuses NaN.
  if (!(*share >= 1.0 / kWholeShare && *share <= 1)) {
    value_error("share: expected 1e-6 <= share <= 1 or None, got ", *share);
  }
  return static_cast<int32_t>(std::nearbyint(*share * kWholeShare));
}

int32_t check_method(const std::string& method, int64_t stride) {
  if (method != "mean" && method != "antidiagonal") {
    value_error("method: expected \"mean\" or \"antidiagonal\", got \"", method, "\"");
  }
  if (stride != 4 && stride != 8 && stride != 16 && stride != 32) {
    value_error("stride: expected 4, 8, 16 or 32, got ", stride);
  }
  return method == "mean" ? 0 : static_cast<int32_t>(stride);
}

std::vector<Pattern> check_patterns(const std::vector<int64_t>& flat, const Shape& shape) {
  if (flat.size() != 3 * static_cast<size_t>(shape.q_heads)) {
    value_error("patterns: expected one pattern for each of the ", shape.q_heads,
                " query heads (three numbers each), got ", flat.size(), " numbers");
  }
  std::vector<Pattern> patterns(shape.q_heads);
  for (int32_t head = 0; head < shape.q_heads; ++head) {
    const int64_t code = flat[3 * head];
    const int64_t kind_code = code & 0xff, stride = code >> 8 & 0xff, share = code >> 16;
    if (code < 0 || kind_code > 3) {
      value_error("patterns: expected a code of 0 to 3 for head ", head, ", got ", code);
    }
    const auto kind = static_cast<PatternKind>(kind_code);
    const bool is_blocks = kind == PatternKind::kBlockSparse;
    if (share > (is_blocks || kind == PatternKind::kVerticalSlash ? kWholeShare : 0)) {
      value_error("patterns: expected a share of at most 1 of a vertical-slash or block-sparse ",
                  "pattern for head ", head, ", got code ", code);
    }
    if (stride != 0 &&
        (!is_blocks || (stride != 4 && stride != 8 && stride != 16 && stride != 32))) {
      value_error("patterns: expected a stride of 4, 8, 16 or 32 of a block-sparse pattern for ",
                  "head ", head, ", got code ", code);
    }
    patterns[head] = {kind, check_size("patterns", flat[3 * head + 1], is_blocks ? 1 : 0),
                      check_size("patterns", flat[3 * head + 2], 0), static_cast<int32_t>(share),
                      static_cast<int32_t>(stride)};
  }
  return patterns;
}

std::vector<int32_t> strides_of(const std::vector<Pattern>& patterns) {
  std::vector<int32_t> strides;
  for (const Pattern& pattern : patterns) {
    if (pattern.kind == PatternKind::kBlockSparse) strides.push_back(pattern.stride);
  }
  std::sort(strides.begin(), strides.end());
  strides.erase(std::unique(strides.begin(), strides.end()), strides.end());
  return strides;
}

std::vector<Pattern> uniform_patterns(const Shape& shape, Pattern pattern) {
  return std::vector<Pattern>(shape.q_heads, pattern);
}

VerticalSlashSizes check_vertical_slash_sizes(int64_t num_columns, int64_t num_offsets,
                                              int64_t last_q, int64_t sink, int64_t local) {
  if (last_q < 1 || last_q > kTileRows) {
    value_error("last_q: expected 1 <= last_q <= ", kTileRows, ", got ", last_q);
  }
  return {check_size("num_columns", num_columns, 0), check_size("num_offsets", num_offsets, 0),
          static_cast<int32_t>(last_q), check_size("sink", sink, 0), check_size("local", local, 0)};
}

Outputs make_outputs(const Tensor& q, const Shape& shape, bool return_lse) {
  using torch::stable::new_empty;
  const Tensor storage = new_empty(q, {shape.batch, shape.q_len, shape.q_heads, shape.head_dim});
  Tensor lse = return_lse ? new_empty(q, {shape.batch, shape.q_heads, shape.q_len},
                                      std::make_optional(ScalarType::Float))
                          : new_empty(q, {0}, std::make_optional(ScalarType::Float));
  float* lse_data = return_lse ? static_cast<float*>(lse.data_ptr()) : nullptr;
  return {torch::stable::transpose(storage, 1, 2), lse, lse_data};
}

}  // namespace sparseattn::torch_layer
