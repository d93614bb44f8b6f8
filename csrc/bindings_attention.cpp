// Attention's part of the bindings.
#include <pybind11/pybind11.h>

#include <array>
#include <vector>

#include "binding_checks.h"
#include "bindings.h"
#include "dispatch.h"
#include "python_calls.h"

namespace py = pybind11;

namespace gpt4v_fast {
namespace {

void check_attention(const AttentionArgs& a, int threads) {
  check_threads(threads);
  check_ndim("q", a.q, 4);
  check_ndim("k", a.k, 4);
  check_ndim("v", a.v, 4);
  check_dtype("q", a.q, kFloats);
  check_dtype("k", a.k, {a.q.dtype});
  check_dtype("v", a.v, {a.q.dtype});
  const bool varlen = a.cu_seqlens_q.defined;
  if (varlen != a.cu_seqlens_k.defined) throw std::invalid_argument("cu_seqlens_q and cu_seqlens_k: expected both");
  const int64_t H = a.q.size[1], S = a.q.size[2], D = a.q.size[3];
  const int64_t Hkv = a.k.size[1], T = a.k.size[2], Dv = a.v.size[3];
  const int64_t B = varlen ? a.cu_seqlens_q.size[0] - 1 : a.q.size[0];
  if (Hkv < 1 || H % Hkv != 0) throw std::invalid_argument("k: expected a number of heads that divides q's");
  check_shape("k", a.k, {a.q.size[0], Hkv, T, D});
  check_shape("v", a.v, {a.q.size[0], Hkv, T, Dv});
  check_shape("bias", a.bias, {B, H, S, T});
  check_shape("alibi_slopes", a.alibi_slopes, {B, H});
  check_shape("sinks", a.sinks, {H});
  check_shape("query_documents", a.query_documents, {B, S});
  check_shape("key_documents", a.key_documents, {B, T});
  check_shape("query_images", a.query_images, {B, S});
  check_shape("key_images", a.key_images, {B, T});
  check_shape("key_lengths", a.key_lengths, {B});
  check_shape("offsets", a.offsets, {B});
  check_shape("cu_seqlens_q", a.cu_seqlens_q, {B + 1});
  check_shape("cu_seqlens_k", a.cu_seqlens_k, {B + 1});
  for (const View* ids : {&a.query_documents, &a.key_documents, &a.query_images, &a.key_images, &a.key_lengths,
                          &a.offsets, &a.cu_seqlens_q, &a.cu_seqlens_k})
    check_dtype("ids, lengths and offsets", *ids, {DType::kInt32});
  check_dtype("alibi_slopes", a.alibi_slopes, {DType::kFloat32});
  check_dtype("sinks", a.sinks, {DType::kFloat32});
  check_dtype("bias", a.bias, {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kBool});
  check_shape("out", a.out, {a.q.size[0], H, S, Dv});
  check_dtype("out", a.out, {a.q.dtype});
  check_shape("lse", a.lse, {a.q.size[0], H, S});
  check_dtype("lse", a.lse, {DType::kFloat32});
}

void check_attention_backward(const AttentionArgs& a, int threads) {
  check_attention(a, threads);
  check_shape("dout", a.dout, {a.out.size[0], a.out.size[1], a.out.size[2], a.out.size[3]});
  check_shape("dlse", a.dlse, {a.lse.size[0], a.lse.size[1], a.lse.size[2]});
  check_shape("dq", a.dq, {a.q.size[0], a.q.size[1], a.q.size[2], a.q.size[3]});
  check_shape("dk", a.dk, {a.k.size[0], a.k.size[1], a.k.size[2], a.k.size[3]});
  check_shape("dv", a.dv, {a.v.size[0], a.v.size[1], a.v.size[2], a.v.size[3]});
  check_shape("dsinks", a.dsinks, {a.q.size[1]});
  for (const View* gradient : {&a.dout, &a.dq, &a.dk, &a.dv}) check_dtype("gradients", *gradient, {a.q.dtype});
  for (const View* gradient : {&a.dlse, &a.dbias, &a.dsinks}) check_dtype("gradients", *gradient, {DType::kFloat32});
  if (!a.dbias.defined) return;
  if (!a.bias.defined) throw std::invalid_argument("dbias: expected a bias to be given");
  check_ndim("dbias", a.dbias, 4);
  for (int i = 0; i < 4; ++i)
    if (a.dbias.size[i] != a.bias.size[i] && !(a.dbias.size[i] == 1 && a.bias.stride[i] == 0))
      throw std::invalid_argument("dbias: expected the bias's shape before broadcasting, got " +
                                  shape_text(a.dbias.size, 4));
}

// Shapes and dtypes of a call of attention_kvcache; out and lse may be absent.
void check_kvcache(const KvCacheArgs& c) {
  check_ndim("q", c.q, 4);
  check_ndim("k_cache", c.k_cache, 4);
  check_ndim("v_cache", c.v_cache, 4);
  check_dtype("q", c.q, kFloats);
  for (const View* view : {&c.k_cache, &c.v_cache, &c.k, &c.v, &c.out}) check_dtype("caches, k, v", *view, {c.q.dtype});
  const bool paged = c.block_table.defined;
  const int64_t B = c.q.size[0], S = c.q.size[1], H = c.q.size[2], D = c.q.size[3];
  const int64_t batch = paged ? c.k_cache.size[0] : B, Hkv = c.k_cache.size[2], Dv = c.v_cache.size[3];
  if (Hkv < 1 || H % Hkv != 0) throw std::invalid_argument("k_cache: expected a number of heads that divides q's");
  check_shape("k_cache", c.k_cache, {batch, c.k_cache.size[1], Hkv, D});
  check_shape("v_cache", c.v_cache, {batch, c.k_cache.size[1], Hkv, Dv});
  check_ndim("cache_lengths", c.cache_lengths, 1);
  check_shape("cache_lengths", c.cache_lengths, {B});
  check_shape("block_table", c.block_table, {B, c.block_table.size[1]});
  for (const View* numbers : {&c.cache_lengths, &c.block_table}) check_dtype("lengths", *numbers, {DType::kInt32});
  if (c.k.defined != c.v.defined) throw std::invalid_argument("k and v: expected both or neither");
  check_shape("k", c.k, {B, c.k.size[1], Hkv, D});
  check_shape("v", c.v, {B, c.k.size[1], Hkv, Dv});
  if (c.rotary_cos.defined != c.rotary_sin.defined)
    throw std::invalid_argument("rotary_cos and rotary_sin: expected both or neither");
  for (const View* table : {&c.rotary_cos, &c.rotary_sin}) {
    check_dtype("rotary_cos and rotary_sin", *table, kFloats);
    check_shape("rotary_cos and rotary_sin", *table, {c.rotary_cos.size[0], c.rotary_cos.size[1]});
  }
  if (2 * c.rotary_cos.size[1] > D) throw std::invalid_argument("rotary_cos: expected at most D / 2 columns");
  check_shape("sinks", c.sinks, {H});
  check_shape("out", c.out, {B, S, H, Dv});
  check_shape("lse", c.lse, {B, H, S});
  for (const View* view : {&c.sinks, &c.lse}) check_dtype("sinks and lse", *view, {DType::kFloat32});
}

// Whether lengths are within the cache and the rotary tables, and the pages of an entry within the pool. `lengths` are
// copies of the numbers that the kernel will go by.
bool are_kvcache_values_good(const KvCacheArgs& c, const std::vector<int32_t>& lengths) {
  const bool paged = c.block_table.defined;
  const int64_t page = c.k_cache.size[1], pages = c.k_cache.size[0];
  const int64_t capacity = paged ? page * c.block_table.size[1] : page, fresh = c.k.defined ? c.k.size[1] : 0;
  for (size_t b = 0; b < lengths.size(); ++b) {
    const int64_t total = lengths[b] + fresh;
    if (lengths[b] < 0 || total > capacity || total > INT32_MAX) return false;
    if (c.rotary_cos.defined && (total > c.rotary_cos.size[0] || total < c.q.size[1])) return false;
    for (int64_t entry = 0; paged && entry * page < total; ++entry) {
      const int32_t index = static_cast<const int32_t*>(
          c.block_table.data)[static_cast<int64_t>(b) * c.block_table.stride[0] + entry * c.block_table.stride[1]];
      if (index < 0 || index >= pages) return false;
    }
  }
  return true;
}

void run_kvcache(KvCacheArgs& c, int threads) {
  check_threads(threads);
  check_ndim("out", c.out, 4);
  check_ndim("lse", c.lse, 3);
  check_kvcache(c);
  for (const View* cache : {&c.k_cache, &c.v_cache})
    for (int i = 0; c.k.defined && i < 4; ++i)
      if (cache->size[i] > 1 && cache->stride[i] == 0)
        throw std::invalid_argument("k_cache and v_cache: expected a place of its own for every element, got stride 0");
  std::vector<int32_t> lengths(static_cast<size_t>(c.q.size[0]));
  for (size_t b = 0; b < lengths.size(); ++b)
    lengths[b] = static_cast<const int32_t*>(c.cache_lengths.data)[static_cast<int64_t>(b) * c.cache_lengths.stride[0]];
  if (!are_kvcache_values_good(c, lengths))
    throw std::invalid_argument(
        "cache_lengths or block_table: expected tokens within the cache, its pages and the tables");
  c.cache_lengths.data = lengths.data(), c.cache_lengths.stride[0] = 1;
  py::gil_scoped_release release;
  kernels().attention_kvcache(c, threads);
}

// Broadcasts dimensions of size 1, and missing first ones, to `sizes`.
void broadcast_to(View& view, std::initializer_list<int64_t> sizes) {
  const int ndim = static_cast<int>(sizes.size()), missing = ndim - view.ndim;
  if (!view.defined || missing < 0) return;
  for (int i = ndim - 1; i >= 0; --i) {
    const bool is_there = i >= missing;
    const int64_t size = is_there ? view.size[i - missing] : 1, stride = is_there ? view.stride[i - missing] : 0;
    const int64_t full = sizes.begin()[i];
    view.size[i] = size == 1 ? full : size;
    view.stride[i] = size == 1 && full != 1 ? 0 : stride;
  }
  view.ndim = ndim;
}

// A quick yes for plain CPU tensors that fit each other as attention_kvcache's do.
bool do_kvcache_tensors_fit(const std::array<py::object, 10>& tensors) {
  KvCacheArgs c{};
  View* const views[] = {&c.q, &c.k_cache,     &c.v_cache,    &c.cache_lengths, &c.k,
                         &c.v, &c.block_table, &c.rotary_cos, &c.rotary_sin,    &c.sinks};
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].is_none()) continue;
    const std::optional<View> view = TensorReader::try_read(tensors[i]);
    if (!view) return false;
    *views[i] = *view;
  }
  // Other float dtypes are converted in Python.
  if (c.sinks.defined && c.sinks.dtype != DType::kFloat32) return false;
  try {
    check_kvcache(c);
  } catch (const std::invalid_argument&) {
    return false;
  }
  return true;
}

