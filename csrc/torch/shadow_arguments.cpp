#include "torch/shadow_arguments.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>

namespace sparseattn::torch_layer {
namespace {

/// A dimension of an expected shape; any size where none is given.
struct Dim {
  const char* name;
  int64_t size = -1;
};

/// The tensor that others must be like, and what errors call it.
struct Anchor {
  const char* name;
  const Tensor& tensor;
};

enum class Memory { kAny, kRows, kContiguous };

constexpr int64_t kMostRows = INT32_MAX - 2 * kTileRows;

std::string shape_name(const std::vector<Dim>& dims) {
  std::ostringstream text;
  text << "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    text << (i ? ", " : "") << dims[i].name;
    if (dims[i].size >= 0) text << " = " << dims[i].size;
  }
  text << "]";
  return text.str();
}

void check_tensor(const char* name, const Tensor& tensor, const Anchor& like,
                  const std::vector<ScalarType>& dtypes, const std::vector<Dim>& dims,
                  Memory memory) {
  if (!tensor.defined()) type_error(name, ": expected a tensor, got None");
  if (std::find(dtypes.begin(), dtypes.end(), tensor.scalar_type()) == dtypes.end()) {
    type_error(name, ": expected dtype ", join(dtypes, dtype_name), ", got ",
               dtype_name(tensor.scalar_type()));
  }
  if (device_name(tensor) != device_name(like.tensor)) {
    value_error(name, ": expected device ", device_name(like.tensor), " (that of ", like.name,
                "), got ", device_name(tensor));
  }
  bool fits = tensor.dim() == static_cast<int64_t>(dims.size());
  for (size_t i = 0; fits && i < dims.size(); ++i) {
    fits = dims[i].size < 0 || tensor.size(i) == dims[i].size;
  }
  if (!fits) {
    value_error(name, ": expected shape ", shape_name(dims), ", got ", sizes_name(tensor));
  }
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) > kMostRows) {
      value_error(name, ": expected sizes <= ", kMostRows, ", got ", sizes_name(tensor));
    }
  }
  const int64_t last = tensor.dim() - 1;
  if (memory != Memory::kAny && tensor.size(last) > 1 && tensor.stride(last) != 1) {
    value_error(name, ": expected the last dimension contiguous (stride 1), got stride ",
                tensor.stride(last));
  }
  if (memory == Memory::kContiguous && !tensor.is_contiguous()) {
    value_error(name, ": expected a contiguous tensor, got other strides");
  }
}

int32_t size_of(const Tensor& tensor, int64_t dim) {
  return static_cast<int32_t>(tensor.size(dim));
}

void check_head_dim(const char* name, const Support& support, int64_t head_dim) {
  const auto& dims = support.head_dims;
  if (std::find(dims.begin(), dims.end(), head_dim) == dims.end()) {
    value_error(name, ": expected head_dim ", join(dims, [](int64_t d) { return d; }), " on ",
                support.device, ", got ", head_dim);
  }
}

/// [batch, kv_heads, rows, head_dim] keys that others are measured by.
void check_keys(const char* name, const Support& support, const Tensor& k) {
  check_tensor(name, k, {name, k}, support.dtypes,
               {{"batch"}, {"kv_heads"}, {"rows"}, {"head_dim"}}, Memory::kRows);
  check_head_dim(name, support, k.size(3));
  if (k.size(1) < 1) value_error(name, ": expected kv_heads >= 1, got 0");
}

LengthList check_lens(const char* name, const MaybeTensor& list, const Anchor& like,
                      int64_t batch) {
  if (!list) return {};
  check_tensor(name, *list, like, {ScalarType::Int, ScalarType::Long}, {{"batch", batch}},
               Memory::kAny);
  return {list->const_data_ptr(), list->scalar_type() == ScalarType::Long, list->stride(0)};
}

int32_t check_chunk(const char* name, int64_t chunk) {
  if (chunk != 4 && chunk != 8 && chunk != 16 && chunk != 32) {
    value_error(name, ": expected chunks of 4, 8, 16 or 32 tokens, got ", chunk);
  }
  return static_cast<int32_t>(chunk);
}

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

