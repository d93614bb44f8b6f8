// Prints for each dtype the most scratch, in bytes, that the backward pass of linear cross-entropy takes at any of many
// sizes (csrc/loss/sizes.h), with what threads need for their copies of the weight, and what it may be.
#include <omp.h>

#include <cstdio>
#include <initializer_list>

#include "loss/kept_logits.h"

using namespace gpt4v_fast::GPT4V_FAST_ISA;
using namespace gpt4v_fast::GPT4V_FAST_ISA::loss;

template <class T>
static void print(const char* name) {
  int64_t most = 0;
  for (const int64_t E : {1, 576, 2048, 2112, 3072, 4096, 5120, 8192, 12288, 16384, 32768, 49152, 65536})
    for (const int64_t N : {1, 48, 256, 512, 1024, 4096, 8192})
      for (const int64_t V : {100, 32000, 262144}) {
        const bool copies = sizeof(T) != sizeof(typename Operands<T>::Element);
        most = max_of(most, BackwardSizes<T>::of(N, E, V).bytes(N, E, true) + (copies ? kThreadBytes : 0));
      }
  std::printf("%s %lld %lld\n", name, static_cast<long long>(most), static_cast<long long>(kExtraBytes));
}

int main() {
  print<bfloat16>("bf16");
  if (kHasAmx) return 0;  // which serve bf16 alone
  print<float>("fp32");
  print<float16>("fp16");
}
