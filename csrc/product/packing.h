// Rows of a tensor and how they are copied for a product: packed, transposed, interleaved in pairs, and back.
#pragma once

#include <type_traits>

#include "product/prefetch.h"
#include "simd/pairs.h"
#include "simd/transpose.h"

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

// The same rows as memory that is asked for beside products; none if their elements are apart.
template <class T>
static Memory memory_of(Rows<T> from, int64_t rows, int64_t cols) {
  constexpr int64_t kSize = sizeof(T);
  return {reinterpret_cast<const char*>(from.data), cols * kSize, from.row_stride * kSize,
          from.col_stride == 1 && cols > 0 ? rows : 0};
}

// Calls f(c, n) for vectors from column c on that cover `count` columns: whole ones, n = kLanes, of which the last may
// overlap the one before; or a single one of n = count.
template <class F>
ALWAYS_INLINE static void for_covering_vectors(int64_t count, F f) {
  if (count < kLanes) return count > 0 ? f(int64_t{0}, static_cast<int>(count)) : void();
  for (int64_t c = 0; c < count; c += kLanes) f(c + kLanes <= count ? c : count - kLanes, kLanes);
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

// to[c] = the pair (first[c], second[c]), the first in the low half.
[[maybe_unused]] static void interleave(const bfloat16* first, const bfloat16* second, int64_t cols, uint32_t* to) {
#pragma omp simd
  for (int64_t c = 0; c < cols; ++c) to[c] = first[c].bits | static_cast<uint32_t>(second[c].bits) << 16;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
