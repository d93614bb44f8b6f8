// What the two cross-entropy kernels share: a row's statistics taken online over the vocabulary, and its
// slopes backward.
//
//     z = softcap * tanh(x / softcap), or x;   lse = log sum_j exp(z_j)
//     nll = (1 - eps) w_y (lse - z_y) + eps / V * sum_j w_j (lse - z_j)
//     dz_j = (g_nll ((1 - eps) w_y + eps / V * sum w) + g_lse) p_j - g_nll ((1 - eps) w_y [j = y] + eps / V *
//     w_j)
//
// Everything is kept relative to an origin, the row's largest z so far, and lse leaves as a pair of floats
// (lse, lse_low): at logits of 1e4 one float of lse would make every probability wrong in its fourth digit.
//
// Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
#pragma once

#include "args.h"
#include "simd/math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

constexpr float kNaN = __builtin_nanf("");

// softcap * tanh(x / softcap); none where softcap is 0.
struct Cap {
  float softcap, inverse;

  explicit Cap(float c) : softcap(c), inverse(c > 0.0f ? 1.0f / c : 0.0f) {}
  bool active() const { return softcap > 0.0f; }
  float operator()(float x) const { return active() ? softcap * tanh(x * inverse) : x; }
};

// Where exponents are taken from: the largest z, or 0 for a row of nothing but infinities.
static inline float origin_of(float largest_z) {
  return (largest_z == kInfinity || largest_z == -kInfinity) ? 0.0f : largest_z;
}

// A sum of exponentials whose origin moves. An empty one, or one of -inf alone, stays 0 wherever its origin moves to:
// below -88, where a softcap puts all of a row, the factor is infinite.
static inline double rescaled(double sum, float old_origin, float new_origin) {
  const double factor = exp(old_origin - new_origin);
  return sum == 0.0 ? 0.0 : sum * factor;
}

struct Statistics {
  float best = -kInfinity;  // largest x (not z: tanh makes large logits equal)
  int64_t argmax = 0;       // its lowest column
  float origin = 0.0f;      // origin_of(cap(best))
  double sum = 0.0;         // sum of exp(z - origin)
  double weight = 0.0;      // sum of class weights, and
  double deviation = 0.0;   // sum of w (z - origin): kept for label smoothing only

  // Takes in the statistics of later columns.
  void merge(const Statistics& later, const Cap& cap) {
    if (later.best > best) {
      best = later.best;
      argmax = later.argmax;
    }
    const float moved = origin_of(cap(best));
    sum = rescaled(sum, origin, moved) + rescaled(later.sum, later.origin, moved);
    deviation += weight * (static_cast<double>(origin) - moved) + later.deviation +
                 later.weight * (static_cast<double>(later.origin) - moved);
    weight += later.weight;
    origin = moved;
  }
};

// Class weights and label smoothing of a call.
struct Classes {
  const float* data;
  int64_t stride, V, ignore_index;
  float smoothing;
  double weight_sum;

  template <class Args>
  Classes(const Args& a, int64_t vocabulary)
      : data(a.class_weight.defined ? static_cast<const float*>(a.class_weight.data) : nullptr),
        stride(a.class_weight.stride[0]),
        V(vocabulary),
        ignore_index(a.ignore_index),
        smoothing(a.label_smoothing),
        weight_sum(0.0) {
    if (data == nullptr) weight_sum = static_cast<double>(V);
    for (int64_t v = 0; data != nullptr && v < V; ++v) weight_sum += data[v * stride];
  }

  float weight(int64_t v) const { return data == nullptr ? 1.0f : data[v * stride]; }
  bool ignored(int64_t label) const { return label == ignore_index; }
  bool counted(int64_t label) const { return label != ignore_index && label >= 0 && label < V; }

  // Weights of columns [first, first + count) for sums over the classes; returns their sum.
  double copy(int64_t first, int64_t count, float* to) const {
    for (int64_t j = 0; j < count; ++j) to[j] = weight(first + j);
    if (data == nullptr) return static_cast<double>(count);
    double sum = 0.0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += to[j];
    return sum;
  }
};

// One element of a (N) tensor.
template <class T>
static inline T& at(const View& view, int64_t i) {
  return static_cast<T*>(view.data)[i * view.stride[0]];
}

template <class Args>
static void write_row(const Args& a, int64_t row, float nll, float lse, float lse_low, int64_t argmax) {
  at<float>(a.nll, row) = nll;
  at<float>(a.lse, row) = lse;
  at<float>(a.lse_low, row) = lse_low;
  at<int64_t>(a.argmax, row) = argmax;
}

// A row that is not counted: zeros where it is ignored, NaN where its label is none. Its logits are not
// looked at.
template <class Args>
static void write_uncounted_row(const Args& a, const Classes& classes, int64_t row) {
  const float value = classes.ignored(at<int64_t>(a.target, row)) ? 0.0f : kNaN;
  write_row(a, row, value, value, 0.0f, -1);
}

// A counted row, from the statistics of all its columns and its label's z. One with an infinite z has no loss (NaN, as
// inf - inf is), an infinite lse and NaN for its gradient. lse_low is taken from the origin, not from the sum of the
// two: at logits of 1e15 their sum is rounded even in fp64.
template <class Args>
static void write_counted_row(const Args& a, const Classes& classes, int64_t row, const Statistics& s, float target_z) {
  const double eps = classes.smoothing;
  const double log_sum = __builtin_log(s.sum);
  const float lse = static_cast<float>(s.origin + log_sum);
  const double lse_low = (static_cast<double>(s.origin) - lse) + log_sum;
  const float w = classes.weight(at<int64_t>(a.target, row));
  double nll = (1.0 - eps) * w * ((static_cast<double>(s.origin) - target_z) + log_sum);
  if (eps > 0.0) nll += eps / static_cast<double>(classes.V) * (classes.weight_sum * log_sum - s.deviation);
  if (s.best == kInfinity && a.softcap == 0.0f) return write_row(a, row, kNaN, kInfinity, kNaN, s.argmax);
  write_row(a, row, static_cast<float>(nll), lse, static_cast<float>(lse_low), s.argmax);
}

// dz_j = p * p_j - all * w_j for every column but the label's.
struct Slopes {
  float p, all;
  double target, of_lse, weight_sum, target_weight;

  template <class Args>
  Slopes(const Args& a, const Classes& classes, int64_t row)
      : weight_sum(classes.smoothing > 0.0f ? classes.weight_sum : 0.0),
        target_weight(classes.weight(at<int64_t>(a.target, row))) {
    const double grad_nll = at<float>(a.grad_nll, row), eps = classes.smoothing;
    const double each = eps > 0.0 ? grad_nll * eps / static_cast<double>(classes.V) : 0.0;
    target = grad_nll * (1.0 - eps) * target_weight;
    of_lse = at<float>(a.grad_lse, row);
    all = static_cast<float>(each);
    p = static_cast<float>(target + each * weight_sum + of_lse);
  }

  // dz of the label, whose parts would cancel in fp32 where its probability is near 1.
  float label(float probability) const {
    const double q = probability;
    const double smoothed = weight_sum > 0.0 ? all * (weight_sum * q - target_weight) : 0.0;
    return static_cast<float>(target * (q - 1.0) + of_lse * q + smoothed);
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
