// Softmax cross-entropy of given logits: one read pass over the vocabulary forward, one read-write pass
// backward.
//
// A row is taken kBlock columns at a time: converted to fp32 in first-level cache, its maximum, then the
// exponentials' sum relative to the maximum so far (loss/loss.h). 1 exponential and about 25 operations
// per logit; bytes: the logits once forward, twice backward. One thread owns a row, so nothing depends on how
// many there are. Each element is read before its gradient is written, by the same thread: the gradient may
// be the logits' own memory.
#pragma once

#include "args.h"
#include "loss/loss.h"
#include "product/operands.h"
#include "simd/buffer.h"
#include "simd/pages.h"
#include "simd/slice.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// Columns at a time, 4 KiB of logits: what is done once a block, some 250 cycles, weighs less for more of them, but
// while their maximum is looked for nothing is fetched. Two fp32 blocks and one of class weights are at most 24 KiB of
// first-level cache; a sum of 1,024 or 2,048 terms in vector lanes is rounded before it joins the others (in fp64),
// which keeps long rows accurate. The last columns, fewer than a vector's, are a block of their own.
template <class T>
constexpr int64_t kBlock = 4096 / sizeof(T);
constexpr int64_t kMaxBlock = 2048;

template <class T>
static int64_t block_columns(int64_t left) {
  return left < kLanes ? left : min_of(kBlock<T>, left / kLanes * kLanes);
}

// How far ahead of the columns at work memory is asked for; and, once a block, a line of a page, so that by then the
// processor knows where it lies.
constexpr int64_t kAheadBytes = 16 << 10, kPageAheadBytes = 48 << 10;

// `count` columns in fp32, in `to` unless they lie ready; and -inf behind them up to whole vectors: a column that is
// not there has probability 0.
template <class T>
static const float* load_block(const T* from, int64_t stride, int64_t count, float* to) {
  if constexpr (sizeof(T) == sizeof(float))
    if (stride == 1 && count % kLanes == 0) return from;
  int64_t j = 0;
  if (stride == 1)
    for (; j + kLanes <= count; j += kLanes) store_vec(to + j, load_wide(from + j));
  for (; j < count; ++j) to[j] = to_float(from[j * stride]);
  for (; j % kLanes != 0; ++j) to[j] = -kInfinity;
  return to;
}

// Calls f(i, j) for vectors of `count` columns at j, i counting four of them round and round: a sum or a maximum of one
// i need not wait for that of another.
template <class F>
static inline void for_vectors(int64_t count, F f) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= count; j += 4 * kLanes)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) f(i, j + i * kLanes);
  for (; j < count; j += kLanes) f(0, j);
}

template <class X>
static inline float largest_of(const X* x, int64_t count) {
  Vec largest[4];
  for (Vec& each : largest) each = broadcast(-kInfinity);
  for_vectors(count, [&](int i, int64_t j) { largest[i] = max(load_wide(x + j), largest[i]); });
  return gpt4v_fast::GPT4V_FAST_ISA::largest_of(max(max(largest[0], largest[1]), max(largest[2], largest[3])));
}

