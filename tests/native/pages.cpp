// Gets pages by csrc/simd/pages.h for tests/native/test_pages.py, which says how many of the coming calls are to do
// without large ones. Prints how many small pages there should be and are, how many there are outside of the memory,
// how many bytes of what stood there have changed, and how many calls are left; or "unknown" where the system does not
// know how.
#include "simd/pages.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace gpt4v_fast::GPT4V_FAST_ISA;

int main(int, char** arguments) {
  constexpr int64_t kPage = 4096, kAll = 24 << 20, kBegin = (3 << 20) + 64, kBytes = 13 << 20, kWritten = 2 << 20;
  void* const all = mmap(nullptr, kAll, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return 1;
  char* const memory = static_cast<char*>(all);
  char* const data = memory + kBegin;
  madvise(all, kAll, MADV_NOHUGEPAGE);  // or a byte may bring 2 MiB around it
  for (int64_t i = 0; i < kWritten; ++i) data[i] = static_cast<char>(i % 127);
  LargePages before;
  before.left_out = std::atoi(arguments[1]);
  get_large_pages(before, data, kBytes, 2);

  std::vector<unsigned char> is_there(kAll / kPage);
  if (mincore(all, kAll, is_there.data()) != 0) return 1;
  const int64_t address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data));
  const int64_t from_large = (address + kLargePage - 1) / kLargePage * kLargePage - (address - kBegin);
  const int64_t to_large = (address + kBytes) / kLargePage * kLargePage - (address - kBegin);
  int64_t wanted = 0, got = 0, outside = 0, changed = 0;
  for (int64_t page = 0; page < kAll / kPage; ++page) {
    const int64_t begin = page * kPage, end = begin + kPage;
    const bool is_got = is_there[page] % 2 != 0;
    if (begin >= from_large && end <= to_large) ++wanted, got += is_got;
    if (end <= kBegin || begin >= kBegin + kBytes) outside += is_got;
  }
  for (int64_t i = 0; i < kWritten; ++i) changed += data[i] != static_cast<char>(i % 127);
  if (madvise(memory + kAll - kLargePage, kPage, 23) != 0) return std::printf("unknown\n"), 0;
  std::printf("%ld %ld %ld %ld %d\n", static_cast<long>(wanted), static_cast<long>(got), static_cast<long>(outside),
              static_cast<long>(changed), before.left_out);
  return 0;
}
