// The Python side of the dispatch table: turns tensors into views, checks what a kernel relies on, releases the GIL and
// calls the kernel. Shapes, dtypes and labels are checked for users in gpt4v_fast/ops/; what is checked again here is
// what would make a kernel touch memory it does not own.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "binding_checks.h"
#include "dispatch.h"
#include "python_views.h"

namespace py = pybind11;

namespace gpt4v_fast {
namespace {

void check_probe(int threads, double seconds) {
  check_threads(threads);
  if (!(seconds > 0.0 && seconds <= 10.0))
    throw std::invalid_argument("seconds: expected more than 0 and at most 10, got " + std::to_string(seconds));
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
  check_dtype("kept", a.kept, {DType::kUInt8});
  if (a.kept.defined) {
    check_ndim("kept", a.kept, 1);
    if (a.kept.stride[0] != 1 || reinterpret_cast<uintptr_t>(a.kept.data) % sizeof(int64_t) != 0)
      throw std::invalid_argument("kept: expected contiguous bytes on an int64's boundary");
  }
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

// Whether the arguments of an op are plain CPU tensors and scalars, which its implementation may be given directly, and
// whether one of the tensors wants a gradient.
enum PlainArguments { kNotPlain, kPlain, kPlainWithGradient };

int plain_arguments(const py::tuple& arguments) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  PlainArguments kind = kPlain;
  for (const py::handle x : arguments) {
    PyObject* object = x.ptr();
    if (x.is_none() || PyBool_Check(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
        PyUnicode_CheckExact(object))
      continue;
    if (!TensorReader::try_read(x)) return kNotPlain;
    const py::object wanted = py::reinterpret_steal<py::object>(PyObject_GetAttr(object, requires_grad));
    if (!wanted) throw py::error_already_set();
    if (wanted.ptr() == Py_True) kind = kPlainWithGradient;
  }
  return kind;
}

}  // namespace
}  // namespace gpt4v_fast

// The macro cannot stand in a namespace.
using namespace gpt4v_fast;

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "CPU kernels of gpt4v_fast. Tensors are torch's, (data_ptr, dtype code, sizes, strides in elements), or None.";

  m.def("read_tensors_of", &TensorReader::install, py::arg("tensor"), py::arg("parameter"), py::arg("capsule"));
  m.def("plain_arguments", &plain_arguments, py::arg("arguments"));
  m.def("isa", [] { return gpt4v_fast::kernels().isa; });
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
  m.def(
      "handoff",
      [](double seconds) {
        check_probe(2, seconds);
        py::gil_scoped_release release;
        return gpt4v_fast::kernels().handoff(seconds);
      },
      py::arg("seconds"));

  bind_attention(m);
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

  m.def("linear_cross_entropy_forward", [](View hidden, View weight, View bias, View target, View class_weight,
                                           int64_t ignore_index, float label_smoothing, float softcap, View nll,
                                           View lse, View lse_low, View argmax, View kept, int threads) {
    LinearCrossEntropyArgs a{};
    a.hidden = hidden, a.weight = weight, a.bias = bias, a.target = target, a.class_weight = class_weight;
    a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
    a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax, a.kept = kept;
    check_linear_cross_entropy(a, threads);
    py::gil_scoped_release release;
    gpt4v_fast::kernels().linear_cross_entropy_forward(a, threads);
  });
  m.def("linear_cross_entropy_backward",
        [](View hidden, View weight, View bias, View target, View class_weight, int64_t ignore_index,
           float label_smoothing, float softcap, View lse, View lse_low, View kept, View grad_nll, View grad_lse,
           View grad_hidden, View grad_weight, View grad_bias, int threads) {
          LinearCrossEntropyArgs a{};
          a.hidden = hidden, a.weight = weight, a.bias = bias, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.lse = lse, a.lse_low = lse_low, a.kept = kept, a.grad_nll = grad_nll, a.grad_lse = grad_lse;
          a.grad_hidden = grad_hidden, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
          check_linear_cross_entropy(a, threads);
          py::gil_scoped_release release;
          gpt4v_fast::kernels().linear_cross_entropy_backward(a, threads);
        });

  // Forward and, for slopes nll_slope of every nll and lse_slope * lse of every lse, backward.
  m.def("linear_cross_entropy_gradients",
        [](View hidden, View weight, View bias, View target, View class_weight, int64_t ignore_index,
           float label_smoothing, float softcap, View nll, View lse, View lse_low, View argmax, float nll_slope,
           float lse_slope, View grad_hidden, View grad_weight, View grad_bias, int64_t room, int threads) {
          LinearCrossEntropyArgs a{};
          a.hidden = hidden, a.weight = weight, a.bias = bias, a.target = target, a.class_weight = class_weight;
          a.ignore_index = ignore_index, a.label_smoothing = label_smoothing, a.softcap = softcap;
          a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax;
          a.grad_hidden = grad_hidden, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
          check_linear_cross_entropy(a, threads);
          if (grad_weight.defined && (grad_weight.stride[1] != 1 || grad_weight.stride[0] != grad_weight.size[1]))
            throw std::invalid_argument("grad_weight: expected a contiguous tensor");
          py::gil_scoped_release release;
          gpt4v_fast::kernels().linear_cross_entropy_gradients(a, nll_slope, lse_slope, room, threads);
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
