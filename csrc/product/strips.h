// Strips: the columns that one register tile is wide, packed with the depth outermost, and products with them.
//
// A strip holds kStripCols floats a step, [depth][kStripCols], or with pairs of bf16 a pair of terms in each lane. Rows
// of a matrix become a strip in two ways: as its lanes, the depth being their elements (pack_lanes_by_team: logits =
// hidden W^T), or as its steps, the depth being the rows themselves (pack_columns_by_team: a gradient's sum over
// tokens). Functions named *_by_team hold an orphaned `omp for` and are called by every thread.
#pragma once

#include "args.h"
#include "product/amx_tiles.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int kStripCols = kProductVectors * kLanes;

// Steps of one product: no more than so many terms (pairs of them with bf16) are added up in one go, which keeps long
// sums accurate. A strip of so many is 36 KiB with AVX-512; 96 to 288 are equally fast.
constexpr int64_t kStripDepth = 192;

// `size` lanes as strips whose widths differ by no more than a vector: 4 vectors are 2 + 2, not 3 + 1, for a product
// of one vector's width waits for its loads. Or as strips that are all of the full width but the last.
struct Strips {
  int64_t size, vectors, count;
  bool is_even;

  explicit Strips(int64_t lanes, bool even = true)
      : size(lanes), vectors(ceil_div(lanes, kLanes)), count(ceil_div(vectors, kProductVectors)), is_even(even) {}
  int64_t begin(int64_t s) const {
    if (count == 0) return 0;
    return (is_even ? vectors * s / count : min_of(vectors, s * kProductVectors)) * kLanes;
  }
  int64_t lanes(int64_t s) const { return begin(s + 1) - begin(s); }
  int64_t used(int64_t s) const { return min_of(lanes(s), size - begin(s)); }
};

// Some rows of a matrix, all of them or those that an index names.
template <class T>
struct RowsOf {
  const T* data;
  int64_t row_stride, col_stride;
  const int64_t* index = nullptr;

  RowsOf(const T* first, int64_t stride) : data(first), row_stride(stride), col_stride(1) {}
  RowsOf(const View& view, const int64_t* rows)
      : data(static_cast<const T*>(view.data)), row_stride(view.stride[0]), col_stride(view.stride[1]), index(rows) {}
  const T* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * row_stride; }
};

// Floats that a strip takes, `count` being what is summed over.
template <class T>
static int64_t strip_size(int64_t count) {
  return round_up(Operands<T>::depth(count), kLanes) * kStripCols;
}

// How far rows of bf16 that AMX tiles take are apart: whole cache lines, an odd number of them, or many rows would fall
// into the same few lines of a first-level cache.
static inline int64_t amx_stride(int64_t count) { return (ceil_div(count, 32) | 1) * 32; }

