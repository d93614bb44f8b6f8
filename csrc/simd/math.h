// exp, exp2 and tanh in fp32 as straight lines of arithmetic, for loops that the compiler turns into vector
// code.
//
// Polynomials by Remez exchange for relative error, in 40 digits. The errors stated are the largest of the
// compiled functions, with and without FMA, against double precision at every float of the interval from
// 2^-25 up (and every 4096th below). A NaN comes out as a NaN: scales are multiplied, never added to exponent
// bits.
#pragma once

#include "simd/scalar.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr float kInfinity = __builtin_inff();

// 1.5 * 2^23: a float of magnitude below 2^22 that is added to it is rounded to an integer, which stands in
// the low bits.
constexpr float kRoundingShift = 12582912.0f;

// 2^n of the integer n in [-126, 127] that `shifted` = n + kRoundingShift holds.
static inline float power_of_two(float shifted) { return bits_to_float((float_to_bits(shifted) + 127u) << 23); }

// 2^x for x in [-126, 127], relative error 1.1e-7; 0 below, infinity above.
static inline float exp2(float x) {
  const float shifted = x + kRoundingShift;
  const float f = x - (shifted - kRoundingShift);  // in [-0.5, 0.5], exact
  float p = mul_add(f, 0.00015353362f, 0.00133988744f);
  p = mul_add(f, p, 0.00961843736f);
  p = mul_add(f, p, 0.0555033247f);
  p = mul_add(f, p, 0.240226479f);
  p = mul_add(f, p, 0.693147203f);
  p = mul_add(f, p, 1.0f) * power_of_two(shifted);
  p = x < -126.0f ? 0.0f : p;
  return x > 127.0f ? __builtin_inff() : p;
}

// e^x for x in [-87.3, 88], relative error 0.9e-7; 0 below, infinity above. The argument is reduced with ln 2
// in two parts (Cody and Waite 1980), the first with so few bits that its multiples are exact; exp2(x *
// log2(e)) would be off by x units in the last place.
static inline float exp(float x) {
  const float shifted = mul_add(x, 1.44269504f, kRoundingShift);
  const float n = shifted - kRoundingShift;
  const float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, x));  // in [-0.347, 0.347]
  float p = mul_add(r, 0.00138145402f, 0.00836874511f);
  p = mul_add(r, p, 0.0416683908f);
  p = mul_add(r, p, 0.166665204f);
  p = mul_add(r, p, 0.499999934f);
  p = (mul_add(r * r, p, r) + 1.0f) * power_of_two(shifted);
  p = x < -87.3f ? 0.0f : p;
  return x > 88.0f ? __builtin_inff() : p;
}

struct TanhAndSlope {
  float value, slope;
};

// tanh(x), relative error 1.8e-7 everywhere, and its derivative 1 - tanh(x)^2, 1.9e-7 on [-8, 8]. Below 0.55
// the odd polynomial of kernels/common.py, above it 1 - q with q = 2 / (exp(2|x|) + 1), where nothing cancels because
// the result is at least 0.5; the derivative is then q (2 - q), right to the last digits where 1 - tanh^2 would be 0.
static inline TanhAndSlope tanh_and_slope(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float square = x * x;
  float tail = mul_add(square, 0.01643758f, -0.05267181f);
  tail = mul_add(square, tail, 0.13320725f);
  tail = mul_add(square, tail, -0.33332947f);
  const float near = mul_add(x * square, tail, x);
  const float q = 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const float far = x < 0.0f ? q - 1.0f : 1.0f - q;
  const bool is_near = magnitude < 0.55f;
  return {is_near ? near : far, is_near ? 1.0f - near * near : q * (2.0f - q)};
}

static inline float tanh(float x) { return tanh_and_slope(x).value; }

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
