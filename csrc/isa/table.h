// Included once by each ISA's file, which names its namespace in GPT4V_FAST_ISA. Everything below a kernel
// lives in that namespace or is a system header's macro or intrinsic: the linker keeps one copy of an inline
// function, and it must not be one compiled for a processor that the caller does not have
// (tests/native/test_native.py looks for such symbols).
#pragma once

#include "attention/attention.h"
#include "attention/kvcache.h"
#include "dispatch.h"
#include "loss/cross_entropy.h"
#include "loss/linear_cross_entropy.h"
#include "patch_embed/patch_embed.h"
#include "probes/peak.h"

#define GPT4V_FAST_STRINGIFY_(x) #x
#define GPT4V_FAST_STRINGIFY(x) GPT4V_FAST_STRINGIFY_(x)

namespace gpt4v_fast::GPT4V_FAST_ISA {

const Kernels& table() {
  static constexpr Kernels kTable = {
      GPT4V_FAST_STRINGIFY(GPT4V_FAST_ISA),
      attention_forward,
      attention_backward,
      attention_kvcache,
      cross_entropy_forward,
      cross_entropy_backward,
      linear_cross_entropy_forward,
      linear_cross_entropy_backward,
      linear_cross_entropy_gradients,
      patch_embed_forward,
      patch_embed_backward,
      peak_fma,
      peak_dot_bf16,
      peak_read,
      handoff,
  };
  return kTable;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
