// Logits that forward leaves for backward, which then need not compute them again: as many tiles as the caller's memory
// and the bound on extra memory hold, strip after strip of tokens.
//
// A logit x is kept in fp32, as it is. Where products round the gradient to bf16, and so does the bias's, 2 bytes do:
// with o the largest logit of the tile's token, q = (o - x) log2(e) 2^9, rounded, at most 65535. Backward takes
// p = 2^((o - lse) log2(e) - q / 2^9), whose relative error is at most log(2) 2^-10 = 0.07%, a third of bf16's rounding
// of p; x below o by 128 log(2) or more has p < 2^-127 there, and gets 2^-128. The label's own logit, whose
// probability may be so near to 1 that such an error is larger than 1 - p, is kept in fp32.
#pragma once

#include "kernels/loss_sizes.h"
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
  static KeptLogits to_fill(const LinearCrossEntropyArgs& a, const Strips& tokens, int64_t most) {
    const View& memory = a.kept;
    const int64_t E = a.weight.size[1], V = a.weight.size[0];
    // What a cap does to a rounded logit depends on the cap.
    const bool is_rounded = a.bias.defined && a.bias.dtype != DType::kBFloat16;
    KeptLogits kept(tokens, E, V, Operands<T>::kPairs && a.softcap == 0.0f && !is_rounded);
    if (!memory.defined || memory.size[0] < kHeaderBytes) return kept;
    kept.data = static_cast<char*>(memory.data);
    kept.limit = max_of(0, min_of(memory.size[0], most) - kept.cells_begin());
    const int64_t header[] = {kept.layout(), tokens.size, V, E, kept.limit};
    std::memcpy(kept.data, header, sizeof(header));
    if (kept.limit > 0) expect_writes(kept.data, kept.cells_begin() + min_of(kept.limit, kept.offset(tokens.count, 0)));
    return kept;
  }

  // What `to_fill` of a call with these tokens left; nothing if another ISA filled the memory.
  static KeptLogits filled(const LinearCrossEntropyArgs& a, const Strips& tokens) {
    const View& memory = a.kept;
    const int64_t E = a.weight.size[1], V = a.weight.size[0];
    int64_t header[5] = {};
    if (memory.defined && memory.size[0] >= kHeaderBytes) std::memcpy(header, memory.data, sizeof(header));
    KeptLogits kept(tokens, E, V, Operands<T>::kPairs && header[0] % 2 != 0);
    kept.data = static_cast<char*>(memory.data);
    const bool is_of_call = header[0] == kept.layout() && header[1] == tokens.size && header[2] == V && header[3] == E;
    const int64_t room = memory.size[0] - kept.cells_begin();
    if (is_of_call && header[4] > 0 && header[4] <= room) kept.limit = header[4];
    return kept;
  }

  // For all logits of so many tokens in fp32.
  static int64_t bytes(int64_t count, int64_t E, int64_t V) {
    const KeptLogits all(Strips(count), E, V, false);
    return all.cells_begin() + all.offset(all.tokens.count, 0);
  }

  bool is_short() const { return short_; }

  // Whether the logits of strip s and the tile of classes from v on are kept.
  bool has(int64_t s, int64_t v) const { return limit > 0 && offset(s, v / tile_rows + 1) <= limit; }

  // The memory that `store` will write.
  FetchToWrite ahead(int64_t s, int64_t v) const {
    const int64_t bytes = has(s, v) ? tokens.lanes(s) * lane_bytes() : 0;
    return {bytes > 0 ? cell_at(s, v) : nullptr, 192, bytes / 192, 192};
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
          store_rounded(to + r * lanes, (origin - load_vec(tile + r * kCols + lane)) * (kSteps * kLog2E));
      } else {
        float* to = reinterpret_cast<float*>(cell) + lane;
        for (int64_t r = 0; r < rows; ++r) store_vec(to + r * lanes, load_vec(tile + r * kCols + lane));
      }
    }
  }

  // The memory of a tile, or null where it is not kept.
  const char* memory(int64_t s, int64_t v) const { return s < tokens.count && has(s, v) ? cell_at(s, v) : nullptr; }

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
  bool has_all(int64_t s) const { return limit > 0 && offset(s, tiles) <= limit; }
  bool has_any() const { return limit > 0; }

 private:
  static constexpr int64_t kHeaderBytes = 64;

  KeptLogits(const Strips& strips, int64_t E, int64_t V, bool is_short)
      : tokens(strips), tile_rows(weight_rows<T>(E)), tiles(ceil_div(V, tile_rows)), short_(is_short) {}

  // A number that says how the memory is laid out, odd if rounded.
  int64_t layout() const { return ((0x6b65707400 + kLanes) * 256 + tile_rows) * 2 + short_; }
  int64_t lane_bytes() const { return short_ ? tile_rows * 2 + 4 : tile_rows * 4; }
  int64_t cells_begin() const { return kHeaderBytes + tokens.vectors * kLanes * int64_t{sizeof(float)}; }
  int64_t offset(int64_t s, int64_t tile) const {
    return (tokens.begin(s) * tiles + (s < tokens.count ? tokens.lanes(s) * tile : 0)) * lane_bytes();
  }
  char* cell_at(int64_t s, int64_t v) const { return data + cells_begin() + offset(s, v / tile_rows); }

  const Strips tokens;
  const int64_t tile_rows, tiles;
  const bool short_;
  char* data = nullptr;
  int64_t limit = 0;  // bytes of cells
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
