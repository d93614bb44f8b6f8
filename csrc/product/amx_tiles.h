// The product of register_tile.h in AMX tiles, for bf16 operands that lie as these want them: rows that are contiguous
// along the depth, and a strip of pairs, [depth / 2][columns].
//
// Six AMX tiles of sums, 32 rows and 48 columns, take seven loads for six products: a product takes the unit 16 cycles,
// a load of 1 KiB from first-level cache 11 (docs/notes/2026-11-amx-tiles.md).
#pragma once

#include "product/operands.h"
#include "product/register_tile.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Pairs that a product of AMX tiles sums over, and the terms of them.
constexpr int64_t kAmxPairs = kAmxSide;
constexpr int64_t kAmxTerms = 2 * kAmxPairs;

// Depth steps of kAmxPairs that are taken in one go: a strip of so many is 18 KiB, and stays in first-level cache
// while the blocks of rows pass by. With both operands from second-level cache a product takes 34 cycles, with one 22.
constexpr int64_t kAmxDepth = 6;

// A product's depth is taken in so many products, of kAmxDepth steps or fewer.
static inline int64_t amx_products(int64_t pairs) { return max_of(1, ceil_div(ceil_div(pairs, kAmxPairs), kAmxDepth)); }

// How often a product of so many rows and pairs does a step of other work, about.
static inline int64_t amx_steps(int64_t rows, int64_t pairs) {
  return ceil_div(rows, 2 * kAmxSide) * ceil_div(pairs, kAmxPairs);
}

#ifdef __AMX_BF16__

// Sums: vectors' AMX tiles of the first 16 rows are 0 to 2, those of the next 3 to 5. 6 is left, 7 right.
template <int kBlocks, int kVectors>
ALWAYS_INLINE static void amx_step(const bfloat16* a, int64_t a_bytes, const float* b, int64_t b_bytes) {
  load_amx_tile<6>(a, a_bytes);
  load_amx_tile<7>(b, b_bytes);
  multiply_add_amx_tiles<0, 6, 7>();
  if constexpr (kVectors > 1) {
    load_amx_tile<7>(b + kLanes, b_bytes);
    multiply_add_amx_tiles<1, 6, 7>();
  }
  if constexpr (kVectors > 2) {
    load_amx_tile<7>(b + 2 * kLanes, b_bytes);
    multiply_add_amx_tiles<2, 6, 7>();
  }
  if constexpr (kBlocks > 1) {
    load_amx_tile<6>(reinterpret_cast<const char*>(a) + kAmxSide * a_bytes, a_bytes);
    multiply_add_amx_tiles<2 + kVectors, 6, 7>();  // the last vector is still there
    if constexpr (kVectors > 2) {
      load_amx_tile<7>(b + kLanes, b_bytes);
      multiply_add_amx_tiles<4, 6, 7>();
    }
    if constexpr (kVectors > 1) {
      load_amx_tile<7>(b, b_bytes);
      multiply_add_amx_tiles<3, 6, 7>();
    }
  }
}

// Calls f<tile>(c) for the sums' AMX tiles and their places.
template <int kBlocks, int kVectors, class F>
ALWAYS_INLINE static void for_sums(float* c, int64_t c_stride, F f) {
  using std::integral_constant;
  f(integral_constant<int, 0>{}, c);
  if constexpr (kVectors > 1) f(integral_constant<int, 1>{}, c + kLanes);
  if constexpr (kVectors > 2) f(integral_constant<int, 2>{}, c + 2 * kLanes);
  if constexpr (kBlocks > 1) {
    float* const next = c + kAmxSide * c_stride;
    f(integral_constant<int, 3>{}, next);
    if constexpr (kVectors > 1) f(integral_constant<int, 4>{}, next + kLanes);
    if constexpr (kVectors > 2) f(integral_constant<int, 5>{}, next + 2 * kLanes);
  }
}

// c (rows, kVectors * kLanes) = or, if `adds`, += a (rows, pairs) b (pairs, ...), rows being 16 kBlocks or, for one
// block, what the tiles are configured for. `rest` holds b's rows of a last step that is not whole, and zeros.
template <int kBlocks, int kVectors, class Work>
ALWAYS_INLINE static void amx_block(const bfloat16* a, int64_t a_stride, int64_t rows, int64_t pairs, const float* b,
                                    int64_t b_stride, const float* rest, float* c, int64_t c_stride, bool adds,
                                    Work& work) {
  const int64_t c_bytes = 4 * c_stride, a_bytes = 2 * a_stride, b_bytes = 4 * b_stride;
  if (adds)
    for_sums<kBlocks, kVectors>(c, c_stride,
                                [&](auto tile, float* at) ALWAYS_INLINE_LAMBDA { load_amx_tile<tile>(at, c_bytes); });
  else
    for_sums<kBlocks, kVectors>(c, c_stride, [&](auto tile, float*) ALWAYS_INLINE_LAMBDA { clear_amx_tile<tile>(); });
  for (; pairs >= kAmxPairs; pairs -= kAmxPairs, a += kAmxTerms, b += kAmxPairs * b_stride) {
    amx_step<kBlocks, kVectors>(a, a_bytes, b, b_bytes);
    work.step();
  }
  if (pairs > 0) {
    alignas(64) bfloat16 left[kBlocks * kAmxSide * kAmxTerms];
    for (int64_t r = 0; r < rows; ++r) copy_pairs(a + r * a_stride, pairs, left + r * kAmxTerms);
    amx_step<kBlocks, kVectors>(left, 2 * kAmxTerms, rest, 4 * kVectors * kLanes);
  }
  for_sums<kBlocks, kVectors>(c, c_stride,
                              [&](auto tile, float* at) ALWAYS_INLINE_LAMBDA { store_amx_tile<tile>(at, c_bytes); });
}

