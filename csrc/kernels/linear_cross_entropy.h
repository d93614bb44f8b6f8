// Cross-entropy of logits = hidden @ weight^T + bias that are never written whole: forward here, backward in
// linear_cross_entropy_backward.h.
//
// Tokens stand in the lanes. Up to kMaxTokens counted tokens (ignored rows are dropped first) are packed
// once, shared by all threads; a task takes a range of the vocabulary, kTileRows rows of the weight at a
// time, and turns each tile of logits (kTileRows x kCols, in first-level cache) into the running statistics
// of kernels/loss.h: no horizontal sums. The ranges' statistics are merged in the order of the vocabulary. 2
// N V E flops; bytes: the weight once per kMaxTokens tokens, hidden once.
//
// Ranges, tiles and depths follow from N, V and E alone, and every sum has one thread, so results do not
// depend on how many threads there are. Scratch is at most kForwardBytes beside per-token scalars.
#pragma once

#include <omp.h>

#include "args.h"
#include "kernels/loss_tiles.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// Tokens packed at a time: their fp32 copy is at most 4 MiB (or one strip), a share of the last-level cache.
constexpr int64_t kMaxTokens = 1024;
constexpr int64_t kPackBytes = 4 << 20;

// Rows of the weight per tile are fewer than kTileRows where their copy would pass half a second-level
// cache.
constexpr int64_t kWeightBytes = 512 << 10;

// All the threads' private scratch; where the depth makes it larger, fewer threads work.
constexpr int64_t kThreadBytes = 16 << 20;

// Ranges of the vocabulary: tasks for many threads, statistics of at most 256 x 1024 tokens (9 MiB).
constexpr int64_t kMaxRanges = 256;
constexpr int64_t kMinRangeRows = 256;

static inline int64_t tokens_per_chunk(int64_t E) {
  const int64_t fitting = min_of(kMaxTokens, kPackBytes / (4 * max_of(E, 1)));
  return max_of(kCols, fitting / kCols * kCols);
}

template <class T>
static int64_t weight_rows(int64_t E) {
  const int64_t bytes = sizeof(typename Operands<T>::Element) * max_of(E, 1);
  const int64_t fitting = kWeightBytes / bytes / kProductRows * kProductRows;
  return max_of(kProductRows, min_of(kTileRows, fitting));
}

// Of a copied row: not a power of two, or all rows would fall into the same few lines of a first-level cache.
static inline int64_t weight_stride(int64_t E) { return round_up(E, 16) + 16; }

static inline int team_size(int threads, int64_t floats_per_thread) {
  const int64_t fitting = kThreadBytes / (4 * max_of(floats_per_thread, 1));
  return static_cast<int>(max_of(1, min_of(threads, fitting)));
}

// The rows that count, in order.
struct Counted {
  Buffer<int64_t> rows;
  int64_t count = 0, rows_of_call;

  template <class Args>
  Counted(const Args& a, const Classes& classes, int64_t N) : rows(N), rows_of_call(N) {
    for (int64_t row = 0; row < N; ++row)
      if (classes.counted(at<int64_t>(a.target, row))) rows[count++] = row;
  }
};

// One tile's rows of the weight: copied, with their bias and class weights.
template <class T>
struct WeightTile {
  using Element = typename Operands<T>::Element;
  Element* rows;  // [kTileRows][weight_stride(E)]
  int64_t first, count;
  double class_weight_sum;
  bool has_bias;
  float bias[kTileRows];
  float class_weight[kTileRows];

  void load(const LinearCrossEntropyArgs& a, const RowsOf<T>& weight, const Classes& classes, int64_t first_row,
            int64_t row_count) {
    const int64_t E = a.weight.size[1], stride = weight_stride(E);
    first = first_row, count = row_count, has_bias = a.bias.defined;
    for (int64_t r = 0; r < count; ++r) {
      copy_row(weight.row(first + r), weight.col_stride, E, rows + r * stride);
      rows[r * stride + E] = Element{};  // the other of a pair
      bias[r] = has_bias ? load_any(a.bias, (first + r) * a.bias.stride[0]) : 0.0f;
    }
    class_weight_sum = classes.smoothing > 0.0f ? classes.copy(first, count, class_weight) : 0.0;
  }

