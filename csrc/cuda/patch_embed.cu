// Patch embedding on NVIDIA GPUs: tokens = patches(pixels * pixel_scale + pixel_shift) @ weight^T + bias + pos_embed.
//
// Patches do not overlap, so the convolution is one matrix product (tokens, K) x (K, E), K = C * Pt * Ph * Pw. A block
// makes kBlockTokens x kBlockChannels of the result. For each step of kStep along K its threads gather pixels into
// registers while the matrix units work on the step before, normalise them and store them as a tile of shared memory;
// the weight's tile is copied beside it asynchronously. Two stages of each, one barrier per step. No normalised and no
// unfolded image is ever written. 2 * B * N * K * E flops; every pixel is read ceil(E / kBlockChannels) times and every
// weight ceil(B * N / kBlockTokens) times, from the second-level cache but for the first.
//
// bf16 and fp16 weights use the tensor cores (mma.m16n8k16, fp32 sums; normalised pixels are rounded to the weight's
// dtype), fp32 weights the FMA units. Any E, K and token count: what is past an edge is read as zero or clamped to the
// last row, and never stored. Pixels may have any strides; the other tensors are contiguous.
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

template <class Units>
struct Shared {
  union {
    typename Units::Stage stages[2];
    float sums[kHalfTokens][kSumPitch];
  };
  int64_t starts[kBlockTokens];     // where each row's patch begins
  int64_t positions[kBlockTokens];  // token % N
};

template <class Units>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) patch_embed_kernel(const Params p) {
  Shared<Units>& shared = *reinterpret_cast<Shared<Units>*>(shared_memory());
  const int64_t token0 = static_cast<int64_t>(blockIdx.x) * kBlockTokens;
  const int channel0 = static_cast<int>(blockIdx.y) * kBlockChannels;
  for (int row = static_cast<int>(threadIdx.x); row < kBlockTokens; row += kThreads) {
    const int64_t last = p.token_count - 1, token = token0 + row < last ? token0 + row : last;
    shared.starts[row] = patch_start(p, token);
    shared.positions[row] = token % p.N;
  }
  synchronize_block();

  Gather<Units> gather;
  Units units;
  const int steps = (p.K + Units::kStep - 1) / Units::kStep;
  // Round -1 only fills the first stage, the last round only multiplies: one copy of the code for all.
#pragma unroll 1
  for (int step = -1; step < steps; ++step) {
    const bool more = step + 1 < steps;
    typename Units::Stage& next = shared.stages[(step + 1) % 2];
    if (more) {
      gather.load(p, shared.starts, step + 1);
      Units::load_weight(p, next, channel0, step + 1);
    }
    if (step >= 0) units.multiply(shared.stages[step % 2]);
    if (more) {
      gather.store(p, next);
      wait_for_copies();
    }
    synchronize_block();
  }

  for (int half = 0; half < 2; ++half) {
    units.store_half(shared.sums, half);
    synchronize_block();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < kHalfTokens * kBlockChannels; i += kThreads) {
      const int row = i / kBlockChannels, column = i % kBlockChannels, tile_row = half * kHalfTokens + row;
      store_token(p, token0 + tile_row, shared.positions[tile_row], channel0 + column, shared.sums[row][column]);
    }
    synchronize_block();
  }
}

template <class Units>
cudaError_t launch_blocks(const Params& p, cudaStream_t stream) {
  static_assert(sizeof(Shared<Units>) <= 48 * 1024, "what a launch may ask for without an attribute");
  const int64_t blocks = (p.token_count + kBlockTokens - 1) / kBlockTokens;
  const int64_t columns = (static_cast<int64_t>(p.E) + kBlockChannels - 1) / kBlockChannels;
  if (blocks > INT32_MAX || columns > UINT16_MAX) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(columns));
  return launch(patch_embed_kernel<Units>, grid, kThreads, static_cast<int>(sizeof(Shared<Units>)), stream, p);
}

