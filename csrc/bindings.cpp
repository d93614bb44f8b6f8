// The Python side of the dispatch table: turns tensors into views, checks what a kernel relies on, releases the GIL and
// calls the kernel. Shapes, dtypes and labels are checked for users in gpt4v_fast/ops/; what is checked again here is
// what would make a kernel touch memory it does not own.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

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

// Whether the fields of a call are plain CPU tensors and scalars, which a backend may be given directly, and whether
// one of the tensors wants a gradient. Negative views (torch resolves them in its dispatcher) and tensors without
// memory are not plain.
enum PlainArguments { kNotPlain, kPlain, kPlainWithGradient };

bool is_true(PyObject* object, PyObject* name, bool is_method) {
  const py::object found = py::reinterpret_steal<py::object>(is_method ? PyObject_CallMethodNoArgs(object, name)
                                                                       : PyObject_GetAttr(object, name));
  if (!found) throw py::error_already_set();
  return found.ptr() == Py_True;
}

int plain_arguments(const py::tuple& arguments) {
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
  PlainArguments kind = kPlain;
  for (const py::handle x : arguments) {
    PyObject* object = x.ptr();
    if (x.is_none() || PyBool_Check(object) || PyLong_CheckExact(object) || PyFloat_CheckExact(object) ||
        PyUnicode_CheckExact(object) || std::strcmp(Py_TYPE(object)->tp_name, "torch.dtype") == 0)
      continue;
    const std::optional<View> view = TensorReader::try_read(x);
    if (!view || lacks_memory(*view) || is_true(object, is_neg, true)) return kNotPlain;
    if (is_true(object, requires_grad, false)) kind = kPlainWithGradient;
  }
  return kind;
}

// Which fields of a call differ from their defaults, a bit each: tensors that are there, numbers that are set.
uint64_t used_fields(const py::tuple& call, const py::tuple& defaults) {
  const Py_ssize_t count = PyTuple_GET_SIZE(call.ptr());
  if (count != PyTuple_GET_SIZE(defaults.ptr()) || count > 64)
    throw std::invalid_argument("defaults: expected one for each of at most 64 fields");
  uint64_t used = 0;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const value = PyTuple_GET_ITEM(call.ptr(), i);
    PyObject* const usual = PyTuple_GET_ITEM(defaults.ptr(), i);
    if (value == usual) continue;
    const bool is_number = PyFloat_CheckExact(value) || PyLong_CheckExact(value) || PyUnicode_CheckExact(value);
    const int equal = is_number ? PyObject_RichCompareBool(value, usual, Py_EQ) : 0;
    if (equal < 0) throw py::error_already_set();
    if (equal == 0) used |= uint64_t{1} << i;
  }
  return used;
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
  m.def("used_fields", &used_fields, py::arg("call"), py::arg("defaults"));
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
  bind_loss(m);
  bind_patch_embed(m);
}
