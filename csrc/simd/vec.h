// The thin vector type of the including ISA: kLanes floats in one register. GCC's vector extension gives
// arithmetic by operators; only the fused multiply-add needs an intrinsic, because contraction is off
// (setup.py).
#pragma once

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "simd/scalar.h"

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

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
