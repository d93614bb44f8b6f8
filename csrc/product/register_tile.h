// The one matrix product under all kernels: c (rows, cols) = or += a (rows, depth) b (depth, cols).
//
// a's elements are broadcast one by one (operands.h says from where), b and c stand in vectors. A register tile is the
// part of c whose sums stand in registers while the depth passes: some rows of a few vectors. Per step of the depth it
// takes kVectors loads, kRows broadcasts and kRows * kVectors multiply-adds of kLanes lanes (of twice as many terms
// with pairs of bf16). A sum over the depth is rounded on its own before it joins what stands in c, so callers who
// divide a long depth (strips.h) keep long sums accurate. amx_tiles.h is the same product in AMX tiles.
//
// Other work, prefetching (prefetch.h) or an exponential, can be woven into a product: units that multiplication leaves
// idle do it (docs/notes/2026-11-attention-forward-cpu.md).
#pragma once

#include <type_traits>

#include "product/prefetch.h"
#include "simd/buffer.h"
#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// What becomes of c. kSetScaled: the product is multiplied by columns (cols); kScaleAndAdd: c is, before the product is
// added; kSetAndCompare: columns becomes the largest of itself and the product's column, a NaN apart.
enum class Into { kSet, kSetAndCompare, kSetScaled, kAdd, kScaleAndAdd };

// Steps of the depth between two steps of other work.
constexpr int kWeaveSteps = 2;

// How far a product goes along its depth: equally for all columns (int64_t), or per vector of columns, not less than
// for the vector before, or over several blocks of a.
struct Stairs {
  const int64_t* depth;
};

// Block i of a has depth(i) steps, a multiple of kWeaveSteps, and begins `next` elements behind the one before.
template <class DepthOf>
struct Blocks {
  int64_t count, next;
  DepthOf depth;
};

static inline int64_t depth_of(int64_t depth, int) { return depth; }
static inline int64_t depth_of(Stairs stairs, int vector) { return stairs.depth[vector]; }
static inline int64_t from_vector(int64_t depth, int64_t) { return depth; }
static inline Stairs from_vector(Stairs stairs, int64_t vector) { return {stairs.depth + vector}; }

// Calls step(a, b, d, v) for all steps d of the depth, b being that of step d, and v the first vector that takes part.
template <int kVectors, class Operand, class Step, class Work>
ALWAYS_INLINE static void for_depth(int64_t depth, Operand a, const float* b, int64_t b_stride, Step step, Work& work) {
  using std::integral_constant;
  int64_t d = 0;
  for (; d + kWeaveSteps <= depth; d += kWeaveSteps) {
#pragma GCC unroll 8
    for (int i = 0; i < kWeaveSteps; ++i) step(a, b + (d + i) * b_stride, d + i, integral_constant<int, 0>{});
    work.step();
  }
  for (; d < depth; ++d) step(a, b + d * b_stride, d, integral_constant<int, 0>{});
}

template <int kVectors, class Operand, class Step, class Work>
ALWAYS_INLINE static void for_depth(Stairs depth, Operand a, const float* b, int64_t b_stride, Step step, Work& work) {
  using std::integral_constant;
  static_assert(kVectors <= 3);
  int64_t d = depth_of(depth, 0);
  for_depth<kVectors>(d, a, b, b_stride, step, work);
  if constexpr (kVectors > 1)
    for (; d < depth_of(depth, 1); ++d) step(a, b + d * b_stride, d, integral_constant<int, 1>{});
  if constexpr (kVectors > 2)
    for (; d < depth_of(depth, 2); ++d) step(a, b + d * b_stride, d, integral_constant<int, 2>{});
}

template <int kVectors, class Operand, class DepthOf, class Step, class Work>
ALWAYS_INLINE static void for_depth(Blocks<DepthOf> blocks, Operand a, const float* b, int64_t b_stride, Step step,
                                    Work& work) {
  constexpr int kWorkSteps = 4;  // of a block
  for (int64_t i = 0; i < blocks.count; ++i, a.data += blocks.next) {
    const int64_t depth = blocks.depth(i);
    for (int w = 0; w < kWorkSteps; ++w) work.step();
    for (int64_t d = 0; d < depth; d += kWeaveSteps, b += kWeaveSteps * b_stride)
#pragma GCC unroll 2
      for (int j = 0; j < kWeaveSteps; ++j) step(a, b + j * b_stride, d + j, std::integral_constant<int, 0>{});
  }
}

