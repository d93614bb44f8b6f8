// The matrix product under the kernels that are matrix products: one register tile over packed operands.
//
// Both operands are packed to fp32 with depth outermost, a "panel" of kRows rows or kCols columns at a time:
//     a[d * kRows + r]    b[d * kCols + c]
// Panels are padded to full width with any values at all: a padded row or column reaches only elements of the
// product that the caller drops. So there is no tail and no masked copy of the loop. Cost per depth step:
// kRows * kCols multiply-adds on kRows + kCols loaded floats.
#pragma once

#include "simd/buffer.h"
#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::gemm {

// In registers stand the sums, the columns of one step and one row's broadcast: 8 x 3 + 3 + 1 of 32
// (AVX-512), 6 x 2 + 2 + 1 of 16 (AVX2, SSE2).
#if defined(__AVX512F__)
constexpr int kRows = 8;
constexpr int kVectors = 3;
#else
constexpr int kRows = 6;
constexpr int kVectors = 2;
#endif
constexpr int kCols = kVectors * kLanes;

// Depth of one register tile. A column panel of it (24 KiB with AVX-512) stays in a 32 KiB first-level cache
// while row panels pass by, and no more than 128 products are added up in one go, which keeps long sums
// accurate.
constexpr int64_t kDepth = 128;

// tile[r * kCols + c] = sum over d < depth of a[d * kRows + r] * b[d * kCols + c], in the order of d.
static inline void multiply_tile(const float* a, const float* b, int64_t depth, float* tile) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) column[v] = load_vec(b + d * kCols + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec row = broadcast(a[d * kRows + r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = mul_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vec(tile + r * kCols + v * kLanes, sum[r][v]);
  }
}

// out (row_panels * kRows, kCols) = a b over the whole depth, kDepth at a time. Row panel i starts at a + i *
// depth * kRows.
static inline void multiply_panels(const float* a, int64_t row_panels, const float* b, int64_t depth, float* out) {
  for (int64_t d = 0; d == 0 || d < depth; d += kDepth) {
    const int64_t count = min_of(kDepth, depth - d);
    for (int64_t i = 0; i < row_panels; ++i) {
      const float* rows = a + (i * depth + d) * kRows;
      float* destination = out + i * kRows * kCols;
      if (d == 0) {
        multiply_tile(rows, b, count, destination);
        continue;
      }
      float tile[kRows * kCols];
      multiply_tile(rows, b + d * kCols, count, tile);
      for (int j = 0; j < kRows * kCols; ++j) destination[j] += tile[j];
    }
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::gemm
