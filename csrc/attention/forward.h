// Attention forward: FlashAttention-2 (Dao 2023, algorithm 1) with queries in the lanes.
//
// A strip of 48 queries is transposed once; blocks of 128 keys, at the end 64, pass by. Per pair of them
//     scores[key][query]  = K Q^T                      48 x 128 x D multiply-adds
//     weights[key][query] = 2^(factor scores - base), all keys of a query in one lane
//     out[d][query]       = out alpha + V^T weights     48 x 128 x Dv multiply-adds
// so both products broadcast K and V from their natural layout and no reduction crosses lanes (AMX tiles take V
// transposed, and their products have no softmax woven in). base is the running
// maximum times factor, and factor is log2(e), times the softmax scale where nothing comes between the product and the
// exponential. A task is up to kForwardStrips strips of one key head, which share what has to be copied of a
// block of keys (another dtype, rows far apart). Blocks of keys that no query of a strip sees are skipped, and so are
// keys at the ends of a block that a vector of queries does not see (`TileKeys`). Bytes: q and out once, k and v once
// per task of their key head (which holds every query head that shares it), asked for a block of keys ahead. Nothing
// depends on who does which task. Scratch is a few tiles a thread; no S x T buffer.
#pragma once

#include <omp.h>

#include "attention/products.h"
#include "attention/softmax.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Strips of queries in a task at most, and bytes of their q and out: they take turns in a first-level cache and
// stay in the second.
constexpr int kForwardStrips = 16;
constexpr int64_t kTaskBytes = 512 << 10;

static inline int64_t strips_per_task(const AttentionArgs& a, int threads) {
  const int64_t strip_bytes = kQueries * (a.q.size[3] + a.v.size[3]) * sizeof(float);
  const int64_t fitting = clamp(kTaskBytes / max_of(strip_bytes, 1), 1, kForwardStrips);
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
    const int64_t tile = kForwardKeys * kQueries;
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
      values[i] = arena.take(kForwardKeys * padded_Dv);
      scores[i] = arena.take(tile + kQueries);  // one row more, for the pair of an odd key
      alpha[i] = arena.take(kQueries);
    }
    keys = arena.take(kForwardKeys * padded_D);
    rows = arena.take(kQueries * max_of(padded_D, padded_Dv));  // of q or out, [query][D]
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = arena.take(a.dropout_p > 0 ? tile : 0);
    stats = arena.take(3 * kQueries);
    largest = arena.take(kQueries);
    scale = arena.take(kQueries);  // the softmax scale in every lane
    size = arena.used();
    for (int64_t lane = 0; scratch != nullptr && lane < kQueries; ++lane) scale[lane] = a.scale;
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
#pragma omp simd
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const double maximum = strip.maximum[lane], base = strip.maximum[lane] * factor;  // rounded, as in start_softmax
    const double sum = (plain ? base * 0.6931471805599453 : maximum) + lse[lane];
    lse[lane] = strip.sum[lane] == 0.0f ? -kInfinity : static_cast<float>(sum);
  }
  float* out = static_cast<float*>(a.lse.data);
  if (a.lse.stride[2] == 1 && block.are_even(0, block.count))
    std::memcpy(out + row_offset(a.lse, block, 0), lse, block.count * sizeof(float));
  else
    for (int64_t lane = 0; lane < block.count; ++lane) out[row_offset(a.lse, block, lane)] = lse[lane];
}

template <class T>
static void start_strip(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s,
                        const StripState& strip) {
  const bool few = block.count <= kFewQueries;
  if (few)
    pack_queries<T>(a.q, block, 0, block.count, strip.queries, s.padded_D);
  else
    Products<T>::load_queries(a.q, block, s.rows, s.padded_D, strip.queries, nullptr);
  for (int64_t lane = 0; lane < kQueries; ++lane) strip.maximum[lane] = -kInfinity, strip.sum[lane] = 0.0f;
  if (!a.sinks.defined) return;
  for (int64_t lane = 0; lane < block.width; ++lane) {
    // The sink is a key with score `sink` and value 0.
    const float sink = static_cast<const float*>(a.sinks.data)[block.head[lane] * a.sinks.stride[0]];
    strip.maximum[lane] = sink;
    strip.sum[lane] = sink == -kInfinity ? 0.0f : 1.0f;
  }
}

static inline void copy_lanes(const float* from, float* to) {
#pragma GCC unroll 12
  for (int64_t lane = 0; lane < kQueries; lane += kLanes) store_vec(to + lane, load_vec(from + lane));
}

// The keys of a tile for each vector of queries, not fewer than for the vector before, so that little is done for a
// triangle that is hidden: as many as one of the vector's queries sees, in runs.
struct TileKeys {
  int64_t n, of[kQueryVectors];  // all of them, and those of a vector

