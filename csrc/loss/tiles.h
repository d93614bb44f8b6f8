// The matrix side of linear cross-entropy: tokens or features packed into strips of vectors, and products of them with
// rows that are broadcast (tile.h, operands.h). Functions named *_by_team hold an orphaned `omp for` and are called by
// every thread.
#pragma once

#include "loss/loss.h"
#include "product/tile_products.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// A strip is as wide as the register tile of a product. 72 rows divide by the heights of the register tiles of every
// width (8, 12; 6, 12 with AVX2), and such a tile of a strip is 14 KiB with AVX-512. AMX takes blocks of 32:
// 64 to 192 rows are equally fast.
constexpr int kCols = kProductVectors * kLanes;
constexpr int64_t kTileRows = kHasTiles ? 96 : 72;

// Steps of one product: no more than so many terms (pairs of them with bf16) are added up in one go, which keeps long
// sums accurate. A strip of so many is 36 KiB with AVX-512; 96 to 288 are equally fast.
constexpr int64_t kDepth = 192;

// Strips of columns in a task: twice the reuse for tiles, whose products are faster than a third-level cache (4 to 5%
// of a call with gradients).
constexpr int64_t kTaskStrips = kHasTiles ? 4 : 2;

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

// `count` floats as elements of T.
template <class T>
static void store_row(const float* from, int64_t count, T* to, int64_t stride) {
  int64_t e = 0;
#ifdef __AVX512BF16__
  if constexpr (Operands<T>::kPairs)
    for (; stride == 1 && e + kLanes <= count; e += kLanes)
      gpt4v_fast::GPT4V_FAST_ISA::store_row(to + e, load_vec(from + e));
#endif
  if (stride == 1)
    for (; e < count; ++e) to[e] = from_float<T>(from[e]);
  else
    for (; e < count; ++e) to[e * stride] = from_float<T>(from[e]);
}

// Strips [first, last) of rows, each packed with its rows as lanes: strip s stands at to + (s - first) * strip_size,
// element (row, e) at [e][row], or with pairs (e, e + 1) at [e / 2][row]. Lanes and elements past the end are zeros.
// Only strips for which is_wanted(s).
template <class T, class Wanted>
static void pack_tokens_by_team(const RowsOf<T>& source, const Strips& strips, int64_t first, int64_t last, int64_t E,
                                float* to, Wanted is_wanted) {
  using Element = typename Operands<T>::Element;
  constexpr int64_t kStep = 64 * sizeof(float) / sizeof(Element);  // elements of a row at a time: 64 floats or pairs
#pragma omp for schedule(static)
  for (int64_t s = first; s < last; ++s) {
    const int64_t rows = is_wanted(s) ? strips.used(s) : 0;
    for (int64_t e = 0; rows > 0 && e < E; e += kStep) {
      alignas(64) Element block[kCols * kStep];
      const int64_t used = min_of(kStep, E - e);
      if (rows < kCols || used < kStep) std::memset(block, 0, sizeof(block));
      for (int64_t r = 0; r < rows; ++r)
        copy_row(source.row(strips.begin(s) + r) + e * source.col_stride, source.col_stride, used, block + r * kStep);
      transpose(reinterpret_cast<const float*>(block), 64, kCols, Operands<T>::depth(used),
                to + (s - first) * strip_size<T>(E) + Operands<T>::depth(e) * kCols, kCols);
    }
  }
}

// to[c] = the pair (first[c], second[c]) of kCols columns, as `interleave` of tile.h.
[[maybe_unused]] static inline void interleave_strip(const bfloat16* first, const bfloat16* second, uint32_t* to) {
#ifdef __AVX512BF16__
  typedef int16_t Halves __attribute__((vector_size(64)));
  Halves order;
  for (int i = 0; i < 32; ++i) order[i] = static_cast<int16_t>(i % 2 * 32 + i / 2);
  for (int c = 0; c < kCols; c += kLanes) {
    const auto load = [&](const bfloat16* from) {
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + c)));
    };
    _mm512_storeu_si512(to + c, _mm512_permutex2var_epi16(load(first), (__m512i)order, load(second)));
  }