// Varlen's (N, H, D) as the kernels' (1, H, N, D), and (H, N) as their (1, H, N).
void pack_into_batch(View& view) {
  if (view.ndim == 3) {
    const View packed = view;
    const int from[] = {1, 0, 2};
    for (int i = 0; i < 3; ++i) view.size[i + 1] = packed.size[from[i]], view.stride[i + 1] = packed.stride[from[i]];
  } else if (view.ndim == 2) {
    for (int i = 2; i > 0; --i) view.size[i] = view.size[i - 1], view.stride[i] = view.stride[i - 1];
  } else {
    return;
  }
  view.size[0] = 1, view.stride[0] = 0;
  ++view.ndim;
}

// Whether varlen's starts are plain CPU tensors, int32, of one dimension and one size, which is not 0.
bool do_starts_fit(py::handle queries, py::handle keys) {
  const std::optional<View> q = TensorReader::try_read(queries), k = TensorReader::try_read(keys);
  return q && k && q->ndim == 1 && k->ndim == 1 && q->dtype == DType::kInt32 && k->dtype == DType::kInt32 &&
         q->size[0] > 0 && q->size[0] == k->size[0];
}

// The last of varlen's starts, int32, or -1 unless they begin at 0, do not decrease, are no further apart than
// `longest`
// (-1: as far as they like) and end within `rows`.
int64_t end_of_starts(const View& starts, int64_t rows, int64_t longest) {
  if (starts.ndim != 1 || starts.dtype != DType::kInt32 || starts.size[0] < 1) return -1;
  const auto at = [&](int64_t b) { return static_cast<const int32_t*>(starts.data)[b * starts.stride[0]]; };
  const int64_t last = starts.size[0] - 1;
  if (at(0) != 0 || at(last) > rows) return -1;
  for (int64_t b = 0; b < last; ++b) {
    const int64_t length = int64_t{at(b + 1)} - at(b);
    if (length < 0 || (longest >= 0 && length > longest)) return -1;
  }
  return at(last);
}

