// Scalar conversions and arithmetic that every kernel shares, in the including ISA's namespace.
#pragma once

#include <cstdint>
#include <cstring>

#include "args.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Calls f with a value of the C++ type that stands for a float dtype.
template <class F>
static void with_float(DType dtype, F f) {
  if (dtype == DType::kBFloat16) return f(bfloat16{});
  if (dtype == DType::kFloat16) return f(float16{});
  f(float{});
}

// The same for the dtype that a kernel multiplies. An ISA with AMX is asked for bf16 alone (isa/amx_bf16.cpp), and has
// no code for others.
template <class F>
static void with_operands([[maybe_unused]] DType dtype, F f) {
#ifdef __AMX_BF16__
  f(bfloat16{});
#else
  with_float(dtype, f);
#endif
}

// a * b + c: one rounding where the ISA has FMA, two on the scalar ISA (a library call per element would be slow).
static inline float mul_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float to_float(float value) { return value; }
static inline float to_float(uint8_t value) { return static_cast<float>(value); }
static inline float to_float(bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

// IEEE half to float: exponent and mantissa are moved in place and rescaled by 2^112, which also makes subnormals
// exact; infinities and NaN get the float's exponent.
static inline float to_float(float16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | 0x70000000u | magnitude);  // infinity or NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));
}

// Round to nearest even, as torch does; a NaN stays a (quiet) NaN.
template <class T>
static inline T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  if (value != value) return {static_cast<uint16_t>((bits >> 16) | 0x0040u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
inline float16 from_float<float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // a half subnormal: adding 0.5 leaves its bits at the bottom of the mantissa
    const uint32_t rounded = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
    return {static_cast<uint16_t>(sign | rounded)};
  }
  const uint32_t rebased = magnitude - 0x38000000u;
  return {static_cast<uint16_t>(sign | ((rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13))};
}

template <class T>
static inline float load(const void* data, int64_t index) {
  return to_float(static_cast<const T*>(data)[index]);
}

// One element of a float tensor whose dtype is known at run time only; for tensors read once per row, not in loops.
static inline float load_any(const View& view, int64_t index) {
  switch (view.dtype) {
    case DType::kBFloat16:
      return load<bfloat16>(view.data, index);
    case DType::kFloat16:
      return load<float16>(view.data, index);
    default:
      return load<float>(view.data, index);
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
