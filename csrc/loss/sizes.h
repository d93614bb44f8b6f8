// How a call of linear cross-entropy is divided, forward and backward, and a tile of the weight. All of it follows from
// N, V and E, so that results do not depend on the number of threads.
#pragma once

#include "loss/tiles.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// Strips of tokens packed at a time forward: at most 1,056 tokens, whose copy is at most 4 MiB (or one strip), a share
// of the last-level cache.
constexpr int64_t kMaxForwardStrips = 22;
constexpr int64_t kPackBytes = 4 << 20;

// Rows of the weight per tile are fewer than kTileRows where they would pass half a second-level cache (or, as those of
// many features are not read whole, loss_deep.h, one of 2 MiB).
constexpr int64_t kWeightBytes = (kHasTiles ? 2048 : 512) << 10;

// All the threads' private scratch; where the depth makes it larger, fewer threads work.
constexpr int64_t kThreadBytes = 8 << 20;

// Ranges of the vocabulary: tasks for many threads, statistics of at most 96 x 1,056 tokens (4 MiB).
constexpr int64_t kMaxRanges = 96;
constexpr int64_t kMinRangeRows = 4 * kTileRows;

// What a tile's rows are a multiple of: the height of a product's blocks, and of the squares that LogitGradient
// transposes.
constexpr int64_t kRowUnit = kHasTiles ? 32 : kProductRows;

// Backward: classes in a block, strips of tokens in a chunk (2,112 tokens), and the gradient of their logits. Fewer
// classes for tiles, beside whose products memory counts more: a block's logits that were kept in its rows of the
// gradient of weight are still near when they are written.
constexpr int64_t kMaxClasses = (kHasTiles ? 8 : 14) * kTileRows;
constexpr int64_t kMaxBackwardStrips = 44;
constexpr int64_t kGradientBytes = 4 << 20;
constexpr int64_t kHiddenSumBytes = 32 << 20;

// Of a chunk's tokens packed one way; both ways beyond kPackBytes are at the expense of kHiddenSumBytes. More for
// tiles, to which sums of grad_weight over several chunks are dear: N 1,024, V 32,000, E 4,096 takes 456 ms in one, 601
// in three (docs/tuning.md).
constexpr int64_t kBackwardPackBytes = kHasTiles ? 10 << 20 : kPackBytes;

// Of a block's rows of the weight, in fp32; more where kPackBytes would be few classes: with every block the sums of
// hidden's gradients are read and written (256 classes in place of 1,008, E 4,096: up to 1.2 times the time). Not for
// pairs: E 8,192 then takes 1.3 times as long (docs/tuning.md); nor for fp16, which has sums of hidden's gradients in
// the same 64 MiB.
constexpr int64_t kFewClasses = 7 * kTileRows;
constexpr int64_t kLargePackBytes = 16 << 20;

template <class T>
static int64_t fitting_strips(int64_t E, int64_t most, int64_t bytes, int64_t strips) {
  const int64_t fitting = max_of(1, min_of(most, bytes / (4 * max_of(strip_size<T>(E), 1))));
  return max_of(1, ceil_div(strips, max_of(1, ceil_div(strips, fitting))));  // chunks of about the same size
}

template <class T>
static int64_t forward_strips(int64_t E, int64_t strips) {
  return fitting_strips<T>(E, kMaxForwardStrips, kPackBytes, strips);
}

