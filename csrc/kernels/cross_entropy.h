// Softmax cross-entropy of given logits: one read pass over the vocabulary forward, one read-write pass
// backward.
//
// A row is taken kBlock columns at a time: converted to fp32 in first-level cache, its maximum, then the
// exponentials' sum relative to the maximum so far (kernels/loss.h). 1 exponential and about 25 operations
// per logit; bytes: the logits once forward, twice backward. One thread owns a row, so nothing depends on how
// many there are. Each element is read before its gradient is written, by the same thread: the gradient may
// be the logits' own memory.
#pragma once

#include "args.h"
#include "kernels/loss.h"
#include "simd/buffer.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// Columns at a time. Two fp32 blocks and one of class weights are 12 KiB of first-level cache; a sum of 1,024
// terms in vector lanes is rounded before it joins the others (in fp64), which keeps long rows accurate.
constexpr int64_t kBlock = 1024;

template <class T>
static void load_block(const T* from, int64_t stride, int64_t count, float* to) {
  if (stride == 1)
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j]);
  else
    for (int64_t j = 0; j < count; ++j) to[j] = to_float(from[j * stride]);
}

static inline void cap_block(const float* x, const Cap& cap, int64_t count, float* z) {
  if (cap.active())
    for (int64_t j = 0; j < count; ++j) z[j] = cap.softcap * tanh(x[j] * cap.inverse);
  else
    for (int64_t j = 0; j < count; ++j) z[j] = x[j];
}

// The statistics of one block of columns that starts at `first`; argmax only where the block has a logit above
// `so_far`.
static Statistics block_statistics(const float* x, const float* z, int64_t count, int64_t first, float so_far,
                                   const Cap& cap, const Classes& classes) {
  Statistics s;
  float best = -kInfinity;
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < count; ++j) best = x[j] > best ? x[j] : best;
  s.best = best;
  if (best > so_far) {
    while (x[s.argmax] != best) ++s.argmax;
    s.argmax += first;
  }
  const float origin = origin_of(cap(best));
  s.origin = origin;
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += exp(z[j] - origin);
  s.sum = sum;
  if (classes.smoothing > 0.0f) {
    alignas(64) float w[kBlock];
    s.weight = classes.copy(first, count, w);
    float deviation = 0.0f;
#pragma omp simd reduction(+ : deviation)
    for (int64_t j = 0; j < count; ++j) deviation += w[j] * (z[j] - origin);
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
  alignas(64) float x[kBlock];
  alignas(64) float z[kBlock];
  Statistics total;
  float target_z = 0.0f;
  for (int64_t first = 0; first < classes.V; first += kBlock) {
    const int64_t count = min_of(kBlock, classes.V - first);
    load_block(logits + first * stride, stride, count, x);
    cap_block(x, cap, count, z);
    total.merge(block_statistics(x, z, count, first, total.best, cap, classes), cap);
    if (label >= first && label < first + count) target_z = z[label - first];
  }
  write_counted_row(a, classes, row, total, target_z);
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
  alignas(64) float x[kBlock];
  alignas(64) float z[kBlock];
  alignas(64) float slope[kBlock];  // dz/dx
  for (int64_t first = 0; first < classes.V; first += kBlock) {
    const int64_t count = min_of(kBlock, classes.V - first);
    load_block(logits + first * stride, stride, count, x);
    if (cap.active())
      for (int64_t j = 0; j < count; ++j) {
        const TanhAndSlope t = tanh_and_slope(x[j] * cap.inverse);
        z[j] = cap.softcap * t.value;
        slope[j] = t.slope;
      }
    else
      for (int64_t j = 0; j < count; ++j) z[j] = x[j];
    // From here x holds the gradient.
    for (int64_t j = 0; j < count; ++j) x[j] = slopes.p * exp((z[j] - lse) - lse_low);
    if (classes.smoothing > 0.0f) {
      alignas(64) float w[kBlock];
      classes.copy(first, count, w);
      for (int64_t j = 0; j < count; ++j) x[j] -= slopes.all * w[j];
    }
    if (label >= first && label < first + count)
      x[label - first] = slopes.label(exp((z[label - first] - lse) - lse_low));
    if (cap.active())
      for (int64_t j = 0; j < count; ++j) x[j] *= slope[j];
    T* to = gradient + first * out_stride;
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
  loss::with_float(a.logits.dtype, [&](auto zero) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < N; ++row) loss::forward_row<decltype(zero)>(a, classes, cap, row);
  });
}

static void cross_entropy_backward(const CrossEntropyArgs& a, int threads) {
  const int64_t N = a.logits.size[0];
  const loss::Classes classes(a, a.logits.size[1]);
  const loss::Cap cap(a.softcap);
  loss::with_float(a.logits.dtype, [&](auto zero) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < N; ++row) loss::backward_row<decltype(zero)>(a, classes, cap, row);
  });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
