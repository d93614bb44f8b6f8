// Rows of fp32, bf16 and fp16 numbers taken a slice at a time: 2 kLanes elements, read where they lie and widened in
// registers. Two vectors, because that is what one register of 16-bit elements widens to; and in the order that costs
// least: bf16 elements are the halves of 32-bit lanes, one shift away for the even ones, one mask for the odd ones.
#pragma once

#include "simd/vec_math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int kSlice = 2 * kLanes;

struct Slice {
  Vec low, high;
};

// A register of 16-bit elements: a slice of them.
template <class Half>
static inline VecInt load_halves(const Half* data) {
  VecInt x;
  std::memcpy(&x, data, sizeof(x));
  return x;
}

// The first `count` of them, 0 < count < kSlice; zeros behind, and nothing behind is read.
template <class Half>
static inline VecInt load_halves(const Half* data, int count) {
#if defined(__AVX512F__)
  return (VecInt)_mm512_maskz_loadu_epi16((1u << count) - 1u, data);
#elif defined(__AVX2__)
  const VecInt lanes = lane_numbers();
  const VecInt pairs = (VecInt)_mm256_maskload_epi32(reinterpret_cast<const int*>(data), (__m256i)(lanes < count / 2));
  return count % 2 != 0 ? (lanes == count / 2 ? broadcast(int32_t{data[count - 1].bits}) : pairs) : pairs;
#else
  VecInt x = {};
  std::memcpy(&x, data, static_cast<size_t>(count) * sizeof(Half));
  return x;
#endif
}

static inline Slice widen(VecInt halves, bfloat16) { return {(Vec)(halves << 16), (Vec)(halves & ~0xffff)}; }

static inline Slice widen(VecInt halves, float16) {
#if defined(__AVX512F__)
  __m256i x[2];
  std::memcpy(x, &halves, sizeof(x));
  // All lanes are kept; GCC 12 warns of an undefined register in the form without a mask.
  return {_mm512_maskz_cvtph_ps(0xffff, x[0]), _mm512_maskz_cvtph_ps(0xffff, x[1])};
#elif defined(__AVX2__)
  const __m256i x = (__m256i)halves;
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
#else
  float16 half[kSlice];
  std::memcpy(half, &halves, sizeof(half));
  Slice slice;
  for (int i = 0; i < kLanes; ++i) slice.low[i] = to_float(half[i]), slice.high[i] = to_float(half[kLanes + i]);
  return slice;
#endif
}

template <class Half>
static inline Slice load_slice(const Half* data) {
  return widen(load_halves(data), Half{});
}

template <class Half>
static inline Slice load_slice(const Half* data, int count) {
  return widen(load_halves(data, count), Half{});
}

static inline Slice load_slice(const float* data) { return {load_vec(data), load_vec(data + kLanes)}; }

static inline Slice load_slice(const float* data, int count) {
#if defined(__AVX512F__)
  const uint32_t mask = (1u << count) - 1u;
  const __mmask16 high = static_cast<__mmask16>(mask >> kLanes);
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), data),
          high == 0 ? Vec{} : (Vec)_mm512_maskz_loadu_ps(high, data + kLanes)};
#elif defined(__AVX2__)
  const VecInt lanes = lane_numbers();
  return {_mm256_maskload_ps(data, (__m256i)(lanes < count)),
          count <= kLanes ? Vec{} : (Vec)_mm256_maskload_ps(data + kLanes, (__m256i)(lanes < count - kLanes))};
#else
  Slice slice = {};
  std::memcpy(&slice, data, static_cast<size_t>(count) * sizeof(float));
  return slice;
#endif
}

// Where element i of a slice of T stands among the 2 kLanes floats low, high.
template <class T>
static inline int64_t place_in_slice(int64_t i) {
  return i;
}

template <>
inline int64_t place_in_slice<bfloat16>(int64_t i) {
  return i / 2 + i % 2 * kLanes;
}

// Products of slices that are summed over their elements: what is kept of a row of T, and how two of them meet.
template <class T>
struct Dot {
  using Part = Slice;
  static Part load(const T* data) { return load_slice(data); }
  static Part load(const T* data, int count) { return load_slice(data, count); }
  static Vec multiply_add(const Part& a, const Part& b, Vec sum) {
    return mul_add(a.low, b.low, mul_add(a.high, b.high, sum));
  }
};

#ifdef __AVX512BF16__
// vdpbf16ps multiplies and adds up pairs of bf16, with nothing to widen.
template <>
struct Dot<bfloat16> {
  using Part = VecInt;
  static Part load(const bfloat16* data) { return load_halves(data); }
  static Part load(const bfloat16* data, int count) { return load_halves(data, count); }
  static Vec multiply_add(Part a, Part b, Vec sum) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};
#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
