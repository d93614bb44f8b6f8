// Attention forward: FlashAttention-2 (Dao 2023, algorithm 1) with queries in the lanes.
//
// A strip of 48 queries is transposed once; blocks of 64 keys pass by. Per pair of them
//     scores[key][query]  = K Q^T                      48 x 64 x D multiply-adds
//     weights[key][query] = 2^(factor scores - base), all keys of a query in one lane
//     out[d][query]       = out alpha + V^T weights     48 x 64 x Dv multiply-adds
// so both products broadcast K and V from their natural layout and no reduction crosses lanes. base is the running
// maximum times factor, and factor is log2(e), times the softmax scale where nothing comes between the product and the
// exponential. A unit of work is up to kForwardStrips strips of one key head, which share what has to be copied of a
// block of keys (another dtype, rows far apart). Blocks of keys that no query of a strip sees are skipped. Bytes: q and
// out once, k and v once per unit of their key head (which holds every query head that shares it). Nothing depends on
// who does which unit. Scratch is a few tiles a thread; no S x T buffer.
#pragma once

#include <omp.h>

#include "kernels/attention_products.h"
#include "kernels/attention_softmax.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Strips of queries in a unit of work at most, and bytes of their q and out: they take turns in a first-level cache and
// stay in the second.
constexpr int kForwardStrips = 16;
constexpr int64_t kUnitBytes = 512 << 10;

static inline int64_t strips_per_unit(const AttentionArgs& a, int threads) {
  const int64_t strip_bytes = kQueries * (a.q.size[3] + a.v.size[3]) * sizeof(float);
  const int64_t fitting = clamp(kUnitBytes / max_of(strip_bytes, 1), 1, kForwardStrips);
  return clamp(total_strips(a) / (4 * threads), 1, fitting);
}

// Up to so many queries, as in a decoding step, the products run along D and Dv instead of across queries, where most
// lanes would be idle: about 2 count / kLanes of the work.
constexpr int64_t kFewQueries = kLanes / 4;

struct ForwardScratch {
  int64_t padded_D, padded_Dv;  // to whole vectors
  StripState strips[kForwardStrips];
  // Two of what a product still needs while the next tile of scores is made.
  float *values[2], *scores[2], *alpha[2];
  float *keys, *rows, *bias, *dropout, *stats, *largest, *scale;
  int64_t size;

  ForwardScratch(const AttentionArgs& a, int64_t strip_count, float* scratch) {
    const int64_t tile = kMaxKeys * kQueries;
    padded_D = round_up(a.q.size[3], kLanes), padded_Dv = round_up(a.v.size[3], kLanes);
    Arena arena(scratch);
    for (int64_t i = 0; i < strip_count; ++i) {
      StripState& strip = strips[i];
      strip.queries = arena.take(padded_D * kQueries);
      strip.out = arena.take(padded_Dv * kQueries);
      strip.maximum = arena.take(kQueries);
      strip.sum = arena.take(kQueries);
    }
    for (int i = 0; i < 2; ++i) {
      values[i] = arena.take(kMaxKeys * padded_Dv);
      scores[i] = arena.take(tile + kQueries);  // one row more, for the pair of an odd key
      alpha[i] = arena.take(kQueries);
    }
    keys = arena.take(kMaxKeys * padded_D);
    rows = arena.take(kQueries * max_of(padded_D, padded_Dv));  // of q or out, [query][D]
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = arena.take(a.dropout_p > 0 ? tile : 0);
    stats = arena.take(3 * kQueries);
    largest = arena.take(kQueries);
    scale = arena.take(kQueries);  // the softmax scale in every lane
    size = arena.used();
  }
};

// Writes lse, and turns the strip's sums into what its output is multiplied by: 0 for a row that saw nothing.
static void finish_sums(const AttentionArgs& a, const QueryBlock& block, float factor, const StripState& strip,
                        float* lse) {
  const bool plain = is_plain(a);
  for (int64_t lane = 0; lane < block.width; lane += kLanes) {
    const Vec sum = load_vec(strip.sum + lane);
    store_vec(lse + lane, log(sum));
    store_vec(strip.sum + lane, sum == 0.0f ? Vec{} : 1.0f / sum);
  }
  for (int64_t lane = 0; lane < block.count; ++lane) {
    const double maximum = strip.maximum[lane], base = strip.maximum[lane] * factor;  // rounded, as in start_softmax
    static_cast<float*>(a.lse.data)[row_offset(a.lse, block, lane)] =
        strip.sum[lane] == 0.0f ? -kInfinity
                                : static_cast<float>((plain ? base * 0.6931471805599453 : maximum) + lse[lane]);
  }
}

