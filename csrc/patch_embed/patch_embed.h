// Patch embedding: tokens = patches(pixels * pixel_scale + pixel_shift) @ weight^T + bias + pos_embed.
//
// Patches do not overlap, so the convolution is one matrix product (tokens, K) x (K, E) with K = C * Pt * Ph
// * Pw. A block of patches is gathered, converted and normalised straight into the packed rows of the
// product, and leaves the cache only as tokens: no normalised image and no unfolded image is ever written. 2
// * B * N * K * E flops; bytes: pixels, weight and tokens once, plus the packed fp32 weight (K * E) once per
// token block.
//
// Backward: grad_weight = grad_tokens^T @ patches, and grad_pixels = (grad_tokens @ weight) * pixel_scale,
// which needs no col2im addition because every pixel belongs to one token. Every element of every result is
// summed by one thread in an order that depends on the sizes alone.
#pragma once

#include <omp.h>

#include "args.h"
#include "product/gemm.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::patch {

// Tokens whose patches are gathered at a time: at most 64 (64 x kCols sums are 12 KiB of first-level cache),
// fewer where their patches would not fit in a quarter of a 1 MiB second-level cache.
constexpr int64_t kMaxBlockTokens = 64;
constexpr int64_t kBlockBytes = 256 * 1024;

// Backward for the weight: fp32 scratch for packed gradients and patches, and rows of the weight per task.
constexpr int64_t kChunkBytes = 16 * 1024 * 1024;
constexpr int64_t kMaxChunkTokens = 1024;
constexpr int64_t kWeightRowPanels = 16;

static inline int thread_id() { return omp_get_thread_num(); }

// Calls f with a value of the C++ type that stands for a dtype.
template <class F>
static void with_pixel(DType dtype, F f) {
  if (dtype == DType::kUInt8) return f(uint8_t{});
  with_float(dtype, f);
}

// Where every element of a patch is, and how it is normalised. K elements in the weight's order (C, Pt, Ph,
// Pw).
struct Layout {
  explicit Layout(const PatchEmbedArgs& args)
      : E(args.weight.size[0]),
        K(args.weight.size[1] * args.weight.size[2] * args.weight.size[3] * args.weight.size[4]),
        frames(args.pixels.size[2] / args.weight.size[2]),
        rows(args.pixels.size[3] / args.weight.size[3]),
        cols(args.pixels.size[4] / args.weight.size[4]),
        N(frames * rows * cols),
        tokens(args.pixels.size[0] * N),
        pixel(K),
        weight(K),
        grad(K),
        scale(K),
        shift(K) {
    const View& w = args.weight;
    int64_t k = 0;
    for (int64_t c = 0; c < w.size[1]; ++c)
      for (int64_t t = 0; t < w.size[2]; ++t)
        for (int64_t h = 0; h < w.size[3]; ++h)
          for (int64_t x = 0; x < w.size[4]; ++x, ++k) {
            const auto offset = [&](const int64_t* s) { return c * s[1] + t * s[2] + h * s[3] + x * s[4]; };
            pixel[k] = offset(args.pixels.stride);
            weight[k] = offset(w.stride);
            grad[k] = offset(args.grad_pixels.stride);
            scale[k] = load<float>(args.pixel_scale.data, c * args.pixel_scale.stride[0]);
            shift[k] = load<float>(args.pixel_shift.data, c * args.pixel_shift.stride[0]);
          }
  }

  // Offset of the first element of a token's patch in a tensor shaped like pixels.
  int64_t patch_start(int64_t token, const View& image, const View& w) const {
    const int64_t n = token % N;
    return token / N * image.stride[0] + n / (rows * cols) * w.size[2] * image.stride[2] +
           n / cols % rows * w.size[3] * image.stride[3] + n % cols * w.size[4] * image.stride[4];
  }

  // Tokens per task: bounded by the cache, and small enough that every thread gets some.
  int64_t block_tokens(int64_t depth, int threads) const {
    const int64_t fitting = kBlockBytes / (4 * max_of(depth, 1));
    int64_t panels = max_of(1, min_of(kMaxBlockTokens, fitting) / gemm::kRows);
    while (panels > 1 && tokens < 2 * threads * panels * gemm::kRows) panels /= 2;
    return panels * gemm::kRows;
  }

  int64_t E, K, frames, rows, cols, N, tokens;
  Buffer<int64_t> pixel, weight, grad;  // offsets in elements
  Buffer<float> scale, shift;
};