#else
  interleave(first, second, kCols, to);
#endif
}

// Rows [first, first + rows) in strips of columns, `floats` apart: element (r, e) at strip s that has column e,
// [r][e - begin(s)], or with pairs of rows [r / 2]; zeros past the last column and, up to `padded`, past the last row.
// Whole rows pass, as they lie in memory.
template <class T>
static void pack_columns_by_team(const RowsOf<T>& source, int64_t first, int64_t rows, int64_t padded,
                                 const Strips& strips, int64_t floats, float* to) {
  constexpr int64_t kTogether = Operands<T>::kPairs ? 2 : 1;  // rows
  const int64_t steps = Operands<T>::depth(rows), stride = source.col_stride;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < Operands<T>::depth(padded); ++i)
    for (int64_t s = 0; s < strips.count; ++s) {
      float* target = to + s * floats + i * kCols;
      const int64_t count = i < steps ? strips.used(s) : 0, r = first + i * kTogether;
      if (count == 0) {
        std::memset(target, 0, kCols * sizeof(float));
        continue;
      }
      const T* row = source.row(r) + strips.begin(s) * stride;
      if constexpr (Operands<T>::kPairs) {
        uint32_t* pairs = reinterpret_cast<uint32_t*>(target);
        const bool has_both = i * kTogether + 1 < rows;
        const T* second = has_both ? source.row(r + 1) + strips.begin(s) * stride : row;
        if (has_both && stride == 1 && count == kCols)
          interleave_strip(row, second, pairs);
        else
          for (int64_t c = 0; c < kCols; ++c) {
            const uint32_t low = c < count ? row[c * stride].bits : 0u;
            pairs[c] = low | (has_both && c < count ? static_cast<uint32_t>(second[c * stride].bits) << 16 : 0u);
          }
      } else {
        pack<T>({row, 0, stride}, 1, count, target, kCols);
      }
    }
}

// Work that a product does on the way (tile.h): fetches memory that is used next, a row of up to 192 bytes a step.
struct Fetch {
  const char* next = nullptr;
  int64_t stride = 0, rows = 0;

  ALWAYS_INLINE void step() {
    if (rows == 0) return;
    __builtin_prefetch(next, 0, 2);
    __builtin_prefetch(next + 64, 0, 2);
    --rows, next += stride;
  }
};

// The same beside products of tiles, whose steps are fewer: so many lines with each, that the last is fetched with the
// last. Faster, loads of tiles wait for the line buffers.
struct FetchLines {
  const char* next = nullptr;
  int64_t lines = 0, per_step = 0;

