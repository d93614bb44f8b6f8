// Patch embedding: tokens = patches(pixels * pixel_scale + pixel_shift) @ weight^T + bias + pos_embed.
//
// Patches do not overlap, so the convolution is one matrix product (tokens, K) x (K, E), K = C * Pt * Ph * Pw. A block
// of patches is gathered, converted and normalised straight into the rows of the product (layout.h), the weight is
// packed once as strips of channels (product/strips.h), and all strips pass by the block: no normalised image and no
// unfolded image is ever written. 2 * B * N * K * E flops; bytes: pixels, weight and tokens once, plus the packed
// weight (K * E) once per block of tokens.
//
// Backward: grad_pixels = (grad_tokens @ weight) * pixel_scale, which needs no col2im addition because every pixel
// belongs to one token, and grad_weight = grad_tokens^T @ patches (backward_weight.h). Every element of every result is
// summed by one thread in an order that depends on the sizes alone.
//
// bf16 tokens of a bf16 weight are multiplied as bf16 where the ISA multiplies pairs: normalised pixels are rounded, as
// a bf16 model rounds its own, which is half a unit of a token at most; sums are fp32. fp32 and fp16 tokens of a bf16
// weight have more digits than such pixels, so everything is fp32 there.
#pragma once

#include <omp.h>

#include "patch_embed/backward_weight.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::patch {

// Rows of a block: so many that the strips, which come from a second- or third-level cache, wait for the product and
// not the other way round; within a quarter of a second-level cache.
constexpr int64_t kRowMultiple = kHasAmx ? 2 * kAmxSide : kProductRows;
constexpr int64_t kMaxBlockTokens = kHasAmx ? 256 : 96;
constexpr int64_t kBlockBytes = (kHasAmx ? 512 : 256) << 10;

// Tokens of a block of rows with so many bytes each; small enough that every thread gets some.
static inline int64_t block_tokens(int64_t tokens, int64_t row_bytes, int threads) {
  int64_t units = max_of(1, min_of(kMaxBlockTokens, kBlockBytes / row_bytes) / kRowMultiple);
  while (units > 1 && tokens < 2 * threads * units * kRowMultiple) units /= 2;
  return units * kRowMultiple;
}

// The product of blocks of tokens, whose rows load(token, to) makes, with packed strips of `columns`; store(first,
// count, s, sums) takes the finished sums (count, kStripCols) of strip s. Called by every thread.
template <class Element, class Load, class Store>
static void multiply_blocks_by_team(int64_t tokens, int64_t depth, const Strips& columns, const float* packed,
                                    int64_t block, Element* rows, float* sums, Load load, Store store) {
  using O = Operands<Element>;
  const int64_t stride = row_stride<Element>(depth), steps = O::depth(depth), size = strip_size<Element>(depth);
#pragma omp for schedule(dynamic)
  for (int64_t first = 0; first < tokens; first += block) {
    const int64_t count = min_of(block, tokens - first);
    for (int64_t t = 0; t < count; ++t) load(first + t, rows + t * stride);
    for (int64_t s = 0; s < columns.count; ++s) {
      NoWork nothing;
      const float* strip = packed + s * size;
      multiply_strip(typename O::RowOperand{rows, stride}, count, columns.lanes(s) / kLanes, strip, steps, sums,
                     kStripCols, nothing, s + 1 < columns.count ? strip + size : packed);
      store(first, count, s, sums);
    }
  }
}

// bias and pos_embed are added to the sums of a strip of channels, and the tokens stored.
static void store_tokens(const PatchEmbedArgs& args, const Layout& layout, const float* bias, int64_t first,
                         int64_t count, int64_t channel, int64_t width, const float* sums) {
  const View &pos = args.pos_embed, &tokens = args.tokens;
  float positions[kStripCols];
  for (int64_t t = 0; t < count; ++t, sums += kStripCols) {
    const int64_t token = first + t;
    if (pos.defined)
      with_float(pos.dtype, [&](auto type) {
        const auto* row = static_cast<const decltype(type)*>(pos.data) + token % layout.N * pos.stride[0];
        copy_elements(row + channel * pos.stride[1], pos.stride[1], width, positions);
      });
    with_float(tokens.dtype, [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(tokens.data) + layout.token_start(token, tokens) + channel * tokens.stride[2];
      float finished[kStripCols];
      for_covering_vectors(width, [&](int64_t c, int n) ALWAYS_INLINE_LAMBDA {
        Vec sum = load_first(sums + c, n);
        if (bias != nullptr) sum += load_first(bias + channel + c, n);
        if (pos.defined) sum += load_first(positions + c, n);
        if (tokens.stride[2] == 1)
          store_first(to + c, sum, n);
        else
          store_first(finished + c, sum, n);
      });
      for (int64_t c = 0; tokens.stride[2] != 1 && c < width; ++c)
        to[c * tokens.stride[2]] = from_float<T>(finished[c]);
    });
  }
}

