// The matrix side of linear cross-entropy: rows of a matrix packed into panels, and products of packed panels
// that are shared out over a team of threads. Functions named *_by_team hold an orphaned `omp for` and are
// called by every thread.
#pragma once

#include "kernels/gemm.h"
#include "kernels/loss.h"
#include "simd/buffer.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

using gemm::kCols;
using gemm::kRows;

// Row panels of one tile: 64 rows (60 without AVX-512) of kCols sums are 12 KiB of first-level cache.
constexpr int64_t kTilePanels = 64 / kRows;
constexpr int64_t kTileRows = kTilePanels * kRows;

// Column panels that a task passes its packed rows by: packing 64 rows is then 1/384 of the task's
// multiply-adds, and a chunk of 1,024 by 1,024 still gives 100 tasks and more.
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

// to[e * width + r] = source(first + r, e) for r < count, 0 for the other r < width: the rows become lanes.
template <class T>
static void pack_rows_as_lanes(const RowsOf<T>& source, int64_t first, int64_t count, int64_t E, int64_t width,
                               float* to) {
  for (int64_t r = 0; r < width; ++r) {
    if (r >= count) {
      for (int64_t e = 0; e < E; ++e) to[e * width + r] = 0.0f;
      continue;
    }
    const T* row = source.row(first + r);
    for (int64_t e = 0; e < E; ++e) to[e * width + r] = to_float(row[e * source.col_stride]);
  }
}

// Strips of kCols rows, each packed with its rows as lanes: strip s stands at to + s * E * kCols.
template <class T>
static void pack_tokens_by_team(const RowsOf<T>& source, int64_t first, int64_t count, int64_t E, float* to) {
#pragma omp for schedule(static)
  for (int64_t s = 0; s < ceil_div(count, kCols); ++s)
    pack_rows_as_lanes(source, first + s * kCols, min_of(kCols, count - s * kCols), E, kCols, to + s * E * kCols);
}

// Strips of kCols columns: to[(s * rows + r) * kCols + c] = source(first + r, s * kCols + c), 0 past the last
// column.
template <class T>
static void pack_columns_by_team(const RowsOf<T>& source, int64_t first, int64_t rows, int64_t E, float* to) {
#pragma omp for schedule(static)
  for (int64_t s = 0; s < ceil_div(E, kCols); ++s) {
    const int64_t e = s * kCols, count = min_of(kCols, E - e);
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = source.row(first + r) + e * source.col_stride;
      float* panel = to + (s * rows + r) * kCols;
      for (int64_t c = 0; c < count; ++c) panel[c] = to_float(row[c * source.col_stride]);
      for (int64_t c = count; c < kCols; ++c) panel[c] = 0.0f;
    }
  }
}

// A left operand of fp32 in memory: element (row, d) is data[row * row_stride + d * depth_stride].
struct Left {
  const float* data;
  int64_t row_stride, depth_stride;
};

// Where a product goes: row i is data + (index == null ? i : index[i]) * stride.
struct Target {
  float* data;
  int64_t stride;
  const int64_t* index;
  float* row(int64_t i) const { return data + (index == nullptr ? i : index[i]) * stride; }
};

// target(i, e) += sum over d of left(i, d) * right(d, e), with right packed by pack_columns_by_team. Each sum
// is one thread's, in an order that depends on the sizes alone. `scratch` is the thread's own: kTileRows *
// depth floats.
static void add_product_by_team(const Left& left, int64_t rows, int64_t depth, const float* right, int64_t E,
                                const Target& target, float* scratch) {
  const int64_t strips = ceil_div(E, kCols), strip_tasks = ceil_div(strips, kTaskStrips);
#pragma omp for schedule(dynamic, 1)
  for (int64_t task = 0; task < ceil_div(rows, kTileRows) * strip_tasks; ++task) {
    const int64_t first = task / strip_tasks * kTileRows, count = min_of(kTileRows, rows - first);
    const int64_t panels = ceil_div(count, kRows);
    for (int64_t i = 0; i < panels; ++i)
      for (int64_t d = 0; d < depth; ++d)
        for (int64_t r = 0; r < kRows; ++r) {
          const int64_t row = first + min_of(i * kRows + r, count - 1);
          scratch[(i * depth + d) * kRows + r] = left.data[row * left.row_stride + d * left.depth_stride];
        }
    const int64_t first_strip = task % strip_tasks * kTaskStrips;
    for (int64_t s = first_strip; s < min_of(first_strip + kTaskStrips, strips); ++s) {
      alignas(64) float tile[kTileRows * kCols];
      gemm::multiply_panels(scratch, panels, right + s * depth * kCols, depth, tile);
      const int64_t columns = min_of(kCols, E - s * kCols);
      for (int64_t r = 0; r < count; ++r) {
        float* to = target.row(first + r) + s * kCols;
        for (int64_t c = 0; c < columns; ++c) to[c] += tile[r * kCols + c];
      }
    }
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
