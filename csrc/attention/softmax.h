// The online softmax of a tile of scores [key][query]: FlashAttention-2 (Dao 2023), all keys of a query in one lane,
// and powers of two in place of exponentials.
#pragma once

#include "attention/work.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// What a strip carries from one block of keys to the next.
struct StripState {
  float* queries;  // [D][query], or pairs of bf16 [D / 2][query]; [query][D] where they are few
  float* out;      // [Dv][query]; [query][Dv] where they are few
  float *maximum, *sum;
};

// Whether nothing but a mask comes between the product q.k and the exponential.
static bool is_plain(const AttentionArgs& a) { return a.scale > 0.0f && !has_terms(a) && !a.sinks.defined; }

// What the scores are multiplied by in the exponent.
static float exponent_factor(const AttentionArgs& a) { return is_plain(a) ? a.scale * kLog2E : kLog2E; }

// largest[lane] becomes the largest of itself and the scores of the keys, n[v] for vector v of the queries; a NaN never
// wins.
static void compare_scores(int64_t width, const int64_t* keys, const float* scores, float* largest) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const int64_t n = keys[lane / kLanes];
    const float* column = scores + lane;
    const Vec start = load_vec(largest + lane);
    Vec found[4] = {start, start, start, start};
    int64_t c = 0;
    for (; c + 4 <= n; c += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) found[i] = max(load_vec(column + (c + i) * kQueries), found[i]);
    for (; c < n; ++c) found[0] = max(load_vec(column + c * kQueries), found[0]);
    store_vec(largest + lane, max(max(found[0], found[1]), max(found[2], found[3])));
  }
}

// What the softmax of a tile needs per query, kQueries floats each.
struct SoftmaxStats {
  float *base, *sum, *factor;
  explicit SoftmaxStats(float* data) : base(data), sum(data + kQueries), factor(data + 2 * kQueries) {}
};

// 2^(factor score - base), where base is factor times the maximum (or lse), so that a multiply-add does it all; a score
// that is not `plain` may be so large (a bias of the least float) that only the difference from the maximum can be
// multiplied: factor (score - base).
template <bool kPlain>
static inline Vec exponent(Vec score, Vec factor, Vec base) {
  return kPlain ? mul_add(score, factor, -base) : (score - base) * factor;
}

// The weights 2^exponent of a tile of scores, in place, a step at a time: one row of fp32 per key, or one
// row of bf16 pairs per two keys, which is written when the rows it replaces have been read. Vector v of the queries
// has n[v] keys.
template <bool kPairs, bool kPlain>
struct WeightWork {
  static constexpr int kRows = kPairs ? 2 : 1;
  const float* from;  // the next scores of a vector of queries
  float *to, *scores, *stats;
  const int64_t* n;
  int64_t left, lanes_left;

  WeightWork(float* tile, int64_t width, const int64_t* n, float* stats)
      : scores(tile), stats(stats), n(n), lanes_left(width) {
    for (int64_t v = 0; v < width / kLanes; ++v)
      if (n[v] % kRows != 0) store_vec(tile + n[v] * kQueries + v * kLanes, broadcast(-kInfinity));
    start_vector();
  }
  bool is_done() const { return lanes_left == 0; }
  ALWAYS_INLINE void start_vector() {
    for (; lanes_left > 0 && *n == 0; lanes_left -= kLanes) scores += kLanes, stats += kLanes, ++n;
    if (lanes_left > 0) from = to = scores, left = ceil_div(*n, kRows);
  }
  ALWAYS_INLINE void step() {
    if (is_done()) return;
    const SoftmaxStats s(stats);
    const Vec factor = load_vec(s.factor), base = load_vec(s.base);
    Vec weight[kRows], sum = load_vec(s.sum);
#pragma GCC unroll 2
    for (int i = 0; i < kRows; ++i) {
      weight[i] = exp2(exponent<kPlain>(load_vec(from + i * kQueries), factor, base));
      sum += weight[i];
    }
    store_vec(s.sum, sum);
    store_vec(to, kPairs ? pair_of(weight[0], weight[kRows - 1]) : weight[0]);
    from += kRows * kQueries, to += kQueries;
    if (--left > 0) return;
    lanes_left -= kLanes, scores += kLanes, stats += kLanes, ++n;
    start_vector();
  }
  // All steps that are left, where none is done beside a product (AMX tiles): two at a time, for a sum in memory would
  // wait for itself.
  void finish() {
    for (; lanes_left > 0; lanes_left -= kLanes, scores += kLanes, stats += kLanes, ++n, start_vector()) {
      const SoftmaxStats s(stats);
      const Vec factor = load_vec(s.factor), base = load_vec(s.base);
      Vec sums[2 * kRows] = {load_vec(s.sum)};
      const auto take = [&](int64_t at, int first) ALWAYS_INLINE_LAMBDA {
        Vec weight[kRows];
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i) {
          weight[i] = exp2(exponent<kPlain>(load_vec(from + (kRows * at + i) * kQueries), factor, base));
          sums[first + i] += weight[i];
        }
        store_vec(to + at * kQueries, kPairs ? pair_of(weight[0], weight[kRows - 1]) : weight[0]);
      };
      int64_t at = 0;
      for (; at + 2 <= left; at += 2) take(at, 0), take(at + 1, kRows);
      if (at < left) take(at, 0);
      Vec sum = sums[0];
#pragma GCC unroll 3
      for (int i = 1; i < 2 * kRows; ++i) sum += sums[i];
      store_vec(s.sum, sum);
    }
  }
};