// Elements [element, element + width) of the gradients of normalised patches, as grad_pixels.
static void store_pixels(const PatchEmbedArgs& args, const Layout& layout, const int64_t* run_starts, int64_t first,
                         int64_t count, int64_t element, int64_t width, const float* sums) {
  const View& grad = args.grad_pixels;
  const int64_t stride = grad.stride[4], end = element + width;
  with_float(grad.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < count; ++t, sums += kStripCols) {
      T* patch = static_cast<T*>(grad.data) + layout.patch_start(first + t, grad);
      for (int64_t k = element, n; k < end; k += n) {
        const int64_t r = k / layout.run, x = k % layout.run;
        const float scale = layout.scale[r / layout.runs_of_channel];
        const float* from = sums + k - element;
        T* to = patch + run_starts[r] + x * stride;
        n = min_of(layout.run - x, end - k);
        if (stride == 1)
          for_covering_vectors(n, [&](int64_t c, int lanes) ALWAYS_INLINE_LAMBDA {
            store_first(to + c, load_first(from + c, lanes) * scale, lanes);
          });
        else
          for (int64_t c = 0; c < n; ++c) to[c * stride] = from_float<T>(from[c] * scale);
      }
    }
  });
}

// Element is what is multiplied.
template <class Element>
static void forward(const PatchEmbedArgs& args, int threads) {
  const Layout layout(args);
  const Strips channels(layout.E);
  if (channels.count == 0 || layout.tokens == 0) return;
  const WeightRows<Element> weight(args, layout);
  const RunStarts runs(layout, args.pixels);
  const int64_t stride = row_stride<Element>(layout.K);
  const int64_t block = block_tokens(layout.tokens, stride * int64_t{sizeof(Element)}, threads);
  const Buffer<float> packed(channels.count * strip_size<Element>(layout.K)), bias(args.bias.defined ? layout.E : 0);
  const Buffer<float> sums(threads * block * kStripCols);
  const Buffer<Element> rows(threads * block * stride);
  for (int64_t e = 0; args.bias.defined && e < layout.E; ++e) bias[e] = load_any(args.bias, e * args.bias.stride[0]);
  // Outside of the team: clang finds no variable of a function from a lambda in a parallel region in a lambda.
  const auto store = [&](int64_t first, int64_t count, int64_t s, const float* strip_sums) {
    store_tokens(args, layout, args.bias.defined ? bias.get() : nullptr, first, count, channels.begin(s),
                 channels.used(s), strip_sums);
  };
  with_pixel(args.pixels.dtype, [&](auto type) {
    const auto gather = [&](int64_t token, Element* to) {
      gather_patch<decltype(type)>(args, layout, runs.start.get(), token, to);
    };
#pragma omp parallel num_threads(threads)
    {
      [[maybe_unused]] const AmxTiles tiles;
      const int me = omp_get_thread_num();
      weight.load_by_team();
      pack_lanes_by_team(weight.rows(), channels, 0, channels.count, layout.K, packed.get(),
                         [](int64_t) { return true; });
      multiply_blocks_by_team(layout.tokens, layout.K, channels, packed.get(), block, rows.get() + me * block * stride,
                              sums.get() + me * block * kStripCols, gather, store);
    }
  });
}

template <class Element>
static void backward_pixels(const PatchEmbedArgs& args, const Layout& layout, int threads) {
  const Strips elements(layout.K);
  if (elements.count == 0 || layout.tokens == 0) return;
  const WeightRows<Element> weight(args, layout);
  const RunStarts runs(layout, args.grad_pixels);
  const int64_t stride = row_stride<Element>(layout.E), size = strip_size<Element>(layout.E);
  const int64_t block = block_tokens(layout.tokens, stride * int64_t{sizeof(Element)}, threads);
  const Buffer<float> packed(elements.count * size), sums(threads * block * kStripCols);
  const Buffer<Element> rows(threads * block * stride);
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const AmxTiles tiles;
    const int me = omp_get_thread_num();
    weight.load_by_team();
    pack_columns_by_team(weight.rows(), 0, layout.E, layout.E, elements, size, packed.get());
    multiply_blocks_by_team(
        layout.tokens, layout.E, elements, packed.get(), block, rows.get() + me * block * stride,
        sums.get() + me * block * kStripCols,
        [&](int64_t token, Element* to) { load_gradient(args, layout, token, to); },
        [&](int64_t first, int64_t count, int64_t s, const float* strip_sums) {
          store_pixels(args, layout, runs.start.get(), first, count, elements.begin(s), elements.used(s), strip_sums);
        });
  }
}

template <class Element>
static void backward(const PatchEmbedArgs& args, int threads) {
  const Layout layout(args);
  if (args.grad_weight.defined) WeightGradient<Element>(args, layout).run(threads);
  if (args.grad_pixels.defined) backward_pixels<Element>(args, layout, threads);
}

// Calls f with a value of the type that a call is multiplied in. (An ISA with AMX is asked for bf16 alone.)
template <class F>
static void with_element([[maybe_unused]] const PatchEmbedArgs& args, F f) {
  if constexpr (kMultipliesPairs)
    if (kHasAmx || is_bf16(args)) return f(bfloat16{});
  if constexpr (!kHasAmx) f(float{});
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::patch

namespace gpt4v_fast::GPT4V_FAST_ISA {

static void patch_embed_forward(const PatchEmbedArgs& args, int threads) {
  patch::with_element(args, [&](auto zero) { patch::forward<decltype(zero)>(args, threads); });
}

// grad_weight is contiguous (csrc/bindings.cpp checks it).
static void patch_embed_backward(const PatchEmbedArgs& args, int threads) {
  patch::with_element(args, [&](auto zero) { patch::backward<decltype(zero)>(args, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
