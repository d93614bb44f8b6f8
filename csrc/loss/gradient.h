// The gradient of a tile of logits, and where it is kept for the products that take it.
#pragma once

#include "loss/sizes.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// The gradients of a tile of logits, classes [first, first + rows) of a strip of tokens.
struct GradientTile {
  const LinearCrossEntropyArgs& a;
  const Classes& classes;
  const Cap& cap;
  const TokenSlopes& slopes;
  int64_t first, rows, lanes;
  const float* class_weight;  // or null without smoothing
  const char* ahead;          // memory that is read after this tile, or null

  // From logits x (rows, stride), which may be the tile.
  void of_logits(const float* x, int64_t stride, float* tile) const {
    float of_label[kStripCols];
    const bool has_label = slopes.any_label(first, rows);
    for (int c = 0; has_label && c < kStripCols; ++c) {
      const int64_t r = slopes.label[c] - first;
      if (r >= 0 && r < rows) of_label[c] = label_gradient(c, x[r * stride + c]);
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      if (cap.active()) {
        capped_vectors(x + lane, stride, lane, tile + lane);
        continue;
      }
      const Vec high = load_vec(slopes.lse + lane), low = load_vec(slopes.lse_low + lane);
      vectors(lane, sizeof(float), tile + lane, [&](int64_t r) ALWAYS_INLINE_LAMBDA {
        return ((load_vec(x + r * stride + lane) - high) - low) * kLog2E;
      });
    }
    put_labels(has_label, of_label, tile);
  }

  // From steps (rows, lanes) below the tokens' origins (KeptLogits), and the labels' logits.
  void of_steps(const float* origins, const uint16_t* steps, float per_step, const float* label_logits,
                float* tile) const {
    float of_label[kStripCols];
    const bool has_label = slopes.any_label(first, rows);
    for (int c = 0; has_label && c < kStripCols; ++c) {
      const int64_t r = slopes.label[c] - first;
      if (r >= 0 && r < rows) of_label[c] = label_gradient(c, label_logits[c]);
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      const Vec high = load_vec(slopes.lse + lane), low = load_vec(slopes.lse_low + lane);
      const Vec base = ((load_vec(origins + lane) - high) - low) * kLog2E, factor = broadcast(-per_step);
      vectors(lane, sizeof(uint16_t), tile + lane, [&](int64_t r) ALWAYS_INLINE_LAMBDA {
        return mul_add(load_integers(steps + r * lanes + lane), factor, base);
      });
    }
    put_labels(has_label, of_label, tile);
  }

 private:
  float label_gradient(int c, float x) const {
    const float slope = cap.active() ? tanh_and_slope(x * cap.inverse).slope : 1.0f;
    return slope * Slopes(a, classes, slopes.row[c]).label(exp((cap(x) - slopes.lse[c]) - slopes.lse_low[c]));
  }

  void put_labels(bool has_label, const float* of_label, float* tile) const {
    for (int c = 0; has_label && c < kStripCols; ++c) {
      const int64_t r = slopes.label[c] - first;
      if (r >= 0 && r < rows) tile[r * kStripCols + c] = of_label[c];
    }
  }

  // exponent(r): log2 of the probabilities of row r, from logits of so many bytes.
  template <class Exponent>
  ALWAYS_INLINE void vectors(int64_t lane, int64_t bytes, float* to, Exponent exponent) const {
    const char* fetched = ahead == nullptr ? reinterpret_cast<const char*>(to) : ahead + lane * rows * bytes;
    const int64_t step = ahead == nullptr ? 0 : kLanes * bytes;
    const Vec slope = load_vec(slopes.p + lane), smoothed = load_vec(slopes.all + lane);
    const auto row = [&](int64_t r) ALWAYS_INLINE_LAMBDA {
      __builtin_prefetch(fetched + r * step, 0, 2);
      const Vec dz = slope * exp2(exponent(r));
      store_vec(to + r * kStripCols, class_weight == nullptr ? dz : dz - smoothed * class_weight[r]);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row(r + i);
    for (; r < rows; ++r) row(r);
  }

  void capped_vectors(const float* x, int64_t stride, int64_t lane, float* to) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kLanes; ++c) {
        const TanhAndSlope t = tanh_and_slope(x[r * stride + c] * cap.inverse);
        const float weight = class_weight == nullptr ? 0.0f : class_weight[r], z = cap.softcap * t.value;
        const float dz = slopes.p[lane + c] * exp((z - slopes.lse[lane + c]) - slopes.lse_low[lane + c]);
        to[r * kStripCols + c] = t.slope * (dz - slopes.all[lane + c] * weight);
      }
  }
};

