// Rows of a large bf16 gradient of weight, written past the caches.
//
// An ordinary store reads the line that it writes: two cores of an Intel Xeon wrote 19 GB/s so, and 43 GB/s past the
// caches, with products of tiles beside it 5 and 13 (docs/tuning.md). Only whole lines gain by it, so strips of
// features, of a line and a half, are written two at a time. Elsewhere lines are fetched beside the products instead.
#pragma once

#include "loss/sizes.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

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
        for (int64_t c = 0; c < kCols; c += kLanes)
          gpt4v_fast::GPT4V_FAST_ISA::store_row(first_ + r * kCols + c, load_vec(strip + r * kCols + c));
      waiting_ = kCols;
      return;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const auto half = [&](int64_t c) ALWAYS_INLINE_LAMBDA {
        if (c < waiting_) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first_ + r * kCols + c));
        return (__m256i)_mm512_cvtneps_pbh((__m512)load_vec(strip + r * kCols + c - waiting_));
      };
      bfloat16* const line = to + r * stride - waiting_;
      for (int64_t c = 0; c < waiting_ + used; c += kLine)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(line + c),
                            _mm512_inserti64x4(_mm512_castsi256_si512(half(c)), half(c + kLanes), 1));
    }
    waiting_ = 0;
  }

  // What a thread has written is there for others after this.
  static void finish() { _mm_sfence(); }

 private:
  int64_t waiting_ = 0;
  alignas(64) bfloat16 first_[kTileRows * kCols];  // of two strips
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