// A copy of row elements in the type that products take them in.
template <class T, class Element>
static void copy_elements(const T* from, int64_t stride, int64_t count, Element* to) {
  if constexpr (sizeof(T) != sizeof(Element))
    pack<T>({from, 0, stride}, 1, count, to, count);
  else if (stride == 1 && count > 0)  // memcpy takes no null pointer, whatever the count
    std::memcpy(to, from, count * sizeof(T));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

// Strips [first, last) of rows, each packed with its rows as lanes: strip s stands at to + (s - first) * strip_size,
// element (row, e) at [e][row], or with pairs (e, e + 1) at [e / 2][row]. Lanes and elements past the end are zeros.
// Only strips for which is_wanted(s).
template <class T, class Wanted>
static void pack_lanes_by_team(const RowsOf<T>& source, const Strips& strips, int64_t first, int64_t last, int64_t E,
                               float* to, Wanted is_wanted) {
  using Element = typename Operands<T>::Element;
  constexpr int64_t kStep = 64 * sizeof(float) / sizeof(Element);  // elements of a row at a time: 64 floats or pairs
#pragma omp for schedule(static)
  for (int64_t s = first; s < last; ++s) {
    const int64_t rows = is_wanted(s) ? strips.used(s) : 0;
    for (int64_t e = 0; rows > 0 && e < E; e += kStep) {
      alignas(64) Element block[kStripCols * kStep];
      const int64_t used = min_of(kStep, E - e);
      if (rows < kStripCols || used < kStep) std::memset(block, 0, sizeof(block));
      for (int64_t r = 0; r < rows; ++r)
        copy_elements(source.row(strips.begin(s) + r) + e * source.col_stride, source.col_stride, used,
                      block + r * kStep);
      transpose(reinterpret_cast<const float*>(block), 64, kStripCols, Operands<T>::depth(used),
                to + (s - first) * strip_size<T>(E) + Operands<T>::depth(e) * kStripCols, kStripCols);
    }
  }
}

// Rows [first, first + rows) as the steps of strips of columns, `floats` apart: element (r, e) at the strip s that has
// column e, [r][e - begin(s)], or with pairs of rows [r / 2]; zeros past the last column and, up to `padded`, past the
// last row. Whole rows pass, as they lie in memory.
template <class T>
static void pack_columns_by_team(const RowsOf<T>& source, int64_t first, int64_t rows, int64_t padded,
                                 const Strips& strips, int64_t floats, float* to) {
  constexpr int64_t kTogether = Operands<T>::kPairs ? 2 : 1;  // rows
  const int64_t steps = Operands<T>::depth(rows), stride = source.col_stride;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < Operands<T>::depth(padded); ++i)
    for (int64_t s = 0; s < strips.count; ++s) {
      float* target = to + s * floats + i * kStripCols;
      const int64_t count = i < steps ? strips.used(s) : 0, r = first + i * kTogether;
      if (count == 0) {
        std::memset(target, 0, kStripCols * sizeof(float));
        continue;
      }
      const T* row = source.row(r) + strips.begin(s) * stride;
      if constexpr (Operands<T>::kPairs) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(target);
        const bool has_both = i * kTogether + 1 < rows;
        const T* second = has_both ? source.row(r + 1) + strips.begin(s) * stride : row;
        if (has_both && stride == 1 && count == kStripCols)
          for (int c = 0; c < kStripCols; c += kLanes) interleave_vec(row + c, second + c, pairs + c);
        else
          for (int64_t c = 0; c < kStripCols; ++c) {
            const uint32_t low = c < count ? row[c * stride].bits : 0u;
            pairs[c] = low | (has_both && c < count ? static_cast<uint32_t>(second[c * stride].bits) << 16 : 0u);
          }
      } else {
        pack<T>({row, 0, stride}, 1, count, target, kStripCols);
      }
    }
}

// Two vectors take 12 rows of a register tile here, of which 72 is a multiple too: 24 sums, as vdpbf16ps's latency
// asks.
template <Into kInto, class Operand, class Depth, class Work>
__attribute__((noinline)) static void product_with_strip(int64_t rows, int64_t vectors, Depth depth, Operand left,
                                                         const float* strip, float* c, int64_t c_stride,
                                                         Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  product_of_vectors<kInto, 12>(rows, vectors, depth, left, strip, kStripCols, c, c_stride, nullptr, work);
  caller_work = work;
}

// c (rows, vectors * kLanes) = left (rows, depth) strip, kStripDepth steps or fewer at a time. Beside one such product
// the strip's next steps are fetched, beside the last the first of `next_strip` (or null): strips of long depth are not
// in the second-level cache when they come again. Nor is a left operand that is packed like a strip.
template <class Operand, class Work>
static void multiply_strip(Operand left, int64_t rows, int64_t vectors, const float* strip, int64_t depth, float* c,
                           int64_t c_stride, Work& work, [[maybe_unused]] const float* next_strip = nullptr) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<Operand, BroadcastPairs<Along::kDepth>>)
    return amx_product(left, rows, vectors, depth, strip, kStripCols, c, c_stride, false, 0, amx_products(depth), work);
#endif
  const int64_t products = max_of(1, ceil_div(depth, kStripDepth));
  for (int64_t i = 0, d = 0; i < products; ++i) {
    const int64_t end = depth * (i + 1) / products, bytes = (end - d) * kStripCols * int64_t{sizeof(float)};
    const float* from = strip + d * kStripCols;
    const bool is_last = i + 1 == products;
    using Line = PrefetchLines<1>;
    Then<Line, Then<Line, Work>> ahead{{}, {{}, work}};
    if (!is_last || next_strip != nullptr)
      ahead.first = Line(Memory::of(is_last ? next_strip : strip + end * kStripCols, bytes));
    if (!is_last && Operand::kPackedAlong == Along::kRows)
      ahead.second.first = Line(Memory::of(left.depth_from(end).data, bytes));
    if (i > 0)
      product_with_strip<Into::kAdd>(rows, vectors, end - d, left.depth_from(d), from, c, c_stride, ahead);
    else
      product_with_strip<Into::kSet>(rows, vectors, end - d, left.depth_from(d), from, c, c_stride, ahead);
    work = ahead.second.second;
    d = end;
  }
}

// to (count) = or += from.
static inline void add_row(const float* from, int64_t count, bool add, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    store_vec(to + c, add ? load_vec(to + c) + load_vec(from + c) : load_vec(from + c));
  for (; c < count; ++c) to[c] = add ? to[c] + from[c] : from[c];
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
