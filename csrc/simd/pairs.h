// Pairs of bf16 in the lanes of a vector of floats: what AVX512_BF16 multiplies, and the loads, stores and permutations
// around it. Elsewhere there are no pairs, and functions that all ISAs name do what single floats need.
#pragma once

#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// An element of an operand as it is stored for products: as store_narrow, but where there is AVX512_BF16 by its
// instruction, for which bf16's subnormals are zeros.
static inline void store_operand(float* to, Vec value) { store_vec(to, value); }

#ifdef __AVX512BF16__

constexpr bool kMultipliesPairs = true;

static inline void store_operand(bfloat16* to, Vec value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

// The pair that begins at `data`, in every lane.
static inline Vec broadcast_pair(const bfloat16* data) {
  float pair;  // only its bits count
  std::memcpy(&pair, data, sizeof(pair));
  return reinterpret_cast<Vec>(_mm512_set1_ps(pair));
}

// sum + the two products of each lane's pairs.
static inline Vec mul_add_pairs(Vec row, Vec column, Vec sum) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(column));
}

// Each lane's two floats as a pair of bf16, the first in the low half, rounded to nearest even.
static inline Vec pair_of(Vec first, Vec second) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  Halves order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i % 2 * kLanes + i / 2);
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// to[c] = the pair (first[c], second[c]), the first in the low half, for kLanes columns.
static inline void interleave_vec(const bfloat16* first, const bfloat16* second, uint32_t* to) {
  typedef int16_t Halves __attribute__((vector_size(64)));
  Halves order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i % 2 * 32 + i / 2);
  const auto load = [](const bfloat16* from) {
    return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  };
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(load(first), (__m512i)order, load(second)));
}

// to = `count` <= kLanes pairs and zeros up to kLanes, on a cache line's boundary; nothing behind the pairs is read.
static inline void copy_pairs(const bfloat16* from, int64_t count, bfloat16* to) {
  const __mmask16 used = static_cast<__mmask16>((1u << count) - 1u);
  _mm512_store_si512(to, _mm512_maskz_loadu_epi32(used, from));
}

// kLanes elements of bf16 in half a register.
typedef int16_t HalfVec __attribute__((vector_size(32)));

static inline HalfVec load_half(const bfloat16* data) {
  HalfVec half;
  std::memcpy(&half, data, sizeof(half));
  return half;
}

static inline HalfVec round_to_half(Vec value) { return (HalfVec)_mm512_cvtneps_pbh(value); }

// Writes a cache line past the caches.
static inline void stream_line(bfloat16* line, HalfVec low, HalfVec high) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(line),
                      _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)low), (__m256i)high, 1));
}

// What this thread has streamed is there for others after this.
static inline void finish_streams() { _mm_sfence(); }

#else

constexpr bool kMultipliesPairs = false;

static inline void store_operand(bfloat16* to, Vec value) {
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<bfloat16>(value[i]);
}

static inline Vec pair_of(Vec first, Vec) { return first; }

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