Tensor new_ints(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, std::make_optional(ScalarType::Int));
}

/// What a tensor with scales holds, or one without.
std::vector<ScalarType> row_dtype(const MaybeTensor& scale, const Tensor& like) {
  return {scale ? ScalarType::Float8_e4m3fn : like.scalar_type()};
}

/// fp32 [batch, heads, rows] scales of a tensor's rows, or [batch, rows]: then there is one head.
RowScales check_scales(const char* name, const MaybeTensor& scale, const Anchor& like,
                       const std::vector<Dim>& dims) {
  if (!scale) return {};
  check_tensor(name, *scale, like, {ScalarType::Float}, dims, Memory::kRows);
  // Not null, so that there are scales where there are no rows.
  static float none = 0.0f;
  float* data = data_of<float>(*scale);
  return {data == nullptr ? &none : data, scale->stride(0),
          dims.size() == 3 ? scale->stride(1) : 0};
}

/// fp32 [batch, kv_heads, head_dim], or null.
const float* check_mean(const MaybeTensor& mean, const Anchor& like, int64_t batch,
                        int64_t kv_heads, int64_t head_dim) {
  if (!mean) return nullptr;
  check_tensor("mean", *mean, like, {ScalarType::Float},
               {{"batch", batch}, {"kv_heads", kv_heads}, {"head_dim", head_dim}},
               Memory::kContiguous);
  return data_of<float>(*mean);
}

void check_frequencies(const Tensor& inv_freq, const Anchor& like, int64_t head_dim, Rope* rope) {
  check_tensor("inv_freq", inv_freq, like, {ScalarType::Float}, {{"rotary_dim / 2"}},
               Memory::kContiguous);
  if (2 * inv_freq.size(0) > head_dim) {
    value_error("inv_freq: expected at most head_dim / 2 = ", head_dim / 2, " frequencies, got ",
                inv_freq.size(0));
  }
  rope->inv_freq = data_of<float>(inv_freq);
  rope->rotary_dim = 2 * size_of(inv_freq, 0);
}

void check_rotation(bool interleaved, double rope_scale, Rope* rope) {
  if (!std::isfinite(rope_scale)) {
    value_error("rope_scale: expected a finite number, got ", rope_scale);
  }
  rope->interleaved = interleaved;
  rope->scale = static_cast<float>(rope_scale);
}

/// `like` is of the dtype, and tells the batch; heads are those of the basis.
LowRankKeys check_low_rank(const LowRankArguments& a, const Anchor& like, int64_t batch,
                           int64_t kv_heads, int64_t head_dim, int32_t chunk) {
  const std::vector<ScalarType> dtype{like.tensor.scalar_type()};
  check_tensor("factor", a.factor, like, row_dtype(a.factor_scale, like.tensor),
               {{"batch", batch}, {"rows"}, {"rank"}}, Memory::kRows);
  const int64_t rank = a.factor.size(2);
  if (rank < 16 || rank % 16 != 0) {
    value_error("factor: expected a rank that is a multiple of 16, got ", rank);
  }
  check_tensor("basis", a.basis, like, dtype,
               {{"batch", batch}, {"kv_heads", kv_heads}, {"rank", rank}, {"head_dim", head_dim}},
               Memory::kRows);
  LowRankKeys keys{};
  keys.rows = size_of(a.factor, 1);
  keys.rank = static_cast<int32_t>(rank);
  keys.chunk = chunk;
  keys.factor = {a.factor.data_ptr(), a.factor.stride(0), 0, a.factor.stride(1)};
  keys.factor_scales = check_scales("factor_scale", a.factor_scale, like,
                                    {{"batch", batch}, {"rows", a.factor.size(1)}});
  keys.basis = view_of(a.basis);
  keys.mean = check_mean(a.mean, like, batch, kv_heads, head_dim);
  if (a.inv_freq) check_frequencies(*a.inv_freq, like, head_dim, &keys.rope);
  check_rotation(a.interleaved, a.rope_scale, &keys.rope);
  return keys;
}

