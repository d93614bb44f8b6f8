// Work that is woven into a product (register_tile.h): asking for memory that is used next.
//
// A product calls work.step() between steps of its depth, and each step asks for a few cache lines: in one go they
// would wait for each other. Work is copied into the product and back, so that it stands in registers. Three ways to go
// through memory are left, each with a measurement in docs/notes: in order, so many lines with each step
// (PrefetchLines), evenly over the whole product, for AMX tiles (PrefetchEvenly), and through a list of what is asked
// for, the urgent first (PrefetchList). Rows that will be written come whole (PrefetchToWrite).
#pragma once

#include "simd/buffer.h"
#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kLineBytes = 64;

struct NoWork {
  ALWAYS_INLINE void step() {}
};

// Rows of memory that will be used: `bytes` of each, `stride` bytes apart.
struct Memory {
  const char* at = nullptr;
  int64_t bytes = 0, stride = 0, rows = 0;

  // One row.
  static Memory of(const void* data, int64_t bytes) {
    return {static_cast<const char*>(data), bytes, 0, bytes > 0 ? 1 : 0};
  }
};

// Asks for memory in order, kLines lines a step, in second-level cache.
template <int kLines>
struct PrefetchLines {
  const char* next = nullptr;
  int64_t left = 0;  // steps

  PrefetchLines() = default;
  explicit PrefetchLines(const Memory& memory) : next(memory.at), left(ceil_div(memory.bytes, kLines * kLineBytes)) {}
  ALWAYS_INLINE void step() {
    if (left == 0) return;
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(next + i * kLineBytes, 0, 2);
    --left, next += kLines * kLineBytes;
  }
};

// The same evenly: so many lines with each of `steps` steps that the last is asked for with the last. Faster, loads of
// AMX tiles wait for the line buffers that it takes.
struct PrefetchEvenly {
  const char* next = nullptr;
  int64_t left = 0, per_step = 0;  // lines

  PrefetchEvenly(const Memory& memory, int64_t steps)
      : next(memory.at), left(memory.bytes / kLineBytes), per_step(ceil_div(left, max_of(steps, 1))) {}
  ALWAYS_INLINE void step() {
    if (left <= 0) return;
    left -= per_step;
    for (int64_t i = 0; i < per_step; ++i, next += kLineBytes) __builtin_prefetch(next, 0, 2);
  }
};

// Asks for rows of up to 192 bytes that will be written, a row a step, in first-level cache.
struct PrefetchToWrite {
  const char* next = nullptr;
  int64_t stride = 0, left = 0, last = 0;  // left: rows; the last byte of one

  explicit PrefetchToWrite(const Memory& rows)
      : next(rows.at), stride(rows.stride), left(rows.rows), last(rows.bytes - 1) {}
  ALWAYS_INLINE void step() {
    if (left == 0) return;
    __builtin_prefetch(next, 1);
    __builtin_prefetch(next + min_of(kLineBytes, last), 1);
    __builtin_prefetch(next + min_of(2 * kLineBytes, last), 1);
    __builtin_prefetch(next + last, 1);
    --left, next += stride;
  }
};

// Asks for what a list of the caller names, kLines lines every kEvery steps.
template <int kLines, int kEvery>
class PrefetchList {
 public:
  // What there is no room for is dropped; `urgent` is room at the front.
  template <int kRoom>
  explicit PrefetchList(Memory (&list)[kRoom], int64_t urgent = 0)
      : begin_(list), next_(list + urgent), end_(list + urgent), last_(list + kRoom) {}
  void add(const Memory& memory) {
    if (memory.rows > 0 && end_ < last_) *end_++ = memory;
  }
  // Before all others.
  void add_first(const Memory& memory) {
    if (memory.rows <= 0 || next_ == begin_) return;
    if (current_.rows > 0) *--next_ = current_;
    current_ = memory, column_ = 0;
  }
  ALWAYS_INLINE bool is_done() const { return current_.rows == 0 && next_ == end_; }
  ALWAYS_INLINE void step() {
    if constexpr (kEvery > 1)
      if (++wait_ % kEvery != 0) return;
    if (current_.rows == 0) {
      if (next_ == end_) return;
      current_ = *next_++, column_ = 0;
    }
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(current_.at + column_ + i * kLineBytes, 0, 2);
    column_ += kLines * kLineBytes;
    if (column_ < current_.bytes) return;
    current_.at += current_.stride, --current_.rows, column_ = 0;
  }

 private:
  Memory current_{};
  int64_t column_ = 0;
  int wait_ = 0;
  Memory *begin_, *next_, *end_, *last_;
};

// One work, then another.
template <class First, class Second>
struct Then {
  First first;
  Second second;

  ALWAYS_INLINE void step() {
    if (first.left > 0)
      first.step();
    else
      second.step();
  }
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
