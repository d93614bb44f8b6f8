// AMX tiles: eight two-dimensional registers, and products of bf16 matrices in them, summed in fp32.
//
// Written as assembly: GCC 12's intrinsics do not tell the compiler that they read and write memory, and it moves or
// drops stores around them. A tile's number is part of the instruction, hence the templates.
#pragma once

#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

#ifdef __AMX_BF16__

constexpr bool kHasAmx = true;

// A tile holds 16 rows of 64 bytes: 16 fp32 sums, or 16 pairs of bf16 terms.
constexpr int kAmxSide = 16;

// All AMX tiles get so many rows, and are zeros. (A product's terms are whole rows of its second operand: fewer rows
// are for its first operand and its sums, so the second one's tile is always whole.)
static inline void configure_amx_tiles(int rows_of_left) {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } configuration = {};
  configuration.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = 64;
    configuration.rows[tile] = static_cast<uint8_t>(tile == 7 ? kAmxSide : rows_of_left);
  }
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
}

// A thread's AMX tiles while it computes. They are given back afterwards: others on this thread (oneDNN) configure
// their own, and a thread that has tiles in use costs the system 8 KiB at every switch.
class AmxTiles {
 public:
  AmxTiles() { configure_amx_tiles(kAmxSide); }
  ~AmxTiles() { asm volatile("tilerelease" ::: "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;
};

template <int kTile>
static inline __attribute__((always_inline)) void clear_amx_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
static inline __attribute__((always_inline)) void load_amx_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(row_bytes) : "memory");
}

template <int kTile>
static inline __attribute__((always_inline)) void store_amx_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(row_bytes) : "memory");
}

// sums (row, column) += the products of left's pairs (row, depth) and right's (depth, column). The 32 products of a
// row and a column are added up on their own before they join the sum.
template <int kSums, int kLeft, int kRight>
static inline __attribute__((always_inline)) void multiply_add_amx_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#else

constexpr bool kHasAmx = false;
constexpr int kAmxSide = 16;

struct AmxTiles {
  AmxTiles() {}
};

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
