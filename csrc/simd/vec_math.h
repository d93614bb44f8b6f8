// exp2 and tanh of whole vectors, for kernels that hold their tiles in Vec (simd/math.h has them for loops that the
// compiler vectorises). Errors are the largest that tests/native/test_vec_math.py finds.
#pragma once

#include "simd/math.h"
#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

typedef int32_t VecInt __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t VecUnsigned __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef int32_t VecIntInMemory
    __attribute__((vector_size(kLanes * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));

static inline VecInt load_vec(const int32_t* data) { return *reinterpret_cast<const VecIntInMemory*>(data); }

static inline VecInt broadcast(int32_t value) { return value + VecInt{}; }

// Whether a lane is not 0.
static inline bool any(VecInt x) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#else
  int32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= x[lane];
  return all != 0;
#endif
}

static inline VecInt lane_numbers() {
  VecInt lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// 2^n of the integers n in [-127, 128] that `shifted` = n + kRoundingShift holds; -127 gives 0 and 128 infinity.
static inline Vec power_of_two(Vec shifted) { return (Vec)(((VecInt)shifted + 127) << 23); }

// x = n log 2 + r, |r| <= log(2) / 2. log 2 is taken in two parts, so that n times the first is exact (Cody and Waite
// 1980).
static inline Vec reduce(Vec x, Vec* shifted) {
  *shifted = x * 1.44269504f + kRoundingShift;
  const Vec n = *shifted - kRoundingShift;
  return mul_add(n, broadcast(2.12194440e-4f), mul_add(n, broadcast(-0.693359375f), x));
}

// 1 / log(2), for e^x = 2^(x / log(2)).
constexpr float kLog2E = 1.44269504f;

#ifdef __AVX512F__
// 2^(k/32).
struct PowerTable {
  alignas(64) float value[2 * kLanes];

  constexpr PowerTable() : value{} {
    double power = 1.0;
    for (int k = 0; k < 2 * kLanes; ++k, power *= 1.0218971486541166) value[k] = static_cast<float>(power);
  }
};
static constexpr PowerTable kPowers;
#endif

// 2^x for x < 128, relative error 1.9e-7; 0 below -126 (avx512: below -150); a NaN stays a NaN. Beside matrix products,
// which it is woven into, multiplications count most, then all instructions. Factors near 1, of which a running sum
// meets many, have no error of one sign.
//
// avx512: x = k/32 + r, |r| <= 1/64, 2^(k/32) from a table but for its power of two, 2^r = 1 + r (a + b r), minimax
// (5.3e-8); sums, vreduceps, vscalefps and the look-up find idle units beside a product, and four multiplications are
// left. Elsewhere x = n + f with n = floor(x), and 2^f is a polynomial, minimax on [0, 1] (9.2e-8) among those with
// 2^0 = 1 and 2^1 = 2.
static inline Vec exp2(Vec x) {
#ifdef __AVX512F__
  const Vec r = _mm512_reduce_ps(x, 5 << 4 | _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512i place = (__m512i)(x + 0x1.8p18f);  // whose last bits count 1/32
  const Vec power =
      _mm512_permutex2var_ps(_mm512_load_ps(kPowers.value), place, _mm512_load_ps(kPowers.value + kLanes));
  const Vec slope = mul_add(broadcast(0.24022651f), r, broadcast(0.69315734f));
  return _mm512_scalef_ps(mul_add(slope, power * r, power), x - r);
#else
  const Vec shifted = (x - 0.5f) + kRoundingShift;
  const Vec f = x - (shifted - kRoundingShift);
  Vec p = mul_add(broadcast(0.00187931862f), f, broadcast(0.00899098907f));
  p = mul_add(p, f, broadcast(0.0558186658f));
  p = mul_add(p, f, broadcast(0.240159333f));
  p = mul_add(p, f, broadcast(0.693151712f));
  p = mul_add(p, f, broadcast(1.0f));
  // Unsigned: out of range it wraps, and is not looked at.
  const Vec power = (Vec)((VecUnsigned)p + ((VecUnsigned)shifted << 23));
  return x >= -126.0f ? power : max(Vec{}, x);  // 0, or the NaN
#endif
}

// Each lane, not negative, as an integer, rounded to nearest; 65535 where it is larger, or a NaN.
static inline void store_rounded(uint16_t* to, Vec x) {
#ifdef __AVX512F__
  const __m512i n = _mm512_cvtps_epi32(x);  // 0x80000000 where it is too large
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtusepi32_epi16(n));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = static_cast<uint16_t>(x[i] < 65535.0f ? x[i] + 0.5f : 65535.0f);
#endif
}

static inline Vec load_integers(const uint16_t* data) {
#ifdef __AVX512F__
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data))));
#else
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = data[i];
  return x;
#endif
}

struct VecTanh {
  Vec value, slope;
};

