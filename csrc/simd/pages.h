// Memory that is about to be written for the first time, in large pages where the system has them.
#pragma once

#include <omp.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kLargePage = 2 << 20;
constexpr int64_t kWorthLargePages = 2 * kLargePage;

// Asks for large pages under [data, data + bytes), of which any part may be written: a page of 4 KiB costs about as
// long to get as to write it ten times (fresh 56 MiB: 21 ms in small pages, 3.7 ms in large ones;
// docs/notes/2026-11-memory-and-pages.md). Without effect on pages that are there already, on small blocks, and where
// the system does not know how.
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

// How large pages came to one kind of memory in the calls before.
struct LargePages {
  double page_time = 0;  // s that one took, mean of the last calls that asked for them
  int left_out = 0;      // of the coming calls
  int pause = 0;         // calls left out the last time
};

// What getting pages has come to.
struct GotPages {
  int64_t count = 0;  // of kLargePage bytes
  double time = 0;    // s of all threads
};

// Gets the pages of memory that begins at first * kLargePage, `count` times so many bytes, large or small as the system
// sees fit. Without effect on those that are there already, and on a system that does not know how.
static inline GotPages get_pages(int64_t first, int64_t count, int threads) {
  GotPages result;
#ifdef __linux__
  constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE: Linux 5.14, and not in every header
  int64_t got = 0;
  double time = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : got, time)
  for (int64_t page = first; page < first + count; ++page) {
    const double start = omp_get_wtime();
    got += madvise(reinterpret_cast<void*>(page * kLargePage), static_cast<size_t>(kLargePage), kPopulateWrite) == 0;
    time += omp_get_wtime() - start;
  }
  result = {got, time};
#else
  (void)first, (void)count, (void)threads;
#endif
  return result;
}

// Gets large pages under [data, data + bytes), all of which will be written, unless they came slowly in the calls
// before. They come slowly where free memory is scattered and has to be moved, and on a virtual machine whose host
// takes free memory back: there 2 MiB took 5 to 12 ms, of small pages, which do not go so soon, 1
// (docs/notes/2026-11-memory-and-pages.md). What one call has waited for is often there for the next: it takes two slow
// calls in a row, or more of them among quick ones, before 16 calls do without, then 32, up to 128. These get small
// pages, many at a time: two thirds to a half of the time that one after the other takes as they are written.
static inline void get_large_pages(LargePages& before, void* data, int64_t bytes, int threads) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr double kSlow = 1.5e-3;                       // s, where 2 MiB of small pages take 1
  constexpr double kMostCounted = 4e-3, kWeight = 0.25;  // s of a call, and of it, in the mean
  constexpr int kEnough = 4;                             // pages of a thread, to see that they are slow again
  constexpr int kFirstPause = 16, kLongestPause = 128;   // calls
  if (data == nullptr || bytes < kWorthLargePages) return;
  // Calls at the same time may lose what another has seen: it is only about speed.
  const int left_out = __atomic_load_n(&before.left_out, __ATOMIC_RELAXED);
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  const int64_t begin = (address + kLargePage - 1) / kLargePage, end = (address + bytes) / kLargePage;
  if (left_out > 0) {
    __atomic_store_n(&before.left_out, left_out - 1, __ATOMIC_RELAXED);
    get_pages(begin, end - begin, threads);
    return;
  }
  double page_time;
  __atomic_load(&before.page_time, &page_time, __ATOMIC_RELAXED);
  const int64_t portion = page_time > kSlow / 2 ? int64_t{kEnough} * threads : end - begin;
  int64_t tried = 0, got = 0;
  double time = 0;  // of all threads
  while (tried < end - begin && time <= kSlow * static_cast<double>(tried)) {
    const int64_t first = begin + tried, count = end - first < portion ? end - first : portion;
    madvise(reinterpret_cast<void*>(first * kLargePage), static_cast<size_t>(count * kLargePage), MADV_HUGEPAGE);
    const GotPages pages = get_pages(first, count, threads);
    got += pages.count, time += pages.time;
    tried += count;
  }
  if (got == 0) return expect_writes(data, bytes);  // an older system: they come when they are written
  get_pages(begin + tried, end - begin - tried, threads);
  const double now = time / static_cast<double>(tried);
  page_time += kWeight * ((now < kMostCounted ? now : kMostCounted) - page_time);
  if (page_time > kSlow) {
    page_time = kSlow;
    const int pause = __atomic_load_n(&before.pause, __ATOMIC_RELAXED);
    const int longer = pause == 0 ? kFirstPause : pause < kLongestPause ? 2 * pause : kLongestPause;
    __atomic_store_n(&before.pause, longer, __ATOMIC_RELAXED);
    __atomic_store_n(&before.left_out, longer, __ATOMIC_RELAXED);
  } else if (page_time < kSlow / 2) {
    __atomic_store_n(&before.pause, 0, __ATOMIC_RELAXED);
  }
  __atomic_store(&before.page_time, &page_time, __ATOMIC_RELAXED);
#else
  (void)before, (void)data, (void)bytes, (void)threads;
#endif
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