// The arguments of a call with its outputs, as the kernels take them: packed sequences as one batch entry, broadcast
// tensors in full.
AttentionArgs attention_args(const py::tuple& call, const View& out, const View& lse) {
  AttentionArgs a = CallReader<AttentionArgs>::read(call);
  a.out = out, a.lse = lse;
  const int64_t batch = a.cu_seqlens_q.defined ? a.cu_seqlens_q.size[0] - 1 : a.q.size[0];
  if (a.cu_seqlens_q.defined)
    for (View* view : {&a.q, &a.k, &a.v, &a.out, &a.lse}) pack_into_batch(*view);
  if (a.q.ndim == 4 && a.k.ndim == 4) {
    broadcast_to(a.bias, {batch, a.q.size[1], a.q.size[2], a.k.size[2]});
    broadcast_to(a.alibi_slopes, {batch, a.q.size[1]});
  }
  return a;
}

// Whether q, k and v are plain CPU tensors of one float dtype and of `ndim` dimensions that fit: the last one of q and
// k is D, `heads` is that of the heads, and k and v differ in the last one alone. Of a batch nothing is said.
bool do_attention_tensors_fit(py::handle q_object, py::handle k_object, py::handle v_object, int ndim, int heads) {
  const std::optional<View> q = TensorReader::try_read(q_object), k = TensorReader::try_read(k_object),
                            v = TensorReader::try_read(v_object);
  if (!q || !k || !v || q->ndim != ndim || k->ndim != ndim || v->ndim != ndim) return false;
  if (q->dtype > DType::kFloat16 || k->dtype != q->dtype || v->dtype != q->dtype) return false;
  for (int i = 0; i < ndim - 1; ++i)
    if (k->size[i] != v->size[i]) return false;
  const int64_t Hkv = k->size[heads];
  return q->size[ndim - 1] == k->size[ndim - 1] && Hkv > 0 && q->size[heads] % Hkv == 0;
}

}  // namespace

