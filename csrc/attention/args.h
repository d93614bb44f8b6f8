// What the attention kernels take: plain views and scalars.
#pragma once

#include "view.h"

namespace gpt4v_fast {

// One call of the attention kernels, forward or backward. Shapes as in gpt4v_fast/ops/attention/api.py.
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

  // What a call object brings, by the names of its fields (python_calls.h).
  template <class F>
  void for_call(F field) {
    field("q", q), field("k", k), field("v", v);
    field("bias", bias), field("alibi_slopes", alibi_slopes), field("sinks", sinks);
    field("query_documents", query_documents), field("key_documents", key_documents);
    field("query_images", query_images), field("key_images", key_images);
    field("key_lengths", key_lengths), field("offsets", offsets);
    field("cu_seqlens_q", cu_seqlens_q), field("cu_seqlens_k", cu_seqlens_k), field("seed", seed);
    field("causal", causal), field("bottom_right", bottom_right);
    field("window_left", window_left), field("window_right", window_right);
    field("scale", scale), field("softcap", softcap), field("dropout_p", dropout_p);
  }
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

  template <class F>
  void for_call(F field) {
    field("q", q), field("k_cache", k_cache), field("v_cache", v_cache), field("cache_lengths", cache_lengths);
    field("k", k), field("v", v), field("block_table", block_table);
    field("rotary_cos", rotary_cos), field("rotary_sin", rotary_sin), field("sinks", sinks);
    field("rotary_interleaved", rotary_interleaved), field("causal", causal);
    field("window_left", window_left), field("window_right", window_right);
    field("scale", scale), field("softcap", softcap);
  }
};

// The most rows of a key head (query heads that share it times S) that attention/decode.h takes, and with it
// the most that a paged call may have.
constexpr int64_t kDecodeRows = 16;

}  // namespace gpt4v_fast
