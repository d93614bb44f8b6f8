// The gradient of a tile of logits, and where it is kept for the products that take it.
#pragma once

#include "kernels/loss_sizes.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

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

  // Turns a tile of logits of classes [first, first + rows) into their gradients.
  void differentiate(const LinearCrossEntropyArgs& a, const Classes& classes, const Cap& cap, int64_t first,
                     int64_t rows, int64_t lanes, const float* class_weight, float* tile) const {
    float of_label[kCols];
    const bool has_label = any_label(first, rows);
    for (int c = 0; has_label && c < kCols; ++c) {
      const int64_t r = label[c] - first;
      if (r < 0 || r >= rows) continue;
      const float x = tile[r * kCols + c];
      const float slope = cap.active() ? tanh_and_slope(x * cap.inverse).slope : 1.0f;
      of_label[c] = slope * Slopes(a, classes, row[c]).label(exp((cap(x) - lse[c]) - lse_low[c]));
    }
    for (int64_t lane = 0; lane < lanes; lane += kLanes)
      if (cap.active())
        capped_vectors(cap, classes.smoothing > 0.0f ? class_weight : nullptr, rows, lane, tile + lane);
      else
        plain_vectors(classes.smoothing > 0.0f ? class_weight : nullptr, rows, lane, tile + lane);
    for (int c = 0; has_label && c < kCols; ++c) {
      const int64_t r = label[c] - first;
      if (r >= 0 && r < rows) tile[r * kCols + c] = of_label[c];
    }
  }

 private:
  bool any_label(int64_t first, int64_t rows) const {
    int64_t found = 0;
    for (int c = 0; c < kCols; ++c) found |= label[c] >= first && label[c] < first + rows;
    return found != 0;
  }

  void plain_vectors(const float* class_weight, int64_t rows, int64_t lane, float* x) const {
    const Vec slope = load_vec(p + lane), high = load_vec(lse + lane), low = load_vec(lse_low + lane);
    const Vec smoothed = load_vec(all + lane);
    const auto row = [&](int64_t r) ALWAYS_INLINE_LAMBDA {
      const Vec z = (load_vec(x + r * kCols) - high) - low;
      const Vec dz = slope * exp2(z * kLog2E);
      store_vec(x + r * kCols, class_weight == nullptr ? dz : dz - smoothed * class_weight[r]);
    };
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row(r + i);
    for (; r < rows; ++r) row(r);
  }

  void capped_vectors(const Cap& cap, const float* class_weight, int64_t rows, int64_t lane, float* x) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < kLanes; ++c) {
        float& to = x[r * kCols + c];
        const TanhAndSlope t = tanh_and_slope(to * cap.inverse);
        const float weight = class_weight == nullptr ? 0.0f : class_weight[r];
        const float dz = p[lane + c] * exp((cap.softcap * t.value - lse[lane + c]) - lse_low[lane + c]);
        to = t.slope * (dz - all[lane + c] * weight);
      }
  }
};

// The gradients G of a block of classes' and a chunk of tokens' logits as the products take them, strip by strip of
// tokens: [strip][class][kCols] for both products or, with bf16, for the weight's gradient, and pairs of classes
// [strip][class / 2][kCols] for hidden's.
template <class T>
struct LogitGradient {
  using Element = typename Operands<T>::Element;
  static constexpr bool kPairs = Operands<T>::kPairs;
  Element* rows;
  float* pairs;     // or null
  int64_t classes;  // an even number

  static int64_t floats(int64_t strips, int64_t classes) { return strips * classes * kCols; }

  // Where the tile of a strip whose first class is `first` belongs in fp32, if it is kept like that.
  float* tile(int64_t strip, int64_t first) const {
    if constexpr (kPairs)
      return nullptr;
    else
      return rows + (strip * classes + first) * kCols;
  }

  // A tile of gradients, (count, kCols), whose first class is even.
  void store(const float* from, int64_t count, int64_t lanes, int64_t strip, int64_t first) const {
    if constexpr (kPairs) {
      Element* row = rows + (strip * classes + first) * kCols;
      float* pair = pairs + (strip * classes + first) / 2 * kCols;
      for (int64_t r = 0; r < count; r += 2, from += 2 * kCols, row += 2 * kCols, pair += kCols)
        for (int64_t lane = 0; lane < lanes; lane += kLanes) {
          const Vec low = load_vec(from + lane), high = r + 1 < count ? load_vec(from + kCols + lane) : Vec{};
          gpt4v_fast::GPT4V_FAST_ISA::store_row(row + lane, low);
          if (r + 1 < count) gpt4v_fast::GPT4V_FAST_ISA::store_row(row + kCols + lane, high);
          store_vec(pair + lane, pair_of(low, high));
        }
    }
  }
  // Classes from `first` on as rows, and tokens of the strips, this one the first of them, as depth.
  typename Operands<T>::RowOperand of_classes(int64_t strip, int64_t first) const {
    return {rows + (strip * classes + first) * kCols, kCols};
  }
  // Tokens of a strip as rows, classes as depth.
  typename Operands<T>::ColumnOperand of_tokens(int64_t strip) const {
    if constexpr (kPairs)
      return {reinterpret_cast<const Element*>(pairs + strip * (classes / 2) * kCols), 2 * kCols};
    else
      return {rows + strip * classes * kCols, kCols};
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
