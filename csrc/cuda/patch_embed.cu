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
#include "cuda/patch_units.h"

namespace {

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