// The gradients G of a block of classes' and a block of tokens' logits as the products take them, strip by strip of
// tokens: [strip][class][kStripCols] for both products or, with bf16, for the weight's gradient, and pairs of classes
// [strip][class / 2][kStripCols] for hidden's. AmxTiles (AMX) take rows that are contiguous along what is summed over,
// [class][token] and [token][class].
template <class T>
struct LogitGradient {
  using Element = typename Operands<T>::Element;
  static constexpr bool kPairs = Operands<T>::kPairs;
  Element* rows;
  Element* others;  // pairs, or rows of tokens; null with fp32
  int64_t strips, classes;

  static int64_t row_elements(int64_t strips, int64_t classes) {
    return classes * (kHasAmx ? amx_stride(strips * kStripCols) : strips * kStripCols);
  }
  static int64_t other_elements(int64_t strips, int64_t classes) {
    return !kPairs ? 0 : strips * kStripCols * (kHasAmx ? amx_stride(classes) : classes);
  }

  // Where the tile of a strip whose first class is `first` belongs in fp32, if it is kept like that.
  float* tile(int64_t strip, int64_t first) const {
    if constexpr (kPairs)
      return nullptr;
    else
      return rows + (strip * classes + first) * kStripCols;
  }

  // A tile of gradients, (count, kStripCols), whose first class is even; `token` is its strip's first one.
  void store(const float* from, int64_t count, int64_t lanes, int64_t strip, int64_t token, int64_t first) const {
    if constexpr (kPairs && kHasAmx) {
      store_for_amx(from, count, lanes, token, first);
    } else if constexpr (kPairs) {
      Element* row = rows + (strip * classes + first) * kStripCols;
      float* pair = reinterpret_cast<float*>(others) + (strip * classes + first) / 2 * kStripCols;
      for (int64_t r = 0; r < count; r += 2, from += 2 * kStripCols, row += 2 * kStripCols, pair += kStripCols)
        for (int64_t lane = 0; lane < lanes; lane += kLanes) {
          const Vec low = load_vec(from + lane), high = r + 1 < count ? load_vec(from + kStripCols + lane) : Vec{};
          store_operand(row + lane, low);
          if (r + 1 < count) store_operand(row + kStripCols + lane, high);
          store_vec(pair + lane, pair_of(low, high));
        }
    }
  }
  // Classes from `first` on as rows, and all tokens as depth.
  typename Operands<T>::RowOperand of_classes(int64_t first) const {
    if constexpr (kPairs && kHasAmx) {
      const int64_t stride = amx_stride(strips * kStripCols);
      return {rows + first * stride, stride};
    } else {
      return {rows + first * kStripCols, kStripCols};
    }
  }
  // The memory of of_tokens.
  const char* of_products(int64_t strip) const {
    return reinterpret_cast<const char*>((kPairs ? others : rows) + strip * classes * kStripCols);
  }
  // Tokens of a strip as rows, classes as depth.
  auto of_tokens(int64_t strip, [[maybe_unused]] int64_t token) const {
    if constexpr (kPairs && kHasAmx) {
      const int64_t stride = amx_stride(classes);
      return typename Operands<T>::RowOperand{others + token * stride, stride};
    } else {
      return typename Operands<T>::ColumnOperand{(kPairs ? others : rows) + strip * classes * kStripCols,
                                                 (kPairs ? 2 : 1) * kStripCols};
    }
  }

 private:
  // Squares of 16 tokens and 16 pairs of classes are transposed; zeros stand for classes past the last.
  void store_for_amx(const float* from, int64_t count, int64_t lanes, int64_t token, int64_t first) const {
    const int64_t row_stride = amx_stride(strips * kStripCols), other_stride = amx_stride(classes);
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      for (int64_t begin = 0; begin < count; begin += 2 * kLanes) {
        Vec square[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          const int64_t r = begin + 2 * i;
          const float* at = from + r * kStripCols + lane;
          const Vec low = r < count ? load_vec(at) : Vec{}, high = r + 1 < count ? load_vec(at + kStripCols) : Vec{};
          Element* row = rows + (first + r) * row_stride + token + lane;
          if (r < count) store_operand(row, low);
          if (r + 1 < count) store_operand(row + row_stride, high);
          square[i] = pair_of(low, high);
        }
        exchange<1>(square);
        float* to = reinterpret_cast<float*>(others + (token + lane) * other_stride + first + begin);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_vec(to + i * (other_stride / 2), square[i]);
      }
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
