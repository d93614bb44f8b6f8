// Memory that is about to be written for the first time, in large pages where the system has them.
#pragma once

#include <omp.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kWorthLargePages = 4 << 20;

// Asks for large pages under [data, data + bytes), of which any part may be written: a page of 4 KiB costs about as
// long to get as to write it ten times (fresh 56 MiB: 21 ms in small pages, 3.7 ms in large ones; docs/tuning.md).
// Without effect on pages that are there already, on small blocks, and where the system does not know how.
static inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  if (data == nullptr || bytes < kWorthLargePages) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refused, it changes nothing
#else
  (void)data, (void)bytes;
#endif
}

// Gets large pages under [data, data + bytes), all of which will be written, until one comes slowly; the rest is left
// to small ones. Large pages come slowly where free memory lies in pieces and has to be moved, and on a virtual machine
// whose host takes free memory back: there 2 MiB took 5 to 12 ms, of small pages, which do not go so soon, 2
// (docs/tuning.md). Where few come before a slow one, the next calls are left without.
static inline void get_large_pages(void* data, int64_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE: Linux 5.14, and not in every header
  constexpr int64_t kLarge = 2 << 20;
  constexpr double kSlow = 2e-3;    // seconds
  constexpr int64_t kPaysOff = 16;  // large pages that make up for a slow one
  static int64_t left_out = 0;      // of the coming calls
  if (data == nullptr || bytes < kWorthLargePages) return;
  if (__atomic_load_n(&left_out, __ATOMIC_RELAXED) > 0) {
    __atomic_fetch_sub(&left_out, 1, __ATOMIC_RELAXED);
    return;
  }
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  const int64_t begin = (address + kLarge - 1) / kLarge, end = (address + bytes) / kLarge;
  for (int64_t page = begin; page < end;) {
    const int64_t first = page, count = page == begin ? 1 : end - page < threads ? end - page : threads;
    int64_t got = 0, slow = 0;
    madvise(reinterpret_cast<void*>(first * kLarge), static_cast<size_t>(count * kLarge), MADV_HUGEPAGE);
#pragma omp parallel for num_threads(threads) if (count > 1) schedule(static) reduction(+ : got, slow)
    for (int64_t p = first; p < first + count; ++p) {
      const double start = omp_get_wtime();
      got += madvise(reinterpret_cast<void*>(p * kLarge), static_cast<size_t>(kLarge), kPopulateWrite) == 0;
      slow += omp_get_wtime() - start > kSlow;
    }
    if (got == 0) return expect_writes(data, bytes);  // an older system: they come when they are written
    page += count;
    if (slow == 0) continue;
    if (page - begin < kPaysOff) __atomic_store_n(&left_out, kPaysOff - (page - begin), __ATOMIC_RELAXED);
    return;
  }
#else
  (void)data, (void)bytes, (void)threads;
#endif
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
