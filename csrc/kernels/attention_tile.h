// The parts of the attention kernels that know nothing of attention: tiles copied to fp32 scratch, and one matrix
// product over them.
#pragma once

#include "simd/buffer.h"
#include "simd/vec_math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Rows of a tensor: element (r, c) is data[r * row_stride + c * col_stride].
template <class T>
struct Rows {
  T* data;
  int64_t row_stride, col_stride;
};

// to[r * width + c] = factor * from(r, c); columns up to `width` are filled with zeros.
template <class T>
static void pack(Rows<const T> from, int64_t rows, int64_t cols, float factor, float* to, int64_t width) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* source = from.data + r * from.row_stride;
    float* target = to + r * width;
    if (from.col_stride == 1)
      for (int64_t c = 0; c < cols; ++c) target[c] = to_float(source[c]) * factor;
    else
      for (int64_t c = 0; c < cols; ++c) target[c] = to_float(source[c * from.col_stride]) * factor;
    for (int64_t c = cols; c < width; ++c) target[c] = 0.0f;
  }
}

// to[c * to_stride + r] = from[r * from_stride + c].
static void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                      int64_t to_stride) {
  for (int64_t c = 0; c < cols; ++c)
    for (int64_t r = 0; r < rows; ++r) to[c * to_stride + r] = from[r * from_stride + c];
}

template <class T>
static void unpack(const float* from, int64_t width, int64_t rows, int64_t cols, float factor, Rows<T> to) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c)
      to.data[r * to.row_stride + c * to.col_stride] = from_float<T>(from[r * width + c] * factor);
}

// A matrix operand whose elements are broadcast one by one: (r, d) is data[r * row_stride + d * depth_stride].
struct Broadcast {
  const float* data;
  int64_t row_stride, depth_stride;

  Broadcast rows_from(int64_t r) const { return {data + r * row_stride, row_stride, depth_stride}; }
  Vec at(int64_t r, int64_t d) const { return broadcast(data[r * row_stride + d * depth_stride]); }
  static Vec multiply_add(Vec row, Vec column, Vec sum) { return mul_add(row, column, sum); }
};

#ifdef __AVX512BF16__
// The same of bf16 elements taken two at a time: pair (r, d) begins at data[r * row_stride + d * depth_stride]. The
// other operand then holds a pair in each lane, and one instruction does twice the work of an fp32 multiply-add.
struct BroadcastPairs {
  const bfloat16* data;
  int64_t row_stride, depth_stride;

  BroadcastPairs rows_from(int64_t r) const { return {data + r * row_stride, row_stride, depth_stride}; }
  Vec at(int64_t r, int64_t d) const {
    float pair;  // only its bits count
    std::memcpy(&pair, data + r * row_stride + d * depth_stride, sizeof(pair));
    return reinterpret_cast<Vec>(_mm512_set1_ps(pair));
  }
  static Vec multiply_add(Vec row, Vec column, Vec sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(row), reinterpret_cast<__m512bh>(column));
  }
};

// to[r * width + c] = the pair (first(r, c), second(r, c)), the first in the low half.
static void interleave(const bfloat16* first, const bfloat16* second, int64_t cols, uint32_t* to) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) to[c] = first[c].bits | static_cast<uint32_t>(second[c].bits) << 16;
}

// Each lane's two floats as a pair of bf16, rounded to nearest even.
static inline Vec pair_of(Vec first, Vec second) {
  const auto half = [](Vec x) { return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x))); };
  return reinterpret_cast<Vec>(_mm512_or_si512(half(first), _mm512_slli_epi32(half(second), 16)));
}
#endif

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
static void dot_rows(int64_t rows, int64_t few, int64_t width, const float* a, const float* b, float* c,
                     int64_t c_stride) {
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

enum class Into { kSet, kSetScaled, kAdd, kScaleAndAdd };

// One register tile of `product` below. A sum of `depth` products is rounded on its own before it joins what stands in
// c, which keeps long sums accurate.
template <Into kInto, int kTileRows, int kTileVectors, class Operand>
static inline void product_tile(Operand a, const float* b, int64_t b_stride, int64_t depth, float* c, int64_t c_stride,
                                const float* column_scale) {
  Vec sum[kTileRows][kTileVectors] = {};
  for (int64_t d = 0; d < depth; ++d) {
    Vec column[kTileVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) column[v] = load_vec(b + d * b_stride + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const Vec row = a.at(r, d);
#pragma GCC unroll 8
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Operand::multiply_add(row, column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kTileVectors; ++v) {
      float* to = c + r * c_stride + v * kLanes;
      Vec value = sum[r][v];
      if (kInto == Into::kSetScaled) value = value * load_vec(column_scale + v * kLanes);
      if (kInto == Into::kAdd) value = load_vec(to) + value;
      if (kInto == Into::kScaleAndAdd) value = mul_add(load_vec(to), load_vec(column_scale + v * kLanes), value);
      store_vec(to, value);
    }
  }
}

// The register tile: accumulators, one step's operands and little else in registers.
// 4 x 4 + 4 + 1 of 32 (AVX-512), 4 x 2 + 2 + 1 of 16 (AVX2, SSE2).
constexpr int kProductRows = 4;
#if defined(__AVX512F__)
constexpr int kProductVectors = 4;
#else
constexpr int kProductVectors = 2;
#endif

// c (rows, cols) = or += a (rows, depth) b (depth, cols), b and c with contiguous columns, cols a multiple of kLanes.
// kSetScaled: the product is multiplied by column_scale (cols); kScaleAndAdd: c is, before the product is added.
template <Into kInto, class Operand = Broadcast>
static void product(int64_t rows, int64_t cols, int64_t depth, Operand a, const float* b, int64_t b_stride, float* c,
                    int64_t c_stride, const float* column_scale = nullptr) {
  constexpr int kWide = kProductVectors * kLanes;
  for (int64_t x = 0; x < cols;) {
    const bool wide = x + kWide <= cols;
    const float* scale = column_scale == nullptr ? nullptr : column_scale + x;
    int64_t r = 0;
    const auto to = [&](int64_t row) { return c + row * c_stride + x; };
    if (wide) {
      for (; r + kProductRows <= rows; r += kProductRows)
        product_tile<kInto, kProductRows, kProductVectors>(a.rows_from(r), b + x, b_stride, depth, to(r), c_stride,
                                                           scale);
      for (; r < rows; ++r)
        product_tile<kInto, 1, kProductVectors>(a.rows_from(r), b + x, b_stride, depth, to(r), c_stride, scale);
    } else {
      for (; r + 2 * kProductRows <= rows; r += 2 * kProductRows)
        product_tile<kInto, 2 * kProductRows, 1>(a.rows_from(r), b + x, b_stride, depth, to(r), c_stride, scale);
      for (; r < rows; ++r) product_tile<kInto, 1, 1>(a.rows_from(r), b + x, b_stride, depth, to(r), c_stride, scale);
    }
    x += wide ? kWide : kLanes;
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
