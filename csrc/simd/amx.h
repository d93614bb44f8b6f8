// AMX's tiles: eight two-dimensional registers, and products of bf16 matrices in them, summed in fp32.
//
// Written as assembly: GCC 12's intrinsics do not tell the compiler that they read and write memory, and it moves or
// drops stores around them. A tile's number is part of the instruction, hence the templates.
#pragma once

#include "simd/vec.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

#ifdef __AMX_BF16__

constexpr bool kHasTiles = true;

// A tile holds 16 rows of 64 bytes: 16 fp32 sums, or 16 pairs of bf16 terms.
constexpr int kTileSide = 16;

// All tiles get so many rows, and are zeros. (A product's terms are whole rows of its second operand: fewer rows are
// for its first operand and its sums, so the second one's tile is always whole.)
static inline void configure_tiles(int rows_of_left) {
  struct alignas(64) {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } configuration = {};
  configuration.palette = 1;
  for (int tile = 0; tile < 8; ++tile) {
    configuration.row_bytes[tile] = 64;
    configuration.rows[tile] = static_cast<uint8_t>(tile == 7 ? kTileSide : rows_of_left);
  }
  asm volatile("ldtilecfg %0" ::"m"(configuration) : "memory");
}

// A thread's tiles while it computes. They are given back afterwards: others on this thread (oneDNN) configure their
// own, and a thread that has tiles in use costs the system 8 KiB at every switch.
class Tiles {
 public:
  Tiles() { configure_tiles(kTileSide); }
  ~Tiles() { asm volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int kTile>
static inline __attribute__((always_inline)) void clear_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kTile>
static inline __attribute__((always_inline)) void load_tile(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(kTile), "r"(from), "r"(row_bytes) : "memory");
}

template <int kTile>
static inline __attribute__((always_inline)) void store_tile(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(kTile), "r"(to), "r"(row_bytes) : "memory");
}

// sums (row, column) += the products of left's pairs (row, depth) and right's (depth, column). The 32 products of a
// row and a column are added up on their own before they join the sum.
template <int kSums, int kLeft, int kRight>
static inline __attribute__((always_inline)) void multiply_add_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#else

constexpr bool kHasTiles = false;
constexpr int kTileSide = 16;

struct Tiles {
  Tiles() {}
};

#endif

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