template <class T>
static void start_strip(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s,
                        const StripState& strip) {
  const bool few = block.count <= kFewQueries;
  if (few)
    pack_queries<T>(a.q, block, strip.queries, s.padded_D);
  else
    Products<T>::load_queries(a.q, block, s.rows, s.padded_D, strip.queries, nullptr);
  std::memset(strip.out, 0, s.padded_Dv * (few ? block.count : kQueries) * sizeof(float));
  for (int64_t lane = 0; lane < block.width; ++lane) {
    // The sink is a key with score `sink` and value 0.
    const float sink =
        a.sinks.defined ? static_cast<const float*>(a.sinks.data)[block.head[lane] * a.sinks.stride[0]] : -kInfinity;
    strip.maximum[lane] = sink;
    strip.sum[lane] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  for (int64_t lane = 0; lane < kQueries; ++lane) s.scale[lane] = a.scale;
}

static inline void copy_lanes(const float* from, float* to) {
#pragma GCC unroll 12
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) store_vec(to + lane, load_vec(from + lane));
}

// Few queries: vectors along D.
template <class T, bool kPlain>
static void forward_few(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s) {
  const StripState& strip = s.strips[0];
  const float factor = exponent_factor(a);
  float *scores = s.scores[0], *alpha = s.alpha[0];
  start_strip<T>(a, block, s, strip);
  for (int64_t j0 = block.key_begin(); j0 < block.key_end(); j0 += kKeys) {
    const int64_t n = min_of(kKeys, block.key_end() - j0);
    const KeyIds documents(a.key_documents, block.sequence, j0, n), images(a.key_images, block.sequence, j0, n);
    const Cover cover = cover_of(block, j0, n, documents, images);
    if (cover == Cover::kNone) continue;
    pack<T>(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, a.k.size[3], s.keys, s.padded_D);
    dot_rows(n, block.count, s.padded_D, s.keys, strip.queries, scores, kQueries);
    for (int64_t c = 0; !kPlain && c < n; ++c)
      for (int64_t lane = 0; lane < block.width; ++lane) scores[c * kQueries + lane] *= a.scale;
    finish_scores(block, j0, n, cover, documents, images, s.bias, scores, nullptr);
    copy_lanes(strip.maximum, s.largest);
    compare_scores(block.width, n, scores, s.largest);
    start_softmax<kPlain>(block.width, factor, strip, s.largest, alpha, s.stats);
    WeightWork<false, kPlain> work(scores, block.width, n, s.stats);
    finish_softmax(block.width, strip, alpha, s.stats, work);
    if (a.dropout_p > 0) drop_weights<false>(block, j0, n, s.dropout, scores);
    pack<T>(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, a.v.size[3], s.values[0], s.padded_Dv);
    for (int64_t lane = 0; lane < block.count; ++lane)
      for (int64_t d = 0; d < s.padded_Dv; ++d) strip.out[lane * s.padded_Dv + d] *= alpha[lane];
    product<Into::kAdd>(block.count, s.padded_Dv, n, Broadcast<Along::kRows>{scores, kQueries}, s.values[0],
                        s.padded_Dv, strip.out, s.padded_Dv);
  }
  finish_sums(a, block, factor, strip, s.stats);
  for (int64_t lane = 0; lane < block.count; ++lane)
    unpack<T>(strip.out + lane * s.padded_Dv, s.padded_Dv, 1, a.v.size[3], strip.sum[lane],
              query_row<T>(a.out, block, lane));
}

