// Reads a call object of gpt4v_fast/ops (a NamedTuple) into a kernel's arguments, by the names of its fields.
//
// An Args struct lists what it reads in `for_call`, a name and a member each. Python says once, at import, in which
// order the fields of the call object stand (`install`); after that a field is an index into a tuple. A name that the
// call object lacks is an error then: Python and C++ were built from different sources.
#pragma once

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "python_views.h"

namespace gpt4v_fast {

inline void read_field(const char* name, pybind11::handle from, View& to) {
  pybind11::detail::type_caster<View> caster;
  try {
    if (!caster.load(from, true))
      throw std::invalid_argument("expected a CPU tensor of a dtype that the kernels know, or None");
  } catch (const std::invalid_argument& error) {
    throw std::invalid_argument(std::string(name) + ": " + error.what());
  }
  to = pybind11::detail::cast_op<View&>(caster);
}

inline void read_field(const char*, pybind11::handle from, bool& to) { to = PyObject_IsTrue(from.ptr()) == 1; }

inline void read_field(const char* name, pybind11::handle from, int64_t& to) {
  to = PyLong_AsLongLong(from.ptr());
  if (to == -1 && PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(name) + ": expected an integer of 64 bits");
  }
}

inline void read_field(const char* name, pybind11::handle from, double& to) {
  to = PyFloat_AsDouble(from.ptr());
  if (to == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(name) + ": expected a number");
  }
}

inline void read_field(const char* name, pybind11::handle from, float& to) {
  double number;
  read_field(name, from, number);
  to = static_cast<float>(number);
}

// A seed: one int64 in a tensor, or None.
inline void read_field(const char* name, pybind11::handle from, uint64_t& to) {
  View view;
  read_field(name, from, view);
  if (view.defined && (view.dtype != DType::kInt64 || view.ndim > 1 || (view.ndim == 1 && view.size[0] != 1)))
    throw std::invalid_argument(std::string(name) + ": expected one int64");
  to = view.defined ? static_cast<uint64_t>(*static_cast<const int64_t*>(view.data)) : 0;
}

template <class Args>
class CallReader {
 public:
  static void install(const std::vector<std::string>& names) {
    Args args{};
    places_.clear();
    args.for_call([&](const char* name, auto&) {
      size_t place = 0;
      while (place < names.size() && names[place] != name) ++place;
      if (place == names.size()) throw std::invalid_argument(std::string(name) + ": expected a field of the call");
      places_.push_back(static_cast<Py_ssize_t>(place));
    });
    fields_ = static_cast<Py_ssize_t>(names.size());
  }

  static Args read(const pybind11::tuple& call) {
    if (places_.empty() || PyTuple_GET_SIZE(call.ptr()) != fields_)
      throw std::invalid_argument("call: expected " + std::to_string(fields_) + " fields");
    Args args{};
    const Py_ssize_t* place = places_.data();
    args.for_call(
        [&](const char* name, auto& field) { read_field(name, PyTuple_GET_ITEM(call.ptr(), *place++), field); });
    return args;
  }

 private:
  inline static std::vector<Py_ssize_t> places_;
  inline static Py_ssize_t fields_ = 0;
};

}  // namespace gpt4v_fast