void bind_attention(py::module_& m) {
  m.attr("DECODE_ROWS") = kDecodeRows;
  m.def("do_attention_tensors_fit", &do_attention_tensors_fit);
  m.def("do_kvcache_tensors_fit",
        [](py::object q, py::object k_cache, py::object v_cache, py::object cache_lengths, py::object k, py::object v,
           py::object block_table, py::object rotary_cos, py::object rotary_sin, py::object sinks) {
          return do_kvcache_tensors_fit(
              {q, k_cache, v_cache, cache_lengths, k, v, block_table, rotary_cos, rotary_sin, sinks});
        });
  m.def("do_starts_fit", &do_starts_fit);
  m.def("end_of_starts", &end_of_starts);
  m.def("read_attention_calls", &CallReader<AttentionArgs>::install, py::arg("fields"));
  m.def("read_attention_kvcache_calls", &CallReader<KvCacheArgs>::install, py::arg("fields"));
  m.def("attention_kvcache", [](const py::tuple& call, View out, View lse, int threads) {
    KvCacheArgs c = CallReader<KvCacheArgs>::read(call);
    c.out = out, c.lse = lse;
    run_kvcache(c, threads);
  });
  m.def("attention_forward", [](const py::tuple& call, View out, View lse, int threads) {
    const AttentionArgs a = attention_args(call, out, lse);
    check_attention(a, threads);
    py::gil_scoped_release release;
    kernels().attention_forward(a, threads);
  });
  m.def("attention_backward", [](const py::tuple& call, View out, View lse, View dout, View dlse, View dq, View dk,
                                 View dv, View dbias, View dsinks, int threads) {
    AttentionArgs a = attention_args(call, out, lse);
    a.dout = dout, a.dlse = dlse;
    a.dq = dq, a.dk = dk, a.dv = dv, a.dbias = dbias, a.dsinks = dsinks;
    if (a.cu_seqlens_q.defined)
      for (View* view : {&a.dout, &a.dlse, &a.dq, &a.dk, &a.dv}) pack_into_batch(*view);
    check_attention_backward(a, threads);
    py::gil_scoped_release release;
    kernels().attention_backward(a, threads);
  });
}

}  // namespace gpt4v_fast