// Start of a (B, N, E) tensor's row.
static inline int64_t token_start(const View& view, int64_t token, int64_t N) {
  return token / N * view.stride[0] + token % N * view.stride[1];
}

// Row panels of normalised patches (panel, K, kRows) of `count` tokens. Rows past the end repeat the last
// token.
template <class T>
static void pack_patch_rows(const PatchEmbedArgs& args, const Layout& layout, int64_t first, int64_t count,
                            float* out) {
  const T* pixels = static_cast<const T*>(args.pixels.data);
  for (int64_t t = 0; t < count; t += gemm::kRows) {
    const T* start[gemm::kRows];
    for (int r = 0; r < gemm::kRows; ++r)
      start[r] = pixels + layout.patch_start(first + min_of(t + r, count - 1), args.pixels, args.weight);
    for (int64_t k = 0; k < layout.K; ++k, out += gemm::kRows)
      for (int r = 0; r < gemm::kRows; ++r)
        out[r] = mul_add(to_float(start[r][layout.pixel[k]]), layout.scale[k], layout.shift[k]);
  }
}

// The same values as column panels (strip, depth, kCols): token first + i becomes depth step i of every
// strip.
template <class T>
static void pack_patch_columns(const PatchEmbedArgs& args, const Layout& layout, int64_t token, int64_t step,
                               int64_t depth, float* out) {
  const T* start = static_cast<const T*>(args.pixels.data) + layout.patch_start(token, args.pixels, args.weight);
  for (int64_t first = 0; first < layout.K; first += gemm::kCols) {
    float* columns = out + (first * depth + step * gemm::kCols);
    const int64_t width = min_of(gemm::kCols, layout.K - first);
    for (int64_t c = 0; c < width; ++c) {
      const int64_t k = first + c;
      columns[c] = mul_add(to_float(start[layout.pixel[k]]), layout.scale[k], layout.shift[k]);
    }
    for (int64_t c = width; c < gemm::kCols; ++c) columns[c] = 0.0f;
  }
}

// One strip (K, kCols) of weight^T: kCols output channels from `first` on. Those past the end repeat the last
// one.
template <class T>
static void pack_weight_columns(const PatchEmbedArgs& args, const Layout& layout, int64_t first, float* out) {
  constexpr int64_t kRun = 16;  // a cache line of fp32 weights, read whole before the next channel's
  for (int64_t k0 = 0; k0 < layout.K; k0 += kRun)
    for (int c = 0; c < gemm::kCols; ++c) {
      const T* row = static_cast<const T*>(args.weight.data) + min_of(first + c, layout.E - 1) * args.weight.stride[0];
      for (int64_t k = k0; k < min_of(k0 + kRun, layout.K); ++k)
        out[k * gemm::kCols + c] = to_float(row[layout.weight[k]]);
    }
}

// One strip (E, kCols) of weight: kCols patch elements from `first` on. Those past the end repeat the last
// one.
template <class T>
static void pack_weight_rows(const PatchEmbedArgs& args, const Layout& layout, int64_t first, float* out) {
  for (int64_t e = 0; e < layout.E; ++e) {
    const T* row = static_cast<const T*>(args.weight.data) + e * args.weight.stride[0];
    for (int c = 0; c < gemm::kCols; ++c)
      out[e * gemm::kCols + c] = to_float(row[layout.weight[min_of(first + c, layout.K - 1)]]);
  }
}

// Row panels of grad_tokens (panel, E, kRows) for `count` tokens: rows are tokens, depth is E.
template <class T>
static void pack_grad_rows(const PatchEmbedArgs& args, const Layout& layout, int64_t first, int64_t count, float* out) {
  const View& grad = args.grad_tokens;
  for (int64_t t = 0; t < count; ++t) {
    const T* row = static_cast<const T*>(grad.data) + token_start(grad, first + t, layout.N);
    float* panel = out + t / gemm::kRows * layout.E * gemm::kRows + t % gemm::kRows;
    for (int64_t e = 0; e < layout.E; ++e) panel[e * gemm::kRows] = to_float(row[e * grad.stride[2]]);
  }
  for (int64_t t = count; t < round_up(count, gemm::kRows); ++t)
    for (int64_t e = 0; e < layout.E; ++e) out[(t / gemm::kRows * layout.E + e) * gemm::kRows + t % gemm::kRows] = 0.0f;
}

