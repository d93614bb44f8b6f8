// Tiles of matrices, and one product over them, for the kernels that are mostly products: rows are copied or
// transposed into scratch, one operand is broadcast element by element and the other stands in vectors.
#pragma once

#include <type_traits>

#include "simd/buffer.h"
#include "simd/vec_math.h"

// A register tile lives in registers only where all of it is inlined.
#define ALWAYS_INLINE __attribute__((always_inline)) inline
#define ALWAYS_INLINE_LAMBDA __attribute__((always_inline))

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Rows of a tensor: element (r, c) is data[r * row_stride + c * col_stride].
template <class T>
struct Rows {
  T* data;
  int64_t row_stride, col_stride;
};

// Asks for rows [begin, end), for the second-level cache or, of rows that will be written, for the first. (Inlined,
// for GCC takes a function that does nothing else for one without effect.)
template <class T>
ALWAYS_INLINE static void prefetch_rows(Rows<T> rows, int64_t begin, int64_t end, int64_t cols) {
  if (rows.col_stride != 1) return;
  const int64_t bytes = cols * static_cast<int64_t>(sizeof(T));
  for (int64_t r = begin; r < end; ++r) {
    const char* row = reinterpret_cast<const char*>(rows.data + r * rows.row_stride);
    for (int64_t at = 0; at < bytes; at += 64)
      __builtin_prefetch(row + at, !std::is_const_v<T>, std::is_const_v<T> ? 2 : 3);
  }
}

// to[r * width + c] = from(r, c); columns up to `width` are filled with zeros.
template <class T>
ALWAYS_INLINE static void pack(Rows<const T> from, int64_t rows, int64_t cols, float* to, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* source = from.data + r * from.row_stride;
    float* target = to + r * width;
    int64_t c = 0;
    if (from.col_stride == 1)
      for (; c + kLanes <= cols; c += kLanes) store_vec(target + c, load_wide(source + c));
    for (; c < cols; ++c) target[c] = to_float(source[c * from.col_stride]);
    for (; c < width; ++c) target[c] = 0.0f;
  }
}

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
    rows[r] = __builtin_shuffle(a, b, upper);
    rows[r + kStep] = __builtin_shuffle(a, b, lower);
  }
  if constexpr (2 * kStep < kLanes) exchange<2 * kStep>(rows);
}

// One square of `transpose` below.
ALWAYS_INLINE static void transpose_square(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Vec square[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) square[i] = load_vec(from + i * from_stride);
  exchange<1>(square);
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) store_vec(to + i * to_stride, square[i]);
}

// to[c * to_stride + r] = from[r * from_stride + c]. Whole vectors are written: rows of `to` up to the next multiple of
// kLanes of `cols`, and columns likewise of `rows`, must exist; so must they in `from`, whatever they hold.
static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                      int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes)
      transpose_square(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
}

// The same of kLanes rows of at least kLanes columns and nothing beside them: the last square may overlap.
[[maybe_unused]] static void transpose_rows(const float* from, int64_t from_stride, int64_t cols, float* to,
                                            int64_t to_stride) {
  for (int64_t begin = 0; begin < cols; begin += kLanes) {
    const int64_t c = begin + kLanes <= cols ? begin : cols - kLanes;
    transpose_square(from + c, from_stride, to + c * to_stride, to_stride);
  }
}

// The other way: to(r, c) = factor from[r * width + c], rounded.
template <class T>
ALWAYS_INLINE static void unpack(const float* from, int64_t width, int64_t rows, int64_t cols, float factor,
                                 Rows<T> to) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* source = from + r * width;
    T* target = to.data + r * to.row_stride;
    int64_t c = 0;
    if (to.col_stride == 1)
      for (; c + kLanes <= cols; c += kLanes) store_narrow(target + c, load_vec(source + c) * factor);
    for (; c < cols; ++c) target[c * to.col_stride] = from_float<T>(source[c] * factor);
  }
}

// A matrix operand whose elements are broadcast one by one, contiguous along the depth of the product or along its
// rows: element (r, d) is data[r * stride + d] or data[r + d * stride].
enum class Along { kDepth, kRows };

template <Along kAlong>
struct Broadcast {
  static constexpr Along kPackedAlong = kAlong;
  const float* data;
  int64_t stride;

  Broadcast rows_from(int64_t r) const { return {data + (kAlong == Along::kDepth ? r * stride : r), stride}; }
  Broadcast depth_from(int64_t d) const { return {data + (kAlong == Along::kDepth ? d : d * stride), stride}; }
  Vec at(int64_t r, int64_t d) const {
    return broadcast(kAlong == Along::kDepth ? data[r * stride + d] : data[r + d * stride]);
  }
  static Vec multiply_add(Vec row, Vec column, Vec sum) { return mul_add(row, column, sum); }
};

