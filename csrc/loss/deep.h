// Logits of many features in AMX tiles: some tiles of the weight at a time, a part of the depth after the other.
//
// Six strips of tokens of 4,096 features are 2.3 MiB, which pass by every tile of the weight; from third-level cache a
// product takes 37 cycles, from the second 20 (docs/notes/2026-11-amx-tiles.md). Taken a part of the depth at a time,
// for the tiles of some more rows, they stay near, and fp32 sums of the tiles are kept instead. The sums are those of
// `amx_product`.
#pragma once

#include "loss/sizes.h"

namespace gpt4v_fast::GPT4V_FAST_ISA::loss {

template <class T>
class DeepLogits {
 public:
  // For so many strips of tokens at a time, each thread with sums of its own.
  DeepLogits(const LinearCrossEntropyArgs& a, const RowsOf<T>& rows_of_weight, int64_t strips, int threads)
      : weight(rows_of_weight),
        E(a.weight.size[1]),
        strips_(strips),
        thread_floats(kTiles * strips * kTileRows * kStripCols),
        is_used(serves(E, strips) && is_read_in_place(a, weight) && threads * thread_floats * 4 <= kMostBytes),
        sums(is_used ? threads * thread_floats : 0) {}

  // Scratch of a call, however many threads there are.
  static int64_t bytes(int64_t E, int64_t strips) { return serves(E, strips) ? kMostBytes : 0; }

  explicit operator bool() const { return is_used; }

  // Multiplies the rows of the weight from v on, of as many tiles as are taken together, `index` being v's of its
  // range, and strips [first, last); nothing where that was done with the tile before.
  void multiply(int64_t index, int64_t v, int64_t end, int64_t tile_rows, const float* packed, const Strips& tokens,
                int64_t first, int64_t last) const {
    if (!is_used || index % kTiles != 0) return;
    if constexpr (kHasAmx && Operands<T>::kPairs) {
      const int64_t pairs = Operands<T>::depth(E), parts = amx_products(pairs);
      NoWork nothing;
      for (int64_t part = 0; part < parts; part += kParts)
        for (int64_t t = 0, row = v; t < kTiles && row < end; ++t, row += tile_rows)
          for (int64_t s = first; s < last; ++s)
            amx_product({weight.row(row), weight.row_stride}, min_of(tile_rows, end - row), tokens.lanes(s) / kLanes,
                        pairs, packed + (s - first) * strip_size<T>(E), kStripCols, tile(t, s - first), kStripCols,
                        part > 0, part, min_of(part + kParts, parts), nothing);
    }
  }

  // The products of the tile with this index and the strip: [row][kStripCols].
  float* tile(int64_t index, int64_t strip) const {
    return sums.get() + omp_get_thread_num() * thread_floats +
           (index % kTiles * strips_ + strip) * kTileRows * kStripCols;
  }

 private:
  static constexpr int64_t kTiles = 2, kParts = 4;  // together: 192 rows, 768 features
  static constexpr int64_t kFewestFeatures = 2049;  // of 2,048 and fewer, 0 to 8% are gained or lost
  static constexpr int64_t kMostBytes = 16 << 20;

  static bool serves(int64_t E, int64_t strips) {
    return kHasAmx && Operands<T>::kPairs && E >= kFewestFeatures && strips > 1;
  }

  const RowsOf<T>& weight;
  const int64_t E, strips_, thread_floats;
  const bool is_used;
  const Buffer<float> sums;
};

}  // namespace gpt4v_fast::GPT4V_FAST_ISA::loss
