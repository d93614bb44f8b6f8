// The Python side of the dispatch table: turns (pointer, dtype, sizes, strides) tuples into views, checks what a kernel
// relies on, releases the GIL and calls the kernel. Shapes, dtypes and labels are checked for users in
// gpt4v_fast/ops/; what is checked again here is what would make a kernel touch memory it does not own.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

#include "dispatch.h"

namespace py = pybind11;
using gpt4v_fast::AttentionArgs;
using gpt4v_fast::CrossEntropyArgs;
using gpt4v_fast::DType;
using gpt4v_fast::kMaxDims;
using gpt4v_fast::LinearCrossEntropyArgs;
using gpt4v_fast::PatchEmbedArgs;
using gpt4v_fast::View;

namespace pybind11::detail {

template <>
struct type_caster<View> {
  PYBIND11_TYPE_CASTER(View, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    value = View{};
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return PyTuple_GET_ITEM(source.ptr(), i); };
    PyObject* sizes = item(2);
    PyObject* strides = item(3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t ndim = PyTuple_GET_SIZE(sizes);
    if (ndim > kMaxDims || PyTuple_GET_SIZE(strides) != ndim) return false;
    value.data = PyLong_AsVoidPtr(item(0));
    value.dtype = static_cast<DType>(PyLong_AsLong(item(1)));
    value.ndim = static_cast<int32_t>(ndim);
    value.defined = true;
    for (Py_ssize_t i = 0; i < ndim; ++i) {
      value.size[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, i));
      value.stride[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(strides, i));
    }
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

}  // namespace pybind11::detail

namespace {

std::string shape_text(const int64_t* size, int ndim) {
  std::string text = "(";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(size[i]);
  return text + ")";
}

// Throws unless `view` is absent or has exactly this shape.
void check_shape(const char* name, const View& view, std::initializer_list<int64_t> expected) {
  if (!view.defined) return;
  bool same = view.ndim == static_cast<int>(expected.size());
  for (int i = 0; same && i < view.ndim; ++i) same = view.size[i] == expected.begin()[i];
  if (!same)
    throw std::invalid_argument(std::string(name) + ": expected shape " +
                                shape_text(expected.begin(), static_cast<int>(expected.size())) + ", got " +
                                shape_text(view.size, view.ndim));
}

void check_dtype(const char* name, const View& view, std::initializer_list<DType> allowed) {
  if (!view.defined) return;
  for (DType dtype : allowed)
    if (view.dtype == dtype) return;
  throw std::invalid_argument(std::string(name) + ": unexpected dtype code " +
                              std::to_string(static_cast<int>(view.dtype)));
}

void check_ndim(const char* name, const View& view, int ndim) {
  if (!view.defined || view.ndim != ndim)
    throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(ndim) + " dimensions, got " +
                                (view.defined ? shape_text(view.size, view.ndim) : std::string("None")));
}

void check_threads(int threads) {
  if (threads < 1) throw std::invalid_argument("threads: expected at least 1, got " + std::to_string(threads));
}

void check_probe(int threads, double seconds) {
  check_threads(threads);
  if (!(seconds > 0.0 && seconds <= 10.0))
    throw std::invalid_argument("seconds: expected more than 0 and at most 10, got " + std::to_string(seconds));
}

constexpr std::initializer_list<DType> kFloats = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

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
    if (H / Hkv * S > gpt4v_fast::kDecodeRows)
      throw std::invalid_argument("q: expected at most " + std::to_string(gpt4v_fast::kDecodeRows) +
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

template <class Args>
void check_per_token(const Args& a, int64_t N, int64_t V) {
  check_shape("target", a.target, {N});
  check_dtype("target", a.target, {DType::kInt64});
  check_shape("class_weight", a.class_weight, {V});
  check_dtype("class_weight", a.class_weight, {DType::kFloat32});
  for (const View* row : {&a.nll, &a.lse, &a.lse_low, &a.grad_nll, &a.grad_lse}) {
    check_shape("nll, lse and their gradients", *row, {N});
    check_dtype("nll, lse and their gradients", *row, {DType::kFloat32});
  }
  check_shape("argmax", a.argmax, {N});
  check_dtype("argmax", a.argmax, {DType::kInt64});
}

void check_cross_entropy(const CrossEntropyArgs& a, int threads) {
  check_threads(threads);
  check_ndim("logits", a.logits, 2);
  check_dtype("logits", a.logits, kFloats);
  check_per_token(a, a.logits.size[0], a.logits.size[1]);
  check_shape("grad_logits", a.grad_logits, {a.logits.size[0], a.logits.size[1]});
  check_dtype("grad_logits", a.grad_logits, {a.logits.dtype});
}

void check_linear_cross_entropy(const LinearCrossEntropyArgs& a, int threads) {
  check_threads(threads);
  check_ndim("hidden", a.hidden, 2);
  check_ndim("weight", a.weight, 2);
  check_dtype("hidden", a.hidden, kFloats);
  check_dtype("weight", a.weight, {a.hidden.dtype});
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  check_shape("weight", a.weight, {V, E});
  check_shape("bias", a.bias, {V});
  check_dtype("bias", a.bias, kFloats);
  check_per_token(a, N, V);
  check_shape("grad_hidden", a.grad_hidden, {N, E});
  check_dtype("grad_hidden", a.grad_hidden, {a.hidden.dtype});
  check_shape("grad_weight", a.grad_weight, {V, E});
  check_dtype("grad_weight", a.grad_weight, {a.weight.dtype});
  check_shape("grad_bias", a.grad_bias, {V});
  check_dtype("grad_bias", a.grad_bias, {DType::kFloat32});
}

void check_patch_embed(const PatchEmbedArgs& a, int threads) {
  check_threads(threads);
  check_ndim("pixels", a.pixels, 5);
  check_ndim("weight", a.weight, 5);
  check_dtype("pixels", a.pixels, {DType::kUInt8, DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_dtype("weight", a.weight, kFloats);
  const int64_t B = a.pixels.size[0], C = a.pixels.size[1], E = a.weight.size[0];
  check_shape("weight", a.weight, {E, C, a.weight.size[2], a.weight.size[3], a.weight.size[4]});
  int64_t N = 1;
  for (int i = 2; i < 5; ++i) {
    if (a.weight.size[i] < 1 || a.pixels.size[i] % a.weight.size[i] != 0)
      throw std::invalid_argument("pixels: expected frames, height and width divisible by the patch, got " +
                                  shape_text(a.pixels.size, 5) + " for weight " + shape_text(a.weight.size, 5));
    N *= a.pixels.size[i] / a.weight.size[i];
  }
  check_shape("bias", a.bias, {E});
  check_dtype("bias", a.bias, kFloats);
  check_shape("pixel_scale", a.pixel_scale, {C});
  check_dtype("pixel_scale", a.pixel_scale, {DType::kFloat32});
  check_shape("pixel_shift", a.pixel_shift, {C});
  check_dtype("pixel_shift", a.pixel_shift, {DType::kFloat32});
  check_shape("pos_embed", a.pos_embed, {N, E});
  check_dtype("pos_embed", a.pos_embed, kFloats);
  check_shape("tokens", a.tokens, {B, N, E});
  check_dtype("tokens", a.tokens, kFloats);
  check_shape("grad_tokens", a.grad_tokens, {B, N, E});
  check_dtype("grad_tokens", a.grad_tokens, kFloats);
  check_shape("grad_weight", a.grad_weight, {E, C, a.weight.size[2], a.weight.size[3], a.weight.size[4]});
  check_dtype("grad_weight", a.grad_weight, {DType::kFloat32});
  int64_t expected = 1;  // the stride of a contiguous tensor
  for (int i = 4; a.grad_weight.defined && i >= 0; --i) {
    const int64_t size = a.grad_weight.size[i];
    if (size > 1 && a.grad_weight.stride[i] != expected)
      throw std::invalid_argument("grad_weight: expected a contiguous tensor");
    expected *= size > 1 ? size : 1;
  }
  check_shape("grad_pixels", a.grad_pixels, {B, C, a.pixels.size[2], a.pixels.size[3], a.pixels.size[4]});
  check_dtype("grad_pixels", a.grad_pixels, kFloats);
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
  return a;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of gpt4v_fast. Tensors are (data_ptr, dtype code, sizes, strides in elements) or None.";

  m.def("isa", [] { return gpt4v_fast::kernels().isa; });
  m.attr("DECODE_ROWS") = gpt4v_fast::kDecodeRows;
  m.def("built_isas", &gpt4v_fast::built_isas);
  m.def("available_isas", &gpt4v_fast::available_isas);
  m.def("select_isa", &gpt4v_fast::select_isa, py::arg("name"));

#ifdef __clang__
  m.attr("compiler") = "Clang " __clang_version__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def(
      "peak_fma",
      [](int threads, double seconds) {
        check_probe(threads, seconds);
        py::gil_scoped_release release;
        return gpt4v_fast::kernels().peak_fma(threads, seconds);
      },
      py::arg("threads"), py::arg("seconds"));
  m.def(
      "peak_dot_bf16",
      [](int threads, double seconds) {
        check_probe(threads, seconds);
        py::gil_scoped_release release;
        return gpt4v_fast::kernels().peak_dot_bf16(threads, seconds);
      },
      py::arg("threads"), py::arg("seconds"));
  m.def(
      "peak_read",
      [](View data, int threads, double seconds) {
        check_probe(threads, seconds);
        check_ndim("data", data, 1);
        check_dtype("data", data, {DType::kFloat32});
        if (data.size[0] < threads * gpt4v_fast::kPeakReadFloats || data.stride[0] != 1)
          throw std::invalid_argument("data: expected at least " + std::to_string(gpt4v_fast::kPeakReadFloats) +
                                      " contiguous floats per thread, got " + std::to_string(data.size[0]));
        py::gil_scoped_release release;
        return gpt4v_fast::kernels().peak_read(static_cast<const float*>(data.data), data.size[0], threads, seconds);
      },
      py::arg("data"), py::arg("threads"), py::arg("seconds"));

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
    gpt4v_fast::kernels().attention_forward(a, threads);
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
    check_attention_backward(a, threads);
    py::gil_scoped_release release;
    gpt4v_fast::kernels().attention_backward(a, threads);
  });

  m.def("cross_entropy_forward",
        [](View logits, View target, View class_weight, int64_t ignore_index, float label_smoothing, float softcap,
           View nll, View lse, View lse_low, View argmax, int threads) {
          CrossEntropyArgs a{};
          a.logits = logits, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax;
          check_cross_entropy(a, threads);
          py::gil_scoped_release release;
          gpt4v_fast::kernels().cross_entropy_forward(a, threads);
        });
  m.def("cross_entropy_backward",
        [](View logits, View target, View class_weight, int64_t ignore_index, float label_smoothing, float softcap,
           View lse, View lse_low, View grad_nll, View grad_lse, View grad_logits, int threads) {
          CrossEntropyArgs a{};
          a.logits = logits, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.lse = lse, a.lse_low = lse_low, a.grad_nll = grad_nll, a.grad_lse = grad_lse, a.grad_logits = grad_logits;
          check_cross_entropy(a, threads);
          py::gil_scoped_release release;
          gpt4v_fast::kernels().cross_entropy_backward(a, threads);
        });

  m.def("linear_cross_entropy_forward",
        [](View hidden, View weight, View bias, View target, View class_weight, int64_t ignore_index,
           float label_smoothing, float softcap, View nll, View lse, View lse_low, View argmax, int threads) {
          LinearCrossEntropyArgs a{};
          a.hidden = hidden, a.weight = weight, a.bias = bias, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax;
          check_linear_cross_entropy(a, threads);
          py::gil_scoped_release release;
          gpt4v_fast::kernels().linear_cross_entropy_forward(a, threads);
        });
  m.def("linear_cross_entropy_backward",
        [](View hidden, View weight, View bias, View target, View class_weight, int64_t ignore_index,
           float label_smoothing, float softcap, View lse, View lse_low, View grad_nll, View grad_lse, View grad_hidden,
           View grad_weight, View grad_bias, int threads) {
          LinearCrossEntropyArgs a{};
          a.hidden = hidden, a.weight = weight, a.bias = bias, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.lse = lse, a.lse_low = lse_low, a.grad_nll = grad_nll, a.grad_lse = grad_lse;
          a.grad_hidden = grad_hidden, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
          check_linear_cross_entropy(a, threads);
          py::gil_scoped_release release;
          gpt4v_fast::kernels().linear_cross_entropy_backward(a, threads);
        });

  m.def("patch_embed_forward", [](View pixels, View weight, View bias, View pixel_scale, View pixel_shift,
                                  View pos_embed, View tokens, int threads) {
    PatchEmbedArgs a{};
    a.pixels = pixels, a.weight = weight, a.bias = bias;
    a.pixel_scale = pixel_scale, a.pixel_shift = pixel_shift, a.pos_embed = pos_embed, a.tokens = tokens;
    check_patch_embed(a, threads);
    py::gil_scoped_release release;
    gpt4v_fast::kernels().patch_embed_forward(a, threads);
  });
  m.def("patch_embed_backward", [](View pixels, View weight, View pixel_scale, View pixel_shift, View grad_tokens,
                                   View grad_weight, View grad_pixels, int threads) {
    PatchEmbedArgs a{};
    a.pixels = pixels, a.weight = weight, a.pixel_scale = pixel_scale, a.pixel_shift = pixel_shift;
    a.grad_tokens = grad_tokens, a.grad_weight = grad_weight, a.grad_pixels = grad_pixels;
    check_patch_embed(a, threads);
    py::gil_scoped_release release;
    gpt4v_fast::kernels().patch_embed_backward(a, threads);
  });
}