#ifdef __AVX512BF16__
// The same of bf16 elements taken two at a time, r or d counting pairs in the contiguous direction and stride elements.
// The other operand then holds a pair in each lane, and one instruction does twice the work of an fp32 multiply-add.
template <Along kAlong>
struct BroadcastPairs {
  static constexpr Along kPackedAlong = kAlong;
  const bfloat16* data;
  int64_t stride;

  BroadcastPairs rows_from(int64_t r) const { return {data + (kAlong == Along::kDepth ? r * stride : 2 * r), stride}; }
  BroadcastPairs depth_from(int64_t d) const { return {data + (kAlong == Along::kDepth ? 2 * d : d * stride), stride}; }
  Vec at(int64_t r, int64_t d) const {
    float pair;  // only its bits count
    std::memcpy(&pair, data + (kAlong == Along::kDepth ? r * stride + 2 * d : 2 * r + d * stride), sizeof(pair));
    return reinterpret_cast<Vec>(_mm512_set1_ps(pair));
  }
  static Vec multiply_add(Vec row, Vec column, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(column));
  }
};

#endif

// to[c] = the pair (first[c], second[c]), the first in the low half.
[[maybe_unused]] static void interleave(const bfloat16* first, const bfloat16* second, int64_t cols, uint32_t* to) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) to[c] = first[c].bits | static_cast<uint32_t>(second[c].bits) << 16;
}

// Each lane's two floats as a pair of bf16, the first in the low half, rounded to nearest even. (Used where there is
// AVX512_BF16 alone.)
static inline Vec pair_of(Vec first, Vec second) {
#ifdef __AVX512BF16__
  typedef int16_t Halves __attribute__((vector_size(64)));
  Halves order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i % 2 * kLanes + i / 2);
  return (Vec)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
#else
  (void)second;
  return first;
#endif
}

static inline void store_row(float* to, Vec value) { store_vec(to, value); }

static inline void store_row(bfloat16* to, Vec value) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
#else
  for (int i = 0; i < kLanes; ++i) to[i] = from_float<bfloat16>(value[i]);
#endif
}

// The sum of a vector's lanes, as a tree.
static inline float sum_of(Vec x) {
  VecInt lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) x += __builtin_shuffle(x, lane ^ step);
  return x[0];
}

// c[i * c_stride + j] = a row i . b row j, for rows (of a) and few (of b, at most kLanes), `width` a multiple of
// kLanes; the rest of c's first vector is 0.
[[maybe_unused]] static void dot_rows(int64_t rows, int64_t few, int64_t width, const float* a, const float* b,
                                      float* c, int64_t c_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    Vec result = {};  // stored whole: a vector load soon after could not be served from single stores
    for (int64_t j = 0; j < few; ++j) {
      Vec sum = {};
      for (int64_t d = 0; d < width; d += kLanes)
        sum = mul_add(load_vec(a + i * width + d), load_vec(b + j * width + d), sum);
      result[j] = sum_of(sum);
    }
    store_vec(c + i * c_stride, result);
  }
}

enum class Into { kSet, kSetAndCompare, kSetScaled, kAdd, kScaleAndAdd };

// Work that has nothing to do with a product but is done in between its steps, so that the processor finds something
// for the units that a product leaves idle.
struct NoWork {
  ALWAYS_INLINE void step() {}
};

constexpr int kWeaveSteps = 2;

// How far a product goes along its depth: equally for all columns (int64_t), or per vector of columns, not less than
// for the vector before.
struct Stairs {
  const int64_t* depth;
};

static inline int64_t depth_of(int64_t depth, int) { return depth; }
static inline int64_t depth_of(Stairs stairs, int vector) { return stairs.depth[vector]; }
static inline int64_t from_vector(int64_t depth, int64_t) { return depth; }
static inline Stairs from_vector(Stairs stairs, int64_t vector) { return {stairs.depth + vector}; }

