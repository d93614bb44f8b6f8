// Linear cross-entropy and its gradients at once, for a loss whose slopes are known before it is: that of every token's
// nll is one number, that of its lse another times lse (means and sums, with or without z_loss).
//
// The gradient of weight keeps logits until it is written (kept_logits.h), and extra memory more of them: tokens up to
// there take 6 N V E flops. More tokens are taken in parts, forward, then backward, whose gradients of weight and bias
// are added to those of the parts before: 6 N V E too, and the gradient of weight is read and written once more for
// each. The sums are fp32: of a 16-bit gradient the upper halves stand in it and the lower ones in extra memory. Where
// no more than a few tokens would make a part, all are one, and logits that are not kept are computed twice: up to
// 8 N V E.
#pragma once

#include "loss/linear_cross_entropy_backward.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// Parts of fewer tokens are slower than logits computed twice (measured: docs/notes/2026-11-linear-loss-cpu.md).
template <class T>
constexpr int64_t kFewestTokens = Operands<T>::kPairs ? 192 : 64;

// How a call's counted tokens are divided.
template <class T>
struct PartsOfTokens {
  int64_t first, each;  // tokens of the first part and of the others
  bool sums_halves;     // of a 16-bit gradient
  int64_t kept_bytes;   // for the logits of a part

  // The first part that keeps all its logits is larger by what the gradient keeps.
  static PartsOfTokens of(const LinearCrossEntropyArgs& a, int64_t counted, int64_t thread_bytes, int64_t room) {
    const int64_t E = a.hidden.size[1], V = a.weight.size[0];
    const int64_t left = room - thread_bytes;
    if (bytes(a, counted) <= left) return {counted, 0, false, KeptLogits<T>::bytes(a, counted)};
    const bool has_halves = sizeof(T) != sizeof(float) && a.grad_weight.defined;
    const int64_t left_of_sums = left - (has_halves ? V * E * 2 : 0);
    const int64_t in_gradient = KeptLogits<T>::tokens_in_gradient(a, counted) / kLanes;
    const int64_t vectors = ceil_div(counted, kLanes) - in_gradient;
    for (int64_t parts = 2; vectors > 0; ++parts) {
      const int64_t each = ceil_div(vectors, parts) * kLanes, first = in_gradient * kLanes + each;
      if (each < kFewestTokens<T>) break;
      LinearCrossEntropyArgs of_others = a;
      of_others.keeps_in_gradient = false;
      if (max_of(bytes(a, first), bytes(of_others, each)) <= left_of_sums)
        return {first, each, has_halves, max_of(KeptLogits<T>::bytes(a, first), KeptLogits<T>::bytes(of_others, each))};
    }
    const int64_t kept = left - scratch_bytes(a, counted);
    return {counted, 0, false, max_of(kept, KeptLogits<T>::fewest_bytes(a, counted))};
  }

 private:
  static int64_t bytes(const LinearCrossEntropyArgs& a, int64_t tokens) {
    return KeptLogits<T>::bytes(a, tokens) + scratch_bytes(a, tokens);
  }
  static int64_t scratch_bytes(const LinearCrossEntropyArgs& a, int64_t tokens) {
    const int64_t E = a.hidden.size[1];
    const int64_t strips = forward_strips<T>(E, Strips(tokens).count);
    const int64_t packed = 4 * strips * strip_size<T>(E) + DeepLogits<T>::bytes(E, strips);
    return max_of(BackwardSizes<T>::of(tokens, E, a.weight.size[0]).bytes(tokens, E, a.keeps_in_gradient),
                  packed + (4 << 20));
  }
};

// Rows [begin, end) of a tensor whose elements have so many bytes.
static inline View rows_of(View view, int64_t begin, int64_t end, int64_t bytes) {
  if (!view.defined) return view;
  view.data = static_cast<char*>(view.data) + begin * view.stride[0] * bytes;
  view.size[0] = end - begin;
  return view;
}

template <class T>
static void linear_gradients(LinearCrossEntropyArgs a, float nll_slope, float lse_slope, int64_t room, int threads) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Counted counted(a, classes, N);
  a.keeps_in_gradient = a.grad_weight.defined;
  const bool copies_weight = copied_weight_floats(a, RowsOf<T>(a.weight, nullptr), 1) > 0;
  const auto parts =
      PartsOfTokens<T>::of(a, counted.count, copies_weight ? kThreadBytes : 0, min_of(room, kExtraBytes));
  const Buffer<char> kept(parts.kept_bytes);
  const Buffer<uint16_t> halves(parts.sums_halves ? V * E : 0);
  const Buffer<float> slopes(2 * N);
  if (parts.sums_halves) a.weight_sum_halves = halves.get();
  get_gradients(a, threads);  // the first part keeps logits there
  static LargePages before;
  get_large_pages(before, halves.get(), parts.sums_halves ? V * E * 2 : 0, threads);
  int64_t from = 0, to = parts.first;
  do {
    const PartOfTokens part{from == 0, to >= counted.count};
    const int64_t begin = part.is_first ? 0 : counted.rows[from], end = part.is_last ? N : counted.rows[to];
    LinearCrossEntropyArgs of_part = a;
    of_part.keeps_in_gradient = a.keeps_in_gradient && part.is_first;
    of_part.hidden = rows_of(a.hidden, begin, end, sizeof(T));
    of_part.grad_hidden = rows_of(a.grad_hidden, begin, end, sizeof(T));
    of_part.target = rows_of(a.target, begin, end, sizeof(int64_t));
    of_part.argmax = rows_of(a.argmax, begin, end, sizeof(int64_t));
    for (View LinearCrossEntropyArgs::* view :
         {&LinearCrossEntropyArgs::nll, &LinearCrossEntropyArgs::lse, &LinearCrossEntropyArgs::lse_low})
      of_part.*view = rows_of(a.*view, begin, end, sizeof(float));
    of_part.kept = {kept.get(), DType::kUInt8, 1, true, {parts.kept_bytes}, {1}};
    linear_forward<T>(of_part, threads);

    float *of_nll = slopes.get(), *of_lse = slopes.get() + N;
    for (int64_t row = 0; row < end - begin; ++row) {
      of_nll[row] = nll_slope;
      of_lse[row] = lse_slope * at<float>(of_part.lse, row);
    }
    of_part.grad_nll = {of_nll, DType::kFloat32, 1, true, {end - begin}, {1}};
    of_part.grad_lse = {of_lse, DType::kFloat32, 1, true, {end - begin}, {1}};
    linear_backward<T>(of_part, threads, part);
    from = to, to += parts.each;
  } while (from < counted.count);
}

}  // namespace loss

static void linear_cross_entropy_gradients(const LinearCrossEntropyArgs& a, float nll_slope, float lse_slope,
                                           int64_t room, int threads) {
  with_operands(a.hidden.dtype,
                [&](auto zero) { loss::linear_gradients<decltype(zero)>(a, nll_slope, lse_slope, room, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