// The strips of a unit. Their tiles form one sequence, and the product of a tile's weights with the values is put off
// until the scores of the next tile are there, whose weights are then worked out in between (`product`).
template <class T, bool kPlain>
static void forward_unit(const AttentionArgs& a, const QueryBlock* blocks, int64_t count, const ForwardScratch& s) {
  using P = Products<T>;
  using Work = WeightWork<P::kPairs, kPlain>;
  const int64_t D = a.q.size[3], Dv = a.v.size[3];
  const float factor = exponent_factor(a);
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t i = 0; i < count; ++i) {
    start_strip<T>(a, blocks[i], s, s.strips[i]);
    begin = min_of(begin, blocks[i].key_begin()), end = max_of(end, blocks[i].key_end());
  }
  struct {
    const StripState* strip = nullptr;
    typename P::ColumnOperand values;
    int64_t width, n;
    const float* weights;
    float* alpha;  // null where all are 1
  } pending;
  const auto add_values = [&](auto& work) {
    if (pending.alpha == nullptr)
      product<Into::kAdd>(Dv, pending.width, P::depth(pending.n), pending.values, pending.weights, kQueries,
                          pending.strip->out, kQueries, nullptr, work);
    else
      product<Into::kScaleAndAdd>(Dv, pending.width, P::depth(pending.n), pending.values, pending.weights, kQueries,
                                  pending.strip->out, kQueries, pending.alpha, work);
  };
  int tile = 0, value_buffer = 0;
  for (int64_t j0 = begin, block_keys; j0 < end; j0 += block_keys) {
    const int64_t left = blocks[0].sequence.visible_keys - j0;
    block_keys = left <= kMaxKeys ? left : kKeys;
    const KeyIds documents(a.key_documents, blocks[0].sequence, j0, block_keys),
        images(a.key_images, blocks[0].sequence, j0, block_keys);
    bool is_prepared = false;
    typename P::RowOperand keys;
    typename P::ColumnOperand values;
    for (int64_t i = 0; i < count; ++i) {
      const QueryBlock& block = blocks[i];
      const StripState& strip = s.strips[i];
      const int64_t n = min_of(block_keys, block.key_end() - j0), width = block.width;
      const Cover cover = n <= 0 ? Cover::kNone : cover_of(block, j0, n, documents, images);
      if (cover == Cover::kNone) continue;
      if (!is_prepared) {
        keys = P::rows_of(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), block_keys, D, s.keys, s.padded_D);
        values = P::columns_of(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), block_keys, Dv,
                               s.values[value_buffer ^= 1], s.padded_Dv);
        is_prepared = true;
      }
      float *scores = s.scores[tile], *alpha = s.alpha[tile];
      copy_lanes(strip.maximum, s.largest);
      if (kPlain && cover == Cover::kWhole) {
        product<Into::kSetAndCompare>(n, width, P::depth(D), keys, strip.queries, kQueries, scores, kQueries,
                                      s.largest);
      } else {
        product<kPlain ? Into::kSet : Into::kSetScaled>(n, width, P::depth(D), keys, strip.queries, kQueries, scores,
                                                        kQueries, s.scale);
        finish_scores(block, j0, n, cover, documents, images, s.bias, scores, nullptr);
        compare_scores(width, n, scores, s.largest);
      }
      const bool has_moved = start_softmax<kPlain>(width, factor, strip, s.largest, alpha, s.stats);
      Work work(scores, width, n, s.stats);
      if (pending.strip != nullptr) add_values(work);
      finish_softmax(width, strip, alpha, s.stats, work);
      if (a.dropout_p > 0) drop_weights<P::kPairs>(block, j0, n, s.dropout, scores);
      pending = {&strip, values, width, n, scores, has_moved ? alpha : nullptr};
      tile ^= 1;
    }
  }
  NoWork nothing;
  if (pending.strip != nullptr) add_values(nothing);
  for (int64_t i = 0; i < count; ++i) {
    const StripState& strip = s.strips[i];
    finish_sums(a, blocks[i], factor, strip, s.stats);
    transpose(strip.out, kQueries, Dv, blocks[i].count, s.rows, s.padded_Dv);
    for (int64_t lane = 0; lane < blocks[i].count; ++lane)
      unpack<T>(s.rows + lane * s.padded_Dv, s.padded_Dv, 1, Dv, strip.sum[lane], query_row<T>(a.out, blocks[i], lane));
  }
}

template <class T, bool kPlain>
static void attention_forward_plain_or_not(const AttentionArgs& a, int threads) {
  const int64_t unit_strips = strips_per_unit(a, threads);
  const QueryWork work(a, unit_strips);
  const int64_t count = work.count();
  if (count == 0) return;
  const int team = static_cast<int>(min_of(threads, count));
  const int64_t scratch_size = ForwardScratch(a, unit_strips, nullptr).size;
  const Buffer<float> scratch(team * scratch_size);
#pragma omp parallel num_threads(team)
  {
    const ForwardScratch s(a, unit_strips, scratch.get() + omp_get_thread_num() * scratch_size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < count; ++unit) {
      QueryBlock blocks[kForwardStrips];
      const int64_t strips = work.get(unit, blocks);
      if (is_decoding(a, blocks[0].sequence)) continue;
      // A key head with so few rows has but one strip.
      if (blocks[0].count <= kFewQueries)
        forward_few<T, kPlain>(a, blocks[0], s);
      else
        forward_unit<T, kPlain>(a, blocks, strips, s);
    }
  }
}

template <class T>
static void attention_forward_as(const AttentionArgs& a, int threads) {
  if (is_plain(a))
    attention_forward_plain_or_not<T, true>(a, threads);
  else
    attention_forward_plain_or_not<T, false>(a, threads);
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
