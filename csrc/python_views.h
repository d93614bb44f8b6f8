// Views of Python's tensors, without torch's headers: through the C functions that DLPack 1.3 defines for this
// ("exchange API", github.com/dmlc/dlpack, include/dlpack/dlpack.h) and torch.Tensor.__dlpack_c_exchange_api__ holds.
// That takes some 40 ns a tensor; its attributes in Python took 400.
#pragma once

#include <pybind11/pybind11.h>

#include <optional>
#include <stdexcept>

#include "args.h"

namespace gpt4v_fast {

// The part of DLPack's ABI that is used here.
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  void* unused[3];                                          // allocator, and managed tensors from and to Python objects
  int (*tensor_from_py_object)(void* object, Tensor* out);  // not owning; -1 with a Python error
};
constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;

}  // namespace dlpack

// Elements without memory: a storage that was freed (resize_(0), as FSDP leaves it), or a tensor of zeros that torch
// never wrote.
inline bool lacks_memory(const View& view) {
  if (!view.defined || view.data != nullptr) return false;
  for (int i = 0; i < view.ndim; ++i)
    if (view.size[i] == 0) return false;
  return true;
}

class TensorReader {
 public:
  // Takes torch.Tensor, torch.nn.Parameter and the capsule of the former.
  static void install(pybind11::handle tensor, pybind11::handle parameter, const pybind11::capsule& capsule) {
    auto* api = capsule.get_pointer<dlpack::ExchangeApi>();
    while (api != nullptr && api->version.major != dlpack::kMajor) api = api->previous;
    if (api == nullptr || api->tensor_from_py_object == nullptr)
      throw std::invalid_argument("capsule: expected DLPack's exchange API, version 1");
    read_ = api->tensor_from_py_object;
    tensor_ = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    parameter_ = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  }
  static bool is_tensor(pybind11::handle x) { return tensor_ != nullptr && PyObject_TypeCheck(x.ptr(), tensor_) != 0; }
  // No subclass, which could mean something else by what torch does with it.
  static bool is_plain(pybind11::handle x) { return Py_TYPE(x.ptr()) == tensor_ || Py_TYPE(x.ptr()) == parameter_; }

  // The view of a tensor, or nothing where it is not on a CPU, has too many dimensions or a dtype that no kernel knows.
  // The caller keeps the tensor alive. Throws what torch raises.
  static std::optional<View> read(pybind11::handle x) {
    dlpack::Tensor tensor;
    if (read_(x.ptr(), &tensor) != 0) throw pybind11::error_already_set();
    return view_of(tensor);
  }
  // The same for plain tensors, with nothing where torch raises too: one without storage, or of another layout.
  static std::optional<View> try_read(pybind11::handle x) {
    dlpack::Tensor tensor;
    if (!is_plain(x)) return std::nullopt;
    if (read_(x.ptr(), &tensor) == 0) return view_of(tensor);
    PyErr_Clear();
    return std::nullopt;
  }

 private:
  static std::optional<View> view_of(const dlpack::Tensor& tensor) {
    const std::optional<DType> dtype = dtype_of(tensor.dtype);
    if (!dtype || tensor.device.type != dlpack::kCpu || tensor.ndim > kMaxDims) return std::nullopt;
    View view{};
    view.data = static_cast<char*>(tensor.data) + tensor.byte_offset;
    view.dtype = *dtype;
    view.ndim = tensor.ndim;
    view.defined = true;
    for (int32_t i = 0; i < tensor.ndim; ++i) view.size[i] = tensor.shape[i], view.stride[i] = tensor.strides[i];
    return view;
  }

  static std::optional<DType> dtype_of(dlpack::DataType type) {
    if (type.lanes != 1) return std::nullopt;
    switch (type.code << 8 | type.bits) {  // codes: 0 int, 1 unsigned, 2 float, 4 bfloat, 6 bool
      case 0x220:
        return DType::kFloat32;
      case 0x410:
        return DType::kBFloat16;
      case 0x210:
        return DType::kFloat16;
      case 0x240:
        return DType::kFloat64;
      case 0x108:
        return DType::kUInt8;
      case 0x020:
        return DType::kInt32;
      case 0x040:
        return DType::kInt64;
      case 0x608:
        return DType::kBool;
      default:
        return std::nullopt;
    }
  }

  inline static int (*read_)(void*, dlpack::Tensor*) = nullptr;
  inline static PyTypeObject* tensor_ = nullptr;
  inline static PyTypeObject* parameter_ = nullptr;
};

}  // namespace gpt4v_fast

namespace pybind11::detail {

// A kernel's argument: a CPU tensor, (data_ptr, dtype code, sizes, strides in elements), or None where it is absent.
template <>
struct type_caster<gpt4v_fast::View> {
  PYBIND11_TYPE_CASTER(gpt4v_fast::View,
                       const_name("torch.Tensor | tuple[int, int, tuple[int, ...], tuple[int, ...]] | None"));

  bool load(handle source, bool) {
    value = gpt4v_fast::View{};
    if (source.is_none()) return true;
    if (gpt4v_fast::TensorReader::is_tensor(source)) {
      const std::optional<gpt4v_fast::View> view = gpt4v_fast::TensorReader::read(source);
      if (view && gpt4v_fast::lacks_memory(*view))
        throw std::invalid_argument("expected a tensor with memory, got one whose storage was freed");
      if (view) value = *view;
      return view.has_value();
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return PyTuple_GET_ITEM(source.ptr(), i); };
    PyObject* sizes = item(2);
    PyObject* strides = item(3);
    if (!PyTuple_Check(sizes) || !PyTuple_Check(strides)) return false;
    const Py_ssize_t ndim = PyTuple_GET_SIZE(sizes);
    if (ndim > gpt4v_fast::kMaxDims || PyTuple_GET_SIZE(strides) != ndim) return false;
    value.data = PyLong_AsVoidPtr(item(0));
    value.dtype = static_cast<gpt4v_fast::DType>(PyLong_AsLong(item(1)));
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
