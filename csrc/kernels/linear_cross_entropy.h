#pragma once

#include "args.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

static void linear_cross_entropy_forward(const LinearCrossEntropyArgs&, int) {}
static void linear_cross_entropy_backward(const LinearCrossEntropyArgs&, int) {}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