// One token of grad_tokens^T as row panels (panel, depth, kRows): rows are output channels, the token is step
// `step`.
template <class T>
static void pack_grad_columns(const PatchEmbedArgs& args, const Layout& layout, int64_t token, int64_t step,
                              int64_t depth, float* out) {
  const View& grad = args.grad_tokens;
  const T* row = static_cast<const T*>(grad.data) + token_start(grad, token, layout.N);
  for (int64_t e = 0; e < round_up(layout.E, gemm::kRows); ++e)
    out[(e / gemm::kRows * depth + step) * gemm::kRows + e % gemm::kRows] =
        e < layout.E ? to_float(row[e * grad.stride[2]]) : 0.0f;
}

// sums[0, count) += source[0, count): a piece of a row of bias or pos_embed.
static void add_to_row(const View& source, int64_t start, int64_t stride, int64_t count, float* sums) {
  with_float(source.dtype, [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(source.data) + start;
    for (int64_t c = 0; c < count; ++c) sums[c] += to_float(from[c * stride]);
  });
}

// Adds bias and pos_embed to the sums (count, kCols) of a strip of output channels and stores them as tokens.
static void store_tokens(const PatchEmbedArgs& args, const Layout& layout, int64_t first, int64_t count,
                         int64_t channel, float* sums) {
  const int64_t width = min_of(gemm::kCols, layout.E - channel);
  const View &bias = args.bias, &pos = args.pos_embed, &tokens = args.tokens;
  for (int64_t t = 0; t < count; ++t, sums += gemm::kCols) {
    const int64_t token = first + t, n = token % layout.N;
    if (bias.defined) add_to_row(bias, channel * bias.stride[0], bias.stride[0], width, sums);
    if (pos.defined) add_to_row(pos, n * pos.stride[0] + channel * pos.stride[1], pos.stride[1], width, sums);
    with_float(tokens.dtype, [&](auto type) {
      using T = decltype(type);
      T* to = static_cast<T*>(tokens.data) + token_start(tokens, token, layout.N) + channel * tokens.stride[2];
      for (int64_t c = 0; c < width; ++c) to[c * tokens.stride[2]] = from_float<T>(sums[c]);
    });
  }
}

// Stores a strip (count, kCols) of the gradient of normalised patches, from patch element `element` on, as
// grad_pixels.
static void store_grad_pixels(const PatchEmbedArgs& args, const Layout& layout, int64_t first, int64_t count,
                              int64_t element, const float* sums) {
  const int64_t width = min_of(gemm::kCols, layout.K - element);
  const View& grad = args.grad_pixels;
  with_float(grad.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < count; ++t) {
      T* to = static_cast<T*>(grad.data) + layout.patch_start(first + t, grad, args.weight);
      for (int64_t c = 0; c < width; ++c)
        to[layout.grad[element + c]] = from_float<T>(sums[t * gemm::kCols + c] * layout.scale[element + c]);
    }
  });
}

// The product of blocks of tokens with all strips: `pack_rows` fills the row panels of a block, `pack_strip`
// the column panel of a strip, `store` takes the finished sums. Forward and the gradient of pixels are this,
// with depth K and E.
template <class PackRows, class PackStrip, class Store>
static void product_by_token_blocks(const Layout& layout, int64_t depth, int64_t width, int threads, PackRows pack_rows,
                                    PackStrip pack_strip, Store store) {
  const int64_t strips = ceil_div(width, gemm::kCols), strip_size = depth * gemm::kCols;
  const int64_t block = layout.block_tokens(depth, threads), blocks = ceil_div(layout.tokens, block);
  if (strips == 0 || blocks == 0) return;
  const Buffer<float> columns(strips * strip_size);
  const Buffer<float> rows(threads * block * depth);
  const Buffer<float> sums(threads * block * gemm::kCols);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t s = 0; s < strips; ++s) pack_strip(s * gemm::kCols, columns.get() + s * strip_size);
    float* my_rows = rows.get() + thread_id() * block * depth;
    float* my_sums = sums.get() + thread_id() * block * gemm::kCols;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t first = b * block, count = min_of(block, layout.tokens - first);
      pack_rows(first, count, my_rows);
      for (int64_t s = 0; s < strips; ++s) {
        const float* strip = columns.get() + s * strip_size;
        gemm::multiply_panels(my_rows, ceil_div(count, gemm::kRows), strip, depth, my_sums);
        store(first, count, s * gemm::kCols, my_sums);
      }
    }
  }
}

