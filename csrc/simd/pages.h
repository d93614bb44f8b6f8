// Memory that is about to be written for the first time, in large pages where the system has them.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Asks for large pages under [data, data + bytes): a page of 4 KiB costs about as long to get as to write it ten times
// (fresh 56 MiB: 21 ms in small pages, 3.7 ms in large ones; docs/tuning.md). Without effect on pages that are there
// already, on small blocks, and where the system does not know how.
static inline void expect_writes(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = 4 << 20;
  if (data == nullptr || bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refused, it changes nothing
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
