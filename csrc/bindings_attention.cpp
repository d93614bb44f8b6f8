// Attention's part of the bindings.
#include <pybind11/pybind11.h>

#include "binding_checks.h"
#include "bindings.h"
#include "dispatch.h"
#include "python_views.h"

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
  const bool paged = a.block_table.defined;
  const int64_t Hkv = a.k.size[1], Dv = a.v.size[3];
  const int64_t T = paged ? a.block_table.size[1] * a.k.size[2] : a.k.size[2];
  const int64_t B = varlen ? a.cu_seqlens_q.size[0] - 1 : a.q.size[0];
  if (Hkv < 1 || H % Hkv != 0) throw std::invalid_argument("k: expected a number of heads that divides q's");
  if (paged) {
    check_shape("k", a.k, {a.k.size[0], Hkv, a.k.size[2], D});
    check_shape("v", a.v, {a.k.size[0], Hkv, a.k.size[2], Dv});
    check_shape("block_table", a.block_table, {B, a.block_table.size[1]});
    if (varlen || !a.key_lengths.defined) throw std::invalid_argument("block_table: expected key_lengths with it");
    if (H / Hkv * S > kDecodeRows)
      throw std::invalid_argument("q: expected at most " + std::to_string(kDecodeRows) +
                                  " rows per key head with a block_table, got " + std::to_string(H / Hkv * S));
    for (const View* rows : {&a.q, &a.k, &a.v})
      if (rows->size[3] > 1 && rows->stride[3] != 1)
        throw std::invalid_argument("q, k and v: expected contiguous rows with a block_table");
    if (a.k.size[0] * a.k.size[2] == 0 && a.block_table.size[1] > 0)
      throw std::invalid_argument("k: expected pages with a block_table, got none");
  } else {
    check_shape("k", a.k, {a.q.size[0], Hkv, T, D});
    check_shape("v", a.v, {a.q.size[0], Hkv, T, Dv});
  }
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
                          &a.offsets, &a.cu_seqlens_q, &a.cu_seqlens_k, &a.block_table})
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

// The arguments that forward and backward have in common, in the order of gpt4v_fast/ops/attention.py.
AttentionArgs attention_args(const View& q, const View& k, const View& v, const View& bias, const View& alibi_slopes,
                             const View& sinks, const View& query_documents, const View& key_documents,
                             const View& query_images, const View& key_images, const View& key_lengths,
                             const View& offsets, const View& cu_seqlens_q, const View& cu_seqlens_k, bool causal,
                             bool bottom_right, int64_t window_left, int64_t window_right, float scale, float softcap,
                             double dropout_p, uint64_t seed, const View& out, const View& lse) {
  AttentionArgs a{};
  a.q = q, a.k = k, a.v = v;
  a.bias = bias, a.alibi_slopes = alibi_slopes, a.sinks = sinks;
  a.query_documents = query_documents, a.key_documents = key_documents;
  a.query_images = query_images, a.key_images = key_images;
  a.key_lengths = key_lengths, a.offsets = offsets;
  a.cu_seqlens_q = cu_seqlens_q, a.cu_seqlens_k = cu_seqlens_k;
  a.causal = causal, a.bottom_right = bottom_right;
  a.window_left = window_left, a.window_right = window_right;
  a.scale = scale, a.softcap = softcap, a.dropout_p = dropout_p, a.seed = seed;
  a.out = out, a.lse = lse;
  if (cu_seqlens_q.defined)
    for (View* view : {&a.q, &a.k, &a.v, &a.out, &a.lse}) pack_into_batch(*view);
  if (a.q.ndim == 4 && a.k.ndim == 4) {
    const int64_t B = cu_seqlens_q.defined ? cu_seqlens_q.size[0] - 1 : q.size[0], H = a.q.size[1];
    broadcast_to(a.bias, {B, H, a.q.size[2], a.k.size[2]});
    broadcast_to(a.alibi_slopes, {B, H});
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
  m.def("do_starts_fit", &do_starts_fit);
  m.def("end_of_starts", &end_of_starts);
  m.def("attention_forward", [](View q, View k, View v, View bias, View alibi_slopes, View sinks, View query_documents,
                                View key_documents, View query_images, View key_images, View key_lengths, View offsets,
                                View cu_seqlens_q, View cu_seqlens_k, View block_table, bool causal, bool bottom_right,
                                int64_t window_left, int64_t window_right, float scale, float softcap, double dropout_p,
                                uint64_t seed, View out, View lse, int threads) {
    AttentionArgs a = attention_args(q, k, v, bias, alibi_slopes, sinks, query_documents, key_documents, query_images,
                                     key_images, key_lengths, offsets, cu_seqlens_q, cu_seqlens_k, causal, bottom_right,
                                     window_left, window_right, scale, softcap, dropout_p, seed, out, lse);
    a.block_table = block_table;
    check_attention(a, threads);
    py::gil_scoped_release release;
    kernels().attention_forward(a, threads);
  });
  m.def("attention_backward", [](View q, View k, View v, View bias, View alibi_slopes, View sinks, View query_documents,
                                 View key_documents, View query_images, View key_images, View key_lengths, View offsets,
                                 View cu_seqlens_q, View cu_seqlens_k, bool causal, bool bottom_right,
                                 int64_t window_left, int64_t window_right, float scale, float softcap,
                                 double dropout_p, uint64_t seed, View out, View lse, View dout, View dlse, View dq,
                                 View dk, View dv, View dbias, View dsinks, int threads) {
    AttentionArgs a = attention_args(q, k, v, bias, alibi_slopes, sinks, query_documents, key_documents, query_images,
                                     key_images, key_lengths, offsets, cu_seqlens_q, cu_seqlens_k, causal, bottom_right,
                                     window_left, window_right, scale, softcap, dropout_p, seed, out, lse);
    a.dout = dout, a.dlse = dlse;
    a.dq = dq, a.dk = dk, a.dv = dv, a.dbias = dbias, a.dsinks = dsinks;
    if (cu_seqlens_q.defined)
      for (View* view : {&a.dout, &a.dlse, &a.dq, &a.dk, &a.dv}) pack_into_batch(*view);
    check_attention_backward(a, threads);
    py::gil_scoped_release release;
    kernels().attention_backward(a, threads);
  });
}

}  // namespace gpt4v_fast
