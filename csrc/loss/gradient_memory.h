// The memory of the gradients of hidden and weight: their rows, their pages, fp32 sums that stand in them, and rows
// that are written past the caches.
#pragma once

#include <cstring>

#include "loss/sizes.h"
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

// Which of the parts of tokens whose gradients are added up one after the other a call is.
struct PartOfTokens {
  bool is_first = true, is_last = true;
};

// The gradients of weight and bias where no token counts.
template <class T>
static void clear_rows(const LinearCrossEntropyArgs& a) {
  for (int64_t v = 0; v < a.weight.size[0]; ++v) {
    if (a.grad_bias.defined) at<float>(a.grad_bias, v) = 0.0f;
    for (int64_t e = 0; a.grad_weight.defined && e < a.weight.size[1]; ++e)
      row_of<T>(a.grad_weight, v)[e * a.grad_weight.stride[1]] = T{};
  }
}

// Rows of a large bf16 gradient of weight, written past the caches.
//
// An ordinary store reads the line that it writes: two cores of an Intel Xeon wrote 19 GB/s so, and 43 GB/s past the
// caches, with products of AMX tiles beside it 5 and 13 (docs/notes/2026-11-linear-loss-amx.md). Only whole lines gain
// by it, so strips of features, of a line and a half, are written two at a time. Elsewhere lines are fetched beside the
// products instead.
#ifdef __AMX_BF16__

// What is smaller may still be in a cache when it is read.
constexpr int64_t kStreamedBytes = 16 << 20;

class StreamedRows {
 public:
  static constexpr int64_t kLine = 32;  // elements

  // Whether lines of this gradient's rows are whole.
  static bool serves(const View& gradient) {
    return gradient.dtype == DType::kBFloat16 && gradient.stride[1] == 1 && gradient.stride[0] % kLine == 0 &&
           gradient.size[1] % kLine == 0 && reinterpret_cast<uintptr_t>(gradient.data) % 64 == 0 &&
           gradient.size[0] * gradient.size[1] * 2 >= kStreamedBytes;
  }

  // The strip (rows, used) of a task's next features, the last of them or one of full width, which belongs at `to`.
  void put(const float* strip, int64_t rows, int64_t used, bool is_last, bfloat16* to, int64_t stride) {
    if (waiting_ == 0 && !is_last) {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0; c < kStripCols; c += kLanes)
          store_operand(first_ + r * kStripCols + c, load_vec(strip + r * kStripCols + c));
      waiting_ = kStripCols;
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const auto half = [&](int64_t c) ALWAYS_INLINE_LAMBDA {
        if (c < waiting_) return load_half(first_ + r * kStripCols + c);
        return round_to_half(load_vec(strip + r * kStripCols + c - waiting_));
      };
      bfloat16* const line = to + r * stride - waiting_;
      for (int64_t c = 0; c < waiting_ + used; c += kLine) stream_line(line + c, half(c), half(c + kLanes));
    }
    waiting_ = 0;
  }

  // What a thread has written is there for others after this.
  static void finish() { finish_streams(); }

 private:
  int64_t waiting_ = 0;
  alignas(64) bfloat16 first_[kTileRows * kStripCols];  // of two strips
};

#else

struct StreamedRows {
  static bool serves(const View&) { return false; }
  template <class T>
  void put(const float*, int64_t, int64_t, bool, T*, int64_t) {}
  static void finish() {}
};

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
