// The online softmax of a tile of scores [key][query]: FlashAttention-2 (Dao 2023), all keys of a query in one lane,
// and powers of two in place of exponentials.
#pragma once

#include "kernels/attention_work.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// What a strip carries from one block of keys to the next.
struct StripState {
  float* queries;  // [D][query], or pairs of bf16 [D / 2][query]; [query][D] where they are few
  float* out;      // [Dv][query]; [query][Dv] where they are few
  float *maximum, *sum;
};

// Whether nothing but a mask comes between the product q.k and the exponential.
static bool is_plain(const AttentionArgs& a) {
  return a.scale > 0.0f && a.softcap == 0.0f && !a.bias.defined && !a.alibi_slopes.defined && !a.sinks.defined;
}

// What the scores are multiplied by in the exponent.
static float exponent_factor(const AttentionArgs& a) { return is_plain(a) ? a.scale * kLog2E : kLog2E; }

// The largest of `start` and the scores of n keys in each of a vector's lanes; a NaN never wins.
static inline Vec largest_score(const float* scores, int64_t n, Vec start) {
  Vec largest[4] = {start, start, start, start};
  int64_t c = 0;
  for (; c + 4 <= n; c += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) largest[i] = max(load_vec(scores + (c + i) * kQueries), largest[i]);
  for (; c < n; ++c) largest[0] = max(load_vec(scores + c * kQueries), largest[0]);
  return max(max(largest[0], largest[1]), max(largest[2], largest[3]));
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
// row of bf16 pairs per two keys, which is written when the rows it replaces have been read.
template <bool kPairs, bool kPlain>
struct WeightWork {
  static constexpr int kRows = kPairs ? 2 : 1;
  const float *from, *end;  // the next row of scores, and the end of the last
  float *to, *stats;
  int64_t width;

  WeightWork(float* scores, int64_t width, int64_t n, float* stats)
      : from(scores), end(scores + n * kQueries), to(scores), stats(stats), width(width) {
    if (n % kRows == 0) return;
    for (int64_t lane = 0; lane < width; lane += kLanes) store_vec(scores + n * kQueries + lane, broadcast(-kInfinity));
    end += kQueries;
  }
  bool is_done() const { return from == end; }
  ALWAYS_INLINE void step() {
    if (is_done()) return;
    for (int64_t lane = 0; lane < width; lane += kLanes) {
      const SoftmaxStats s(stats + lane);
      const Vec factor = load_vec(s.factor), base = load_vec(s.base);
      Vec weight[kRows], sum = load_vec(s.sum);
#pragma GCC unroll 2
      for (int i = 0; i < kRows; ++i) {
        weight[i] = exp2(exponent<kPlain>(load_vec(from + i * kQueries + lane), factor, base));
        sum += weight[i];
      }
      store_vec(s.sum, sum);
      store_vec(to + lane, kPairs ? pair_of(weight[0], weight[kRows - 1]) : weight[0]);
    }
    from += kRows * kQueries, to += kQueries;
  }
};

// Starts a step of the online softmax: the new running maximum, the base of its weights, and alpha, by which what was
// summed up under the old one is multiplied.
template <bool kPlain>
static void start_softmax(int64_t width, int64_t n, float factor, const StripState& strip, const float* scores,
                          float* alpha, float* stats) {
  for (int64_t lane = 0; lane < width; lane += kLanes) {
    const Vec before = load_vec(strip.maximum + lane);
    const Vec maximum = largest_score(scores + lane, n, before);
    // Nothing seen so far: 2^(-inf - 0) = 0.
    const Vec base = maximum == -kInfinity ? Vec{} : kPlain ? maximum * factor : maximum;
    const SoftmaxStats s(stats + lane);
    store_vec(s.base, base);
    store_vec(s.sum, Vec{});
    store_vec(s.factor, broadcast(factor));
    // Exactly 1 where the maximum stands.
    store_vec(alpha + lane, exp2(kPlain ? before * factor - base : (before - base) * factor));
    store_vec(strip.maximum + lane, maximum);
  }
}

// All weights of a tile that are left, and the running sum.
template <class Work>
static void finish_softmax(int64_t width, const StripState& strip, const float* alpha, const float* stats, Work& work) {
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
