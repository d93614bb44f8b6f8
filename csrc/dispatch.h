// One table of function pointers per ISA, chosen once by cpuid and by GPT4V_FAST_ISA.
#pragma once

#include <string>
#include <vector>

#include "args.h"

namespace gpt4v_fast {

// Floats that a thread of peak_read reads per look at the clock; the data holds at least this many for each
// thread.
constexpr int64_t kPeakReadFloats = 256 * 1024;

// `threads` is the number of OpenMP threads to use; no kernel's result depends on it.
struct Kernels {
  const char* isa;
  void (*attention_forward)(const AttentionArgs&, int threads);
  void (*attention_backward)(const AttentionArgs&, int threads);
  void (*attention_kvcache)(const KvCacheArgs&, int threads);
  void (*cross_entropy_forward)(const CrossEntropyArgs&, int threads);
  void (*cross_entropy_backward)(const CrossEntropyArgs&, int threads);
  void (*linear_cross_entropy_forward)(const LinearCrossEntropyArgs&, int threads);
  void (*linear_cross_entropy_backward)(const LinearCrossEntropyArgs&, int threads);
  void (*linear_cross_entropy_gradients)(const LinearCrossEntropyArgs&, float nll_slope, float lse_slope, int64_t room,
                                         int threads);
  void (*patch_embed_forward)(const PatchEmbedArgs&, int threads);
  void (*patch_embed_backward)(const PatchEmbedArgs&, int threads);
  // Probes for benchmarks (probes/peak.h): GFLOP/s, GFLOP/s and GB/s on this many threads.
  double (*peak_fma)(int threads, double seconds);
  double (*peak_dot_bf16)(int threads, double seconds);
  double (*peak_read)(const float* data, int64_t count, int threads, double seconds);
  double (*handoff)(double seconds);  // nanoseconds between two threads
};

// The ISAs this binary holds, slowest first.
std::vector<std::string> built_isas();

// The ISAs this binary holds and this processor runs, slowest first.
std::vector<std::string> available_isas();

// The table in use. The first call picks it: the fastest available, or the one GPT4V_FAST_ISA names.
const Kernels& kernels();

// Uses the named ISA from now on; throws std::invalid_argument when this binary or processor lacks it.
void select_isa(const std::string& name);

}  // namespace gpt4v_fast