template <Into kInto, int kRows, int kVectors, class Operand, class Depth, class Work>
ALWAYS_INLINE static void product_tile(Operand a, const float* b, int64_t b_stride, Depth depth, float* c,
                                       int64_t c_stride, float* columns, Work& work) {
  Vec sum[kRows][kVectors] = {};
  if (kInto == Into::kAdd)  // c may be far away
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(c + r * c_stride + v * kLanes, 1);
  const auto step = [&](const Operand& rows, const float* at, int64_t d, auto first) ALWAYS_INLINE_LAMBDA {
    Vec column[kVectors];
#pragma GCC unroll 8
    for (int v = first; v < kVectors; ++v) column[v] = load_vec(at + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec row = rows.at(r, d);
#pragma GCC unroll 8
      for (int v = first; v < kVectors; ++v) sum[r][v] = Operand::multiply_add(row, column[v], sum[r][v]);
    }
  };
  for_depth<kVectors>(depth, a, b, b_stride, step, work);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      Vec value = sum[r][v];
      if (kInto == Into::kSetScaled) value = value * load_vec(columns + v * kLanes);
      if (kInto == Into::kAdd) value = load_vec(to) + value;
      if (kInto == Into::kScaleAndAdd) value = mul_add(load_vec(to), load_vec(columns + v * kLanes), value);
      store_vec(to, value);
    }
  }
  if (kInto == Into::kSetAndCompare)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      Vec largest = load_vec(columns + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) largest = max(sum[r][v], largest);
      store_vec(columns + v * kLanes, largest);
    }
}

// The register tile: sums, one step's vectors of b and one element of a in registers.
// 8 x 3 + 3 + 1 of 32 (AVX-512), 6 x 2 + 2 + 1 of 16 (AVX2, SSE2).
#if defined(__AVX512F__)
constexpr int kProductRows = 8;
constexpr int kProductVectors = 3;
#else
constexpr int kProductRows = 6;
constexpr int kProductVectors = 2;
#endif

// All rows of a few vectors' columns: register tiles of kRows rows, then halves of it.
template <Into kInto, int kRows, int kVectors, class Operand, class Depth, class Work>
ALWAYS_INLINE static void product_columns(int64_t rows, Depth depth, Operand a, const float* b, int64_t b_stride,
                                          float* c, int64_t c_stride, float* columns, Work& work) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows)
    product_tile<kInto, kRows, kVectors>(a.rows_from(r), b, b_stride, depth, c + r * c_stride, c_stride, columns, work);
  if constexpr (kRows > 1)
    if (r < rows)
      product_columns<kInto, kRows / 2, kVectors>(rows - r, depth, a.rows_from(r), b, b_stride, c + r * c_stride,
                                                  c_stride, columns, work);
}

// The same of `vectors` <= kProductVectors. Narrower register tiles are higher, as sums must outnumber the latency of a
// multiply-add: kRowsOfTwo is the height of one that is two vectors wide.
template <Into kInto, int kRowsOfTwo, class Operand, class Depth, class Work>
ALWAYS_INLINE static void product_of_vectors(int64_t rows, int64_t vectors, Depth depth, Operand a, const float* b,
                                             int64_t b_stride, float* c, int64_t c_stride, float* columns, Work& work) {
  if (vectors == kProductVectors)
    product_columns<kInto, kProductRows, kProductVectors>(rows, depth, a, b, b_stride, c, c_stride, columns, work);
  else if (kProductVectors > 2 && vectors == 2)
    product_columns<kInto, kRowsOfTwo, 2>(rows, depth, a, b, b_stride, c, c_stride, columns, work);
  else
    product_columns<kInto, 2 * kProductRows, 1>(rows, depth, a, b, b_stride, c, c_stride, columns, work);
}

// The product: b and c with contiguous columns, cols a multiple of kLanes. `caller_work` is done on the way as far as
// there is room, and must not touch the operands. (Two vectors take kProductRows rows, of which callers have
// multiples.)
template <Into kInto, class Operand, class Depth, class Work>
__attribute__((noinline)) static void product(int64_t rows, int64_t cols, Depth whole_depth, Operand a, const float* b,
                                              int64_t b_stride, float* c, int64_t c_stride, float* columns,
                                              Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  // Vectors are divided evenly: 4 as 2 + 2, for a register tile one vector wide would wait for its loads.
  const int64_t vectors = cols / kLanes, tiles = ceil_div(vectors, kProductVectors);
  for (int64_t tile = 0, x = 0; tile < tiles; ++tile) {
    const int64_t end = vectors * (tile + 1) / tiles * kLanes;
    float* at = columns == nullptr ? nullptr : columns + x;
    const Depth depth = from_vector(whole_depth, x / kLanes);
    product_of_vectors<kInto, kProductRows>(rows, (end - x) / kLanes, depth, a, b + x, b_stride, c + x, c_stride, at,
                                            work);
    x = end;
  }
  caller_work = work;
}

template <Into kInto, class Operand>
static void product(int64_t rows, int64_t cols, int64_t depth, Operand a, const float* b, int64_t b_stride, float* c,
                    int64_t c_stride, float* columns = nullptr) {
  NoWork work;
  product<kInto>(rows, cols, depth, a, b, b_stride, c, c_stride, columns, work);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