/// Rows of whole chunks [batch, kv_heads, n, chunk * head_dim], one after the other in a head.
void check_chunk_rows(const char* name, const Tensor& tensor) {
  if (tensor.size(2) > 1 && tensor.stride(2) != tensor.size(3)) {
    value_error(name, ": expected the rows of a head one after the other (stride ", tensor.size(3),
                "), got stride ", tensor.stride(2));
  }
}

}  // namespace

ShadowUndoRope undo_rope_arguments(const Support& support, const Tensor& k, const Tensor& out,
                                   const Tensor& inv_freq, const MaybeTensor& mean, int64_t first,
                                   bool interleaved, double rope_scale) {
  check_keys("k", support, k);
  const Anchor like{"k", k};
  const int64_t batch = k.size(0), heads = k.size(1), rows = k.size(2), head_dim = k.size(3);
  check_tensor("out", out, like, {k.scalar_type()},
               {{"batch", batch}, {"rows", rows}, {"kv_heads", heads}, {"head_dim", head_dim}},
               Memory::kRows);
  Rope rope{};
  check_frequencies(inv_freq, like, head_dim, &rope);
  check_rotation(interleaved, rope_scale, &rope);
  if (rope.scale == 0.0f) value_error("rope_scale: expected a number that is not 0, got 0");
  const int64_t most = kMostRows - rows;
  if (first < 0 || first > most) {
    value_error("first: expected a position from 0 to ", most, ", got ", first);
  }
  return {size_of(k, 0),
          size_of(k, 1),
          size_of(k, 2),
          size_of(k, 3),
          static_cast<int32_t>(first),
          dtype_of(k),
          view_of(k),
          {out.data_ptr(), out.stride(0), out.stride(2), out.stride(1)},
          check_mean(mean, like, batch, heads, head_dim),
          rope};
}

ShadowGram gram_arguments(const Support& support, const Tensor& k, const Tensor& gram,
                          const Tensor& total, const Tensor& count, const MaybeTensor& kv_lens) {
  check_keys("k", support, k);
  const Anchor like{"k", k};
  const int64_t batch = k.size(0), width = k.size(1) * k.size(3);
  check_tensor("gram", gram, like, {ScalarType::Double},
               {{"batch", batch}, {"width", width}, {"width", width}}, Memory::kContiguous);
  check_tensor("total", total, like, {ScalarType::Double}, {{"batch", batch}, {"width", width}},
               Memory::kContiguous);
  check_tensor("count", count, like, {ScalarType::Long}, {{"batch", batch}}, Memory::kContiguous);
  return {size_of(k, 0),
          size_of(k, 1),
          size_of(k, 2),
          size_of(k, 3),
          dtype_of(k),
          view_of(k),
          check_lens("kv_lens", kv_lens, like, batch),
          data_of<double>(gram),
          data_of<double>(total),
          data_of<int64_t>(count)};
}

ShadowLandmarks landmark_arguments(const Support& support, const Tensor& k, const Tensor& landmarks,
                                   const MaybeTensor& min_cosine, int64_t chunk,
                                   const MaybeTensor& first_chunk, const MaybeTensor& kv_lens) {
  check_keys("k", support, k);
  const Anchor like{"k", k};
  const Dim batch{"batch", k.size(0)}, heads{"kv_heads", k.size(1)};
  check_tensor("landmarks", landmarks, like, {k.scalar_type()},
               {batch, heads, {"chunks"}, {"head_dim", k.size(3)}}, Memory::kRows);
  if (min_cosine) {
    check_tensor("min_cosine", *min_cosine, like, {ScalarType::Float},
                 {batch, heads, {"chunks", landmarks.size(2)}}, Memory::kContiguous);
  }
  return {size_of(k, 0),
          size_of(k, 1),
          size_of(k, 2),
          size_of(k, 3),
          check_chunk("chunk", chunk),
          size_of(landmarks, 2),
          dtype_of(k),
          view_of(k),
          check_lens("kv_lens", kv_lens, like, batch.size),
          check_lens("first_chunk", first_chunk, like, batch.size),
          view_of(landmarks),
          min_cosine ? data_of<float>(*min_cosine) : nullptr};
}

