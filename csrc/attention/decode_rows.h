// Few rows of queries against a chunk of keys, as decode.h has them: scores, what is added to or hidden of
// them, a step of the online softmax, and the product with the values. Memory is asked for ahead of every loop.
#pragma once

#include <cmath>

#include "attention/scores.h"
#include "product/packing.h"
#include "product/register_tile.h"
#include "simd/slice.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

// Keys of a chunk: up to so many blocks of kKeys keys, leaving out those that no row sees.
constexpr int kChunkBlocks = 4, kChunkKeys = kChunkBlocks * kKeys;

// How far ahead rows are asked for, in bytes and then in rows; and how far ahead one line of each page that they reach.
// A processor that has to look up where a page lies keeps later requests waiting: with pages of 4 kB, one early line of
// each takes a core from 24 to 34 GB/s of 40, as far as pages of 2 MB do.
constexpr int64_t kAheadBytes = 8192, kPageAheadBytes = 24576;
constexpr int kMaxAhead = kChunkKeys;

struct Ahead {
  int64_t rows, pages;

  explicit Ahead(int64_t row_bytes)
      : rows(clamp(kAheadBytes / max_of(1, row_bytes), kLanes, kMaxAhead)),
        pages(clamp(kPageAheadBytes / max_of(1, row_bytes), kLanes, kMaxAhead)) {}
};

template <class T>
struct KeyChunk {
  int blocks = 0;
  int64_t n = 0, padded = 0;  // keys; the same up to whole vectors
  int64_t first[kChunkBlocks];
  Cover cover[kChunkBlocks];
  // The rows of `padded` keys, of their values, and of the next chunk's first keys. Behind n the last one is repeated.
  const T* rows[2 * kChunkKeys + kMaxAhead];

  const T* const* keys() const { return rows; }
  const T* const* values() const { return rows + padded; }
  int64_t keys_of(int i) const { return min_of(kKeys, n - i * kKeys); }

  // Collects the blocks from key *j on, short of `end`, and moves *j behind them.
  void collect(const QueryBlock& block, int64_t* j, int64_t end) {
    const AttentionArgs& a = *block.args;
    blocks = 0, n = 0;
    for (; *j < end && blocks < kChunkBlocks; *j += kKeys) {
      const int64_t count = min_of(kKeys, end - *j);
      const KeyIds documents(a.key_documents, block.sequence, *j, count);
      const KeyIds images(a.key_images, block.sequence, *j, count);
      cover[blocks] = cover_of(block, *j, count, documents, images);
      if (cover[blocks] == Cover::kNone) continue;
      first[blocks++] = *j;
      n += count;
    }
    padded = round_up(n, kLanes);
    find(a.k, block, rows);
    find(a.v, block, rows + padded);
  }

  // The rows of these keys in k or v; pages may lie anywhere.
  void find(const View& view, const QueryBlock& block, const T** to) const {
    const AttentionArgs& a = *block.args;
    const Sequence& sequence = block.sequence;
    const T* head = static_cast<const T*>(view.data) + block.kv_head * view.stride[1];
    for (int i = 0; i < blocks; ++i) {
      const int64_t count = keys_of(i);
      const T** at = to + i * kKeys;
      if (a.block_table.defined) {
        const int64_t page = view.size[2];
        const int32_t* table = static_cast<const int32_t*>(a.block_table.data) + sequence.b * a.block_table.stride[0];
        int64_t entry = first[i] / page, slot = first[i] % page;
        for (int64_t c = 0; c < count; ++entry, slot = 0) {
          // Python checked these; clamped, a later change of the table cannot lead out of the pool.
          const int64_t index = clamp(table[entry * a.block_table.stride[1]], 0, view.size[0] - 1);
          for (; slot < page && c < count; ++slot, ++c) at[c] = head + index * view.stride[0] + slot * view.stride[2];
        }
      } else {
        const T* row = head + sequence.batch * view.stride[0] + (sequence.key0 + first[i]) * view.stride[2];
        for (int64_t c = 0; c < count; ++c) at[c] = row + c * view.stride[2];
      }
    }
    for (int64_t c = n; c < padded; ++c) to[c] = to[n - 1];
  }

  // Lets the last rows look ahead to the next chunk's.
  void look_ahead(const KeyChunk& next, Ahead ahead) {
    const T** to = rows + 2 * padded;
    for (int64_t c = 0; c < ahead.pages; ++c) to[c] = next.n == 0 ? to[-1] : next.rows[min_of(c, next.n - 1)];
  }
};

