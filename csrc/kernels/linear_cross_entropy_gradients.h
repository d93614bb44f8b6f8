// Linear cross-entropy and its gradients at once, for a loss whose slopes are known before it is: that of every token's
// nll is one number, that of its lse another times lse (means and sums, with or without z_loss).
//
// So many tokens at a time that all their logits can be kept: forward, then backward, whose gradients of weight and
// bias are added to those of the tokens before. 6 N V E flops for any N, where two calls of their own, whose kept
// logits end with the memory for them, need up to 8. For fp32 alone: a 16-bit gradient would be rounded once for every
// chunk, or need fp32 sums of the size of the weight.
#pragma once

#include "kernels/linear_cross_entropy_backward.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// Tokens at a time: all counted ones in equal parts, whole vectors, whose kept logits and scratch stay within `room`.
static inline int64_t tokens_at_once(int64_t counted, int64_t E, int64_t V, int64_t thread_bytes, int64_t room) {
  const int64_t vectors = max_of(1, ceil_div(counted, kLanes));
  for (int64_t parts = 1;; ++parts) {
    const int64_t tokens = ceil_div(vectors, parts) * kLanes;
    const int64_t scratch = BackwardSizes<float>::of(tokens, E, V).bytes(tokens, E);
    const int64_t packed = 4 * forward_strips<float>(E, Strips(tokens).count) * strip_size<float>(E);
    const int64_t bytes = KeptLogits<float>::bytes(tokens, E, V) + max_of(scratch, packed + (4 << 20)) + thread_bytes;
    if (bytes <= room || tokens <= kLanes) return tokens;
  }
}

// Rows [begin, end) of a tensor whose elements have so many bytes.
static inline View rows_of(View view, int64_t begin, int64_t end, int64_t bytes) {
  if (!view.defined) return view;
  view.data = static_cast<char*>(view.data) + begin * view.stride[0] * bytes;
  view.size[0] = end - begin;
  return view;
}

static void linear_gradients(const LinearCrossEntropyArgs& a, float nll_slope, float lse_slope, int64_t room,
                             int threads) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Counted counted(a, classes, N);
  const bool copies_weight = copied_weight_floats(a, RowsOf<float>(a.weight, nullptr), 1) > 0;
  const int64_t thread_bytes = copies_weight ? kThreadBytes : 0;
  const int64_t at_once = tokens_at_once(counted.count, E, V, thread_bytes, min_of(room, kExtraBytes)),
                parts = max_of(1, ceil_div(counted.count, at_once));
  const int64_t bytes = KeptLogits<float>::bytes(min_of(at_once, counted.count), E, V);
  const Buffer<char> kept(bytes);
  const Buffer<float> slopes(2 * N);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = part == 0 ? 0 : counted.rows[part * at_once];
    const int64_t end = part == parts - 1 ? N : counted.rows[(part + 1) * at_once];
    LinearCrossEntropyArgs of_part = a;
    of_part.hidden = rows_of(a.hidden, begin, end, sizeof(float));
    of_part.grad_hidden = rows_of(a.grad_hidden, begin, end, sizeof(float));
    of_part.target = rows_of(a.target, begin, end, sizeof(int64_t));
    of_part.argmax = rows_of(a.argmax, begin, end, sizeof(int64_t));
    for (View LinearCrossEntropyArgs::* view :
         {&LinearCrossEntropyArgs::nll, &LinearCrossEntropyArgs::lse, &LinearCrossEntropyArgs::lse_low})
      of_part.*view = rows_of(a.*view, begin, end, sizeof(float));
    of_part.kept = {kept.get(), DType::kUInt8, 1, true, {bytes}, {1}};
    linear_forward<float>(of_part, threads);

    float *of_nll = slopes.get(), *of_lse = slopes.get() + N;
    for (int64_t row = 0; row < end - begin; ++row) {
      of_nll[row] = nll_slope;
      of_lse[row] = lse_slope * at<float>(of_part.lse, row);
    }
    of_part.grad_nll = {of_nll, DType::kFloat32, 1, true, {end - begin}, {1}};
    of_part.grad_lse = {of_lse, DType::kFloat32, 1, true, {end - begin}, {1}};
    linear_backward<float>(of_part, threads, part > 0);
  }
}

}  // namespace loss

static void linear_cross_entropy_gradients(const LinearCrossEntropyArgs& a, float nll_slope, float lse_slope,
                                           int64_t room, int threads) {
  loss::linear_gradients(a, nll_slope, lse_slope, room, threads);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