// One register tile of `product` below. A sum of `depth` products is rounded on its own before it joins what stands in
// c, which keeps long sums accurate.
template <Into kInto, int kTileRows, int kTileVectors, class Operand, class Depth, class Work>
ALWAYS_INLINE static void product_tile(Operand a, const float* b, int64_t b_stride, Depth depth, float* c,
                                       int64_t c_stride, float* columns, Work& work) {
  Vec sum[kTileRows][kTileVectors] = {};
  if (kInto == Into::kAdd)  // c may be far away
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) __builtin_prefetch(c + r * c_stride + v * kLanes, 1);
  const auto step = [&](int64_t d, auto first) ALWAYS_INLINE_LAMBDA {
    Vec column[kTileVectors];
#pragma GCC unroll 8
    for (int v = first; v < kTileVectors; ++v) column[v] = load_vec(b + d * b_stride + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < kTileRows; ++r) {
      const Vec row = a.at(r, d);
#pragma GCC unroll 8
      for (int v = first; v < kTileVectors; ++v) sum[r][v] = Operand::multiply_add(row, column[v], sum[r][v]);
    }
  };
  using std::integral_constant;
  const int64_t all = depth_of(depth, 0);
  int64_t d = 0;
  for (; d + kWeaveSteps <= all; d += kWeaveSteps) {
#pragma GCC unroll 8
    for (int i = 0; i < kWeaveSteps; ++i) step(d + i, integral_constant<int, 0>{});
    work.step();
  }
  for (; d < all; ++d) step(d, integral_constant<int, 0>{});
  if constexpr (std::is_same_v<Depth, Stairs>) {
    static_assert(kTileVectors <= 3);
    if constexpr (kTileVectors > 1)
      for (; d < depth_of(depth, 1); ++d) step(d, integral_constant<int, 1>{});
    if constexpr (kTileVectors > 2)
      for (; d < depth_of(depth, 2); ++d) step(d, integral_constant<int, 2>{});
  }
#pragma GCC unroll 16
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
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
    for (int v = 0; v < kTileVectors; ++v) {
      Vec largest = load_vec(columns + v * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kTileRows; ++r) largest = max(sum[r][v], largest);
      store_vec(columns + v * kLanes, largest);
    }
}

// The register tile: accumulators, one step's vectors of b and one element of a in registers.
// 8 x 3 + 3 + 1 of 32 (AVX-512), 6 x 2 + 2 + 1 of 16 (AVX2, SSE2).
#if defined(__AVX512F__)
constexpr int kProductRows = 8;
constexpr int kProductVectors = 3;
#else
constexpr int kProductRows = 6;
constexpr int kProductVectors = 2;
#endif

// All rows of a few vectors' columns: tiles of kTileRows rows, then halves of it.
template <Into kInto, int kTileRows, int kTileVectors, class Operand, class Depth, class Work>
ALWAYS_INLINE static void product_columns(int64_t rows, Depth depth, Operand a, const float* b, int64_t b_stride,
                                          float* c, int64_t c_stride, float* columns, Work& work) {
  int64_t r = 0;
  for (; r + kTileRows <= rows; r += kTileRows)
    product_tile<kInto, kTileRows, kTileVectors>(a.rows_from(r), b, b_stride, depth, c + r * c_stride, c_stride,
                                                 columns, work);
  if constexpr (kTileRows > 1)
    if (r < rows)
      product_columns<kInto, kTileRows / 2, kTileVectors>(rows - r, depth, a.rows_from(r), b, b_stride,
                                                          c + r * c_stride, c_stride, columns, work);
}

// c (rows, cols) = or += a (rows, depth) b (depth, cols), b and c with contiguous columns, cols a multiple of kLanes.
// kSetScaled: the product is multiplied by columns (cols); kScaleAndAdd: c is, before the product is added;
// kSetAndCompare: columns becomes the largest of itself and the product's column, a NaN apart. `work` is done on the
// way as far as there is room, and must not touch the operands.
template <Into kInto, class Operand, class Depth, class Work>
__attribute__((noinline)) static void product(int64_t rows, int64_t cols, Depth whole_depth, Operand a, const float* b,
                                              int64_t b_stride, float* c, int64_t c_stride, float* columns,
                                              Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  // Vectors are divided evenly: 4 as 2 + 2, for a tile one vector wide would wait for its loads.
  const int64_t vectors = cols / kLanes, tiles = ceil_div(vectors, kProductVectors);
  for (int64_t tile = 0, x = 0; tile < tiles; ++tile) {
    const int64_t end = vectors * (tile + 1) / tiles * kLanes;
    float* at = columns == nullptr ? nullptr : columns + x;
    const int64_t width = (end - x) / kLanes;
    const Depth depth = from_vector(whole_depth, x / kLanes);
    if (width == kProductVectors)
      product_columns<kInto, kProductRows, kProductVectors>(rows, depth, a, b + x, b_stride, c + x, c_stride, at, work);
    else if (kProductVectors > 2 && width == 2)
      product_columns<kInto, kProductRows, 2>(rows, depth, a, b + x, b_stride, c + x, c_stride, at, work);
    else
      product_columns<kInto, 2 * kProductRows, 1>(rows, depth, a, b + x, b_stride, c + x, c_stride, at, work);
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
