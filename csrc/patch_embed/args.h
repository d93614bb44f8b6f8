// What the kernels of the patch embedding take: plain views and scalars.
#pragma once

#include "view.h"

namespace gpt4v_fast {

// One call of the patch embedding: tokens (B, N, E) = conv(pixels * pixel_scale[c] + pixel_shift[c]) + bias +
// pos_embed. Pixels are always 5-D here, (B, C, frames, H, W), frames = 1 for still images; weight is (E, C, Pt, Ph,
// Pw).
struct PatchEmbedArgs {
  View pixels;       // uint8/fp32/bf16/fp16
  View weight;       // fp32/bf16/fp16
  View bias;         // (E) weight's dtype or absent
  View pixel_scale;  // (C) fp32: rescale / std
  View pixel_shift;  // (C) fp32: -mean / std
  View pos_embed;    // (N, E) float or absent; shared by the batch

  View tokens;  // (B, N, E) fp32/bf16/fp16

  // Backward only. A gradient that is not needed is absent. Those of bias and pos_embed are sums of grad_tokens.
  View grad_tokens;
  View grad_weight;  // (E, C, Pt, Ph, Pw) fp32
  View grad_pixels;  // float pixels only, their dtype

  // What a call object brings, by the names of its fields (python_calls.h).
  template <class F>
  void for_call(F field) {
    field("pixels", pixels), field("weight", weight), field("bias", bias);
    field("pixel_scale", pixel_scale), field("pixel_shift", pixel_shift), field("pos_embed", pos_embed);
  }
};

}  // namespace gpt4v_fast