// Asks for the row that far behind *row, of `size` elements, and for a line of a later row that begins on another page
// than the one before.
template <class T>
ALWAYS_INLINE static void prefetch(const T* const* row, Ahead ahead, int64_t size) {
  for (int64_t i = 0; i < size; i += 64 / sizeof(T)) __builtin_prefetch(row[ahead.rows] + i);
  const auto page = [](const T* element) { return reinterpret_cast<uintptr_t>(element) / 4096; };
  if (page(row[ahead.pages]) != page(row[ahead.pages - 1])) __builtin_prefetch(row[ahead.pages]);
}

// scores[row][c] = scale * row . key c, for kRows rows and kLanes / kRows keys. Each key is read to its end before the
// next: the processor's own prefetching follows lines in order; a bare reading loop over four rows in step ran at half
// the rate.
template <class T, int kRows, bool kPrefetch>
static inline void score_tile(const T* const* keys, Ahead ahead, const typename Dot<T>::Part* rows, int64_t D,
                              float scale, float* scores) {
  constexpr int kTileKeys = kLanes / kRows;
  const int64_t whole = D / kSlice, parts = ceil_div(D, kSlice);
  const int tail = static_cast<int>(D % kSlice);
  Vec sums[kLanes];  // [row][key]
#pragma GCC unroll 16
  for (int c = 0; c < kTileKeys; ++c) {
    Vec sum[kRows] = {};
    const auto add = [&](int64_t i, typename Dot<T>::Part key) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sum[r] = Dot<T>::multiply_add(key, rows[r * parts + i], sum[r]);
    };
    if (kPrefetch) prefetch(keys + c, ahead, D);
    for (int64_t i = 0; i < whole; ++i) add(i, Dot<T>::load(keys[c] + i * kSlice));
    if (tail != 0) add(whole, Dot<T>::load(keys[c] + whole * kSlice, tail));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) sums[r * kTileKeys + c] = sum[r];
  }
  const Vec products = sums_of(sums) * scale;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
    std::memcpy(scores + r * kChunkKeys, reinterpret_cast<const float*>(&products) + r * kTileKeys,
                kTileKeys * sizeof(float));
}

// The most rows whose dot products share a tile.
constexpr int kScoreRows = kLanes / 4;

template <class T>
static void score_chunk(const KeyChunk<T>& chunk, Ahead ahead, const typename Dot<T>::Part* rows, int64_t count,
                        const AttentionArgs& a, float* scores) {
  const int64_t D = a.q.size[3], parts = ceil_div(D, kSlice);
  for (int64_t c = 0; c < chunk.n; c += kLanes) {
    int64_t r = 0;
    const auto tiles = [&](auto rows_of_tile) {
      constexpr int kRows = decltype(rows_of_tile)::kValue;
      for (; r + kRows <= count; r += kRows)
        for (int64_t i = c; i < c + kLanes; i += kLanes / kRows) {
          const T* const* keys = chunk.keys() + i;
          float* to = scores + r * kChunkKeys + i;
          if (r == 0)
            score_tile<T, kRows, true>(keys, ahead, rows, D, a.scale, to);
          else
            score_tile<T, kRows, false>(keys, ahead, rows + r * parts, D, a.scale, to);
        }
    };
    if constexpr (kScoreRows >= 4) tiles(Constant<4>{});
    if constexpr (kScoreRows >= 2) tiles(Constant<2>{});
    tiles(Constant<1>{});
  }
}

// Vectors of sums that a tile of rows x slices of V keeps in registers, with room for a slice of V and a weight.
constexpr int kValueSlices = kLanes == 16 ? 8 : 4;
// Bytes of V that all rows meet before the next: few, so that memory is asked for all the time.
constexpr int64_t kValueBytes = 4096;

// What a few values need: n rows of V, the weights of their keys, [row][kChunkKeys], and what they are added to,
// out[row] = out[row] alpha[row] + the sum over keys c of weights[row][c] values[c].
template <class T>
struct ValueBlock {
  const T* const* values;
  int64_t n, Dv;
  Ahead ahead;
  const float *weights, *alpha;
  float* out;
  int64_t out_stride;
};

// Slices [i, i + kSlices) of kRows rows; the products of a block are added up on their own first. kWhole: all of these
// slices are.
template <class T, int kRows, int kSlices, bool kWhole, bool kPrefetch>
static inline void value_tile(const ValueBlock<T>& block, int64_t i) {
  const int tail = static_cast<int>(block.Dv - i * kSlice);
  const T *const *row = block.values, *const *end = row + block.n;
  const float* weights = block.weights;
  const Ahead ahead = block.ahead;
  Vec sum[kRows][2 * kSlices] = {};
  for (; row < end; ++row, ++weights) {
    const T* value = *row + i * kSlice;
    if (kPrefetch && i == 0) prefetch(row, ahead, block.Dv);
    Slice slice[kSlices];
#pragma GCC unroll 8
    for (int s = 0; s < kSlices; ++s)
      slice[s] = kWhole ? load_slice(value + s * kSlice) : load_slice(value + s * kSlice, tail);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * kChunkKeys]);
