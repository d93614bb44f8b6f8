// What every kernel takes: plain views and scalars. This header is included by translation units of every ISA, so it
// holds nothing but plain data: an inline function here could be kept by the linker in its AVX-512 copy for everybody.
#pragma once

#include <cstdint>

namespace gpt4v_fast {

// The order is that of gpt4v_fast/_native.py.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kUInt8, kInt32, kInt64, kBool };

constexpr int kMaxDims = 6;

// A tensor somebody else owns: sizes and strides in elements. `defined` is false for an absent optional tensor.
struct View {
  void* data;
  DType dtype;
  int32_t ndim;
  bool defined;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];
};

// One call of the attention kernels, forward or backward. Shapes as in gpt4v_fast/ops/attention.py.
//
// Dense: q (B, H, S, D), k (B, Hkv, T, D), v (B, Hkv, T, Dv), cu_seqlens absent.
// Varlen: q (1, H, Nq, D), k (1, Hkv, Nk, D), v (1, Hkv, Nk, Dv) with cu_seqlens_q and cu_seqlens_k (B + 1); every
// sequence is then one batch entry, and the per-batch tensors below are indexed by sequence.
//
// Paged (forward only, few queries): k (pages, Hkv, page, D) and v (pages, Hkv, page, Dv) with block_table (B,
// entries); key j of batch entry b is in page block_table[b, j / page], and T = entries * page.
struct AttentionArgs {
  View q, k, v;
  View bias;             // (B, H, S, T) additive fp32/bf16/fp16 or bool (true = attend); broadcast by stride 0
  View alibi_slopes;     // (B, H) fp32
  View sinks;            // (H) fp32
  View query_documents;  // (B, S) int32, with key_documents (B, T)
  View key_documents;
  View query_images;  // (B, S) int32, with key_images (B, T)
  View key_images;
  View key_lengths;   // (B) int32
  View offsets;       // (B) int32: the causal diagonal of each batch entry; absent: see bottom_right
  View cu_seqlens_q;  // (B + 1) int32
  View cu_seqlens_k;
  View block_table;  // (B, entries) int32, with key_lengths; entries behind the last key may be anything
  bool causal;
  bool bottom_right;     // offset T - S when true, 0 when false; per sequence for varlen
  int64_t window_left;   // -1: unbounded
  int64_t window_right;  // -1: unbounded
  float scale;
  float softcap;     // 0: none
  double dropout_p;  // 0: none; the generator is in docs/math.md
  uint64_t seed;

  View out;  // (B, H, S, Dv), q's dtype
  View lse;  // (B, H, S) fp32

  // Backward only. d* have the shape and dtype of what they are the gradient of, unless said otherwise.
  View dout;
  View dlse;  // (B, H, S) fp32 or absent
  View dq, dk, dv;
  View dbias;   // fp32, the bias's own shape before broadcasting (broadcast dimensions of size 1), or absent
  View dsinks;  // (H) fp32 or absent
};

// One call of attention against a key/value cache: rotate, append, attend.
struct KvCacheArgs {
  View q;              // (B, S, H, D)
  View k_cache;        // (B, Tmax, Hkv, D), or with block_table (pages, page, Hkv, D); v_cache likewise with Dv
  View v_cache;        // both written where k is given
  View cache_lengths;  // (B) int32, tokens before k and v
  View k, v;           // (B, Snew, Hkv, D) and (B, Snew, Hkv, Dv), or absent
  View block_table;    // (B, entries) int32, or absent
  View rotary_cos;     // (positions, R / 2) any float, or absent; rotary_sin likewise
  View rotary_sin;
  View sinks;  // (H) fp32, or absent
  bool rotary_interleaved;
  bool causal;
  int64_t window_left;   // -1: unbounded
  int64_t window_right;  // -1: unbounded
  float scale;
  float softcap;  // 0: none

  View out;  // (B, S, H, Dv), q's dtype
  View lse;  // (B, H, S) fp32
};

// The most rows of a key head (query heads that share it times S) that attention/decode.h takes, and with it
// the most that a paged call may have.
constexpr int64_t kDecodeRows = 16;

// One call of softmax cross-entropy over given logits (N, V).
struct CrossEntropyArgs {
  View logits;        // (N, V) fp32/bf16/fp16
  View target;        // (N) int64, checked: in [0, V) or ignore_index
  View class_weight;  // (V) fp32 or absent
  int64_t ignore_index;
  float label_smoothing;
  float softcap;  // 0: none

  View nll;      // (N) fp32; 0 where ignored
  View lse;      // (N) fp32; 0 where ignored
  View lse_low;  // (N) fp32: what rounding lse to fp32 left out; exp(z - lse) is wrong by as much at logits of 1e4
  View argmax;   // (N) int64; -1 where ignored

  // Backward only.
  View grad_nll;     // (N) fp32
  View grad_lse;     // (N) fp32
  View grad_logits;  // (N, V), logits' dtype; may be logits itself
};

// One call of the fused projection and cross-entropy: logits = hidden @ weight^T + bias, never written whole.
struct LinearCrossEntropyArgs {
  View hidden;        // (N, E) fp32/bf16/fp16
  View weight;        // (V, E), hidden's dtype
  View bias;          // (V) any float dtype, or absent
  View target;        // (N) int64, checked: in [0, V) or ignore_index
  View class_weight;  // (V) fp32 or absent
  int64_t ignore_index;
  float label_smoothing;
  float softcap;

  View nll;      // (N) fp32
  View lse;      // (N) fp32
  View lse_low;  // (N) fp32, as above
  View argmax;   // (N) int64
  View kept;     // bytes that forward may fill with logits for backward (csrc/loss/kept_logits.h), or absent

  // Backward only. A gradient that is not needed is absent.
  View grad_nll;
  View grad_lse;
  View grad_hidden;  // (N, E), hidden's dtype
  View grad_weight;  // (V, E), weight's dtype
  View grad_bias;    // (V) fp32

  // Forward and backward in one, csrc/loss/linear_cross_entropy_gradients.h. grad_weight is contiguous then.
  bool keeps_in_gradient;  // logits stay in grad_weight's memory until it is written
  // (V, E), the lower halves of fp32 sums, whose upper halves stand in grad_weight; or null.
  uint16_t* weight_sum_halves;
};

// One call of the patch embedding: tokens (B, N, E) = conv(pixels * pixel_scale[c] + pixel_shift[c]) + bias +
// pos_embed. Pixels are always 5-D here, (B, C, frames, H, W), frames = 1 for still images; weight is (E, C, Pt, Ph,
// Pw).
struct PatchEmbedArgs {
  View pixels;       // uint8/fp32/bf16/fp16
  View weight;       // fp32/bf16/fp16
  View bias;         // (E) weight's dtype or absent
  View pixel_scale;  // (C) fp32: rescale / std
  View pixel_shift;  // (C) fp32: -mean / std
  View pos_embed;    // (N, E) float or absent; shared by the batch

  View tokens;  // (B, N, E) fp32/bf16/fp16

  // Backward only. A gradient that is not needed is absent. Those of bias and pos_embed are sums of grad_tokens.
  View grad_tokens;
  View grad_weight;  // (E, C, Pt, Ph, Pw) fp32
  View grad_pixels;  // float pixels only, their dtype
};

}  // namespace gpt4v_fast
