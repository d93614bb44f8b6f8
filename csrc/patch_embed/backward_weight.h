// Patch embedding, the gradient of weight: grad_weight (E, K) = grad_tokens^T @ patches.
//
// Tokens are the depth. A block of them is gathered by all threads as rows of gradients and of patches, these rows are
// packed as steps of strips of channels and of patch elements, and each task multiplies a strip of channels with all
// strips of elements in turn: 2 * B * N * K * E flops. Over several blocks grad_weight is read and written once for
// each.
#pragma once

#include <omp.h>

#include "patch_embed/layout.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::patch {

// Tokens of a block: their strips take so many bytes, rows as many again. An odd number of cache lines of pairs, or all
// rows of an AMX tile would fall into the same few lines of a first-level cache.
constexpr int64_t kDepthBytes = 16 << 20;
constexpr int64_t kMaxDepthLines = 31;
constexpr int64_t kLineTokens = 32;

template <class Element>
class WeightGradient {
 public:
  using Operand = typename Operands<Element>::ColumnOperand;

  WeightGradient(const PatchEmbedArgs& args, const Layout& layout)
      : a(args),
        layout(layout),
        runs(layout, args.pixels),
        elements(layout.K, false),
        channels(layout.E, false),
        block(block_tokens()),
        size(strip_size<Element>(block)),
        patch_stride(row_stride<Element>(layout.K)),
        gradient_stride(row_stride<Element>(layout.E)),
        patch_rows(block * patch_stride),
        gradient_rows(block * gradient_stride),
        patches(elements.count * size),
        gradients(channels.count * size) {}

  void run(int threads) const {
    if (elements.count == 0 || channels.count == 0) return;
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] const AmxTiles tiles;
      for (int64_t first = 0; first == 0 || first < layout.tokens; first += block) {
        const int64_t count = min_of(block, layout.tokens - first);
        load_by_team(first, count);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < channels.count * elements.count; ++task)
          multiply(task / elements.count, task % elements.count, count, first > 0);
      }
    }
  }

 private:
  int64_t block_tokens() const {
    const int64_t bytes = 4 * (elements.vectors + channels.vectors) * kLanes;
    const int64_t lines = min_of(kMaxDepthLines, kDepthBytes / (max_of(bytes, 1) * kLineTokens));
    return max_of(1, min_of((max_of(0, lines - 1) | 1) * kLineTokens, layout.tokens));
  }

  void load_by_team(int64_t first, int64_t count) const {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < count; ++t) {
      with_pixel(a.pixels.dtype, [&](auto type) {
        gather_patch<decltype(type)>(a, layout, runs.start.get(), first + t, patch_rows.get() + t * patch_stride);
      });
      load_gradient(a, layout, first + t, gradient_rows.get() + t * gradient_stride);
    }
    pack_columns_by_team(RowsOf<Element>(patch_rows.get(), patch_stride), 0, count, count, elements, size,
                         patches.get());
    const RowsOf<Element> rows(gradient_rows.get(), gradient_stride);
    if (kHasAmx) {
#pragma omp for schedule(static)
      for (int64_t s = 0; s < channels.count; ++s)
        Operands<Element>::columns_of({rows.data + channels.begin(s), gradient_stride, 1}, count, channels.used(s),
                                      gradients.get() + s * size, channels.lanes(s));
    } else {
      pack_columns_by_team(rows, 0, count, count, channels, size, gradients.get());
    }
  }

  // Channels of a strip as rows, tokens as depth.
  Operand channels_of(int64_t s, int64_t count) const {
    const Element* data = reinterpret_cast<const Element*>(gradients.get() + s * size);
    const int64_t each = Operands<Element>::kPairs ? 2 : 1;
    return {data, each * (kHasAmx ? round_up(Operands<Element>::depth(count), kLanes) : kStripCols)};
  }

  void multiply(int64_t s, int64_t f, int64_t count, bool adds) const {
    alignas(64) float sums[kStripCols * kStripCols];
    NoWork nothing;
    multiply_strip(channels_of(s, count), channels.used(s), elements.lanes(f) / kLanes, patches.get() + f * size,
                   Operands<Element>::depth(count), sums, kStripCols, nothing,
                   f + 1 < elements.count ? patches.get() + (f + 1) * size : nullptr);
    float* to = static_cast<float*>(a.grad_weight.data) + channels.begin(s) * layout.K + elements.begin(f);
    for (int64_t e = 0; e < channels.used(s); ++e)
      add_row(sums + e * kStripCols, elements.used(f), adds, to + e * layout.K);
  }

  const PatchEmbedArgs& a;
  const Layout& layout;
  const RunStarts runs;
  const Strips elements, channels;
  const int64_t block, size, patch_stride, gradient_stride;
  const Buffer<Element> patch_rows, gradient_rows;
  const Buffer<float> patches, gradients;
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::patch