  // tile[r * kCols + c] = logit of row first + r and token c of a packed strip.
  void logits(const float* strip, int64_t E, float* tile) const {
    multiply_strip(typename Operands<T>::RowOperand{rows, weight_stride(E)}, count, strip, Operands<T>::depth(E), false,
                   tile, kCols);
    for (int64_t r = 0; has_bias && r < count; ++r)
      for (int c = 0; c < kCols; ++c) tile[r * kCols + c] += bias[r];
  }
};

// Statistics of a strip of tokens over a range of the vocabulary, token by lane.
struct alignas(64) Lanes {
  float best[kCols], origin[kCols];
  int64_t argmax[kCols];
  double sum[kCols], deviation[kCols];

  void clear() {
    for (int c = 0; c < kCols; ++c) {
      best[c] = -kInfinity, origin[c] = 0.0f, argmax[c] = 0;
      sum[c] = 0.0, deviation[c] = 0.0;
    }
  }

  // Takes in the logits of `rows` classes, the first of them `first`; leaves z in the tile. `weight_before`
  // is the sum of the class weights taken in so far.
  void take(float* tile, int64_t first, int64_t rows, const float* class_weight, double weight_before, const Cap& cap,
            bool smoothing) {
    alignas(64) float largest[kCols], moved[kCols], tile_sum[kCols];
    for (int lane = 0; lane < kCols; lane += kLanes) store_vec(largest + lane, largest_of(tile + lane, rows));
    // A tile seldom has a new largest logit once some have passed, and only then is it looked for.
    for (int c = 0; c < kCols; ++c) {
      if (!(largest[c] > best[c])) continue;
      int64_t row = 0;
      while (tile[row * kCols + c] != largest[c]) ++row;
      argmax[c] = first + row;
    }
    if (cap.active())
      for (int64_t i = 0; i < rows * kCols; ++i) tile[i] = cap.softcap * tanh(tile[i] * cap.inverse);
    for (int c = 0; c < kCols; ++c) {
      const float before = cap(best[c]);
      best[c] = largest[c] > best[c] ? largest[c] : best[c];
      moved[c] = origin_of(cap(best[c]));
      sum[c] *= rescale(before, origin[c], moved[c]);
    }
    for (int lane = 0; lane < kCols; lane += kLanes)
      store_vec(tile_sum + lane, sum_of_exponentials(tile + lane, rows, load_vec(moved + lane)));
    for (int c = 0; c < kCols; ++c) sum[c] += tile_sum[c];
    if (smoothing) {
      float shift[kCols] = {};
      for (int64_t r = 0; r < rows; ++r)
        for (int c = 0; c < kCols; ++c) shift[c] += class_weight[r] * (tile[r * kCols + c] - moved[c]);
      for (int c = 0; c < kCols; ++c)
        deviation[c] += weight_before * (static_cast<double>(origin[c]) - moved[c]) + shift[c];
    }
    for (int c = 0; c < kCols; ++c) origin[c] = moved[c];
  }

  Statistics of(int c, double weight) const {
    Statistics s;
    s.best = best[c], s.argmax = argmax[c], s.origin = origin[c];
    s.sum = sum[c], s.weight = weight, s.deviation = deviation[c];
    return s;
  }

 private:
  static constexpr int kChains = 4;  // independent of each other, so that none waits for its own last step

  static Vec largest_of(const float* tile, int64_t rows) {
    Vec largest[kChains];
    for (Vec& x : largest) x = broadcast(-kInfinity);
    int64_t r = 0;
    for (; r + kChains <= rows; r += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) largest[i] = max(load_vec(tile + (r + i) * kCols), largest[i]);
    for (; r < rows; ++r) largest[0] = max(load_vec(tile + r * kCols), largest[0]);
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }

  static Vec sum_of_exponentials(const float* tile, int64_t rows, Vec origin) {
    Vec sum[kChains] = {};
    int64_t r = 0;
    for (; r + kChains <= rows; r += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) sum[i] += exp2((load_vec(tile + (r + i) * kCols) - origin) * kLog2E);
    for (; r < rows; ++r) sum[0] += exp2((load_vec(tile + r * kCols) - origin) * kLog2E);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
};

template <class T>
static void linear_forward(const LinearCrossEntropyArgs& a, int threads) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Cap cap(a.softcap);
  const Counted counted(a, classes, N);
  for (int64_t row = 0; row < N; ++row)
    if (!classes.counted(at<int64_t>(a.target, row))) write_uncounted_row(a, classes, row);
  if (counted.count == 0) return;

  const RowsOf<T> weight(a.weight, nullptr), hidden(a.hidden, counted.rows.get());
  const int64_t chunk = min_of(tokens_per_chunk(E), round_up(counted.count, kCols)), strips = chunk / kCols;
  const int64_t tile_rows = weight_rows<T>(E), thread_floats = tile_rows * weight_stride(E);
  const int64_t range_rows = round_up(max_of(kMinRangeRows, ceil_div(V, kMaxRanges)), tile_rows);
  const int64_t ranges = ceil_div(V, range_rows);
  const int team = team_size(threads, thread_floats);
  const Buffer<float> packed(strips * strip_size<T>(E)), scratch(team * thread_floats), target_z(chunk);
  const Buffer<Lanes> partial(ranges * strips);
  const Buffer<double> range_weight(ranges);
  const bool smoothing = classes.smoothing > 0.0f;

#pragma omp parallel num_threads(team)
  for (int64_t n = 0; n < counted.count; n += chunk) {
    const int64_t tokens = min_of(chunk, counted.count - n), used = ceil_div(tokens, kCols);
    pack_tokens_by_team(hidden, n, tokens, E, packed.get());
#pragma omp for schedule(dynamic, 1)
    for (int64_t range = 0; range < ranges; ++range) {
      Lanes* lanes = partial.get() + range * strips;
      for (int64_t s = 0; s < used; ++s) lanes[s].clear();
      WeightTile<T> rows;
      rows.rows =
          reinterpret_cast<typename WeightTile<T>::Element*>(scratch.get() + omp_get_thread_num() * thread_floats);
      double weight_before = 0.0;
      const int64_t end = min_of(V, (range + 1) * range_rows);
      for (int64_t v = range * range_rows; v < end; v += tile_rows) {
        rows.load(a, weight, classes, v, min_of(tile_rows, end - v));
        for (int64_t s = 0; s < used; ++s) {
          alignas(64) float tile[kTileRows * kCols];
          rows.logits(packed.get() + s * strip_size<T>(E), E, tile);
          lanes[s].take(tile, v, rows.count, rows.class_weight, weight_before, cap, smoothing);
          for (int64_t c = 0; c < min_of(kCols, tokens - s * kCols); ++c) {
            const int64_t r = at<int64_t>(a.target, counted.rows[n + s * kCols + c]) - v;
            if (r >= 0 && r < rows.count) target_z[s * kCols + c] = tile[r * kCols + c];
          }
        }
        weight_before += rows.class_weight_sum;
      }
      range_weight[range] = weight_before;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tokens; ++i) {
      Statistics total;
      for (int64_t range = 0; range < ranges; ++range)
        total.merge(partial[range * strips + i / kCols].of(static_cast<int>(i % kCols), range_weight[range]), cap);
      write_counted_row(a, classes, counted.rows[n + i], total, target_z[i]);
    }
  }
}

}  // namespace loss

static void linear_cross_entropy_forward(const LinearCrossEntropyArgs& a, int threads) {
  loss::with_float(a.hidden.dtype, [&](auto zero) { loss::linear_forward<decltype(zero)>(a, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA

#include "kernels/linear_cross_entropy_backward.h"
