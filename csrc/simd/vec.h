// The thin vector type of the including ISA: kLanes floats in one register. GCC's vector extension gives
// arithmetic by operators; only the fused multiply-add needs an intrinsic, because contraction is off
// (setup.py).
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd/scalar.h"

// A register tile lives in registers only where all of it is inlined.
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace gpt4v_fast::GPT4V_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2 on x86-64, NEON on aarch64; elsewhere the compiler splits it
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
// The same in memory, on any float's boundary.
typedef float VecInMemory __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

static inline Vec load_vec(const float* data) { return *reinterpret_cast<const VecInMemory*>(data); }

static inline void store_vec(float* data, Vec value) { *reinterpret_cast<VecInMemory*>(data) = value; }

static inline Vec broadcast(float value) { return value - Vec{}; }  // minus zero: keeps the sign of a zero

static inline Vec mul_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger of each lane's two; `b` where either is NaN.
static inline Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // all lanes; GCC 12 warns of an undefined register in the form without
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// kLanes numbers of a tensor's dtype, widened.
static inline Vec load_wide(const float* data) { return load_vec(data); }

static inline Vec load_wide(const bfloat16* data) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
  return reinterpret_cast<Vec>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
#else
  return Vec{to_float(data[0]), to_float(data[1]), to_float(data[2]), to_float(data[3])};
#endif
}

static inline Vec load_wide(const float16* data) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data)));
#else
  return Vec{to_float(data[0]), to_float(data[1]), to_float(data[2]), to_float(data[3])};
#endif
}

static inline Vec load_wide(const uint8_t* data) {
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(data))));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(data))));
#else
  return Vec{to_float(data[0]), to_float(data[1]), to_float(data[2]), to_float(data[3])};
#endif
}

// The first `count` <= kLanes of them, zeros behind; nothing behind is read.
template <class T>
static inline Vec load_first(const T* data, int count) {
  if (count == kLanes) return load_wide(data);
#if defined(__AVX512F__)
  const __mmask16 used = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == sizeof(float)) {
    return _mm512_maskz_loadu_ps(used, data);
  } else {
    T whole[kLanes] = {};
    if constexpr (sizeof(T) == 1)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(whole), _mm_maskz_loadu_epi8(used, data));
    else
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(whole), _mm256_maskz_loadu_epi16(used, data));
    return load_wide(whole);
  }
#else
  T whole[kLanes] = {};
  for (int i = 0; i < count; ++i) whole[i] = data[i];
  return load_wide(whole);
#endif
}

// The other way: kLanes numbers rounded to a tensor's dtype, as from_float does.
static inline void store_narrow(float* data, Vec value) { store_vec(data, value); }

static inline void store_narrow(bfloat16* data, Vec value) {
  typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));
  typedef uint16_t Half __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  const Bits bits = (Bits)value;
  const Bits rounded = value == value ? bits + 0x7fffu + (bits >> 16 & 1u) : bits | 0x400000u;
  const Half half = __builtin_convertvector(rounded >> 16, Half);
  std::memcpy(data, &half, sizeof(half));
}

static inline void store_narrow(float16* data, Vec value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(data),
                      _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(data), _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) data[i] = from_float<float16>(value[i]);
#endif
}

// The first `count` <= kLanes lanes.
template <class T>
static inline void store_first(T* data, Vec value, int count) {
  if (count == kLanes) return store_narrow(data, value);
  T whole[kLanes];
  store_narrow(whole, value);
#if defined(__AVX512F__)
  const __mmask16 used = static_cast<__mmask16>((1u << count) - 1u);
  if constexpr (sizeof(T) == sizeof(float))
    _mm512_mask_storeu_ps(data, used, value);
  else
    _mm256_mask_storeu_epi16(data, used, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole)));
#else
  for (int i = 0; i < count; ++i) data[i] = whole[i];
#endif
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
