// Attention on the CPU, forward and backward, for every argument of AttentionArgs. Numbers in the tensors are fp32,
// bf16 or fp16; everything in between is fp32.
//     block.h     blocks of queries, and which keys they see
//     scores.h    softcap, bias, ALiBi, masks, dropout on a tile
//     product/    packing and the matrix product, and what the element type means for them
//     work.h      strips of queries, and the tasks that they form
//     products.h  queries in those products
//     softmax.h   the online softmax of a tile
//     forward.h, backward.h, backward_strip.h, backward_bias.h
//     decode.h    forward where rows are few, with decode_rows.h
#pragma once

#include "attention/backward.h"
#include "attention/decode.h"
#include "attention/forward.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Each sequence by itself, so that its bits don't depend on what it is packed with.
template <class T>
static void attention_forward_any(const AttentionArgs& a, int threads) {
  int64_t decoding = 0;
  for (int64_t b = 0; b < sequence_count(a); ++b) decoding += is_decoding(a, sequence_at(a, b));
  if (decoding > 0) attention_decode_as<T>(a, threads);
  if (decoding < sequence_count(a)) attention_forward_as<T>(a, threads);
}

// Work of fewer multiply-adds than this is done by the calling thread: a team of two cost 20 us to wake, and this takes
// half of that at the rate of a decoding step from memory, a tenth at that of a matrix product.
constexpr int64_t kTeamWork = 1 << 17;

// For `products` of the queries with the keys of their sequences.
static int team_of(const AttentionArgs& a, int products, int threads) {
  int64_t pairs = 0;
  for (int64_t b = 0; b < sequence_count(a); ++b) {
    const Sequence sequence = sequence_at(a, b);
    pairs += a.q.size[1] * sequence.S * sequence.visible_keys;
  }
  return pairs * products * max_of(a.q.size[3], a.v.size[3]) < kTeamWork ? 1 : threads;
}

static void attention_forward(const AttentionArgs& a, int threads) {
  threads = team_of(a, 2, threads);
  with_operands(a.q.dtype, [&](auto zero) { attention_forward_any<decltype(zero)>(a, threads); });
}

static void attention_backward(const AttentionArgs& a, int threads) {
  threads = team_of(a, 5, threads);
  with_operands(a.q.dtype, [&](auto zero) { attention_backward_as<decltype(zero)>(a, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
