// How a call of linear cross-entropy is divided, forward and backward, and a tile of the weight. All of it follows from
// N, V and E, so that results do not depend on the number of threads.
#pragma once

#include "loss/loss.h"
#include "product/strips.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// 72 rows divide by the heights of the register tiles of every width (8, 12; 6, 12 with AVX2), and such a tile of a
// strip is 14 KiB with AVX-512. AMX takes blocks of 32: 64 to 192 rows are equally fast.
constexpr int64_t kTileRows = kHasAmx ? 96 : 72;

// Strips of columns in a task: twice the reuse for AMX tiles, whose products are faster than a third-level cache (4 to
// 5% of a call with gradients).
constexpr int64_t kTaskStrips = kHasAmx ? 4 : 2;

// Strips of tokens packed at a time forward: at most 1,056 tokens, whose copy is at most 4 MiB (or one strip), a share
// of the last-level cache.
constexpr int64_t kMaxForwardStrips = 22;
constexpr int64_t kPackBytes = 4 << 20;

// Rows of the weight per tile are fewer than kTileRows where they would pass half a second-level cache (or, as those of
// many features are not read whole, deep.h, one of 2 MiB).
constexpr int64_t kWeightBytes = (kHasAmx ? 2048 : 512) << 10;

// All the threads' private scratch; where the depth makes it larger, fewer threads work.
constexpr int64_t kThreadBytes = 8 << 20;

// Ranges of the vocabulary: tasks for many threads, statistics of at most 96 x 1,056 tokens (4 MiB).
constexpr int64_t kMaxRanges = 96;
constexpr int64_t kMinRangeRows = 4 * kTileRows;

// What a tile's rows are a multiple of: the height of a product's blocks, and of the squares that LogitGradient
// transposes.
constexpr int64_t kRowMultiple = kHasAmx ? 32 : kProductRows;

// Backward: classes in a block, strips of tokens in a block (2,112 tokens), and the gradient of their logits. Fewer
// classes for AMX, beside whose products memory counts more: a block's logits that were kept in its rows of the
// gradient of weight are still near when they are written.
constexpr int64_t kMaxClasses = (kHasAmx ? 8 : 14) * kTileRows;
constexpr int64_t kMaxBackwardStrips = 44;
constexpr int64_t kGradientBytes = 4 << 20;
constexpr int64_t kHiddenSumBytes = 32 << 20;

// Of a block's tokens packed one way; both ways beyond kPackBytes are at the expense of kHiddenSumBytes. More for
// AMX, to which sums of grad_weight over several blocks are dear: N 1,024, V 32,000, E 4,096 takes 456 ms in one, 601
// in three (docs/notes/2026-11-linear-loss-amx.md).
constexpr int64_t kBackwardPackBytes = kHasAmx ? 10 << 20 : kPackBytes;

// Of a block's rows of the weight, in fp32; more where kPackBytes would be few classes: with every block the sums of
// hidden's gradients are read and written (256 classes in place of 1,008, E 4,096: up to 1.2 times the time). Not for
// pairs: E 8,192 then takes 1.3 times as long (docs/notes/2026-11-linear-loss-fp32-xeon.md); nor for fp16, which has
// sums of hidden's gradients in the same 64 MiB.
constexpr int64_t kFewClasses = 7 * kTileRows;
constexpr int64_t kLargePackBytes = 16 << 20;

template <class T>
static int64_t fitting_strips(int64_t E, int64_t most, int64_t bytes, int64_t strips) {
  const int64_t fitting = max_of(1, min_of(most, bytes / (4 * max_of(strip_size<T>(E), 1))));
  return max_of(1, ceil_div(strips, max_of(1, ceil_div(strips, fitting))));  // blocks of about the same size
}

template <class T>
static int64_t forward_strips(int64_t E, int64_t strips) {
  return fitting_strips<T>(E, kMaxForwardStrips, kPackBytes, strips);
}

template <class T>
static int64_t weight_rows(int64_t E) {
  const int64_t bytes = sizeof(typename Operands<T>::Element) * max_of(E, 1);
  const int64_t fitting = kWeightBytes / bytes / kRowMultiple * kRowMultiple;
  return max_of(kRowMultiple, min_of(kTileRows, fitting));
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
        copy_elements(weight.row(first + r), weight.col_stride, E, copy + r * stride);
        copy[r * stride + E] = Element{};  // the other of a pair
      }
      rows = {copy, stride};
    }
    for (int64_t r = 0; args.bias.defined && r < count; ++r)
      bias[r] = load_any(args.bias, (first + r) * args.bias.stride[0]);
    class_weight_sum = classes.smoothing > 0.0f ? classes.copy(first, count, class_weight) : 0.0;
  }

  // The rows of the next tile, of those before `end`, as far as they are contiguous.
  Memory next_tile(int64_t tile_rows, int64_t end) const {
    const int64_t E = args.weight.size[1], next = first + count, n = min_of(tile_rows, end - next);
    if (n <= 0 || !is_read_in_place(args, weight) || weight.row_stride != E) return {};
    return Memory::of(weight.row(next), n * E * int64_t{sizeof(T)});
  }

  // tile[r * kStripCols + c] = logit of row first + r and token c of a packed strip of `lanes` tokens.
  template <class Work>
  void logits(const float* strip, int64_t lanes, int64_t E, float* tile, Work& work, const float* next_strip) const {
    multiply_strip(rows, count, lanes / kLanes, strip, Operands<T>::depth(E), tile, kStripCols, work, next_strip);
    add_bias(lanes, tile);
  }

  void add_bias(int64_t lanes, float* tile) const {
    for (int64_t r = 0; args.bias.defined && r < count; ++r)
      for (int64_t lane = 0; lane < lanes; lane += kLanes)
        store_vec(tile + r * kStripCols + lane, load_vec(tile + r * kStripCols + lane) + bias[r]);
  }
};

