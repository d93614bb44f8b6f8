// Scratch memory of a kernel call, in the including ISA's namespace: std::vector would leave inline functions
// compiled for this ISA to the linker, which may keep them for everybody (csrc/isa/table.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace gpt4v_fast::GPT4V_FAST_ISA {

// `count` elements of a trivial type, uninitialised, on a cache line's boundary. Throws std::bad_alloc, so it
// is made outside of OpenMP regions, which no exception may leave.
template <class T>
class Buffer {
 public:
  static constexpr size_t kAlignment = 64;

  explicit Buffer(int64_t count) : data_(static_cast<T*>(allocate(count))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{kAlignment}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() const { return data_; }
  T& operator[](int64_t index) const { return data_[index]; }

 private:
  static void* allocate(int64_t count) {
    if (count < 0 || static_cast<uint64_t>(count) > PTRDIFF_MAX / sizeof(T)) throw std::bad_alloc();
    return ::operator new(static_cast<size_t>(count) * sizeof(T), std::align_val_t{kAlignment});
  }

  T* data_;
};

// `count` rounded up to a multiple of `unit`.
static inline int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

static inline int64_t ceil_div(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

static inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

static inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