// A running maximum may be passed by so many powers of two before it moves, for weights up to 256 are as exact as those
// up to 1, and what was summed up seldom needs another factor (FlashAttention-4 does so too).
constexpr float kSlack = 8.0f;

// Starts a step of the online softmax: the maximum that its weights refer to, their base, and alpha, by which what was
// summed up under the one before is multiplied. `largest_scores` count those of the tile and the maximum before.
// Returns whether any alpha is not 1.
template <bool kPlain>
static bool start_softmax(int64_t width, float factor, const StripState& strip, const float* largest_scores,
                          float* alpha, float* stats) {
  const float slack = kSlack / factor < __FLT_MAX__ ? kSlack / factor : __FLT_MAX__;
  VecInt moved = {};
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const Vec before = load_vec(strip.maximum + lane);
    const Vec largest = load_vec(largest_scores + lane);
    const VecInt moves = largest > before + slack;
    const Vec maximum = moves ? largest : before;
    // Nothing seen so far: 2^(-inf - 0) = 0.
    const Vec base = maximum == -kInfinity ? Vec{} : kPlain ? maximum * factor : maximum;
    const SoftmaxStats s(stats + lane);
    store_vec(s.base, base);
    store_vec(s.sum, Vec{});
    store_vec(s.factor, broadcast(factor));
    // Exactly 1 where the maximum stands.
    store_vec(alpha + lane, exp2(kPlain ? before * factor - base : (before - base) * factor));
    store_vec(strip.maximum + lane, maximum);
    moved |= moves;
  }
  return any(moved);
}

// All weights of a tile that are left, and the running sum.
template <class Work>
static void finish_softmax(int64_t width, const StripState& strip, const float* alpha, const float* stats, Work& work) {
  if (kHasAmx)
    work.finish();
  else
    while (!work.is_done()) work.step();
  const float* sum = stats + kQueries;
  for (int64_t lane = 0; lane < width; lane += kLanes)
    store_vec(strip.sum + lane, mul_add(load_vec(strip.sum + lane), load_vec(alpha + lane), load_vec(sum + lane)));
}

static void multiply_tile(const QueryBlock& block, int64_t n, const float* factors, float* tile) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      float* at = tile + c * kQueries + lane;
      store_vec(at, load_vec(at) * load_vec(factors + c * kQueries + lane));
    }
}

// Multiplies a tile of weights by its dropout factors, after they have joined the sum.
template <bool kPairs>
static void drop_weights(const QueryBlock& block, int64_t j0, int64_t n, float* factors, float* weights) {
  dropout_tile(block, j0, n, factors);
  if (!kPairs) return multiply_tile(block, n, factors, weights);
  for (int64_t c = 0; c < n; c += 2)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      float* at = weights + c / 2 * kQueries + lane;
      const VecInt pair = (VecInt)load_vec(at);
      const Vec first = (Vec)(pair << 16), second = (Vec)(pair & -0x10000);
      const float* factor = factors + c * kQueries + lane;
      store_vec(at, pair_of(first * load_vec(factor), c + 1 < n ? second * load_vec(factor + kQueries) : Vec{}));
    }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