  TileKeys() = default;
  explicit TileKeys(int64_t n) : n(n) {
    for (int v = 0; v < kQueryVectors; ++v) of[v] = n;
  }
  TileKeys(const QueryBlock& block, int64_t j0, int64_t n) : TileKeys(n) {
    for (int64_t v = 0; v < block.width / kLanes; ++v)
      of[v] = clamp(round_up(block.vector_last[v] + 1 - j0, kKeyRun), 0, n);
  }
};

// Few queries: vectors along D.
template <class T, bool kPlain>
static void forward_few(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s) {
  const StripState& strip = s.strips[0];
  const float factor = exponent_factor(a);
  float *scores = s.scores[0], *alpha = s.alpha[0];
  start_strip<T>(a, block, s, strip);
  std::memset(strip.out, 0, s.padded_Dv * block.count * sizeof(float));
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
    const TileKeys keys(n);
    compare_scores(block.width, keys.of, scores, s.largest);
    start_softmax<kPlain>(block.width, factor, strip, s.largest, alpha, s.stats);
    WeightWork<false, kPlain> work(scores, block.width, keys.of, s.stats);
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

// A product of a tile's weights with its values that is still to be done.
template <class T>
struct PendingValues {
  const StripState* strip = nullptr;
  typename Products<T>::ColumnOperand values;
  int64_t width, depth[kQueryVectors];
  const float* weights;
  float* alpha;
  bool is_first, has_moved;  // has_moved: not all of alpha are 1

  template <class Work>
  void add(int64_t Dv, Work& work) const {
    const auto multiply = [&](auto into, auto steps) {
      product<decltype(into)::value>(Dv, width, steps, values, weights, kQueries, strip->out, kQueries, alpha, work);
    };
    if (depth[0] != depth[width / kLanes - 1]) {
      if (is_first) std::memset(strip->out, 0, round_up(Dv, kLanes) * kQueries * sizeof(float));
      multiply(std::integral_constant<Into, Into::kScaleAndAdd>{}, Stairs{depth});
    } else if (is_first) {
      multiply(std::integral_constant<Into, Into::kSet>{}, depth[0]);
    } else if (has_moved) {
      multiply(std::integral_constant<Into, Into::kScaleAndAdd>{}, depth[0]);
    } else {
      multiply(std::integral_constant<Into, Into::kAdd>{}, depth[0]);
    }
  }
};

// The scores of a strip and keys [j, j + n), which `keys` holds, and in s.largest the largest of each query.
template <class T, bool kPlain>
static void score_tile(const QueryBlock& block, Cover cover, int64_t j, int64_t n, const TileKeys& tile_keys,
                       typename Products<T>::RowOperand keys, const KeyIds& documents, const KeyIds& images,
                       const ForwardScratch& s, const StripState& strip, float* scores) {
  const int64_t width = block.width, depth = Products<T>::depth(block.args->q.size[3]);
  copy_lanes(strip.maximum, s.largest);
  if (kPlain && cover == Cover::kWhole) {
    product<Into::kSetAndCompare>(n, width, depth, keys, strip.queries, kQueries, scores, kQueries, s.largest);
    return;
  }
  for (int64_t lane = 0, row = 0; lane < width; lane += kLanes) {
    const int64_t row_end = tile_keys.of[lane / kLanes];
    if (row_end == row) continue;
    product<kPlain ? Into::kSet : Into::kSetScaled>(row_end - row, width - lane, depth, keys.rows_from(row),
                                                    strip.queries + lane, kQueries, scores + row * kQueries + lane,
                                                    kQueries, s.scale);
    row = row_end;
  }
  if (kPlain)
    hide_scores(block, j, tile_keys.of, documents, images, scores);
  else
    finish_scores(block, j, n, cover, documents, images, s.bias, scores, nullptr);
  compare_scores(width, tile_keys.of, scores, s.largest);
}

// The strips of a task. Their tiles form one sequence, and the product of a tile's weights with the values is put off
// until the scores of the next tile are there, whose weights are then worked out in between (`product`).
template <class T, bool kPlain>
static void forward_task(const AttentionArgs& a, const QueryBlock* blocks, int64_t count, const ForwardScratch& s) {
  using P = Products<T>;
  using Work = WeightWork<P::kPairs, kPlain>;
  const int64_t D = a.q.size[3], Dv = a.v.size[3];
  const float factor = exponent_factor(a);
  int64_t begin = INT64_MAX, end = 0;
  for (int64_t i = 0; i < count; ++i)
    begin = min_of(begin, blocks[i].key_begin()), end = max_of(end, blocks[i].key_end());
  begin = begin / kForwardKeys * kForwardKeys;  // the same blocks whatever strips share a task
  PendingValues<T> pending;
  int tile = 0, value_buffer = 0;
  bool has_out[kForwardStrips] = {};
  int64_t started = 0;
  // A strip starts when its first tile is due, and asks for the next one's queries.
  const auto start = [&](int64_t strip) {
    for (; started <= strip; ++started) {
      start_strip<T>(a, blocks[started], s, s.strips[started]);
      if (started + 1 < count) prefetch_queries<const T>(a.q, blocks[started + 1]);
    }
  };
  for (int64_t j0 = begin, block_keys; j0 < end; j0 += block_keys) {
    const int64_t left = blocks[0].sequence.visible_keys - j0;
    block_keys = left <= kMaxKeys ? left : left <= kShortKeys ? kKeys : kForwardKeys;
    const KeyIds documents(a.key_documents, blocks[0].sequence, j0, block_keys),
        images(a.key_images, blocks[0].sequence, j0, block_keys);
    const int64_t next = j0 + block_keys, next_keys = clamp(end - next, 0, kForwardKeys);
    // Each strip asks for its part of the next keys and values, and the last time for its rows of out.
    const auto prefetch = [&](int64_t i) ALWAYS_INLINE_LAMBDA {
      const QueryBlock& block = blocks[i];
      const int64_t from = next_keys * i / count, to = next_keys * (i + 1) / count;
      prefetch_rows(key_rows<const T>(a.k, block.sequence, block.kv_head, next), from, to, D);
      prefetch_rows(key_rows<const T>(a.v, block.sequence, block.kv_head, next), from, to, Dv);
      if (next >= block.key_end()) prefetch_queries<T>(a.out, block);
    };
    bool is_prepared = false;
    typename P::RowOperand keys;
    typename P::ColumnOperand values;
    for (int64_t i = 0; i < count; ++i) {
      const QueryBlock& block = blocks[i];
      const StripState& strip = s.strips[i];
      const int64_t block_n = min_of(block_keys, block.key_end() - j0), width = block.width;
      const Cover cover = block_n <= 0 ? Cover::kNone : cover_of(block, j0, block_n, documents, images);
      if (cover == Cover::kNone) continue;
      const KeyRange seen = cover != Cover::kPart ? KeyRange{0, block_n}
                                                  : seen_keys(block_n, block.min_first - j0, block.max_last - j0,
                                                              documents, block.min_document, block.max_document);
      if (seen.end == 0) continue;
      if (!is_prepared) {
        keys = P::rows_of(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), block_keys, D, s.keys, s.padded_D);
        values = P::columns_of(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), block_keys, Dv,
                               s.values[value_buffer ^= 1], s.padded_Dv);
        is_prepared = true;
      }
      start(i);
      prefetch(i);
      float *scores = s.scores[tile], *alpha = s.alpha[tile];
      const int64_t skipped = seen.begin, j = j0 + skipped, n = seen.end - skipped;
      const TileKeys tile_keys = cover == Cover::kPart ? TileKeys(block, j, n) : TileKeys(n);
      score_tile<T, kPlain>(block, cover, j, n, tile_keys, keys.rows_from(skipped), documents.from(skipped),
                            images.from(skipped), s, strip, scores);
      const bool has_moved = start_softmax<kPlain>(width, factor, strip, s.largest, alpha, s.stats);
      Work work(scores, width, tile_keys.of, s.stats);
      if (pending.strip != nullptr) pending.add(Dv, work);
      finish_softmax(width, strip, alpha, s.stats, work);
      if (a.dropout_p > 0) drop_weights<P::kPairs>(block, j, n, s.dropout, scores);
      pending = {&strip, values.depth_from(P::depth(skipped)), width, {}, scores, alpha, !has_out[i], has_moved};
      for (int v = 0; v < kQueryVectors; ++v) pending.depth[v] = P::depth(tile_keys.of[v]);
      has_out[i] = true;
      tile ^= 1;
    }
  }
  start(count - 1);
  NoWork nothing;
  if (pending.strip != nullptr) pending.add(Dv, nothing);
  for (int64_t i = 0; i < count; ++i) {
    const StripState& strip = s.strips[i];
    finish_sums(a, blocks[i], factor, strip, s.stats);
    if (!has_out[i]) std::memset(strip.out, 0, s.padded_Dv * kQueries * sizeof(float));
    P::store_out(a.out, blocks[i], strip.out, strip.sum, s.rows, s.padded_Dv);
  }
}

template <class T, bool kPlain>
static void attention_forward_plain_or_not(const AttentionArgs& a, int threads) {
  const int64_t task_strips = strips_per_task(a, threads);
  const QueryWork work(a, task_strips);
  const int64_t count = work.count();
  if (count == 0) return;
  const int team = static_cast<int>(min_of(threads, count));
  const int64_t scratch_size = ForwardScratch(a, task_strips, nullptr).size;
  const Buffer<float> scratch(team * scratch_size);
#pragma omp parallel num_threads(team)
  {
    [[maybe_unused]] const AmxTiles tiles;
    const ForwardScratch s(a, task_strips, scratch.get() + omp_get_thread_num() * scratch_size);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < count; ++task) {
      QueryBlock blocks[kForwardStrips];
      const int64_t strips = work.get(task, blocks);
      if (is_decoding(a, blocks[0].sequence)) continue;
      // A key head with so few rows has but one strip.
      if (blocks[0].count <= kFewQueries)
        forward_few<T, kPlain>(a, blocks[0], s);
      else
        forward_task<T, kPlain>(a, blocks, strips, s);
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