template <class T>
static int64_t weight_rows(int64_t E) {
  const int64_t bytes = sizeof(typename Operands<T>::Element) * max_of(E, 1);
  const int64_t fitting = kWeightBytes / bytes / kRowUnit * kRowUnit;
  return max_of(kRowUnit, min_of(kTileRows, fitting));
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

// Products read rows of the weight where they lie if they are of the products' type, contiguous, and whole pairs.
template <class T>
static bool is_read_in_place(const LinearCrossEntropyArgs& a, const RowsOf<T>& weight) {
  return sizeof(T) == sizeof(typename Operands<T>::Element) && weight.col_stride == 1 &&
         (!Operands<T>::kPairs || a.weight.size[1] % 2 == 0);
}

// Floats that a thread needs for its copy of a tile's rows.
template <class T>
static int64_t copied_weight_floats(const LinearCrossEntropyArgs& a, const RowsOf<T>& weight, int64_t tile_rows) {
  return is_read_in_place(a, weight) ? 0 : tile_rows * weight_stride(a.weight.size[1]);
}

// One tile's rows of the weight, with their bias and class weights.
template <class T>
struct WeightTile {
  using Element = typename Operands<T>::Element;
  const LinearCrossEntropyArgs& args;
  const RowsOf<T>& weight;
  Element* const copy;  // [kTileRows][weight_stride(E)]
  typename Operands<T>::RowOperand rows;
  int64_t first = 0, count = 0;
  double class_weight_sum = 0.0;
  float bias[kTileRows];
  float class_weight[kTileRows];

  WeightTile(const LinearCrossEntropyArgs& a, const RowsOf<T>& source, float* scratch)
      : args(a), weight(source), copy(reinterpret_cast<Element*>(scratch)), rows{nullptr, 0} {}

  // Without products only what else is known of the rows.
  void load(const Classes& classes, int64_t first_row, int64_t row_count, bool has_products = true) {
    const int64_t E = args.weight.size[1], stride = weight_stride(E);
    first = first_row, count = row_count;
    if (!has_products) {
      rows = {nullptr, 0};
    } else if (is_read_in_place(args, weight)) {
      rows = {reinterpret_cast<const Element*>(weight.row(first)), weight.row_stride};
    } else {
      for (int64_t r = 0; r < count; ++r) {
        copy_row(weight.row(first + r), weight.col_stride, E, copy + r * stride);
        copy[r * stride + E] = Element{};  // the other of a pair
      }
      rows = {copy, stride};
    }
    for (int64_t r = 0; args.bias.defined && r < count; ++r)
      bias[r] = load_any(args.bias, (first + r) * args.bias.stride[0]);
    class_weight_sum = classes.smoothing > 0.0f ? classes.copy(first, count, class_weight) : 0.0;
  }

  // The rows of the next tile, of those before `end`, as far as they are one piece of memory.
  Fetch fetch_next(int64_t tile_rows, int64_t end) const {
    const int64_t E = args.weight.size[1], next = first + count, n = min_of(tile_rows, end - next);
    if (n <= 0 || !is_read_in_place(args, weight) || weight.row_stride != E) return {};
    return {reinterpret_cast<const char*>(weight.row(next)), 128, ceil_div(n * E * sizeof(T), 128)};
  }

  // tile[r * kCols + c] = logit of row first + r and token c of a packed strip of `lanes` tokens.
  template <class Work>
  void logits(const float* strip, int64_t lanes, int64_t E, float* tile, Work& work, const float* next_strip) const {
    multiply_strip(rows, count, lanes / kLanes, strip, Operands<T>::depth(E), tile, kCols, work, next_strip);
    add_bias(lanes, tile);
  }

  void add_bias(int64_t lanes, float* tile) const {
    for (int64_t r = 0; args.bias.defined && r < count; ++r)
      for (int64_t lane = 0; lane < lanes; lane += kLanes)
        store_vec(tile + r * kCols + lane, load_vec(tile + r * kCols + lane) + bias[r]);
  }
};

// How far rows of bf16 that tiles take are apart: whole cache lines, an odd number of them, or many rows would fall
// into the same few lines of a first-level cache.
static inline int64_t tile_stride(int64_t count) { return (ceil_div(count, 32) | 1) * 32; }

// Of the fp32 sums of hidden's gradients, rows apart; beside products of tiles likewise (those of vectors are as fast).
static inline int64_t sum_stride(int64_t E) { return kHasTiles ? (ceil_div(E, kLanes) | 1) * kLanes : max_of(E, 1); }

// What a gradient tile needs of its tokens, lane by lane.
struct TokenSlopes {
  alignas(64) float p[kCols], all[kCols], lse[kCols], lse_low[kCols];
  int64_t row[kCols], label[kCols];  // row -1 and label -1 in unused lanes

  void load(const LinearCrossEntropyArgs& a, const Classes& classes, const int64_t* rows, int64_t count) {
    for (int c = 0; c < kCols; ++c) {
      p[c] = all[c] = lse_low[c] = 0.0f;
      lse[c] = 1e30f;  // probability 0, whatever the bias
      row[c] = label[c] = -1;
      if (c >= count) continue;
      const Slopes slopes(a, classes, rows[c]);
      p[c] = slopes.p, all[c] = slopes.all;
      lse[c] = at<float>(a.lse, rows[c]), lse_low[c] = at<float>(a.lse_low, rows[c]);
      row[c] = rows[c], label[c] = at<int64_t>(a.target, rows[c]);
    }
  }
  bool any_label(int64_t first, int64_t rows) const {
    int64_t found = 0;
    for (int c = 0; c < kCols; ++c) found |= label[c] >= first && label[c] < first + rows;
    return found != 0;
  }
};

// How the backward pass is divided.
template <class T>
struct BackwardSizes {
  int64_t tile_rows;  // of the weight
  int64_t strips;     // of tokens in a chunk
  int64_t classes;    // in a block
  int64_t group;      // strips of tokens whose 16-bit gradients are summed in one pass

  static constexpr int64_t kElementBytes = sizeof(typename Operands<T>::Element);

  static BackwardSizes of(int64_t tokens, int64_t E, int64_t V) {
    const int64_t all = Strips(tokens).count;
    BackwardSizes s;
    s.tile_rows = weight_rows<T>(E);
    s.strips = fitting_strips<T>(E, kMaxBackwardStrips, kBackwardPackBytes, all);
    const int64_t row_bytes = kElementBytes * max_of(E, 1);
    const bool are_few = sizeof(T) == sizeof(float) && kPackBytes / row_bytes < kFewClasses;
    const int64_t fitting =
        min_of(kGradientBytes / (4 * kCols * s.strips), (are_few ? kLargePackBytes : kPackBytes) / row_bytes);
    const int64_t tiles = max_of(1, min_of(kMaxClasses, fitting) / s.tile_rows);
    s.classes = s.tile_rows * min_of(tiles, ceil_div(V, s.tile_rows));
    const int64_t beyond = max_of(0, 4 * s.strips * strip_size<T>(E) - kPackBytes);
    s.group = max_of(1, (kHiddenSumBytes - 2 * beyond) / (4 * kCols * sum_stride(E)) / s.strips) * s.strips;
    return s;
  }
  // Scratch of a call that computes all gradients, without what threads have for themselves.
  int64_t bytes(int64_t tokens, int64_t E, bool keeps_in_gradient) const {
    const int64_t columns = Strips(E).count, all = Strips(tokens).count;
    const bool sums_hidden = sizeof(T) != sizeof(float),
               sums_weight = strips < all && (sums_hidden || keeps_in_gradient);
    const int64_t floats = strips * strip_size<T>(E) + (token_column_floats() + weight_column_floats()) * columns +
                           gradient_floats() + classes * strips +
                           (sums_hidden ? min_of(group, all) * kCols * sum_stride(E) : 0) +
                           (sums_weight ? classes * E : 0);
    return 4 * floats + strips * int64_t{sizeof(TokenSlopes)};
  }
  // Of the logits: two forms of it with bf16, in half the bytes.
  int64_t gradient_floats() const {
    const int64_t lanes = strips * kCols;
    return kHasTiles ? (classes * tile_stride(lanes) + lanes * tile_stride(classes)) / 2 : classes * lanes;
  }
  // A strip of features, of a block's classes or a chunk's tokens.
  int64_t weight_column_floats() const { return strip_size<T>(classes); }
  int64_t token_column_floats() const { return strip_size<T>(strips * kCols); }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
