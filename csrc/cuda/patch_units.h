// How a block of the patch embedding multiplies: on the tensor cores or on the FMA units.
#pragma once

#include "cuda/patch_tile.h"

namespace {

// bf16 and fp16 on the tensor cores. Eight warps as 2 x 4, each with 64 tokens x 32 channels of the block's tile.
template <class Weight>
struct MatrixUnits {
  static constexpr int kStep = 32;
  // Rows of 80 bytes: the eight 16-byte rows that one phase of ldmatrix reads begin in eight different groups of banks.
  static constexpr int kPitch = kStep + 8;
  static constexpr int kWarpTokens = kHalfTokens, kWarpChannels = 32;

  struct Stage {
    alignas(16) Weight patches[kBlockTokens][kPitch];
    alignas(16) Weight weight[kBlockChannels][kPitch];
  };

  __device__ static void store_patch(Stage& stage, int row, int column, float value) {
    stage.patches[row][column] = from_float<Weight>(value);
  }

  // One step of the weight's tile: kBytes at a time, a row's tail and rows past E filled with zeros.
  template <int kBytes>
  __device__ static void copy_weight(const Params& p, Stage& stage, int channel0, int step) {
    constexpr int kElements = kBytes / static_cast<int>(sizeof(Weight)), kPerRow = kStep / kElements;
#pragma unroll 2
    for (int i = static_cast<int>(threadIdx.x); i < kBlockChannels * kPerRow; i += kThreads) {
      const int row = i / kPerRow, column = i % kPerRow * kElements, k = step * kStep + column;
      const bool inside = channel0 + row < p.E && k < p.K;
      const int64_t index = inside ? static_cast<int64_t>(channel0 + row) * p.K + k : 0;
      copy_async<kBytes>(&stage.weight[row][column], static_cast<const Weight*>(p.weight) + index, inside ? kBytes : 0);
    }
  }

  __device__ static void load_weight(const Params& p, Stage& stage, int channel0, int step) {
    if (p.copy_bytes == 16) return copy_weight<16>(p, stage, channel0, step);
    if (p.copy_bytes == 8) return copy_weight<8>(p, stage, channel0, step);
    if (p.copy_bytes == 4) return copy_weight<4>(p, stage, channel0, step);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kBlockChannels * kStep; i += kThreads) {
      const int row = i / kStep, column = i % kStep, k = step * kStep + column;
      const bool inside = channel0 + row < p.E && k < p.K;
      stage.weight[row][column] =
          inside ? static_cast<const Weight*>(p.weight)[static_cast<int64_t>(channel0 + row) * p.K + k]
                 : from_float<Weight>(0.0f);
    }
  }

  __device__ MatrixUnits()
      : lane(static_cast<int>(threadIdx.x) % kWarpSize),
        token(static_cast<int>(threadIdx.x) / kWarpSize / 4 * kWarpTokens),
        channel(static_cast<int>(threadIdx.x) / kWarpSize % 4 * kWarpChannels) {}

  __device__ void multiply(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < kStep; k += 16) {
      uint32_t b[kWarpChannels / 16][4];
#pragma unroll
      for (int j = 0; j < kWarpChannels / 16; ++j)
        load_matrices(b[j], &stage.weight[channel + j * 16 + lane / 16 * 8 + lane % 8][k + lane / 8 % 2 * 8]);
#pragma unroll
      for (int i = 0; i < kWarpTokens / 16; ++i) {
        uint32_t a[4];
        load_matrices(a, &stage.patches[token + i * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < kWarpChannels / 8; ++j) {
          const uint32_t (&pair)[4] = b[j / 2];
          const uint32_t fragment[2] = {pair[j % 2 * 2], pair[j % 2 * 2 + 1]};
          multiply_add(sums[i][j], a, fragment, Weight{});
        }
      }
    }
  }

  // Writes the sums of tokens half * kHalfTokens ... of the block's tile.
  __device__ void store_half(float (*out)[kSumPitch], int half) const {
    if (token != half * kHalfTokens) return;
#pragma unroll
    for (int i = 0; i < kWarpTokens / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpChannels / 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          out[i * 16 + e / 2 * 8 + lane / 4][channel + j * 8 + lane % 4 * 2 + e % 2] = sums[i][j][e];
  }

  int lane, token, channel;
  float sums[kWarpTokens / 16][kWarpChannels / 8][4] = {};
};

// fp32 on the FMA units. Each thread has 2 x 2 squares of 4 x 4 sums, 64 apart, so that a warp's 16-byte loads of a row
// of the tile fall on neighbouring addresses.
struct FmaUnits {
  static constexpr int kStep = 16;
  static constexpr int kPitch = kBlockTokens + 4;  // a gathering warp's stores, 16 rows x 2, meet two to a bank
  static constexpr int kHalf = kHalfTokens;

  struct alignas(16) Four {
    float value[4];
  };

  struct Stage {
    alignas(16) float patches[kStep][kPitch];
    alignas(16) float weight[kStep][kPitch];
  };

  __device__ static void store_patch(Stage& stage, int row, int column, float value) {
    stage.patches[column][row] = value;
  }

  __device__ static void load_weight(const Params& p, Stage& stage, int channel0, int step) {
    const int column = static_cast<int>(threadIdx.x) % kStep, k = step * kStep + column;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kStep; row < kBlockChannels; row += kThreads / kStep) {
      const bool inside = channel0 + row < p.E && k < p.K;
      stage.weight[column][row] =
          inside ? static_cast<const float*>(p.weight)[static_cast<int64_t>(channel0 + row) * p.K + k] : 0.0f;
    }
  }

  __device__ FmaUnits()
      : token(static_cast<int>(threadIdx.x) / 16 * 4), channel(static_cast<int>(threadIdx.x) % 16 * 4) {}

  __device__ void multiply(const Stage& stage) {
#pragma unroll
    for (int k = 0; k < kStep; ++k) {
      Four a[2], b[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        a[half] = reinterpret_cast<const Four&>(stage.patches[k][half * kHalf + token]);
        b[half] = reinterpret_cast<const Four&>(stage.weight[k][half * kHalf + channel]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          sums[i][j] = fused_multiply_add(a[i / 4].value[i % 4], b[j / 4].value[j % 4], sums[i][j]);
    }
  }

  __device__ void store_half(float (*out)[kSumPitch], int half) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (i / 4 == half) out[token + i % 4][j / 4 * kHalf + channel + j % 4] = sums[i][j];
  }

  int token, channel;
  float sums[8][8] = {};
};

}  // namespace
