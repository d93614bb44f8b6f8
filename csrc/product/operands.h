// The operands of a product (register_tile.h), and what the element type means for them: how rows and columns of a
// tensor become operands.
#pragma once

#include "product/packing.h"
#include "simd/amx.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

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
    return broadcast_pair(data + (kAlong == Along::kDepth ? r * stride + 2 * d : 2 * r + d * stride));
  }
  static Vec multiply_add(Vec row, Vec column, Vec sum) { return mul_add_pairs(row, column, sum); }
};

#endif

// Everything is fp32 here; other types are widened when they are copied.
template <class T>
struct Operands {
  static constexpr bool kPairs = false;
  using Element = float;  // of what is broadcast
  using RowOperand = Broadcast<Along::kDepth>;
  using ColumnOperand = Broadcast<Along::kRows>;

  // Steps of a product along a sum of `count`.
  static int64_t depth(int64_t count) { return count; }

  // n rows whose elements are summed over (rows_of), or that are summed over themselves (columns_of). They stay where
  // they lie if they are fp32 and close together, and are copied to `scratch` else.
  static RowOperand rows_of(Rows<const T> from, int64_t n, int64_t cols, float* scratch, int64_t width) {
    if constexpr (sizeof(T) == sizeof(float))
      if (from.col_stride == 1 && from.row_stride <= 2 * width) return {from.data, from.row_stride};
    pack<T>(from, n, cols, scratch, width);
    return {scratch, width};
  }
  static ColumnOperand columns_of(Rows<const T> from, int64_t n, int64_t cols, float* scratch, int64_t width) {
    const RowOperand rows = rows_of(from, n, cols, scratch, width);
    return {rows.data, rows.stride};
  }
};

#ifdef __AVX512BF16__
// bf16 stays bf16 here, and vdpbf16ps adds up products of pairs in fp32. What is summed over is taken in pairs.
template <>
struct Operands<bfloat16> {
  static constexpr bool kPairs = true;
  using Element = bfloat16;
  using RowOperand = BroadcastPairs<Along::kDepth>;
  using ColumnOperand = BroadcastPairs<kHasAmx ? Along::kDepth : Along::kRows>;

  static int64_t depth(int64_t count) { return (count + 1) / 2; }

  static RowOperand rows_of(Rows<const bfloat16> from, int64_t n, int64_t cols, float* scratch, int64_t width) {
    if (from.col_stride == 1 && cols % 2 == 0) return {from.data, from.row_stride};
    bfloat16* packed = reinterpret_cast<bfloat16*>(scratch);
    for (int64_t c = 0; c < n; ++c) {
      for (int64_t d = 0; d < cols; ++d) packed[c * width + d] = from.data[c * from.row_stride + d * from.col_stride];
      if (cols % 2 != 0) packed[c * width + cols] = bfloat16{0};
    }
    return {packed, width};
  }
  // Pairs of rows, [n / 2][width]; an odd last one has a row of zeros for the other.
  static void interleave_rows(Rows<const bfloat16> from, int64_t n, int64_t cols, float* scratch, int64_t width) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(scratch);
    for (int64_t c = 0; c < n; c += 2, pairs += width) {
      const bfloat16* first = from.data + c * from.row_stride;
      const bfloat16* second = first + from.row_stride;
      int64_t d = 0;
      if (from.col_stride == 1 && c + 1 < n) {
        interleave(first, second, cols, pairs);
        d = cols;
      }
      for (; d < cols; ++d) {
        const uint32_t high = c + 1 < n ? second[d * from.col_stride].bits : 0u;
        pairs[d] = first[d * from.col_stride].bits | high << 16;
      }
      for (; d < width; ++d) pairs[d] = 0;
    }
  }
  // AMX tiles take the columns as rows, [cols][n]: pairs of rows in squares of 16 that are transposed. `scratch` holds
  // width (n / 2) floats, n rounded up to pairs of 16.
  static ColumnOperand columns_of(Rows<const bfloat16> from, int64_t n, int64_t cols, float* scratch, int64_t width) {
    if constexpr (kHasAmx) {
      const int64_t pairs = round_up(depth(n), kLanes);
      alignas(64) uint32_t block[kLanes * kLanes];
      for (int64_t c = 0; c < n; c += 2 * kLanes)
        for (int64_t d = 0; d < width; d += kLanes) {
          const int64_t rows = min_of(2 * kLanes, n - c), used = max_of(0, min_of(kLanes, cols - d));
          interleave_rows({from.data + c * from.row_stride + d * from.col_stride, from.row_stride, from.col_stride},
                          rows, used, reinterpret_cast<float*>(block), kLanes);
          transpose_square(reinterpret_cast<const float*>(block), kLanes, scratch + d * pairs + c / 2, pairs);
        }
      return {reinterpret_cast<const bfloat16*>(scratch), 2 * pairs};
    }
    interleave_rows(from, n, cols, scratch, width);
    return {reinterpret_cast<const bfloat16*>(scratch), 2 * width};
  }
};
#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
