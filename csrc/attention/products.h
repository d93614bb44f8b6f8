// How tiles of attention are multiplied (product/), and how queries stand in them.
#pragma once

#include "attention/work.h"
#include "product/strips.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

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

template <class T>
struct Products : Operands<T> {
  // The rows of q or dout with queries in the lanes, [D][query], and unless null as rows, [query][width]. `scratch`
  // takes kQueries * width floats.
  static void load_queries(const View& view, const QueryBlock& block, float* scratch, int64_t width, float* transposed,
                           float* rows) {
    load_widened<T>(view, block, scratch, width, transposed, rows);
  }
  // The rows of out: from[d * kQueries + lane] factors[lane], rounded.
  static void store_out(const View& view, const QueryBlock& block, const float* from, const float* factors,
                        float* scratch, int64_t width) {
    store_queries<T>(view, block, from, factors, scratch, width);
  }
};

#ifdef __AVX512BF16__
// Weights and their gradients are rounded to bf16 for their products, as every flash attention does (a row's sum of
// weights is not).
template <>
struct Products<bfloat16> : Operands<bfloat16> {
  // [D / 2][query] and, in place of single rows, pairs [query / 2][width].
  static void load_queries(const View& view, const QueryBlock& block, float* scratch, int64_t width, float* transposed,
                           float* rows) {
    const int64_t cols = view.size[3], pairs = depth(cols);
    const bool are_pairs = view.stride[3] == 1 && cols % 2 == 0 && view.stride[2] % 2 == 0 && pairs >= kLanes;
    bfloat16* copy = reinterpret_cast<bfloat16*>(scratch);  // [query][2 width], the first halves in use
    for (int64_t first = 0; first < block.width; first += kLanes) {
      if (rows == nullptr && are_pairs && block.are_even(first, kLanes)) {
        const bfloat16* row = query_row<const bfloat16>(view, block, first).data;
        if (reinterpret_cast<uintptr_t>(row) % sizeof(float) == 0) {
          transpose_rows(reinterpret_cast<const float*>(row), view.stride[2] / 2, pairs, transposed + first, kQueries);
          continue;
        }
      }
      for (int64_t lane = first; lane < first + kLanes; ++lane) copy_row(view, block, lane, copy + lane * 2 * width);
      transpose(scratch + first * width, width, kLanes, pairs, transposed + first, kQueries);
    }
    if (rows != nullptr) interleave_rows({copy, 2 * width, 1}, block.width, cols, rows, width);
  }
  static void store_out(const View& view, const QueryBlock& block, const float* from, const float* factors,
                        float* scratch, int64_t width) {
    const int64_t pairs = view.size[3] / 2;
    if (view.stride[3] != 1 || view.size[3] % 2 != 0 || pairs < kLanes)
      return store_queries<bfloat16>(view, block, from, factors, scratch, width);
    for (int64_t lane = 0; lane < block.count; lane += kLanes) {
      const int64_t used = min_of(kLanes, block.count - lane);
      const Vec factor = load_vec(factors + lane);
      for (int64_t begin = 0; begin < pairs; begin += kLanes) {
        const int64_t c = begin + kLanes <= pairs ? begin : pairs - kLanes;
        const float* at = from + 2 * c * kQueries + lane;
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          square[i] = pair_of(load_vec(at + 2 * i * kQueries) * factor, load_vec(at + (2 * i + 1) * kQueries) * factor);
        exchange<1>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i)
          if (i < used) std::memcpy(query_row<bfloat16>(view, block, lane + i).data + 2 * c, &square[i], sizeof(Vec));
      }
    }
  }

 private:
  // One row and zeros up to a whole pair, or zeros behind a lane not in use.
  static void copy_row(const View& view, const QueryBlock& block, int64_t lane, bfloat16* to) {
    const int64_t cols = view.size[3];
    to[2 * depth(cols) - 1] = bfloat16{0};
    if (lane >= block.count) {
      std::memset(to, 0, cols * sizeof(bfloat16));
      return;
    }
    const Rows<const bfloat16> row = query_row<const bfloat16>(view, block, lane);
    int64_t d = 0;
    if (row.col_stride == 1)  // a call of memcpy takes as long
      for (; d + 8 <= cols; d += 8) std::memcpy(to + d, row.data + d, 8 * sizeof(bfloat16));
    for (; d < cols; ++d) to[d] = row.data[d * row.col_stride];
  }
};
#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