static void backward_pixels(const PatchEmbedArgs& args, const Layout& layout, int threads) {
  product_by_token_blocks(
      layout, layout.E, layout.K, threads,
      [&](int64_t first, int64_t count, float* out) {
        with_float(args.grad_tokens.dtype,
                   [&](auto type) { pack_grad_rows<decltype(type)>(args, layout, first, count, out); });
      },
      [&](int64_t element, float* out) {
        with_float(args.weight.dtype, [&](auto type) { pack_weight_rows<decltype(type)>(args, layout, element, out); });
      },
      [&](int64_t first, int64_t count, int64_t element, const float* sums) {
        store_grad_pixels(args, layout, first, count, element, sums);
      });
}

// grad_weight (E, K) in chunks of tokens: all threads pack a chunk, then each multiplies its own tiles of the
// result.
static void backward_weight(const PatchEmbedArgs& args, const Layout& layout, int threads) {
  const int64_t E = layout.E, K = layout.K;
  const int64_t strips = ceil_div(K, gemm::kCols), panels = ceil_div(E, gemm::kRows);
  const int64_t groups = ceil_div(panels, kWeightRowPanels);
  const int64_t token_bytes = 4 * (strips * gemm::kCols + panels * gemm::kRows);
  if (strips == 0 || panels == 0) return;
  int64_t chunk = min_of(kMaxChunkTokens, kChunkBytes / token_bytes) / gemm::kDepth * gemm::kDepth;
  chunk = min_of(max_of(chunk, gemm::kDepth), max_of(layout.tokens, 1));
  const Buffer<float> patches(strips * chunk * gemm::kCols);
  const Buffer<float> grads(panels * chunk * gemm::kRows);
  const int64_t sums_size = kWeightRowPanels * gemm::kRows * gemm::kCols;
  const Buffer<float> sums(threads * sums_size);
  float* grad_weight = static_cast<float*>(args.grad_weight.data);
#pragma omp parallel num_threads(threads)
  {
    float* my_sums = sums.get() + thread_id() * sums_size;
    for (int64_t first = 0; first == 0 || first < layout.tokens; first += chunk) {
      const int64_t count = min_of(chunk, layout.tokens - first);
#pragma omp for
      for (int64_t t = 0; t < count; ++t) {
        with_pixel(args.pixels.dtype, [&](auto type) {
          pack_patch_columns<decltype(type)>(args, layout, first + t, t, count, patches.get());
        });
        with_float(args.grad_tokens.dtype, [&](auto type) {
          pack_grad_columns<decltype(type)>(args, layout, first + t, t, count, grads.get());
        });
      }
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < strips * groups; ++task) {
        const int64_t element = task / groups * gemm::kCols, panel = task % groups * kWeightRowPanels;
        const int64_t row_panels = min_of(kWeightRowPanels, panels - panel);
        gemm::multiply_panels(grads.get() + panel * count * gemm::kRows, row_panels, patches.get() + element * count,
                              count, my_sums);
        const int64_t channel = panel * gemm::kRows, width = min_of(gemm::kCols, K - element);
        for (int64_t e = 0; e < min_of(row_panels * gemm::kRows, E - channel); ++e) {
          float* to = grad_weight + (channel + e) * K + element;
          const float* from = my_sums + e * gemm::kCols;
          for (int64_t c = 0; c < width; ++c) to[c] = first == 0 ? from[c] : to[c] + from[c];
        }
      }
    }
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::patch

namespace gpt4v_fast::GPT4V_FAST_ISA {

static void patch_embed_forward(const PatchEmbedArgs& args, int threads) {
  const patch::Layout layout(args);
  patch::product_by_token_blocks(
      layout, layout.K, layout.E, threads,
      [&](int64_t first, int64_t count, float* out) {
        patch::with_pixel(args.pixels.dtype,
                          [&](auto type) { patch::pack_patch_rows<decltype(type)>(args, layout, first, count, out); });
      },
      [&](int64_t channel, float* out) {
        with_float(args.weight.dtype,
                   [&](auto type) { patch::pack_weight_columns<decltype(type)>(args, layout, channel, out); });
      },
      [&](int64_t first, int64_t count, int64_t channel, float* sums) {
        patch::store_tokens(args, layout, first, count, channel, sums);
      });
}

// grad_weight is contiguous (csrc/bindings.cpp checks it).
static void patch_embed_backward(const PatchEmbedArgs& args, int threads) {
  const patch::Layout layout(args);
  if (args.grad_weight.defined) patch::backward_weight(args, layout, threads);
  if (args.grad_pixels.defined) patch::backward_pixels(args, layout, threads);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
