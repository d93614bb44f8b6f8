// The running statistics of loss/loss.h for a strip of tokens, token by lane, from tiles of logits [class][token].
#pragma once

#include "loss/sizes.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

static inline Vec origin_of(Vec largest_z) {
  return ((largest_z == kInfinity) | (largest_z == -kInfinity)) ? Vec{} : largest_z;
}

// `rescale` of loss/loss.h; the exponent's rounding error grows as the factor falls, and is lost in the sum.
static inline Vec rescale(Vec largest_z, Vec old_origin, Vec new_origin) {
  const Vec factor = exp2((old_origin - new_origin) * kLog2E);
  return largest_z == -kInfinity ? broadcast(1.0f) : factor;
}

struct alignas(64) Lanes {
  float best[kStripCols];    // largest x (not z: tanh makes large logits equal)
  float top[kStripCols];     // its z
  float origin[kStripCols];  // origin_of(top)
  int64_t argmax[kStripCols];
  double sum[kStripCols], deviation[kStripCols];
  float largest_of_tile[kStripCols];  // the largest x of what was taken in last

  void clear() {
    for (int c = 0; c < kStripCols; ++c) {
      best[c] = top[c] = -kInfinity, origin[c] = 0.0f, argmax[c] = 0;
      sum[c] = 0.0, deviation[c] = 0.0;
    }
  }

  // Takes in the logits of `rows` classes, the first of them `first`; leaves z in the tile. `weight_before`
  // is the sum of the class weights taken in so far.
  void take(float* tile, int64_t first, int64_t rows, int64_t lanes, const float* class_weight, double weight_before,
            const Cap& cap, bool smoothing) {
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      float* x = tile + lane;
      const Vec largest = largest_of(x, rows), before = load_vec(best + lane);
      if (any(largest > before)) find(x, first, rows, lane, largest);
      store_vec(best + lane, max(largest, before));
      store_vec(largest_of_tile + lane, largest);
      if (cap.active())
        for (int64_t r = 0; r < rows; ++r) store_vec(x + r * kStripCols, capped(load_vec(x + r * kStripCols), cap));
      const Vec tile_top = cap.active() ? capped(largest, cap) : largest, tile_origin = origin_of(tile_top);
      const Vec old_top = load_vec(top + lane), old_origin = load_vec(origin + lane);
      const Vec new_top = max(tile_top, old_top), new_origin = origin_of(new_top);
      add(lane, rescale(old_top, old_origin, new_origin), sum_of_exponentials(x, rows, tile_origin),
          rescale(tile_top, tile_origin, new_origin));
      if (smoothing) add_deviation(x, rows, lane, class_weight, weight_before, old_origin, new_origin);
      store_vec(top + lane, new_top);
      store_vec(origin + lane, new_origin);
    }
  }

  Statistics of(int64_t c, double weight) const {
    Statistics s;
    s.best = best[c], s.argmax = argmax[c], s.origin = origin[c];
    s.sum = sum[c], s.weight = weight, s.deviation = deviation[c];
    return s;
  }

 private:
  static constexpr int kChains = 4;  // independent of each other, so that none waits for its own last step

  static Vec capped(Vec x, const Cap& cap) { return cap.softcap * gpt4v_fast::GPT4V_FAST_ISA::tanh(x * cap.inverse); }

  static Vec largest_of(const float* x, int64_t rows) {
    Vec largest[kChains];
    for (Vec& each : largest) each = broadcast(-kInfinity);
    int64_t r = 0;
    for (; r + kChains <= rows; r += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) largest[i] = max(load_vec(x + (r + i) * kStripCols), largest[i]);
    for (; r < rows; ++r) largest[0] = max(load_vec(x + r * kStripCols), largest[0]);
    return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
  }

  static Vec sum_of_exponentials(const float* z, int64_t rows, Vec origin) {
    Vec sum[kChains] = {};
    int64_t r = 0;
    for (; r + kChains <= rows; r += kChains)
#pragma GCC unroll 4
      for (int i = 0; i < kChains; ++i) sum[i] += exp2((load_vec(z + (r + i) * kStripCols) - origin) * kLog2E);
    for (; r < rows; ++r) sum[0] += exp2((load_vec(z + r * kStripCols) - origin) * kLog2E);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // Where a lane has a new largest logit, its first row.
  void find(const float* x, int64_t first, int64_t rows, int64_t lane, Vec largest) {
    VecInt row = {};
    for (int32_t r = static_cast<int32_t>(rows) - 1; r >= 0; --r)
      row = load_vec(x + r * kStripCols) == largest ? broadcast(r) : row;
    for (int i = 0; i < kLanes; ++i) argmax[lane + i] = largest[i] > best[lane + i] ? first + row[i] : argmax[lane + i];
  }

  void add(int64_t lane, Vec old_factor, Vec tile_sum, Vec tile_factor) {
    alignas(64) float factor[kLanes], part[kLanes];
    store_vec(factor, old_factor);
    store_vec(part, tile_sum * tile_factor);
    for (int i = 0; i < kLanes; ++i) sum[lane + i] = sum[lane + i] * factor[i] + part[i];
  }

  void add_deviation(const float* z, int64_t rows, int64_t lane, const float* class_weight, double weight_before,
                     Vec old_origin, Vec new_origin) {
    alignas(64) float shift[kLanes], before[kLanes], now[kLanes];
    Vec all = {};
    for (int64_t r = 0; r < rows; ++r) all += class_weight[r] * (load_vec(z + r * kStripCols) - new_origin);
    store_vec(shift, all), store_vec(before, old_origin), store_vec(now, new_origin);
    for (int i = 0; i < kLanes; ++i)
      deviation[lane + i] += weight_before * (static_cast<double>(before[i]) - now[i]) + shift[i];
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
