// Squares of kLanes vectors, transposed in registers.
#pragma once

#include "simd/vec_math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// One step of the transposition of kLanes vectors: exchanges the off-diagonal blocks of kStep rows and lanes.
template <int kStep>
static inline void exchange(Vec* rows) {
  VecInt upper, lower;
  for (int lane = 0; lane < kLanes; ++lane) {
    upper[lane] = lane & kStep ? (lane ^ kStep) + kLanes : lane;
    lower[lane] = lane & kStep ? lane + kLanes : lane ^ kStep;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (r & kStep) continue;
    const Vec a = rows[r], b = rows[r + kStep];
    rows[r] = shuffle(a, b, upper);
    rows[r + kStep] = shuffle(a, b, lower);
  }
  if constexpr (2 * kStep < kLanes) exchange<2 * kStep>(rows);
}

// to[c * to_stride + r] = from[r * from_stride + c] for kLanes rows and columns.
ALWAYS_INLINE static void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = load_vec(from + i * from_stride);
  exchange<1>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_vec(to + i * to_stride, square[i]);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
