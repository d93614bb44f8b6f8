// Where the patches of a call lie, how they are gathered as rows of a product, and rows of grad_tokens and weight
// likewise.
#pragma once

#include "args.h"
#include "product/strips.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::patch {

// Calls f with a value of the C++ type that stands for a dtype.
template <class F>
static void with_pixel(DType dtype, F f) {
  if (dtype == DType::kUInt8) return f(uint8_t{});
  with_float(dtype, f);
}

// A patch's K elements stand in the weight's order (C, Pt, Ph, Pw). The Pw of a row are a run: nothing longer can be
// contiguous in an image.
struct Layout {
  explicit Layout(const PatchEmbedArgs& args)
      : E(args.weight.size[0]),
        run(args.weight.size[4]),
        runs_of_channel(args.weight.size[2] * args.weight.size[3]),
        runs(args.weight.size[1] * runs_of_channel),
        K(runs * run),
        rows(args.pixels.size[3] / args.weight.size[3]),
        cols(args.pixels.size[4] / args.weight.size[4]),
        N(args.pixels.size[2] / args.weight.size[2] * rows * cols),
        tokens(args.pixels.size[0] * N),
        side{args.weight.size[2], args.weight.size[3], args.weight.size[4]},
        scale(args.weight.size[1]),
        shift(args.weight.size[1]) {
    for (int64_t c = 0; c < args.weight.size[1]; ++c) {
      scale[c] = load<float>(args.pixel_scale.data, c * args.pixel_scale.stride[0]);
      shift[c] = load<float>(args.pixel_shift.data, c * args.pixel_shift.stride[0]);
    }
  }

  // Offset of a run in a tensor shaped like a patch of pixels, or like a channel of weight.
  int64_t run_start(int64_t index, const View& view) const {
    return index / runs_of_channel * view.stride[1] + index / side[1] % side[0] * view.stride[2] +
           index % side[1] * view.stride[3];
  }

  // Offset of the first element of a token's patch in a tensor shaped like pixels.
  int64_t patch_start(int64_t token, const View& image) const {
    const int64_t n = token % N;
    return token / N * image.stride[0] + n / (rows * cols) * side[0] * image.stride[2] +
           n / cols % rows * side[1] * image.stride[3] + n % cols * side[2] * image.stride[4];
  }

  // Start of a (B, N, E) tensor's row.
  int64_t token_start(int64_t token, const View& view) const {
    return token / N * view.stride[0] + token % N * view.stride[1];
  }

  int64_t E, run, runs_of_channel, runs, K, rows, cols, N, tokens;
  int64_t side[3];             // of a patch: Pt, Ph, Pw
  Buffer<float> scale, shift;  // of a channel
};

// Elements between two rows that are written as whole vectors and read as pairs: for AMX tiles as amx_stride.
template <class Element>
static int64_t row_stride(int64_t count) {
  return Operands<Element>::kPairs ? amx_stride(count + kLanes) : round_up(count, kLanes) + kLanes;
}

// The normalised patch of a token, and a zero behind it for the other of a pair.
template <class Pixel, class Element>
static void gather_patch(const PatchEmbedArgs& args, const Layout& layout, const int64_t* run_starts, int64_t token,
                         Element* to) {
  const Pixel* patch = static_cast<const Pixel*>(args.pixels.data) + layout.patch_start(token, args.pixels);
  const int64_t stride = args.pixels.stride[4];
  for (int64_t c = 0, r = 0; r < layout.runs; ++c) {
    const float scale = layout.scale[c], shift = layout.shift[c];
    for (const int64_t end = r + layout.runs_of_channel; r < end; ++r, to += layout.run) {
      const Pixel* from = patch + run_starts[r];
      if (stride == 1)
        for_covering_vectors(layout.run, [&](int64_t x, int n) ALWAYS_INLINE_LAMBDA {
          store_operand(to + x, mul_add(load_first(from + x, n), broadcast(scale), broadcast(shift)));
        });
      else
        for (int64_t x = 0; x < layout.run; ++x)
          to[x] = from_float<Element>(mul_add(to_float(from[x * stride]), scale, shift));
    }
  }
  *to = Element{};
}

// A token's row of grad_tokens, likewise.
template <class Element>
static void load_gradient(const PatchEmbedArgs& args, const Layout& layout, int64_t token, Element* to) {
  const View& grad = args.grad_tokens;
  with_float(grad.dtype, [&](auto type) {
    const auto* row = static_cast<const decltype(type)*>(grad.data) + layout.token_start(token, grad);
    if (grad.stride[2] == 1)
      for_covering_vectors(
          layout.E, [&](int64_t e, int n) ALWAYS_INLINE_LAMBDA { store_operand(to + e, load_first(row + e, n)); });
    else
      for (int64_t e = 0; e < layout.E; ++e) to[e] = from_float<Element>(to_float(row[e * grad.stride[2]]));
  });
  to[layout.E] = Element{};
}

// Offsets of all runs of a patch in a tensor.
struct RunStarts {
  RunStarts(const Layout& layout, const View& view) : start(layout.runs) {
    for (int64_t r = 0; r < layout.runs; ++r) start[r] = layout.run_start(r, view);
  }
  const Buffer<int64_t> start;
};

// Whether a call is multiplied as bf16: its pixels are rounded, so its tokens must be no better than that.
static inline bool is_bf16(const PatchEmbedArgs& args) {
  const View& tokens = args.tokens.defined ? args.tokens : args.grad_tokens;
  return args.weight.dtype == DType::kBFloat16 && tokens.dtype == DType::kBFloat16;
}

// The weight as rows (E, K) of Element: where it lies, or a copy where it is of another type or its rows are not
// contiguous.
template <class Element>
class WeightRows {
 public:
  WeightRows(const PatchEmbedArgs& args, const Layout& of_call)
      : weight(args.weight), layout(of_call), copy(is_in_place() ? 0 : layout.E * layout.K) {}

  // Before rows() are used.
  void load_by_team() const {
    if (is_in_place()) return;
#pragma omp for schedule(static)
    for (int64_t e = 0; e < layout.E; ++e)
      with_float(weight.dtype, [&](auto type) {
        const auto* from = static_cast<const decltype(type)*>(weight.data) + e * weight.stride[0];
        for (int64_t r = 0; r < layout.runs; ++r)
          convert(from + layout.run_start(r, weight), copy.get() + e * layout.K + r * layout.run);
      });
  }
  RowsOf<Element> rows() const {
    if (is_in_place()) return {static_cast<const Element*>(weight.data), weight.stride[0]};
    return {copy.get(), layout.K};
  }

 private:
  bool is_in_place() const {
    const bool is_own = weight.dtype == (sizeof(Element) == 4 ? DType::kFloat32 : DType::kBFloat16);
    if (!is_own || (weight.stride[4] != 1 && layout.run > 1)) return false;
    for (int64_t r = 0; r < layout.runs; ++r)
      if (layout.run_start(r, weight) != r * layout.run) return false;
    return true;
  }
  template <class T>
  void convert(const T* from, Element* to) const {
    for (int64_t x = 0; x < layout.run; ++x) to[x] = from_float<Element>(to_float(from[x * weight.stride[4]]));
  }

  const View& weight;
  const Layout& layout;
  const Buffer<Element> copy;
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::patch
