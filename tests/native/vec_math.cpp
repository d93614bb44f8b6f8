// Prints the largest errors of csrc/simd/vec_math.h over a sweep, for tests/native/test_vec_math.py:
//     name largest_relative_error largest_absolute_error
// and the values at the edges. Compiled once per ISA, with GPT4V_FAST_ISA and the flags of setup.py.
#include "simd/vec_math.h"

#include <cmath>
#include <cstdio>
#include <initializer_list>

using namespace gpt4v_fast::GPT4V_FAST_ISA;
namespace isa = gpt4v_fast::GPT4V_FAST_ISA;

// Every `step`th float between the two, of each sign that the interval has.
template <class Fast, class Exact>
static void sweep(const char* name, float low, float high, uint32_t step, Fast fast, Exact exact) {
  double relative = 0.0, absolute = 0.0;
  for (int sign = 0; sign < 2; ++sign) {
    const float limit = sign ? -low : high;
    if (limit <= 0.0f) continue;
    for (uint32_t bits = low > 0.0f ? float_to_bits(low) : 0; bits + step * kLanes < float_to_bits(limit);
         bits += step * kLanes) {
      Vec x;
      for (int i = 0; i < kLanes; ++i) x[i] = bits_to_float((bits + i * step) | (sign ? 0x80000000u : 0u));
      const Vec y = fast(x);
      for (int i = 0; i < kLanes; ++i) {
        const double want = exact(static_cast<double>(x[i])), error = std::fabs(y[i] - want);
        if (!(error <= absolute)) absolute = error;  // also for a NaN
        if (want != 0.0 && !(error / std::fabs(want) <= relative)) relative = error / std::fabs(want);
      }
    }
  }
  std::printf("%s %.9g %.9g\n", name, relative, absolute);
}

template <class Fast>
static void edges(const char* name, Fast fast, std::initializer_list<float> inputs) {
  std::printf("%s_edges", name);
  for (float x : inputs) std::printf(" %.9g", fast(broadcast(x))[kLanes - 1]);
  std::printf("\n");
}

int main() {
  const float inf = __builtin_inff(), nan = __builtin_nanf(""), other_nan = bits_to_float(0xffffffffu);
  const auto exp2 = [](Vec x) { return isa::exp2(x); };
  const auto tanh = [](Vec x) { return isa::tanh(x); };
  sweep("exp2", -125.0f, 127.0f, 499, exp2, [](double x) { return std::exp2(x); });
  sweep("exp2_of_negative", -300.0f, 0.0f, 499, exp2, [](double x) { return std::exp2(x); });
  sweep("tanh", -30.0f, 30.0f, 499, tanh, [](double x) { return std::tanh(x); });
  sweep(
      "tanh_slope", -42.0f, 42.0f, 499, [](Vec x) { return isa::tanh_and_slope(x).slope; },
      [](double x) { return 1.0 / std::pow(std::cosh(x), 2); });
  const auto log = [](Vec x) { return isa::log(x); };
  sweep("log", 0x1p-126f, 0x1.fp127f, 499, log, [](double x) { return std::log(x); });
  sweep("log_near_1", 0.5f, 2.0f, 499, log, [](double x) { return std::log(x); });
  edges("log", log, {nan, inf, 1.0f});
  edges("exp2", exp2, {nan, other_nan, -inf, 0.0f, -0.0f, -3e38f, -151.0f, -1e-9f, 1.0f, 127.0f});
  edges("tanh", tanh, {nan, other_nan, inf, -inf, 0.0f, -0.0f, 3e38f, -3e38f, -87.8f, 89.0f});
}