OutlierCall outlier_arguments(const Tensor& min_cosine, int64_t count, int64_t sink_chunks,
                              const MaybeTensor& num_chunks) {
  const Anchor like{"min_cosine", min_cosine};
  check_tensor("min_cosine", min_cosine, like, {ScalarType::Float},
               {{"batch"}, {"kv_heads"}, {"chunks"}}, Memory::kContiguous);
  const int32_t asked = check_size("count", count, 0);
  const int32_t sinks = check_size("sink_chunks", sink_chunks, 0);
  const LengthList lens = check_lens("num_chunks", num_chunks, like, min_cosine.size(0));
  Tensor outliers = new_ints(min_cosine, {min_cosine.size(0), min_cosine.size(1), count});
  return {{size_of(min_cosine, 0), size_of(min_cosine, 1), size_of(min_cosine, 2), asked, sinks,
           data_of<float>(min_cosine), lens, data_of<int32_t>(outliers)},
          outliers};
}

SelectCall select_arguments(const Support& support, const Tensor& q, const Tensor& landmarks,
                            int64_t top_k, const MaybeTensor& excluded,
                            const MaybeTensor& num_chunks, const MaybeTensor& q_lens,
                            std::optional<double> scale) {
  const Anchor like{"q", q};
  check_tensor("q", q, like, support.dtypes, {{"batch"}, {"q_heads"}, {"q_len"}, {"head_dim"}},
               Memory::kRows);
  check_head_dim("q", support, q.size(3));
  if (q.size(2) < 1) value_error("q: expected q_len >= 1, got ", q.size(2));
  const Dim batch{"batch", q.size(0)};
  check_tensor("landmarks", landmarks, like, {q.scalar_type()},
               {batch, {"kv_heads"}, {"chunks"}, {"head_dim", q.size(3)}}, Memory::kRows);
  const int64_t kv_heads = landmarks.size(1), chunks = landmarks.size(2);
  if (kv_heads < 1 || q.size(1) < 1 || q.size(1) % kv_heads != 0) {
    value_error("landmarks: expected a number of heads that divides q's ", q.size(1), ", got ",
                kv_heads);
  }
  if (excluded) {
    check_tensor("excluded", *excluded, like, {ScalarType::Bool},
                 {batch, {"kv_heads", kv_heads}, {"chunks", chunks}}, Memory::kContiguous);
  }
  const int32_t asked = check_size("top_k", top_k, 1);
  const Shape shape{size_of(q, 0), size_of(q, 1),         static_cast<int32_t>(kv_heads),
                    size_of(q, 2), size_of(landmarks, 2), size_of(q, 3)};
  const LengthList own_q = check_lens("q_lens", q_lens, like, batch.size);
  const LengthList own_chunks = check_lens("num_chunks", num_chunks, like, batch.size);
  const float factor = check_scale(scale, shape);
  Tensor selected = new_ints(q, {shape.batch, kv_heads, asked});
  return {{shape.batch, shape.q_heads, shape.kv_heads, shape.q_len, shape.kv_len, shape.head_dim,
           asked, dtype_of(q), view_of(q), view_of(landmarks), own_q, own_chunks,
           excluded ? data_of<uint8_t>(*excluded) : nullptr, factor, data_of<int32_t>(selected)},
          selected};
}

