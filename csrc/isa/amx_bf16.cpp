#define GPT4V_FAST_ISA amx_bf16
// AMX tiles multiply bf16 alone: this ISA has the functions that gain by them, and those of avx512_bf16 for all else.
// (Not isa/table.h, whose other functions would be compiled once more for nothing.)
#include "attention/attention.h"
#include "attention/kvcache.h"
#include "dispatch.h"
#include "loss/linear_cross_entropy.h"
#include "patch_embed/patch_embed.h"
#include "probes/peak.h"

namespace gpt4v_fast {

namespace avx512_bf16 {
const Kernels& table();
}

namespace amx_bf16 {

// Where a processor without AVX-512 asks for the name, nothing may be computed: the table is constant, and what it
// takes from the other is looked up in a call.
const Kernels& table() {
  using avx512_bf16::table;
  static constexpr Kernels kTable = {
      "amx_bf16",
      [](const AttentionArgs& a, int threads) {
        if (a.q.dtype == DType::kBFloat16) return attention_forward(a, threads);
        table().attention_forward(a, threads);
      },
      [](const AttentionArgs& a, int threads) {
        if (a.q.dtype == DType::kBFloat16) return attention_backward(a, threads);
        table().attention_backward(a, threads);
      },
      [](const KvCacheArgs& c, int threads) {
        if (c.q.dtype == DType::kBFloat16) return attention_kvcache(c, threads);
        table().attention_kvcache(c, threads);
      },
      [](const CrossEntropyArgs& a, int threads) { table().cross_entropy_forward(a, threads); },
      [](const CrossEntropyArgs& a, int threads) { table().cross_entropy_backward(a, threads); },
      [](const LinearCrossEntropyArgs& a, int threads) {
        if (a.hidden.dtype == DType::kBFloat16) return linear_cross_entropy_forward(a, threads);
        table().linear_cross_entropy_forward(a, threads);
      },
      [](const LinearCrossEntropyArgs& a, int threads) {
        if (a.hidden.dtype == DType::kBFloat16) return linear_cross_entropy_backward(a, threads);
        table().linear_cross_entropy_backward(a, threads);
      },
      [](const LinearCrossEntropyArgs& a, float nll_slope, float lse_slope, int64_t room, int threads) {
        if (a.hidden.dtype == DType::kBFloat16)
          return linear_cross_entropy_gradients(a, nll_slope, lse_slope, room, threads);
        table().linear_cross_entropy_gradients(a, nll_slope, lse_slope, room, threads);
      },
      [](const PatchEmbedArgs& a, int threads) {
        if (patch::is_bf16(a)) return patch_embed_forward(a, threads);
        table().patch_embed_forward(a, threads);
      },
      [](const PatchEmbedArgs& a, int threads) {
        if (patch::is_bf16(a)) return patch_embed_backward(a, threads);
        table().patch_embed_backward(a, threads);
      },
      [](int threads, double seconds) { return table().peak_fma(threads, seconds); },
      peak_dot_bf16,
      [](const float* data, int64_t count, int threads, double seconds) {
        return table().peak_read(data, count, threads, seconds);
      },
      [](double seconds) { return table().handoff(seconds); },
  };
  return kTable;
}

}  // namespace amx_bf16
}  // namespace gpt4v_fast
