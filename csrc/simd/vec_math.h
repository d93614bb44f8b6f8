// exp, exp2 and tanh of whole vectors, for kernels that hold their tiles in Vec (simd/math.h has them for loops that the
// compiler vectorises). Errors are the largest that tests/test_simd_math.py finds over the stated interval, for every ISA.
#pragma once

#include "simd/math.h"
#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef int32_t VecIntInMemory
    __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));

static inline VecInt load_vec(const int32_t* data) { return *reinterpret_cast<const VecIntInMemory*>(data); }

static inline VecInt broadcast(int32_t value) { return value + VecInt{}; }

constexpr float kInfinity = __builtin_inff();

// 2^n of integers n in [-127, 128] that are held as floats; -127 gives 0 and 128 infinity.
static inline Vec power_of_two(Vec n) { return (Vec)((__builtin_convertvector(n, VecInt) + 127) << 23); }

// 2^x for x in [-126, 127], relative error 1.2e-7; 0 below -126.5, infinity from 128; a NaN stays a NaN.
// x = n + f, |f| <= 1/2; the polynomial of degree 6 has a relative error of 2.0e-9 (Lawson's iteration in double, then
// rounded to fp32; degree 5 has 9.1e-8).
static inline Vec exp2(Vec x) {
  x = x < -127.0f ? broadcast(-127.0f) : x;
  x = x > 128.0f ? broadcast(128.0f) : x;
  const Vec n = (x + kRoundingShift) - kRoundingShift;
  const Vec f = x - n;
  Vec p = broadcast(0x1.41fbbcp-13f);
  p = mul_add(p, f, broadcast(0x1.5f3e54p-10f));
  p = mul_add(p, f, broadcast(0x1.3b2d4cp-7f));
  p = mul_add(p, f, broadcast(0x1.c6aee8p-5f));
  p = mul_add(p, f, broadcast(0x1.ebfbdcp-3f));
  p = mul_add(p, f, broadcast(0x1.62e43p-1f));
  p = mul_add(p, f, broadcast(1.0f));
  return p * power_of_two(n);
}

// e^x as 2^(x log2 e): absolute error 1.1e-7 for x <= 0, which is what a softmax needs. The rounding of the product adds
// |x| 6e-8 to the relative error, and e^x |x| <= 0.37.
static inline Vec exp(Vec x) { return exp2(x * 1.44269504f); }

// tanh(x), relative error 5e-7 everywhere; a NaN stays a NaN.
// tanh |x| = e / (e + 2) with e = exp(2|x|) - 1 = 2^n (exp(f) - 1) + (2^n - 1), 2|x| = n log 2 + f: nothing cancels for
// small x, where n = 0. exp(f) - 1 comes from a polynomial of degree 7, relative error 2.4e-10 on |f| <= log(2) / 2.
static inline Vec tanh(Vec x) {
  const VecInt sign = (VecInt)x & INT32_MIN;
  Vec y = (Vec)((VecInt)x & INT32_MAX);
  y = y > 10.0f ? broadcast(10.0f) : y;  // 1 - tanh(10) is below half a unit in the last place of 1
  y = y + y;
  const Vec n = (y * 1.44269504f + kRoundingShift) - kRoundingShift;
  Vec f = mul_add(n, broadcast(-0.693359375f), y);  // log 2 in two parts; n times the first is exact
  f = mul_add(n, broadcast(2.12194440e-4f), f);
  Vec p = broadcast(0.00019845886f);
  p = mul_add(p, f, broadcast(0.001394072f));
  p = mul_add(p, f, broadcast(0.00833339f));
  p = mul_add(p, f, broadcast(0.04166636f));
  p = mul_add(p, f, broadcast(0.16666666f));
  p = mul_add(p, f, broadcast(0.5f));
  p = mul_add(p * f, f, f);
  const Vec power = power_of_two(n);
  const Vec e = mul_add(power, p, power - 1.0f);
  return (Vec)((VecInt)(e / (e + 2.0f)) | sign);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