// tanh(x), relative error 1.8e-7 everywhere, and its derivative 1 - tanh(x)^2, 5e-7 where |x| <= 42; a NaN stays a NaN.
// tanh |x| = e / (e + 2) with e = exp(2|x|) - 1 = 2^n (exp(f) - 1) + (2^n - 1), 2|x| = n log 2 + f: nothing cancels for
// small x, where n = 0; nor for large ones in the derivative, which is 4 (e + 1) / (e + 2)^2. exp(f) - 1 comes from a
// polynomial of degree 7, relative error 2.4e-10 on |f| <= log(2) / 2.
static inline VecTanh tanh_and_slope(Vec x) {
  const VecInt sign = (VecInt)x & INT32_MIN;
  Vec y = (Vec)((VecInt)x & INT32_MAX);
  y = y > 42.0f ? broadcast(42.0f) : y;  // exp(84) is still a float
  y = y + y;
  Vec shifted;
  const Vec f = reduce(y, &shifted);
  Vec p = broadcast(0.00019845886f);
  p = mul_add(p, f, broadcast(0.001394072f));
  p = mul_add(p, f, broadcast(0.00833339f));
  p = mul_add(p, f, broadcast(0.04166636f));
  p = mul_add(p, f, broadcast(0.16666666f));
  p = mul_add(p, f, broadcast(0.5f));
  p = mul_add(p * f, f, f);
  const Vec power = power_of_two(shifted);
  const Vec e = mul_add(power, p, power - 1.0f), q = 2.0f / (e + 2.0f);
  return {(Vec)((VecInt)(e / (e + 2.0f)) | sign), q * (q * (e + 1.0f))};
}

static inline Vec tanh(Vec x) { return tanh_and_slope(x).value; }

// log(x) for normal x > 0, relative error 8e-8; infinity and a NaN stay what they are. x = m 2^n with m
// in [sqrt(1/2), sqrt(2)), and a polynomial of degree 8 for (log(m) - f + f^2 / 2) / f^3, f = m - 1 (Moshier, Cephes).
static inline Vec log(Vec x) {
  const VecInt n = ((VecInt)x - 0x3f3504f3) >> 23;
  const Vec f = (Vec)((VecUnsigned)x - ((VecUnsigned)n << 23)) - 1.0f, square = f * f;
  Vec p = mul_add(broadcast(7.0376836e-2f), f, broadcast(-1.1514610e-1f));
  p = mul_add(p, f, broadcast(1.1676999e-1f));
  p = mul_add(p, f, broadcast(-1.2420141e-1f));
  p = mul_add(p, f, broadcast(1.4249323e-1f));
  p = mul_add(p, f, broadcast(-1.6668058e-1f));
  p = mul_add(p, f, broadcast(2.0000714e-1f));
  p = mul_add(p, f, broadcast(-2.4999994e-1f));
  p = mul_add(p, f, broadcast(3.3333331e-1f));
  const Vec count = __builtin_convertvector(n, Vec);
  p = mul_add(count, broadcast(-2.12194440e-4f), p * f * square);
  p = mul_add(count, broadcast(0.693359375f), mul_add(square, broadcast(-0.5f), p) + f);
  return x < kInfinity ? p : x;
}

// Lane l is lane lanes[l] of x, or of a and b behind each other. Clang has no shuffle whose lanes are a vector, and
// makes one of the loops, since every caller's lanes are constants.
ALWAYS_INLINE static Vec shuffle(Vec x, VecInt lanes) {
#ifdef __clang__
  Vec to = {};
  for (int l = 0; l < kLanes; ++l) to[l] = x[lanes[l] % kLanes];
  return to;
#else
  return __builtin_shuffle(x, lanes);
#endif
}
ALWAYS_INLINE static Vec shuffle(Vec a, Vec b, VecInt lanes) {
#ifdef __clang__
  Vec to = {};
  for (int l = 0; l < kLanes; ++l) to[l] = lanes[l] < kLanes ? a[lanes[l] % kLanes] : b[lanes[l] % kLanes];
  return to;
#else
  return __builtin_shuffle(a, b, lanes);
#endif
}

// The sum of a vector's lanes, as a tree.
static inline float sum_of(Vec x) {
  const VecInt lane = lane_numbers();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) x += shuffle(x, lane ^ step);
  return x[0];
}

// One step of the tree below: lanes l with bit kStep unset hold a[l] + a[l ^ kStep], the others the same of b.
template <int kStep>
__attribute__((always_inline)) static inline Vec add_across(Vec a, Vec b) {
  const VecInt lanes = lane_numbers();
  const VecInt own = lanes + (lanes & kStep) * (kLanes / kStep);
  return shuffle(a, b, own) + shuffle(a, b, own ^ kStep);
}

template <int kStep>
__attribute__((always_inline)) static inline Vec sums_of(const Vec* x) {
  if constexpr (kStep == 1)
    return add_across<1>(x[0], x[1]);
  else
    return add_across<kStep>(sums_of<kStep / 2>(x), sums_of<kStep / 2>(x + kStep));
}

// Lane l is the sum of the lanes of x[l], for kLanes vectors: kLanes - 1 additions instead of kLanes log2(kLanes).
__attribute__((always_inline)) static inline Vec sums_of(const Vec* x) { return sums_of<kLanes / 2>(x); }

// The largest lane; a NaN never wins.
static inline float largest_of(Vec x) {
  const VecInt lanes = lane_numbers();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const Vec other = shuffle(x, lanes ^ step);
    x = other > x ? other : x;
  }
  return x[0];
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
