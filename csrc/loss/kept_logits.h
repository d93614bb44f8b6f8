// Logits that forward leaves for backward, which then need not compute them again: as many tiles as the caller's memory
// and the bound on extra memory hold, strip after strip of tokens.
//
// Where both passes are one call, the gradient of weight serves too until it is written: its rows of a tile of classes
// keep the tile's logits of the first strips (with bf16 of nearly E tokens), for any V. Backward has turned all logits
// of a block of classes into gradients before it writes the block's rows.
//
// A logit x is kept in fp32, as it is. Where products round the gradient to bf16, and so does the bias's, 2 bytes do:
// with o the largest logit of the tile's token, q = (o - x) log2(e) 2^9, rounded, at most 65535. Backward takes
// p = 2^((o - lse) log2(e) - q / 2^9), whose relative error is at most log(2) 2^-10 = 0.07%, a third of bf16's rounding
// of p; x below o by 128 log(2) or more has p < 2^-127 there, and gets 2^-128. The label's own logit, whose
// probability may be so near to 1 that such an error is larger than 1 - p, is kept in fp32.
#pragma once

#include "loss/sizes.h"
#include "simd/pages.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

// All extra memory of a call: kept logits and scratch. The rest of the 64 MiB that are promised is for the caller's
// tensors of a number per token.
constexpr int64_t kExtraBytes = 60 << 20;

template <class T>
class KeptLogits {
 public:
  static constexpr float kSteps = 512.0f;  // of an exponent of 2

  // Memory to fill, of which no more than `most` bytes are used.
  static KeptLogits to_fill(const LinearCrossEntropyArgs& a, const Strips& tokens, int64_t most, int threads) {
    const View& memory = a.kept;
    KeptLogits kept(a, tokens, is_short_for(a));
    if (!memory.defined || memory.size[0] < kept.cells_begin()) return kept;
    kept.use(a, max_of(0, min_of(memory.size[0], most) - kept.cells_begin()));
    const int64_t header[] = {kept.layout(), tokens.size, kept.classes, kept.depth, kept.limit};
    std::memcpy(kept.data, header, sizeof(header));
    static LargePages before;
    if (kept.limit > 0)
      get_large_pages(before, kept.data, kept.cells_begin() + min_of(kept.limit, kept.offset(tokens.count, 0)),
                      threads);
    return kept;
  }

  // What `to_fill` of a call with these tokens left; nothing if another ISA filled the memory.
  static KeptLogits filled(const LinearCrossEntropyArgs& a, const Strips& tokens) {
    const View& memory = a.kept;
    int64_t header[5] = {};
    if (memory.defined && memory.size[0] >= kHeaderBytes) std::memcpy(header, memory.data, sizeof(header));
    KeptLogits kept(a, tokens, Operands<T>::kPairs && header[0] % 2 != 0);
    const bool is_of_call =
        header[0] == kept.layout() && header[1] == tokens.size && header[2] == kept.classes && header[3] == kept.depth;
    if (is_of_call && header[4] >= 0 && header[4] <= memory.size[0] - kept.cells_begin()) kept.use(a, header[4]);
    return kept;
  }

  // Extra memory for all logits of so many tokens, without a tile that is left out of the gradient (`has`).
  static int64_t bytes(const LinearCrossEntropyArgs& a, int64_t count) {
    const KeptLogits all(a, Strips(count), is_short_for(a));
    return all.cells_begin() + all.offset(all.tokens.count, 0);
  }
  // And for none.
  static int64_t fewest_bytes(const LinearCrossEntropyArgs& a, int64_t count) {
    return KeptLogits(a, Strips(count), false).cells_begin();
  }

  // Tokens whose logits the gradient of weight holds.
  static int64_t tokens_in_gradient(const LinearCrossEntropyArgs& a, int64_t count) {
    const KeptLogits all(a, Strips(count), is_short_for(a));
    return all.tokens.begin(all.in_gradient);
  }

  bool is_short() const { return short_; }
  bool uses_gradient() const { return data != nullptr && in_gradient > 0; }

  // Whether the logits of strip s and the tile of classes from v on are kept. The gradient has no room for those of a
  // last tile of fewer rows.
  bool has(int64_t s, int64_t v) const {
    if (s < in_gradient) return data != nullptr && v + tile_rows <= classes;
    return limit > 0 && offset(s, v / tile_rows + 1) <= limit;
  }
  bool has_all_of(int64_t first, int64_t last, int64_t v) const {
    for (int64_t s = first; s < last; ++s)
      if (!has(s, v)) return false;
    return true;
  }

  // The memory that `store` will write.
  Memory ahead(int64_t s, int64_t v) const {
    const int64_t bytes = has(s, v) ? tokens.lanes(s) * lane_bytes() : 0;
    return {bytes > 0 ? cell_at(s, v) : nullptr, 192, 192, bytes / 192};
  }

