// The matrix side of linear cross-entropy: tokens or features packed into strips of vectors, and products of them with
// rows that are broadcast (tile.h, operands.h), shared out over a team of threads. Functions named *_by_team hold an
// orphaned `omp for` and are called by every thread.
#pragma once

#include "kernels/loss.h"
#include "kernels/operands.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// A strip is as wide as the register tile of a product; a tile of kTileRows rows of a strip is 12 KiB with AVX-512.
constexpr int kCols = kProductVectors * kLanes;
constexpr int64_t kTileRows = 64 / kProductRows * kProductRows;

// Steps of one product: a strip of so many is 24 KiB with AVX-512, half a first-level cache, while a tile's rows pass
// by; and no more than so many terms (pairs of them with bf16) are added up in one go, which keeps long sums accurate.
constexpr int64_t kDepth = 192;

// Strips of columns that a task passes its copied rows by: a chunk of 1,024 by 1,024 still gives 40 tasks and more.
constexpr int64_t kTaskStrips = 8;

// Some rows of a matrix, all of them or those that an index names.
template <class T>
struct RowsOf {
  const T* data;
  int64_t row_stride, col_stride;
  const int64_t* index;  // or null

  RowsOf(const View& view, const int64_t* rows)
      : data(static_cast<const T*>(view.data)), row_stride(view.stride[0]), col_stride(view.stride[1]), index(rows) {}
  const T* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * row_stride; }
};

// Floats that a strip of vectors takes, `count` being what is summed over.
template <class T>
static int64_t strip_size(int64_t count) {
  return round_up(Operands<T>::depth(count), kLanes) * kCols;
}

// A copy of row elements in the type that products take them in.
template <class T, class Element>
static void copy_row(const T* from, int64_t stride, int64_t count, Element* to) {
  if constexpr (sizeof(T) != sizeof(Element))
    pack<T>({from, 0, stride}, 1, count, to, count);
  else if (stride == 1 && count > 0)  // memcpy takes no null pointer, whatever the count
    std::memcpy(to, from, count * sizeof(T));
  else
    for (int64_t i = 0; i < count; ++i) to[i] = from[i * stride];
}

// Strips of kCols rows, each packed with its rows as lanes: strip s stands at to + s * strip_size, element (row, e) at
// [e][row], or with pairs (e, e + 1) at [e / 2][row]. Lanes and elements past the end are zeros.
template <class T>
static void pack_tokens_by_team(const RowsOf<T>& source, int64_t first, int64_t count, int64_t E, float* to) {
  using Element = typename Operands<T>::Element;
  constexpr int64_t kStep = 64 * sizeof(float) / sizeof(Element);  // elements of a row at a time: 64 floats or pairs
#pragma omp for schedule(static)
  for (int64_t s = 0; s < ceil_div(count, kCols); ++s) {
    const int64_t rows = min_of(kCols, count - s * kCols);
    for (int64_t e = 0; e < E; e += kStep) {
      alignas(64) Element block[kCols * kStep];
      const int64_t used = min_of(kStep, E - e);
      if (rows < kCols || used < kStep) std::memset(block, 0, sizeof(block));
      for (int64_t r = 0; r < rows; ++r)
        copy_row(source.row(first + s * kCols + r) + e * source.col_stride, source.col_stride, used, block + r * kStep);
      transpose(reinterpret_cast<const float*>(block), 64, kCols, Operands<T>::depth(used),
                to + s * strip_size<T>(E) + Operands<T>::depth(e) * kCols, kCols);
    }
  }
}

// Strips of kCols columns: element (r, e) at strip e / kCols, [r][e mod kCols], or with pairs of rows [r / 2]; zeros
// past the last column and row.
template <class T>
static void pack_columns_by_team(const RowsOf<T>& source, int64_t first, int64_t rows, int64_t E, float* to) {
#pragma omp for schedule(static)
  for (int64_t s = 0; s < ceil_div(E, kCols); ++s) {
    const int64_t e = s * kCols * source.col_stride, count = min_of(kCols, E - s * kCols);
    float* strip = to + s * strip_size<T>(rows);
    if constexpr (Operands<T>::kPairs) {
      for (int64_t r = 0; r < rows; r += 2) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(strip + r / 2 * kCols);
        const T* low = source.row(first + r) + e;
        const T* high = r + 1 < rows ? source.row(first + r + 1) + e : nullptr;
        if (high != nullptr && source.col_stride == 1)
          interleave(low, high, count, pairs);
        else
          for (int64_t c = 0; c < count; ++c)
            pairs[c] = low[c * source.col_stride].bits |
                       (high == nullptr ? 0u : static_cast<uint32_t>(high[c * source.col_stride].bits) << 16);
        for (int64_t c = count; c < kCols; ++c) pairs[c] = 0;
      }
    } else {
      for (int64_t r = 0; r < rows; ++r)
        pack<T>({source.row(first + r) + e, 0, source.col_stride}, 1, count, strip + r * kCols, kCols);
    }
  }
}

// tile (rows, kCols) = or, with `add`, += left (rows, depth) strip, a stretch of the depth at a time.
template <class Operand>
static void multiply_strip(Operand left, int64_t rows, const float* strip, int64_t depth, bool add, float* tile,
                           int64_t tile_stride) {
  const int64_t parts = max_of(1, ceil_div(depth, kDepth));
  for (int64_t part = 0, d = 0; part < parts; ++part) {
    const int64_t end = depth * (part + 1) / parts;
    const float* from = strip + d * kCols;
    if (add || part > 0)
      product<Into::kAdd>(rows, kCols, end - d, left.depth_from(d), from, kCols, tile, tile_stride);
    else
      product<Into::kSet>(rows, kCols, end - d, left.depth_from(d), from, kCols, tile, tile_stride);
    d = end;
  }
}

// Where a product goes: row i is data + (index == null ? i : index[i]) * stride.
struct Target {
  float* data;
  int64_t stride;
  const int64_t* index;
  float* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * stride; }
};

// target(i, e) = or, with `add`, += sum over d of left(i, d) * right(d, e), with right packed by pack_columns_by_team,
// whose strips take `strip_floats`. `left(first, count)` is the operand of some rows; it may copy them to the thread's
// own scratch. Each sum is one thread's, in an order that depends on the sizes alone.
template <class Left>
static void product_by_team(const Left& left, int64_t rows, int64_t depth, const float* right, int64_t strip_floats,
                            int64_t E, bool add, const Target& target) {
  const int64_t strips = ceil_div(E, kCols), strip_tasks = ceil_div(strips, kTaskStrips);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < ceil_div(rows, kTileRows) * strip_tasks; ++task) {
    const int64_t first = task / strip_tasks * kTileRows, count = min_of(kTileRows, rows - first);
    const auto operand = left(first, count);
    const int64_t first_strip = task % strip_tasks * kTaskStrips;
    for (int64_t s = first_strip; s < min_of(first_strip + kTaskStrips, strips); ++s) {
      const float* strip = right + s * strip_floats;
      const int64_t columns = min_of(kCols, E - s * kCols);
      if (columns == kCols && target.index == nullptr) {
        multiply_strip(operand, count, strip, depth, add, target.row(first) + s * kCols, target.stride);
        continue;
      }
      alignas(64) float tile[kTileRows * kCols];
      multiply_strip(operand, count, strip, depth, false, tile, kCols);
      for (int64_t r = 0; r < count; ++r) {
        float* to = target.row(first + r) + s * kCols;
        for (int64_t c = 0; c < columns; ++c) to[c] = add ? to[c] + tile[r * kCols + c] : tile[r * kCols + c];
      }
    }
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
