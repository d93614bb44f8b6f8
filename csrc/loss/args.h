// What the kernels of the losses take: plain views and scalars.
#pragma once

#include "view.h"

namespace gpt4v_fast {

// One call of softmax cross-entropy over given logits (N, V).
struct CrossEntropyArgs {
  View logits;        // (N, V) fp32/bf16/fp16
  View target;        // (N) int64, checked: in [0, V) or ignore_index
  View class_weight;  // (V) fp32 or absent
  int64_t ignore_index;
  float label_smoothing;
  float softcap;  // 0: none

  View nll;      // (N) fp32; 0 where ignored
  View lse;      // (N) fp32; 0 where ignored
  View lse_low;  // (N) fp32: what rounding lse to fp32 left out; exp(z - lse) is wrong by as much at logits of 1e4
  View argmax;   // (N) int64; -1 where ignored

  // Backward only.
  View grad_nll;     // (N) fp32
  View grad_lse;     // (N) fp32
  View grad_logits;  // (N, V), logits' dtype; may be logits itself

  // What a call object brings, by the names of its fields (python_calls.h).
  template <class F>
  void for_call(F field) {
    field("logits", logits), field("target", target), field("class_weight", class_weight);
    field("ignore_index", ignore_index), field("label_smoothing", label_smoothing), field("softcap", softcap);
  }
};

// One call of the fused projection and cross-entropy: logits = hidden @ weight^T + bias, never written whole.
struct LinearCrossEntropyArgs {
  View hidden;        // (N, E) fp32/bf16/fp16
  View weight;        // (V, E), hidden's dtype
  View bias;          // (V) any float dtype, or absent
  View target;        // (N) int64, checked: in [0, V) or ignore_index
  View class_weight;  // (V) fp32 or absent
  int64_t ignore_index;
  float label_smoothing;
  float softcap;

  View nll;      // (N) fp32
  View lse;      // (N) fp32
  View lse_low;  // (N) fp32, as above
  View argmax;   // (N) int64
  View kept;     // bytes that forward may fill with logits for backward (csrc/loss/kept_logits.h), or absent

  // Backward only. A gradient that is not needed is absent.
  View grad_nll;
  View grad_lse;
  View grad_hidden;  // (N, E), hidden's dtype
  View grad_weight;  // (V, E), weight's dtype
  View grad_bias;    // (V) fp32

  // Forward and backward in one, csrc/loss/linear_cross_entropy_gradients.h. grad_weight is contiguous then.
  bool keeps_in_gradient;  // logits stay in grad_weight's memory until it is written
  // (V, E), the lower halves of fp32 sums, whose upper halves stand in grad_weight; or null.
  uint16_t* weight_sum_halves;

  template <class F>
  void for_call(F field) {
    field("hidden", hidden), field("weight", weight), field("bias", bias), field("target", target);
    field("class_weight", class_weight);
    field("ignore_index", ignore_index), field("label_smoothing", label_smoothing), field("softcap", softcap);
  }
};

}  // namespace gpt4v_fast