  FetchLines(const Fetch& rows, int64_t steps)
      : next(rows.next), lines(rows.rows * rows.stride / 64), per_step(ceil_div(lines, max_of(steps, 1))) {}
  ALWAYS_INLINE void step() {
    if (lines <= 0) return;
    lines -= per_step;
    for (int64_t i = 0; i < per_step; ++i, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

struct Piece {
  const char *next, *end;
};

// The same for such pieces of memory of any size, 128 bytes every so many steps.
template <int kEvery>
struct FetchPieces {
  Piece* piece = nullptr;
  int64_t pieces = 0;
  int wait = 0;

  ALWAYS_INLINE void step() {
    if (pieces == 0 || ++wait % kEvery != 0) return;
    __builtin_prefetch(piece->next, 0, 2);
    __builtin_prefetch(piece->next + 64, 0, 2);
    piece->next += 128;
    if (piece->next >= piece->end) ++piece, --pieces;
  }
};

// The same for memory that will be written, whose lines are wanted in first-level cache.
struct FetchToWrite {
  const char* next = nullptr;
  int64_t stride = 0, rows = 0, last = 0;  // the last byte of a row that counts

  FetchToWrite(const void* first, int64_t stride_bytes, int64_t row_count, int64_t bytes)
      : next(static_cast<const char*>(first)), stride(stride_bytes), rows(row_count), last(bytes - 1) {}
  ALWAYS_INLINE void step() {
    if (rows == 0) return;
    __builtin_prefetch(next, 1);
    __builtin_prefetch(next + min_of(64, last), 1);
    __builtin_prefetch(next + min_of(128, last), 1);
    __builtin_prefetch(next + last, 1);
    --rows, next += stride;
  }
};

// The same for packed floats, a line a step.
struct FetchStretch {
  const float* next = nullptr;
  int64_t rows = 0;  // lines

  ALWAYS_INLINE void step() {
    if (rows == 0) return;
    __builtin_prefetch(next, 0, 2);
    --rows, next += 64 / sizeof(float);
  }
};

// Two kinds of work, the first first.
template <class First, class Second>
struct Both {
  First first;
  Second second;

  ALWAYS_INLINE void step() {
    if (first.rows > 0)
      first.step();
    else
      second.step();
  }
};

constexpr int product_rows(int vectors) {
  return vectors == kProductVectors ? kProductRows : vectors == 2 ? 12 : 2 * kProductRows;
}

// The product of `rows` rows with a strip of `vectors` vectors' width.
template <Into kInto, class Operand, class Work>
__attribute__((noinline)) static void product_strip(int64_t rows, int64_t vectors, int64_t depth, Operand left,
                                                    const float* strip, float* tile, int64_t tile_stride,
                                                    Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  if (vectors == kProductVectors)
    product_columns<kInto, product_rows(kProductVectors), kProductVectors>(rows, depth, left, strip, kCols, tile,
                                                                           tile_stride, nullptr, work);
  else if (kProductVectors > 2 && vectors == 2)
    product_columns<kInto, product_rows(2), 2>(rows, depth, left, strip, kCols, tile, tile_stride, nullptr, work);
  else
    product_columns<kInto, product_rows(1), 1>(rows, depth, left, strip, kCols, tile, tile_stride, nullptr, work);
  caller_work = work;
}

// tile (rows, vectors * kLanes) = left (rows, depth) strip, a stretch of the depth at a time. Beside one stretch the
// next is fetched, after the last that of `next_strip` (or null): strips of many features or tokens are not in the
// second-level cache when they come again. So is that of a left operand which is packed like a strip.
template <class Operand, class Work>
static void multiply_strip(Operand left, int64_t rows, int64_t vectors, const float* strip, int64_t depth, float* tile,
                           int64_t tile_stride, Work& work, [[maybe_unused]] const float* next_strip = nullptr) {
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<Operand, BroadcastPairs<Along::kDepth>>)
    return tile_product(left, rows, vectors, depth, strip, kCols, tile, tile_stride, false, 0, tile_parts(depth), work);
#endif
  const int64_t parts = max_of(1, ceil_div(depth, kDepth));
  for (int64_t part = 0, d = 0; part < parts; ++part) {
    const int64_t end = depth * (part + 1) / parts;
    const float* from = strip + d * kCols;
    const bool is_last = part + 1 == parts;
    const int64_t lines = (end - d) * kCols * int64_t{sizeof(float)} / 64;
    Both<FetchStretch, Both<FetchStretch, Work>> ahead{{}, {{}, work}};
    if (!is_last || next_strip != nullptr) ahead.first = {is_last ? next_strip : strip + end * kCols, lines};
    if (!is_last && Operand::kPackedAlong == Along::kRows)
      ahead.second.first = {reinterpret_cast<const float*>(left.depth_from(end).data), lines};
    if (part > 0)
      product_strip<Into::kAdd>(rows, vectors, end - d, left.depth_from(d), from, tile, tile_stride, ahead);
    else
      product_strip<Into::kSet>(rows, vectors, end - d, left.depth_from(d), from, tile, tile_stride, ahead);
    work = ahead.second.second;
    d = end;
  }
}

// tile = or += left strip, for a left operand whose depth is that of strips [first, last) of tokens, each of which has
// its own place: element (r, token c of strip s) is left's (r, c), `next` elements further with every strip.
template <Into kInto, int kRows, int kVectors, class Operand, class Work>
ALWAYS_INLINE static void product_tokens_columns(const Strips& tokens, int64_t first, int64_t last, int64_t per_step,
                                                 int64_t rows, Operand left, int64_t next, const float* strip,
                                                 float* tile, Work& work) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    Operand from = left.rows_from(r);
    const float* column = strip;
    Vec sum[kRows][kVectors] = {};
    for (int64_t s = first; s < last; ++s, from.data += next) {
      const int64_t depth = tokens.lanes(s) / per_step;  // a multiple of 2: strips are whole vectors
      for (int i = 0; i < 4; ++i) work.step();
      for (int64_t d = 0; d < depth; d += 2, column += 2 * kCols)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          Vec vector[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) vector[v] = load_vec(column + i * kCols + v * kLanes);
#pragma GCC unroll 16
          for (int j = 0; j < kRows; ++j) {
            const Vec row = from.at(j, d + i);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sum[j][v] = Operand::multiply_add(row, vector[v], sum[j][v]);
          }
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < kRows; ++j)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        float* to = tile + (r + j) * kCols + v * kLanes;
        store_vec(to, kInto == Into::kAdd ? load_vec(to) + sum[j][v] : sum[j][v]);
      }
  }
  if constexpr (kRows > 1)
    if (r < rows)
      product_tokens_columns<kInto, kRows / 2, kVectors>(tokens, first, last, per_step, rows - r, left.rows_from(r),
                                                         next, strip, tile + r * kCols, work);
}

