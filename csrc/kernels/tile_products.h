// The products of tile.h in AMX's tiles, for bf16 operands that lie as tiles want them: rows that are contiguous along
// the depth of the product, and a strip of pairs, [depth / 2][columns].
//
// Six tiles of sums, 32 rows and 48 columns, take seven loads for six products: a product takes the tile unit 16
// cycles, a load of 1 KiB from first-level cache 8.
#pragma once

#include "kernels/operands.h"
#include "simd/tiles.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Pairs that a product of tiles sums over, and the terms of them.
constexpr int64_t kTilePairs = kTileSide;
constexpr int64_t kTileTerms = 2 * kTilePairs;

#ifdef __AMX_BF16__

// Depth steps of kTilePairs that are taken in one go: a strip of so many is 30 KiB, and stays in first-level cache
// while the blocks of rows pass by.
constexpr int64_t kTileDepth = 10;

// Sums: vectors' tiles of the first 16 rows are 0 to 2, those of the next 3 to 5. 6 is left, 7 right.
template <int kBlocks, int kVectors, class Work>
ALWAYS_INLINE static void tile_step(const bfloat16* a, int64_t a_bytes, const float* b, int64_t b_bytes, Work& work) {
  load_tile<6>(a, a_bytes);
  load_tile<7>(b, b_bytes);
  multiply_add_tiles<0, 6, 7>();
  work.step();
  if constexpr (kVectors > 1) {
    load_tile<7>(b + kLanes, b_bytes);
    multiply_add_tiles<1, 6, 7>();
    work.step();
  }
  if constexpr (kVectors > 2) {
    load_tile<7>(b + 2 * kLanes, b_bytes);
    multiply_add_tiles<2, 6, 7>();
    work.step();
  }
  if constexpr (kBlocks > 1) {
    load_tile<6>(reinterpret_cast<const char*>(a) + kTileSide * a_bytes, a_bytes);
    multiply_add_tiles<2 + kVectors, 6, 7>();  // the last vector is still there
    work.step();
    if constexpr (kVectors > 2) {
      load_tile<7>(b + kLanes, b_bytes);
      multiply_add_tiles<4, 6, 7>();
      work.step();
    }
    if constexpr (kVectors > 1) {
      load_tile<7>(b, b_bytes);
      multiply_add_tiles<3, 6, 7>();
      work.step();
    }
  }
}

// Calls f<tile>(c) for the sums' tiles and their places.
template <int kBlocks, int kVectors, class F>
ALWAYS_INLINE static void for_sums(float* c, int64_t c_stride, F f) {
  using std::integral_constant;
  f(integral_constant<int, 0>{}, c);
  if constexpr (kVectors > 1) f(integral_constant<int, 1>{}, c + kLanes);
  if constexpr (kVectors > 2) f(integral_constant<int, 2>{}, c + 2 * kLanes);
  if constexpr (kBlocks > 1) {
    float* const next = c + kTileSide * c_stride;
    f(integral_constant<int, 3>{}, next);
    if constexpr (kVectors > 1) f(integral_constant<int, 4>{}, next + kLanes);
    if constexpr (kVectors > 2) f(integral_constant<int, 5>{}, next + 2 * kLanes);
  }
}

// c (rows, kVectors * kLanes) = or, if `adds`, += a (rows, pairs) b (pairs, ...), rows being 16 kBlocks or, for one
// block, what the tiles are configured for. b's rows up to a multiple of kTilePairs are there, and finite; behind a's
// last pair nothing is read.
template <int kBlocks, int kVectors, class Work>
ALWAYS_INLINE static void tile_block(const bfloat16* a, int64_t a_stride, int64_t rows, int64_t pairs, const float* b,
                                     int64_t b_stride, float* c, int64_t c_stride, bool adds, Work& work) {
  const int64_t c_bytes = 4 * c_stride, a_bytes = 2 * a_stride, b_bytes = 4 * b_stride;
  if (adds)
    for_sums<kBlocks, kVectors>(c, c_stride,
                                [&](auto tile, float* at) ALWAYS_INLINE_LAMBDA { load_tile<tile>(at, c_bytes); });
  else
    for_sums<kBlocks, kVectors>(c, c_stride, [&](auto tile, float*) ALWAYS_INLINE_LAMBDA { clear_tile<tile>(); });
  for (; pairs >= kTilePairs; pairs -= kTilePairs, a += kTileTerms, b += kTilePairs * b_stride)
    tile_step<kBlocks, kVectors>(a, a_bytes, b, b_bytes, work);
  if (pairs > 0) {
    alignas(64) bfloat16 rest[kBlocks * kTileSide * kTileTerms];
    const __mmask16 used = static_cast<__mmask16>((1u << pairs) - 1u);
    for (int64_t r = 0; r < rows; ++r)
      _mm512_store_si512(rest + r * kTileTerms, _mm512_maskz_loadu_epi32(used, a + r * a_stride));
    tile_step<kBlocks, kVectors>(rest, 2 * kTileTerms, b, b_bytes, work);
  }
  for_sums<kBlocks, kVectors>(c, c_stride,
                              [&](auto tile, float* at) ALWAYS_INLINE_LAMBDA { store_tile<tile>(at, c_bytes); });
}

// All rows: blocks of 32, of 16, and what is left in tiles of fewer rows.
template <int kVectors, class Work>
ALWAYS_INLINE static void tile_columns(const bfloat16* a, int64_t a_stride, int64_t rows, int64_t pairs, const float* b,
                                       int64_t b_stride, float* c, int64_t c_stride, bool adds, Work& work) {
  int64_t r = 0;
  for (; r + 2 * kTileSide <= rows; r += 2 * kTileSide)
    tile_block<2, kVectors>(a + r * a_stride, a_stride, 2 * kTileSide, pairs, b, b_stride, c + r * c_stride, c_stride,
                            adds, work);
  while (r < rows) {
    const int64_t count = min_of(kTileSide, rows - r);
    if (count < kTileSide) configure_tiles(static_cast<int>(count));
    tile_block<1, kVectors>(a + r * a_stride, a_stride, count, pairs, b, b_stride, c + r * c_stride, c_stride, adds,
                            work);
    if (count < kTileSide) configure_tiles(kTileSide);
    r += count;
  }
}

// c (rows, vectors * kLanes) = a (rows, pairs) b, for up to three vectors. The thread's tiles are configured (Tiles).
template <class Work>
__attribute__((noinline)) static void tile_product(BroadcastPairs<Along::kDepth> a, int64_t rows, int64_t vectors,
                                                   int64_t pairs, const float* b, int64_t b_stride, float* c,
                                                   int64_t c_stride, Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  const int64_t steps = ceil_div(pairs, kTilePairs), parts = max_of(1, ceil_div(steps, kTileDepth));
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t begin = steps * part / parts * kTilePairs;
    const int64_t end = min_of(pairs, steps * (part + 1) / parts * kTilePairs);
    const bfloat16* left = a.data + 2 * begin;
    const float* right = b + begin * b_stride;
    if (vectors == 3)
      tile_columns<3>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, part > 0, work);
    else if (vectors == 2)
      tile_columns<2>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, part > 0, work);
    else
      tile_columns<1>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, part > 0, work);
  }
  caller_work = work;
}

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
