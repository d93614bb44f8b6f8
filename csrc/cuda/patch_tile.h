// The block of the patch embedding's product, its call's parameters, and the ways of its tensors in and out: pixels
// that are gathered to shared memory, tokens that are stored.
#pragma once

#ifdef __CUDACC__
#include "cuda/device.h"
#else
#include "cuda_on_cpu/device.h"
#endif

#include "args.h"

namespace {

using gpt4v_fast::DType;

constexpr int kThreads = 256;
constexpr int kBlocksPerMultiprocessor = 2;

// 128 x 128: each loaded 16-bit element feeds 128 multiply-adds, and the 64 fp32 sums of a thread leave it 64 of the
// 128 registers that two blocks on a multiprocessor may have.
constexpr int kBlockTokens = 128;
constexpr int kBlockChannels = 128;

// The finished sums go through shared memory half a tile at a time, over the stages that nobody needs any more, so that
// neighbouring threads store neighbouring channels.
constexpr int kHalfTokens = kBlockTokens / 2;
constexpr int kSumPitch = kBlockChannels + 4;

// n / divisor for 0 <= n < 2^31 by one multiplication (Granlund and Montgomery 1994, figure 4.1).
struct Divider {
  uint32_t divisor, multiplier, shift;
};

Divider make_divider(int64_t divisor) {
  uint32_t shift = 0;
  while ((int64_t{1} << shift) < divisor) ++shift;
  const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(divisor);
  const uint64_t multiplier = (excess << 32) / static_cast<uint64_t>(divisor) + 1;
  return {static_cast<uint32_t>(divisor), static_cast<uint32_t>(multiplier), shift};
}

__device__ inline int divide(int n, const Divider& by) {
  const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(by.multiplier) * static_cast<uint32_t>(n)) >> 32);
  return static_cast<int>((high + static_cast<uint32_t>(n)) >> by.shift);
}

struct Params {
  const void *pixels, *weight, *bias, *pos_embed;
  const float *pixel_scale, *pixel_shift;
  void* tokens;
  DType pixel_dtype, bias_dtype, pos_dtype, token_dtype;
  int64_t token_count, N;           // B * N, N
  int64_t grid_rows, grid_columns;  // patches in an image's column and row
  int64_t pixel_stride[5];          // B, C, frames, H, W, in elements
  int64_t patch_stride[3];          // from a patch to the next along frames, H, W
  int E, K;
  int copy_bytes;  // widest aligned copy of the weight's rows: 16, 8, 4, or 0 for none
  Divider patch_frames, patch_height, patch_width;
};

// Offset of the first pixel of a token's patch.
__device__ inline int64_t patch_start(const Params& p, int64_t token) {
  const int64_t n = token % p.N, row = n / p.grid_columns;
  return token / p.N * p.pixel_stride[0] + row / p.grid_rows * p.patch_stride[0] +
         row % p.grid_rows * p.patch_stride[1] + n % p.grid_columns * p.patch_stride[2];
}

__device__ inline float load_float(const void* data, DType dtype, int64_t index) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bfloat16*>(data)[index]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const float16*>(data)[index]);
  return static_cast<const float*>(data)[index];
}

// The pixels of one step that this thread carries from global to shared memory: element `column` of every kRowsApart-th
// row of the tile, so that a warp reads neighbours along the patch. The pixels' type is told apart at run time, once a
// step: as a template argument it would triple the time to compile for a branch that all threads take alike.
template <class Units>
struct Gather {
  static constexpr int kRowsApart = kThreads / Units::kStep;
  static constexpr int kCount = kBlockTokens / kRowsApart;

  __device__ Gather()
      : column(static_cast<int>(threadIdx.x) % Units::kStep), row(static_cast<int>(threadIdx.x) / Units::kStep) {}

  __device__ void load(const Params& p, const int64_t* starts, int step) {
    const int k = step * Units::kStep + column;
    inside = k < p.K;
    if (!inside) return;
    const int outer = divide(k, p.patch_width), x = k - outer * static_cast<int>(p.patch_width.divisor);
    const int plane = divide(outer, p.patch_height), y = outer - plane * static_cast<int>(p.patch_height.divisor);
    const int c = divide(plane, p.patch_frames), t = plane - c * static_cast<int>(p.patch_frames.divisor);
    const int64_t offset =
        c * p.pixel_stride[1] + t * p.pixel_stride[2] + y * p.pixel_stride[3] + x * p.pixel_stride[4];
    scale = p.pixel_scale[c];
    shift = p.pixel_shift[c];
    if (p.pixel_dtype == DType::kUInt8)
      load_bits(static_cast<const uint8_t*>(p.pixels) + offset, starts);
    else if (p.pixel_dtype == DType::kFloat32)
      load_bits(static_cast<const uint32_t*>(p.pixels) + offset, starts);
    else
      load_bits(static_cast<const uint16_t*>(p.pixels) + offset, starts);
  }

  template <class Bits>
  __device__ void load_bits(const Bits* pixels, const int64_t* starts) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) bits[i] = pixels[starts[row + i * kRowsApart]];
  }

  __device__ void store(const Params& p, typename Units::Stage& stage) const {
    if (p.pixel_dtype == DType::kUInt8)
      store_as(stage, [](uint32_t pixel) { return to_float(static_cast<uint8_t>(pixel)); });
    else if (p.pixel_dtype == DType::kFloat32)
      store_as(stage, [](uint32_t pixel) { return from_bits<float>(pixel); });
    else if (p.pixel_dtype == DType::kBFloat16)
      store_as(stage, [](uint32_t pixel) { return to_float(from_bits<bfloat16>(pixel)); });
    else
      store_as(stage, [](uint32_t pixel) { return to_float(from_bits<float16>(pixel)); });
  }

  template <class ToFloat>
  __device__ void store_as(typename Units::Stage& stage, ToFloat pixel_to_float) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = inside ? fused_multiply_add(pixel_to_float(bits[i]), scale, shift) : 0.0f;
      Units::store_patch(stage, row + i * kRowsApart, column, value);
    }
  }

  int column, row;
  bool inside = false;
  float scale = 0.0f, shift = 0.0f;
  uint32_t bits[kCount] = {};
};

// Adds bias and pos_embed to one sum and stores it, where there is such a token and channel. `n` is token % N.
__device__ inline void store_token(const Params& p, int64_t token, int64_t n, int channel, float sum) {
  if (token >= p.token_count || channel >= p.E) return;
  if (p.bias != nullptr) sum += load_float(p.bias, p.bias_dtype, channel);
  if (p.pos_embed != nullptr) sum += load_float(p.pos_embed, p.pos_dtype, n * p.E + channel);
  const int64_t index = token * p.E + channel;
  if (p.token_dtype == DType::kBFloat16)
    static_cast<bfloat16*>(p.tokens)[index] = from_float<bfloat16>(sum);
  else if (p.token_dtype == DType::kFloat16)
    static_cast<float16*>(p.tokens)[index] = from_float<float16>(sum);
  else
    static_cast<float*>(p.tokens)[index] = sum;
}

}  // namespace