// The widest copy that fits the weight's rows: their length in bytes and their first address are multiples of it.
int widest_copy(const void* weight, int64_t row_bytes) {
  for (const int bytes : {16, 8, 4})
    if (row_bytes % bytes == 0 && reinterpret_cast<uintptr_t>(weight) % bytes == 0) return bytes;
  return 0;
}

}  // namespace

#define GPT4V_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// Launches the kernel on `stream` and returns without waiting. Dtypes are codes of DType (csrc/args.h).
//   pixels (B, C, frames, H, W) uint8/fp32/bf16/fp16, any strides, in elements
//   weight (E, C, Pt, Ph, Pw) fp32/bf16/fp16, contiguous; frames, H and W are multiples of Pt, Ph and Pw
//   bias (E) and pos_embed (N, E), any float dtype, contiguous, or null
//   pixel_scale, pixel_shift (C) fp32, contiguous
//   tokens (B, N, E), any float dtype, contiguous
// Returns cudaErrorInvalidValue for sizes or dtypes that it does not take; nothing is launched then.
GPT4V_FAST_EXPORT cudaError_t gpt4v_fast_patch_embed_forward(
    const void* pixels, int32_t pixel_dtype, const int64_t* pixel_sizes, const int64_t* pixel_strides,
    const void* weight, int32_t weight_dtype, const int64_t* weight_sizes, const void* bias, int32_t bias_dtype,
    const float* pixel_scale, const float* pixel_shift, const void* pos_embed, int32_t pos_dtype, void* tokens,
    int32_t token_dtype, cudaStream_t stream) {
  Params p{};
  int64_t grid[3], K = weight_sizes[1];
  for (int i = 0; i < 3; ++i) {
    const int64_t side = weight_sizes[2 + i];
    if (side < 1 || pixel_sizes[2 + i] % side != 0) return cudaErrorInvalidValue;
    grid[i] = pixel_sizes[2 + i] / side;
    p.patch_stride[i] = side * pixel_strides[2 + i];
    K *= side;
    if (K > INT32_MAX / 2) return cudaErrorInvalidValue;
  }
  if (weight_sizes[0] > INT32_MAX / 2 || weight_sizes[1] != pixel_sizes[1]) return cudaErrorInvalidValue;
  for (int i = 0; i < 5; ++i) p.pixel_stride[i] = pixel_strides[i];
  p.pixels = pixels, p.weight = weight, p.bias = bias, p.pos_embed = pos_embed, p.tokens = tokens;
  p.pixel_scale = pixel_scale, p.pixel_shift = pixel_shift;
  p.pixel_dtype = static_cast<DType>(pixel_dtype), p.bias_dtype = static_cast<DType>(bias_dtype);
  p.pos_dtype = static_cast<DType>(pos_dtype), p.token_dtype = static_cast<DType>(token_dtype);
  p.N = grid[0] * grid[1] * grid[2], p.token_count = pixel_sizes[0] * p.N;
  p.grid_rows = grid[1], p.grid_columns = grid[2];
  p.E = static_cast<int>(weight_sizes[0]), p.K = static_cast<int>(K);
  p.patch_frames = make_divider(weight_sizes[2]);
  p.patch_height = make_divider(weight_sizes[3]);
  p.patch_width = make_divider(weight_sizes[4]);
  if (p.pixel_dtype > DType::kUInt8) return cudaErrorInvalidValue;
  if (p.token_count == 0 || p.E == 0) return cudaSuccess;
  switch (static_cast<DType>(weight_dtype)) {
    case DType::kFloat32:
      return launch_blocks<FmaUnits>(p, stream);
    case DType::kBFloat16:
      p.copy_bytes = widest_copy(weight, K * 2);
      return launch_blocks<MatrixUnits<bfloat16>>(p, stream);
    case DType::kFloat16:
      p.copy_bytes = widest_copy(weight, K * 2);
      return launch_blocks<MatrixUnits<float16>>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

GPT4V_FAST_EXPORT const char* gpt4v_fast_cuda_error(cudaError_t error) { return cudaGetErrorString(error); }
