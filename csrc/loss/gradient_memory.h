// The memory of the gradients of hidden and weight: their rows, their pages, and fp32 sums that stand in them.
#pragma once

#include <cstring>

#include "args.h"
#include "simd/pages.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

template <class T>
static T* row_of(const View& view, int64_t row) {
  return static_cast<T*>(view.data) + row * view.stride[0];
}

// A gradient that is its own fp32 sum needs no other.
static inline bool holds_sums(const View& view) { return view.dtype == DType::kFloat32 && view.stride[1] == 1; }

// Memory for the gradients, which are about to be written whole.
static inline void get_gradients(const LinearCrossEntropyArgs& a, int threads) {
  static LargePages before[2];
  const View* const gradients[] = {&a.grad_hidden, &a.grad_weight};
  for (int i = 0; i < 2; ++i) {
    const View& to = *gradients[i];
    const int64_t bytes = to.size[0] * to.size[1] * (to.dtype == DType::kFloat32 ? 4 : 2);
    if (to.defined && to.stride[1] == 1 && to.stride[0] == to.size[1])
      get_large_pages(before[i], to.data, bytes, threads);
  }
}

// fp32 numbers in two halves, of which the upper is a bf16 number (csrc/args.h).
struct Halves {
  uint16_t *high, *low;

  // to += the numbers.
  void add_to(float* to, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t{high[i]} << 16 | low[i];
      float value;
      std::memcpy(&value, &bits, sizeof(value));
      to[i] += value;
    }
  }
  void store(const float* from, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bits;
      std::memcpy(&bits, from + i, sizeof(bits));
      high[i] = static_cast<uint16_t>(bits >> 16), low[i] = static_cast<uint16_t>(bits);
    }
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
