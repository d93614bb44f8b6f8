// The losses' part of the bindings.
#include <pybind11/pybind11.h>

#include "binding_checks.h"
#include "bindings.h"
#include "dispatch.h"
#include "python_calls.h"

namespace py = pybind11;

namespace gpt4v_fast {
namespace {

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

}  // namespace

void bind_loss(py::module_& m) {
  m.def("read_cross_entropy_calls", &CallReader<CrossEntropyArgs>::install, py::arg("fields"));
  m.def("read_linear_cross_entropy_calls", &CallReader<LinearCrossEntropyArgs>::install, py::arg("fields"));
  m.def("cross_entropy_forward", [](const py::tuple& call, View nll, View lse, View lse_low, View argmax, int threads) {
    CrossEntropyArgs a = CallReader<CrossEntropyArgs>::read(call);
    a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax;
    check_cross_entropy(a, threads);
    py::gil_scoped_release release;
    kernels().cross_entropy_forward(a, threads);
  });
  m.def("cross_entropy_backward",
        [](const py::tuple& call, View lse, View lse_low, View grad_nll, View grad_lse, View grad_logits, int threads) {
          CrossEntropyArgs a = CallReader<CrossEntropyArgs>::read(call);
          a.lse = lse, a.lse_low = lse_low, a.grad_nll = grad_nll, a.grad_lse = grad_lse, a.grad_logits = grad_logits;
          check_cross_entropy(a, threads);
          py::gil_scoped_release release;
          kernels().cross_entropy_backward(a, threads);
        });

  m.def("linear_cross_entropy_forward",
        [](const py::tuple& call, View nll, View lse, View lse_low, View argmax, View kept, int threads) {
          LinearCrossEntropyArgs a = CallReader<LinearCrossEntropyArgs>::read(call);
          a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax, a.kept = kept;
          check_linear_cross_entropy(a, threads);
          py::gil_scoped_release release;
          kernels().linear_cross_entropy_forward(a, threads);
        });
  m.def("linear_cross_entropy_backward",
        [](const py::tuple& call, View lse, View lse_low, View kept, View grad_nll, View grad_lse, View grad_hidden,
           View grad_weight, View grad_bias, int threads) {
          LinearCrossEntropyArgs a = CallReader<LinearCrossEntropyArgs>::read(call);
          a.lse = lse, a.lse_low = lse_low, a.kept = kept, a.grad_nll = grad_nll, a.grad_lse = grad_lse;
          a.grad_hidden = grad_hidden, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
          check_linear_cross_entropy(a, threads);
          py::gil_scoped_release release;
          kernels().linear_cross_entropy_backward(a, threads);
        });

  // Forward and, for slopes nll_slope of every nll and lse_slope * lse of every lse, backward.
  m.def("linear_cross_entropy_gradients",
        [](const py::tuple& call, View nll, View lse, View lse_low, View argmax, float nll_slope, float lse_slope,
           View grad_hidden, View grad_weight, View grad_bias, int64_t room, int threads) {
          LinearCrossEntropyArgs a = CallReader<LinearCrossEntropyArgs>::read(call);
          a.nll = nll, a.lse = lse, a.lse_low = lse_low, a.argmax = argmax;
          a.grad_hidden = grad_hidden, a.grad_weight = grad_weight, a.grad_bias = grad_bias;
          check_linear_cross_entropy(a, threads);
          if (grad_weight.defined && (grad_weight.stride[1] != 1 || grad_weight.stride[0] != grad_weight.size[1]))
            throw std::invalid_argument("grad_weight: expected a contiguous tensor");
          py::gil_scoped_release release;
          kernels().linear_cross_entropy_gradients(a, nll_slope, lse_slope, room, threads);
        });
}

}  // namespace gpt4v_fast
