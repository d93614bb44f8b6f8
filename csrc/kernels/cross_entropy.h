#pragma once

#include "args.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

static void cross_entropy_forward(const CrossEntropyArgs&, int) {}
static void cross_entropy_backward(const CrossEntropyArgs&, int) {}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