PlanCall plan_arguments(const Tensor& selected, const Tensor& slot_chunk, const Tensor& last_used) {
  const Anchor like{"selected", selected};
  const std::vector<ScalarType> ints{ScalarType::Int};
  check_tensor("selected", selected, like, ints, {{"batch"}, {"kv_heads"}, {"top_k"}},
               Memory::kContiguous);
  const int64_t batch = selected.size(0), kv_heads = selected.size(1), top_k = selected.size(2);
  check_tensor("slot_chunk", slot_chunk, like, ints,
               {{"batch", batch}, {"kv_heads", kv_heads}, {"slots"}}, Memory::kContiguous);
  const int64_t slots = slot_chunk.size(2);
  if (slots < top_k) value_error("slot_chunk: expected slots >= top_k = ", top_k, ", got ", slots);
  check_tensor("last_used", last_used, like, ints,
               {{"batch", batch}, {"kv_heads", kv_heads}, {"slots", slots}}, Memory::kContiguous);
  PlanCall call{{},
                new_ints(selected, {batch, kv_heads, top_k}),
                new_ints(selected, {batch, kv_heads, top_k, 2}),
                new_ints(selected, {batch, kv_heads})};
  call.params = {size_of(selected, 0),          size_of(selected, 1),
                 size_of(selected, 2),          size_of(slot_chunk, 2),
                 data_of<int32_t>(selected),    data_of<int32_t>(slot_chunk),
                 data_of<int32_t>(last_used),   data_of<int32_t>(call.slot_of),
                 data_of<int32_t>(call.misses), data_of<int32_t>(call.miss_count)};
  return call;
}

StoreRows store_arguments(const Support& support, const Tensor& x, const Tensor& store,
                          const MaybeTensor& scale, int64_t first) {
  const Anchor like{"x", x};
  check_tensor("x", x, like, support.dtypes, {{"batch"}, {"heads"}, {"rows"}, {"dim"}},
               Memory::kRows);
  const Dim batch{"batch", x.size(0)}, heads{"heads", x.size(1)};
  const int64_t dim = x.size(3);
  if (dim < 8 || dim % 8 != 0) value_error("x: expected dim a multiple of 8, got ", dim);
  check_tensor("store", store, store.defined() && store.is_cpu() ? Anchor{"store", store} : like,
               row_dtype(scale, x), {batch, heads, {"rows"}, {"group * dim"}}, Memory::kRows);
  check_chunk_rows("store", store);
  const int64_t width = store.size(3), group = width / dim;
  if (width < dim || width % dim != 0 || width % 16 != 0) {
    value_error("store: expected rows of group * dim elements with dim ", dim,
                ", a multiple of 16, got ", width);
  }
  if (x.size(2) % group != 0) {
    value_error("x: expected rows a multiple of group = ", group, ", got ", x.size(2));
  }
  const int64_t rows = x.size(2) / group, most = store.size(2) - rows;
  if (first < 0 || first > most) {
    value_error("first: expected 0 to ", most, ", where ", rows, " rows end in the store's ",
                store.size(2), ", got ", first);
  }
  return {size_of(x, 0),
          size_of(x, 1),
          size_of(x, 2),
          static_cast<int32_t>(dim),
          static_cast<int32_t>(group),
          static_cast<int32_t>(first),
          dtype_of(x),
          view_of(x),
          view_of(store),
          check_scales("scale", scale, like, {batch, heads, {"rows", store.size(2)}})};
}

GatherValues gather_arguments(const Support& support, const Tensor& store, const Tensor& values,
                              const Tensor& misses, const Tensor& miss_count,
                              const MaybeTensor& store_scale) {
  const Anchor like{"values", values};
  check_tensor("values", values, like, support.dtypes,
               {{"batch"}, {"kv_heads"}, {"slots"}, {"chunk * head_dim"}}, Memory::kRows);
  const Dim batch{"batch", values.size(0)}, heads{"kv_heads", values.size(1)};
  check_tensor("store", store, store.defined() && store.is_cpu() ? Anchor{"store", store} : like,
               row_dtype(store_scale, values),
               {batch, heads, {"chunks"}, {"chunk * head_dim", values.size(3)}}, Memory::kRows);
  check_chunk_rows("values", values);
  check_chunk_rows("store", store);
  check_tensor("misses", misses, like, {ScalarType::Int}, {batch, heads, {"top_k"}, {"pair", 2}},
               Memory::kContiguous);
  check_tensor("miss_count", miss_count, like, {ScalarType::Int}, {batch, heads},
               Memory::kContiguous);
  const int64_t element = values.scalar_type() == ScalarType::Float ? 4 : 2;
  return {
      size_of(values, 0),
      size_of(values, 1),
      size_of(misses, 2),
      size_of(store, 2),
      size_of(values, 2),
      values.size(3) * element,
      dtype_of(values),
      view_of(store),
      view_of(values),
      data_of<int32_t>(misses),
      data_of<int32_t>(miss_count),
      check_scales("store_scale", store_scale, like, {batch, heads, {"chunks", store.size(2)}})};
}