  // Keeps a tile of `rows` classes from v on; largest[c] is the largest logit of each token.
  void store(int64_t s, int64_t v, int64_t rows, const float* tile, const float* largest) const {
    if (!has(s, v)) return;
    const int64_t lanes = tokens.lanes(s);
    char* cell = cell_at(s, v);
    for (int64_t lane = 0; lane < lanes; lane += kLanes) {
      if (short_) {
        float* origins = reinterpret_cast<float*>(cell);
        const Vec top = load_vec(largest + lane);
        const Vec origin = top == -kInfinity ? Vec{} : top;
        store_vec(origins + lane, origin);
        uint16_t* to = reinterpret_cast<uint16_t*>(origins + lanes) + lane;
        for (int64_t r = 0; r < rows; ++r)
          store_rounded(to + r * lanes, (origin - load_vec(tile + r * kStripCols + lane)) * (kSteps * kLog2E));
      } else {
        float* to = reinterpret_cast<float*>(cell) + lane;
        for (int64_t r = 0; r < rows; ++r) store_vec(to + r * lanes, load_vec(tile + r * kStripCols + lane));
      }
    }
  }

  // The memory of a tile, or null where it is not kept.
  const char* memory(int64_t s, int64_t v) const { return s < tokens.count && has(s, v) ? cell_at(s, v) : nullptr; }

  // Calls add(data, bytes) for the memory that hold the logits of strips [first, last) and tiles [begin,
  // end).
  template <class Add>
  void for_memory(int64_t first, int64_t last, int64_t begin, int64_t end, Add add) const {
    const int64_t inside = data == nullptr ? 0 : min_of(last, in_gradient);
    for (int64_t tile = begin; first < inside && tile < end; ++tile)
      if (has(first, tile * tile_rows))
        add(cell_at(first, tile * tile_rows), (tokens.begin(inside) - tokens.begin(first)) * lane_bytes());
    for (int64_t s = max_of(first, in_gradient); limit > 0 && s < last; ++s)
      add(data + cells_begin() + offset(s, begin), min_of(offset(s, end), limit) - offset(s, begin));
  }

  // The tile's logits (fp32), [class][lanes of the strip].
  const float* logits(int64_t s, int64_t v) const { return reinterpret_cast<const float*>(cell_at(s, v)); }

  // The tile's origins, [lanes], and steps below them, [class][lanes].
  const float* origins(int64_t s, int64_t v) const { return logits(s, v); }
  const uint16_t* steps(int64_t s, int64_t v) const {
    return reinterpret_cast<const uint16_t*>(origins(s, v) + tokens.lanes(s));
  }

  // The logit of the label of each counted token of a strip.
  float* label_logits(int64_t s) const { return reinterpret_cast<float*>(data + kHeaderBytes) + tokens.begin(s); }

  // A strip all of whose tiles are kept needs no copy of its hidden states.
  bool has_all(int64_t s) const {
    if (s < in_gradient) return data != nullptr && classes % tile_rows == 0;
    return limit > 0 && offset(s, tiles) <= limit;
  }
  bool has_any() const { return limit > 0 || uses_gradient(); }

 private:
  static constexpr int64_t kHeaderBytes = 64;

  KeptLogits(const LinearCrossEntropyArgs& a, const Strips& strips, bool is_short)
      : tokens(strips),
        classes(a.weight.size[0]),
        depth(a.weight.size[1]),
        tile_rows(weight_rows<T>(depth)),
        tiles(ceil_div(classes, tile_rows)),
        short_(is_short) {
    if (!a.keeps_in_gradient) return;
    const int64_t room = gradient_tile_bytes() / lane_bytes();
    while (in_gradient < tokens.count && tokens.begin(in_gradient + 1) <= room) ++in_gradient;
  }

  // What a cap does to a rounded logit depends on the cap.
  static bool is_short_for(const LinearCrossEntropyArgs& a) {
    const bool is_rounded = a.bias.defined && a.bias.dtype != DType::kBFloat16;
    return Operands<T>::kPairs && a.softcap == 0.0f && !is_rounded;
  }

  void use(const LinearCrossEntropyArgs& a, int64_t bytes) {
    data = static_cast<char*>(a.kept.data);
    gradient = static_cast<char*>(a.grad_weight.data);
    limit = bytes;
  }

  // A number that says how the memory is laid out, odd if rounded.
  int64_t layout() const { return ((0x6b65707400 + kLanes) * 256 + tile_rows) * 2 + short_; }
  int64_t lane_bytes() const { return short_ ? tile_rows * 2 + 4 : tile_rows * 4; }
  int64_t cells_begin() const { return kHeaderBytes + tokens.vectors * kLanes * int64_t{sizeof(float)}; }
  int64_t gradient_tile_bytes() const { return tile_rows * depth * int64_t{sizeof(T)}; }
  int64_t offset(int64_t s, int64_t tile) const {
    const int64_t lanes = max_of(0, tokens.begin(s) - tokens.begin(in_gradient));
    return (lanes * tiles + (s < tokens.count ? tokens.lanes(s) * tile : 0)) * lane_bytes();
  }
  char* cell_at(int64_t s, int64_t v) const {
    const int64_t tile = v / tile_rows;
    if (s < in_gradient) return gradient + tile * gradient_tile_bytes() + tokens.begin(s) * lane_bytes();
    return data + cells_begin() + offset(s, tile);
  }

  const Strips tokens;
  const int64_t classes, depth, tile_rows, tiles;
  const bool short_;
  int64_t in_gradient = 0;   // strips
  char* data = nullptr;      // null: nothing is kept
  char* gradient = nullptr;  // of weight, contiguous
  int64_t limit = 0;         // bytes of cells in `data`
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