// Meanwhile fetches what comes later, from `ahead` on, `bytes` a column: while exponentials are worked out, no load
// would ask for it.
template <class Z>
static inline float sum_of_exponentials(const Z* z, int64_t count, float origin, const char* ahead, int64_t bytes) {
  const Vec origins = broadcast(origin);
  Vec sum[4] = {};
  for_vectors(count, [&](int i, int64_t j) {
    __builtin_prefetch(ahead + j * bytes);
    sum[i] += exp2((load_wide(z + j) - origins) * kLog2E);
  });
  return sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// z = cap(x), in `to` unless there is no cap.
static inline const float* cap_block(const float* x, const Cap& cap, int64_t count, float* to) {
  if (!cap.active()) return x;
  for (int64_t j = 0; j < count; ++j) to[j] = cap.softcap * tanh(x[j] * cap.inverse);
  for (int64_t j = count; j % kLanes != 0; ++j) to[j] = -kInfinity;
  return to;
}

// The statistics of one block of columns that starts at `first`, from its logits x and z; argmax only where the block
// has a logit above `so_far`. Inlined, since columns in place have strides that are known (31 GB/s of fp32, not 23).
template <class X>
ALWAYS_INLINE static Statistics block_statistics(const X* x, const X* z, int64_t count, int64_t first, float so_far,
                                                 const Cap& cap, const Classes& classes, const char* ahead,
                                                 int64_t bytes) {
  Statistics s;
  s.best = largest_of(x, count);
  if (s.best > so_far) {
    while (to_float(x[s.argmax]) != s.best) ++s.argmax;
    s.argmax += first;
  }
  const float origin = origin_of(cap(s.best));
  s.origin = origin;
  s.sum = sum_of_exponentials(z, count, origin, ahead, bytes);
  if (classes.smoothing > 0.0f) {
    alignas(64) float w[kMaxBlock];
    s.weight = classes.copy(first, count, w);
    float deviation = 0.0f;
#pragma omp simd reduction(+ : deviation)
    for (int64_t j = 0; j < count; ++j) deviation += w[j] * (to_float(z[j]) - origin);
    s.deviation = deviation;
  }
  return s;
}

template <class T>
static void forward_row(const CrossEntropyArgs& a, const Classes& classes, const Cap& cap, int64_t row) {
  const int64_t label = at<int64_t>(a.target, row);
  if (!classes.counted(label)) return write_uncounted_row(a, classes, row);
  const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.stride[0];
  const int64_t stride = a.logits.stride[1];
  alignas(64) float loaded[kMaxBlock];
  alignas(64) float capped[kMaxBlock];
  Statistics total;
  float target_z = 0.0f;
  const bool in_place = stride == 1 && !cap.active() && classes.smoothing == 0.0f;
  for (int64_t first = 0, count = 0; first < classes.V; first += count) {
    const int64_t left = classes.V - first;
    const T* block = logits + first * stride;
    const char* ahead = reinterpret_cast<const char*>(block) + kAheadBytes;
    count = block_columns<T>(left);
    if (in_place && left >= kLanes) {
      total.merge(block_statistics(block, block, count, first, total.best, cap, classes, ahead, sizeof(T)), cap);
      if (label >= first && label < first + count) target_z = to_float(block[label - first]);
      continue;
    }
    const float* x = load_block(block, stride, count, loaded);
    const float* z = cap_block(x, cap, count, capped);
    total.merge(block_statistics(x, z, count, first, total.best, cap, classes, ahead, stride * sizeof(T)), cap);
    if (label >= first && label < first + count) target_z = z[label - first];
  }
  write_counted_row(a, classes, row, total, target_z);
}

// Whether vectors of floats are stored as elements of T at once.
template <class T>
constexpr bool kStoresVectors = sizeof(T) == sizeof(float) || Operands<T>::kPairs;

template <class T>
static inline void store_vectors(T* to, Vec value) {
  if constexpr (kStoresVectors<T>) store_operand(to, value);
}

template <class T>
static void backward_row(const CrossEntropyArgs& a, const Classes& classes, const Cap& cap, int64_t row) {
  const int64_t label = at<int64_t>(a.target, row);
  T* gradient = static_cast<T*>(a.grad_logits.data) + row * a.grad_logits.stride[0];
  const int64_t out_stride = a.grad_logits.stride[1];
  if (!classes.counted(label)) {
    const T nothing = from_float<T>(classes.ignored(label) ? 0.0f : kNaN);
    for (int64_t j = 0; j < classes.V; ++j) gradient[j * out_stride] = nothing;
    return;
  }
  const T* logits = static_cast<const T*>(a.logits.data) + row * a.logits.stride[0];
  const int64_t stride = a.logits.stride[1];
  const float lse = at<float>(a.lse, row), lse_low = at<float>(a.lse_low, row);
  const Slopes slopes(a, classes, row);
  alignas(64) float x[kMaxBlock];      // z where there is a cap, then the gradient
  alignas(64) float slope[kMaxBlock];  // dz/dx
  const Vec p = broadcast(slopes.p), high = broadcast(lse), low = broadcast(lse_low);
  const bool is_plain = stride == 1 && out_stride == 1 && !cap.active() && classes.smoothing == 0.0f;
  for (int64_t first = 0, count = 0; first < classes.V; first += count) {
    const int64_t left = classes.V - first;
    const bool in_place = kStoresVectors<T> && is_plain && left >= kLanes;
    count = block_columns<T>(left);
    const bool has_label = label >= first && label < first + count;
    T* to = gradient + first * out_stride;
    __builtin_prefetch(reinterpret_cast<const char*>(logits + first * stride) + kPageAheadBytes);
    __builtin_prefetch(reinterpret_cast<const char*>(to) + kPageAheadBytes, 1);
    if (in_place) {
      const T* block = logits + first;
      const float of_label = has_label ? slopes.label(exp((to_float(block[label - first]) - lse) - lse_low)) : 0.0f;
      for_vectors(count, [&](int, int64_t j) {
        __builtin_prefetch(reinterpret_cast<const char*>(block + j) + kAheadBytes);
        store_vectors(to + j, p * exp2(((load_wide(block + j) - high) - low) * kLog2E));
      });
      if (has_label) to[label - first] = from_float<T>(of_label);
      continue;
    }
    const float* z = load_block(logits + first * stride, stride, count, x);
    if (cap.active()) {
      for (int64_t j = 0; j < count; ++j) {
        const TanhAndSlope t = tanh_and_slope(z[j] * cap.inverse);
        x[j] = cap.softcap * t.value;
        slope[j] = t.slope;
      }
      z = x;
    }
    const float of_label = has_label ? slopes.label(exp((z[label - first] - lse) - lse_low)) : 0.0f;
    for_vectors(count, [&](int, int64_t j) {
      __builtin_prefetch(reinterpret_cast<const char*>(logits + (first + j) * stride) + kAheadBytes);
      store_vec(x + j, p * exp2(((load_vec(z + j) - high) - low) * kLog2E));
    });
    if (classes.smoothing > 0.0f) {
      alignas(64) float w[kMaxBlock];
      classes.copy(first, count, w);
      for (int64_t j = 0; j < count; ++j) x[j] -= slopes.all * w[j];
    }
    if (has_label) x[label - first] = of_label;
    if (cap.active())
      for (int64_t j = 0; j < count; ++j) x[j] *= slope[j];
    if (out_stride == 1)
      for (int64_t j = 0; j < count; ++j) to[j] = from_float<T>(x[j]);
    else
      for (int64_t j = 0; j < count; ++j) to[j * out_stride] = from_float<T>(x[j]);
  }
}

}  // namespace loss

static void cross_entropy_forward(const CrossEntropyArgs& a, int threads) {
  const int64_t N = a.logits.size[0];
  const loss::Classes classes(a, a.logits.size[1]);
  const loss::Cap cap(a.softcap);
  with_operands(a.logits.dtype, [&](auto zero) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < N; ++row) loss::forward_row<decltype(zero)>(a, classes, cap, row);
  });
}

static void cross_entropy_backward(const CrossEntropyArgs& a, int threads) {
  const int64_t N = a.logits.size[0];
  const loss::Classes classes(a, a.logits.size[1]);
  const loss::Cap cap(a.softcap);
  with_operands(a.logits.dtype, [&](auto zero) {
    const View& to = a.grad_logits;
    static LargePages before;
    if (to.stride[1] == 1 && to.stride[0] == classes.V)
      get_large_pages(before, to.data, N * classes.V * static_cast<int64_t>(sizeof(zero)), threads);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < N; ++row) loss::backward_row<decltype(zero)>(a, classes, cap, row);
  });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