#pragma GCC unroll 8
      for (int s = 0; s < kSlices; ++s) {
        sum[r][2 * s] = mul_add(weight, slice[s].low, sum[r][2 * s]);
        sum[r][2 * s + 1] = mul_add(weight, slice[s].high, sum[r][2 * s + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2 * kSlices; ++v) {
      float* to = block.out + r * block.out_stride + i * kSlice + v * kLanes;
      store_vec(to, mul_add(load_vec(to), broadcast(block.alpha[r]), sum[r][v]));
    }
}

// The same for all slices from i on, the widest tiles first.
template <class T, int kRows, int kSlices, bool kPrefetch>
static inline void value_tiles(const ValueBlock<T>& block, int64_t i) {
  for (; (i + kSlices) * kSlice <= block.Dv; i += kSlices) value_tile<T, kRows, kSlices, true, kPrefetch>(block, i);
  if constexpr (kSlices > 1)
    value_tiles<T, kRows, kSlices / 2, kPrefetch>(block, i);
  else if (i * kSlice < block.Dv)
    value_tile<T, kRows, 1, false, kPrefetch>(block, i);
}

// Four rows at a time where registers hold their sums for a whole row of V, two for wider ones: fewer passes over V's
// rows for the processor's own prefetching, which follows lines in order.
template <class T>
static void add_values(ValueBlock<T> block, int64_t count) {
  bool is_first = true;
  const int64_t slices = ceil_div(block.Dv, kSlice);
  const auto tiles = [&](auto rows_of_tile) {
    constexpr int kRows = decltype(rows_of_tile)::kValue;
    if (kRows > 2 && sizeof(T) == 4 && slices > kValueSlices / kRows) return;
    for (; count >= kRows; count -= kRows, is_first = false) {
      is_first ? value_tiles<T, kRows, kValueSlices / kRows, true>(block, 0)
               : value_tiles<T, kRows, kValueSlices / kRows, false>(block, 0);
      block.weights += kRows * kChunkKeys, block.alpha += kRows, block.out += kRows * block.out_stride;
    }
  };
  tiles(Constant<4>{});
  tiles(Constant<2>{});
  tiles(Constant<1>{});
}

// The scores of all rows; those behind the chunk's last key become -inf.
template <class T>
static void finish_chunk(const QueryBlock& block, const KeyChunk<T>& chunk, int64_t count, float* scores) {
  const AttentionArgs& a = *block.args;
  for (int i = 0; i < chunk.blocks; ++i) {
    const bool is_part = chunk.cover[i] == Cover::kPart;
    if (!is_part && !has_terms(a)) continue;
    const int64_t j0 = chunk.first[i], n = chunk.keys_of(i);
    BlockIds ids;
    if (is_part) ids.copy({a.key_documents, block.sequence, j0, n}, {a.key_images, block.sequence, j0, n}, n);
    for (int64_t r = 0; r < count; ++r)
      finish_row(block, r, j0, n, is_part ? &ids : nullptr, scores + r * kChunkKeys + i * kKeys);
  }
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = chunk.n; c < chunk.padded; ++c) scores[r * kChunkKeys + c] = -kInfinity;
}

// A step of the online softmax of one row: scores become weights relative to the new maximum; returns what the row's
// earlier sums are to be multiplied by.
static inline float softmax_row(int64_t n, float* scores, float* maximum, Vec* sum) {
  const float before = *maximum;
  Vec largest = broadcast(before);  // a NaN never wins, and makes its weight and with it the sum NaN below
  for (int64_t c = 0; c < n; c += kLanes) {
    const Vec score = load_vec(scores + c);
    largest = score > largest ? score : largest;
  }
  *maximum = largest_of(largest);
  const float base = *maximum == -kInfinity ? 0.0f : *maximum;  // nothing seen so far: exp(-inf - 0) = 0
  const float alpha = exp(before - base);
  Vec total = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const Vec weight = exp2((load_vec(scores + c) - base) * kLog2E);
    total += weight;
    store_vec(scores + c, weight);
  }
  *sum = mul_add(*sum, broadcast(alpha), total);
  return alpha;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
