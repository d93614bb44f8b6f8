// How tiles of attention are multiplied (operands.h), and how queries stand in them.
#pragma once

#include "kernels/attention_work.h"
#include "kernels/operands.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

template <class T>
struct Products : Operands<T> {
  // The rows of q or dout with queries in the lanes, [D][query], and unless null as rows, [query][width]. `scratch`
  // takes kQueries * width floats.
  static void load_queries(const View& view, const QueryBlock& block, float* scratch, int64_t width, float* transposed,
                           float* rows) {
    load_widened<T>(view, block, rows == nullptr ? scratch : rows, width, transposed);
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
    bfloat16* copy = reinterpret_cast<bfloat16*>(scratch);  // [query][2 width], the first halves in use
    for (int64_t lane = 0; lane < block.width; ++lane) {
      bfloat16* to = copy + lane * 2 * width;
      std::memset(to + 2 * pairs - 2, 0, 2 * sizeof(bfloat16));  // the pair that may be half full
      if (lane >= block.count) {
        std::memset(to, 0, cols * sizeof(bfloat16));
        continue;
      }
      const Rows<const bfloat16> row = query_row<const bfloat16>(view, block, lane);
      int64_t d = 0;
      if (row.col_stride == 1)  // a call of memcpy takes as long
        for (; d + 8 <= cols; d += 8) std::memcpy(to + d, row.data + d, 8 * sizeof(bfloat16));
      for (; d < cols; ++d) to[d] = row.data[d * row.col_stride];
    }
    transpose(scratch, width, block.width, pairs, transposed, kQueries);
    if (rows != nullptr) interleave_rows({copy, 2 * width, 1}, block.width, cols, rows, width);
  }
};
#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