ReconstructCall reconstruct_arguments(const Support& support, const Tensor& selected,
                                      const LowRankArguments& a, int64_t chunk) {
  const Anchor like{"basis", a.basis};
  check_tensor("basis", a.basis, like, support.dtypes,
               {{"batch"}, {"kv_heads"}, {"rank"}, {"head_dim"}}, Memory::kRows);
  const int64_t batch = a.basis.size(0), kv_heads = a.basis.size(1), head_dim = a.basis.size(3);
  check_head_dim("basis", support, head_dim);
  check_tensor("selected", selected, like, {ScalarType::Int},
               {{"batch", batch}, {"kv_heads", kv_heads}, {"top_k"}}, Memory::kContiguous);
  const LowRankKeys keys =
      check_low_rank(a, like, batch, kv_heads, head_dim, check_chunk("chunk", chunk));
  Tensor out =
      torch::stable::new_empty(a.basis, {batch, kv_heads, selected.size(2) * chunk, head_dim});
  return {{size_of(a.basis, 0), size_of(a.basis, 1), size_of(a.basis, 3), size_of(selected, 2),
           dtype_of(a.basis), keys, data_of<int32_t>(selected), view_of(out)},
          out};
}

ShadowAttention attention_arguments(const Support& support, const Tensor& q, const Tensor& k,
                                    const Tensor& v, const Tensor& selected, const Tensor& slot_of,
                                    const Tensor& values, const LowRankArguments& a,
                                    std::optional<double> scale, const MaybeTensor& q_lens,
                                    const MaybeTensor& exact_lens,
                                    const MaybeTensor& exact_starts) {
  const Shape shape = check_qkv(support, q, k, &v);
  const Anchor like{"q", q};
  const Dim batch{"batch", shape.batch}, heads{"kv_heads", shape.kv_heads};
  check_tensor("selected", selected, like, {ScalarType::Int}, {batch, heads, {"top_k"}},
               Memory::kContiguous);
  check_tensor("slot_of", slot_of, like, {ScalarType::Int},
               {batch, heads, {"top_k", selected.size(2)}}, Memory::kContiguous);
  check_tensor("values", values, like, {q.scalar_type()},
               {batch, heads, {"slots"}, {"chunk * head_dim"}}, Memory::kRows);
  check_chunk_rows("values", values);
  if (values.size(3) % shape.head_dim != 0) {
    value_error("values: expected rows of chunk * head_dim elements with head_dim ", shape.head_dim,
                ", got ", values.size(3));
  }
  const int32_t chunk = check_chunk("values", values.size(3) / shape.head_dim);
  if (values.size(2) > kMostRows / chunk) {
    value_error("values: expected slots <= ", kMostRows / chunk, ", got ", values.size(2));
  }
  ShadowAttention p{};
  p.shape = shape;
  p.dtype = dtype_of(q);
  p.q = view_of(q);
  p.k = view_of(k);
  p.v = view_of(v);
  p.scale = check_scale(scale, shape);
  p.q_lens = check_lens("q_lens", q_lens, like, shape.batch);
  p.exact_lens = check_lens("exact_lens", exact_lens, like, shape.batch);
  p.exact_starts = check_lens("exact_starts", exact_starts, like, shape.batch);
  p.keys = check_low_rank(a, like, shape.batch, shape.kv_heads, shape.head_dim, chunk);
  p.top_k = size_of(selected, 2);
  p.slots = size_of(values, 2);
  p.selected = data_of<int32_t>(selected);
  p.slot_of = data_of<int32_t>(slot_of);
  p.values = view_of(values);
  return p;
}

}  // namespace sparseattn::torch_layer