// Of the fp32 sums of hidden's gradients, rows apart; beside products of AMX tiles likewise (those of vectors are as
// fast).
static inline int64_t sum_stride(int64_t E) { return kHasAmx ? (ceil_div(E, kLanes) | 1) * kLanes : max_of(E, 1); }

// What a gradient tile needs of its tokens, lane by lane.
struct TokenSlopes {
  alignas(64) float p[kStripCols], all[kStripCols], lse[kStripCols], lse_low[kStripCols];
  int64_t row[kStripCols], label[kStripCols];  // row -1 and label -1 in unused lanes

  void load(const LinearCrossEntropyArgs& a, const Classes& classes, const int64_t* rows, int64_t count) {
    for (int c = 0; c < kStripCols; ++c) {
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
    for (int c = 0; c < kStripCols; ++c) found |= label[c] >= first && label[c] < first + rows;
    return found != 0;
  }
};

// How the backward pass is divided.
template <class T>
struct BackwardSizes {
  int64_t tile_rows;  // of the weight
  int64_t strips;     // of tokens in a block
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
        min_of(kGradientBytes / (4 * kStripCols * s.strips), (are_few ? kLargePackBytes : kPackBytes) / row_bytes);
    const int64_t tiles = max_of(1, min_of(kMaxClasses, fitting) / s.tile_rows);
    s.classes = s.tile_rows * min_of(tiles, ceil_div(V, s.tile_rows));
    const int64_t beyond = max_of(0, 4 * s.strips * strip_size<T>(E) - kPackBytes);
    s.group = max_of(1, (kHiddenSumBytes - 2 * beyond) / (4 * kStripCols * sum_stride(E)) / s.strips) * s.strips;
    return s;
  }
  // Scratch of a call that computes all gradients, without what threads have for themselves.
  int64_t bytes(int64_t tokens, int64_t E, bool keeps_in_gradient) const {
    const int64_t columns = Strips(E).count, all = Strips(tokens).count;
    const bool sums_hidden = sizeof(T) != sizeof(float),
               sums_weight = strips < all && (sums_hidden || keeps_in_gradient);
    const int64_t floats = strips * strip_size<T>(E) + (token_column_floats() + weight_column_floats()) * columns +
                           gradient_floats() + classes * strips +
                           (sums_hidden ? min_of(group, all) * kStripCols * sum_stride(E) : 0) +
                           (sums_weight ? classes * E : 0);
    return 4 * floats + strips * int64_t{sizeof(TokenSlopes)};
  }
  // Of the logits: two forms of it with bf16, in half the bytes.
  int64_t gradient_floats() const {
    const int64_t lanes = strips * kStripCols;
    return kHasAmx ? (classes * amx_stride(lanes) + lanes * amx_stride(classes)) / 2 : classes * lanes;
  }
  // A strip of features, of a block's classes or a block's tokens.
  int64_t weight_column_floats() const { return strip_size<T>(classes); }
  int64_t token_column_floats() const { return strip_size<T>(strips * kStripCols); }
};

// `count` floats as elements of T.
template <class T>
static void store_elements(const float* from, int64_t count, T* to, int64_t stride) {
  int64_t e = 0;
  if constexpr (Operands<T>::kPairs)
    for (; stride == 1 && e + kLanes <= count; e += kLanes) store_operand(to + e, load_vec(from + e));
  if (stride == 1)
    for (; e < count; ++e) to[e] = from_float<T>(from[e]);
  else
    for (; e < count; ++e) to[e * stride] = from_float<T>(from[e]);
}

// tile (rows, vectors * kLanes) = left strip, for a left operand whose depth is that of strips [first, last) of tokens,
// each of which has its own place: element (r, token c of strip s) is left's (r, c), `next` elements further with every
// strip. `per_step` tokens are a step of the depth, of which kStripDepth or fewer are taken at a time.
template <class Operand, class Work>
static void multiply_tokens(const Strips& tokens, int64_t first, int64_t last, int64_t per_step, int64_t rows,
                            int64_t vectors, Operand left, int64_t next, const float* strip, float* tile, Work& work) {
  const int64_t together = kStripDepth / kStripCols * per_step;
  for (int64_t s = first; s == first || s < last; s += together) {
    const int64_t end = min_of(last, s + together);
    const auto steps = [&tokens, s, per_step](int64_t i) { return tokens.lanes(s + i) / per_step; };
    const Blocks<decltype(steps)> depth{end - s, next, steps};  // strips are whole vectors, so even
    Operand from = left;
    from.data += (s - first) * next;
    const float* column = strip + (tokens.begin(s) - tokens.begin(first)) / per_step * kStripCols;
    if (s > first)
      product_with_strip<Into::kAdd>(rows, vectors, depth, from, column, tile, kStripCols, work);
    else
      product_with_strip<Into::kSet>(rows, vectors, depth, from, column, tile, kStripCols, work);
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