// All rows: blocks of 32, of 16, and what is left in tiles of fewer rows.
template <int kVectors, class Work>
ALWAYS_INLINE static void amx_columns(const bfloat16* a, int64_t a_stride, int64_t rows, int64_t pairs, const float* b,
                                      int64_t b_stride, float* c, int64_t c_stride, bool adds, Work& work) {
  alignas(64) float rest[kAmxPairs * kVectors * kLanes];
  for (int64_t i = 0, whole = pairs / kAmxPairs * kAmxPairs; whole < pairs && i < kAmxPairs; ++i)
    for (int v = 0; v < kVectors; ++v)
      store_vec(rest + (i * kVectors + v) * kLanes,
                whole + i < pairs ? load_vec(b + (whole + i) * b_stride + v * kLanes) : Vec{});
  int64_t r = 0;
  for (; r + 2 * kAmxSide <= rows; r += 2 * kAmxSide)
    amx_block<2, kVectors>(a + r * a_stride, a_stride, 2 * kAmxSide, pairs, b, b_stride, rest, c + r * c_stride,
                           c_stride, adds, work);
  while (r < rows) {
    const int64_t count = min_of(kAmxSide, rows - r);
    if (count < kAmxSide) configure_amx_tiles(static_cast<int>(count));
    amx_block<1, kVectors>(a + r * a_stride, a_stride, count, pairs, b, b_stride, rest, c + r * c_stride, c_stride,
                           adds, work);
    if (count < kAmxSide) configure_amx_tiles(kAmxSide);
    r += count;
  }
}

// c (rows, vectors * kLanes) = or += parts [first, last) of a (rows, pairs) b, for up to three vectors. The thread's
// tiles are configured (AmxTiles). Nothing is read behind the last pair, of which a zero would not make up for a NaN
// there. `work` is done beside it, a step with every whole step of the depth: little of it, as loads of tiles wait for
// the line buffers that its fetches take (docs/notes/2026-11-amx-tiles.md).
template <class Work>
__attribute__((noinline)) static void amx_product(BroadcastPairs<Along::kDepth> a, int64_t rows, int64_t vectors,
                                                  int64_t pairs, const float* b, int64_t b_stride, float* c,
                                                  int64_t c_stride, bool adds, int64_t first, int64_t last,
                                                  Work& caller_work) {
  Work work = caller_work;  // its own, and so in registers
  const int64_t steps = ceil_div(pairs, kAmxPairs), parts = amx_products(pairs);
  for (int64_t part = first; part < last; ++part, adds = true) {
    const int64_t begin = steps * part / parts * kAmxPairs;
    const int64_t end = min_of(pairs, steps * (part + 1) / parts * kAmxPairs);
    const bfloat16* left = a.data + 2 * begin;
    const float* right = b + begin * b_stride;
    if (vectors == 3)
      amx_columns<3>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, adds, work);
    else if (vectors == 2)
      amx_columns<2>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, adds, work);
    else
      amx_columns<1>(left, a.stride, rows, end - begin, right, b_stride, c, c_stride, adds, work);
  }
  caller_work = work;
}

// The same of all parts, and without other work.
static inline void amx_product(BroadcastPairs<Along::kDepth> a, int64_t rows, int64_t vectors, int64_t pairs,
                               const float* b, int64_t b_stride, float* c, int64_t c_stride, bool adds = false) {
  NoWork nothing;
  amx_product(a, rows, vectors, pairs, b, b_stride, c, c_stride, adds, 0, amx_products(pairs), nothing);
}

// `product` of register_tile.h in AMX tiles. The other work is left to the caller, see above: all of it, or a sum would
// be taken in an order that depends on whether there was a product beside it.
template <Into kInto, class Depth, class Work>
static void product(int64_t rows, int64_t cols, Depth depth, BroadcastPairs<Along::kDepth> a, const float* b,
                    int64_t b_stride, float* c, int64_t c_stride, float* columns, Work&) {
  const auto for_rows = [&](int64_t first, int64_t vectors, auto f) ALWAYS_INLINE_LAMBDA {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t v = first; v < first + vectors; ++v) f(v, c + r * c_stride + v * kLanes);
  };
  const int64_t vectors = cols / kLanes, parts = ceil_div(vectors, kProductVectors);
  for (int64_t part = 0, v = 0, count; part < parts; ++part, v += count) {
    count = vectors * (part + 1) / parts - v;
    if (kInto == Into::kScaleAndAdd)
      for_rows(v, count, [&](int64_t i, float* at) { store_vec(at, load_vec(at) * load_vec(columns + i * kLanes)); });
    // Vectors of the same depth together.
    for (int64_t i = v, together; i < v + count; i += together) {
      const int64_t pairs = depth_of(depth, static_cast<int>(i));
      together = 1;
      while (i + together < v + count && depth_of(depth, static_cast<int>(i + together)) == pairs) ++together;
      amx_product(a, rows, together, pairs, b + i * kLanes, b_stride, c + i * kLanes, c_stride,
                  kInto == Into::kAdd || kInto == Into::kScaleAndAdd);
    }
    if (kInto == Into::kSetScaled)
      for_rows(v, count, [&](int64_t i, float* at) { store_vec(at, load_vec(at) * load_vec(columns + i * kLanes)); });
    if (kInto == Into::kSetAndCompare)
      for (int64_t i = v; i < v + count; ++i) {
        Vec largest = load_vec(columns + i * kLanes);
        for_rows(i, 1, [&](int64_t, float* at) { largest = max(load_vec(at), largest); });
        store_vec(columns + i * kLanes, largest);
      }
  }
}

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
