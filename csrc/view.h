// A tensor as kernels see it. This header, like args.h, is included by translation units of every ISA, so it
// holds nothing but plain data: an inline function here could be kept by the linker in its AVX-512 copy for everybody.
#pragma once

#include <cstdint>

namespace gpt4v_fast {

// The order is that of gpt4v_fast/_native.py.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kUInt8, kInt32, kInt64, kBool, kFloat64 };

constexpr int kMaxDims = 6;

// A tensor somebody else owns: sizes and strides in elements. `defined` is false for an absent optional tensor.
struct View {
  void* data;
  DType dtype;
  int32_t ndim;
  bool defined;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

}  // namespace gpt4v_fast