template <Into kInto, class Operand, class Work>
__attribute__((noinline)) static void product_tokens(const Strips& tokens, int64_t first, int64_t last,
                                                     int64_t per_step, int64_t rows, int64_t vectors, Operand left,
                                                     int64_t next, const float* strip, float* tile, Work& caller_work) {
  Work work = caller_work;
  if (vectors == kProductVectors)
    product_tokens_columns<kInto, product_rows(kProductVectors), kProductVectors>(tokens, first, last, per_step, rows,
                                                                                  left, next, strip, tile, work);
  else if (kProductVectors > 2 && vectors == 2)
    product_tokens_columns<kInto, product_rows(2), 2>(tokens, first, last, per_step, rows, left, next, strip, tile,
                                                      work);
  else
    product_tokens_columns<kInto, product_rows(1), 1>(tokens, first, last, per_step, rows, left, next, strip, tile,
                                                      work);
  caller_work = work;
}

// The same over as many strips as there are, kDepth steps at a time.
template <class Operand, class Work>
static void multiply_tokens(const Strips& tokens, int64_t first, int64_t last, int64_t per_step, int64_t rows,
                            int64_t vectors, Operand left, int64_t next, const float* strip, float* tile, Work& work) {
  constexpr int64_t kTogether = kDepth / kCols;
  const int64_t together = kTogether * per_step;
  for (int64_t s = first; s == first || s < last; s += together) {
    const int64_t end = min_of(last, s + together);
    Operand from = left;
    from.data += (s - first) * next;
    const float* column = strip + (tokens.begin(s) - tokens.begin(first)) / per_step * kCols;
    if (s > first)
      product_tokens<Into::kAdd>(tokens, s, end, per_step, rows, vectors, from, next, column, tile, work);
    else
      product_tokens<Into::kSet>(tokens, s, end, per_step, rows, vectors, from, next, column, tile, work);
  }
}

// to (count) = or += from.
static inline void add_row(const float* from, int64_t count, bool add, float* to) {
  int64_t c = 0;
  for (; c + kLanes <= count; c += kLanes)
    store_vec(to + c, add ? load_vec(to + c) + load_vec(from + c) : load_vec(from + c));
  for (; c < count; ++c) to[c] = add ? to[c] + from[c] : from[c];
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
