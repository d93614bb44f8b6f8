// Attention backward: FlashAttention-2 (Dao 2023, algorithm 2), scores recomputed from lse, queries in the lanes.
//
// With P = exp(scores - lse), M the dropout factors (1 without dropout) and delta = rowsum(dout * out) - dlse:
//     dV = (M P)^T dout,   dP = dout V^T,   dS = P (M dP - delta),   dbias = dS,
//     dsink = -sum of exp(sink - lse) delta over the rows of a head,
//     dQ = scale (dS cap') K,   dK = scale (dS cap')^T Q,   cap' = 1 - tanh^2 with a softcap, else 1
// A unit of work is a key head of a sequence with all or a share of its strips of queries. It walks groups of up to
// kStrips strips, and for each the key blocks. Per key block and strip it does three products: scores, dP and dQ; then
// for the key block and all of the group's strips at once dV and dK, whose sums over queries are long then. dQ belongs
// to the group; dK and dV are summed in fp32 over the unit, T x (D + Dv) floats of scratch. Where a call has fewer than
// kUnits key heads, each is shared by several units, whose sums are added in a fixed order; so the result does not
// depend on the number of threads, and at most max(kUnits, B Hkv) threads find work.
#pragma once

#include <cmath>

#include "kernels/attention_backward_bias.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kUnits = 8;

// What belongs to a strip while its key blocks pass.
struct GradientStrip {
  float *queries, *douts, *dq;  // [D][query] or pairs [D / 2][query]; dq always [D][query]
  float *base, *delta;          // of the weights' exponents, and delta as above
  int64_t offset;               // of its first column in the group's tiles
};

template <class T>
struct GradientScratch {
  using Element = typename Products<T>::Element;
  int64_t D, Dv, padded_D, padded_Dv;  // padded to whole vectors
  int64_t group;                       // strips in a group: fewer where heads are wide, for a second-level cache
  GradientStrip strips[kStrips];
  float *queries, *douts;      // of the group: rows [query][D] or pairs [query / 2][D]
  Element *weights, *dscores;  // of the group, [key][query]; weights are M P
  float *scores, *dprobs;      // of a strip, [key][query]
  float* dscores_strip;        // of a strip, pairs [key / 2][query]
  float *keys, *values, *keys_transposed, *slope, *bias, *dropout, *scale, *rows;
  int64_t size;

  GradientScratch(const AttentionArgs& a, float* base) {
    const int64_t tile = kKeys * kQueries;
    D = a.q.size[3], Dv = a.v.size[3];
    padded_D = round_up(D, kLanes), padded_Dv = round_up(Dv, kLanes);
    group = D + Dv > 256 ? kStrips / 2 : kStrips;
    Arena arena(base);
    for (GradientStrip& strip : strips) {
      strip.queries = arena.take(padded_D * kQueries);
      strip.douts = arena.take(padded_Dv * kQueries);
      strip.dq = arena.take(padded_D * kQueries);
      strip.base = arena.take(kQueries);
      strip.delta = arena.take(kQueries);
    }
    queries = arena.take(kStrips * kQueries * padded_D);
    douts = arena.take(kStrips * kQueries * padded_Dv);
    weights = reinterpret_cast<Element*>(arena.take(kStrips * tile));
    dscores = reinterpret_cast<Element*>(arena.take(kStrips * tile));
    scores = arena.take(tile);
    dprobs = arena.take(tile);
    dscores_strip = arena.take(Products<T>::kPairs ? tile : 0);
    keys = arena.take(kKeys * padded_D);
    values = arena.take(kKeys * padded_Dv);
    keys_transposed = arena.take(Products<T>::kPairs ? kKeys * padded_D : 0);
    slope = a.softcap > 0 ? arena.take(tile) : nullptr;
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = a.dropout_p > 0 ? arena.take(tile) : nullptr;
    scale = arena.take(kQueries);
    rows = arena.take(kQueries * max_of(padded_D, padded_Dv));
    size = arena.used();
  }
  int64_t columns() const { return kStrips * kQueries; }  // of the group's tiles
};

// Where the rows' delta is kept for dsinks: that of q's row (batch, head, row) is delta[(batch H + head) Nq + row].
static inline int64_t delta_index(const AttentionArgs& a, const QueryBlock& block, int64_t lane) {
  return (block.sequence.batch * a.q.size[1] + block.head[lane]) * a.q.size[2] + block.sequence.query0 +
         block.index[lane];
}

// Fills what belongs to the queries of a strip: q and dout both ways round, lse and delta. `deltas` may be null.
template <class T>
static void load_strip(const AttentionArgs& a, const QueryBlock& block, const GradientScratch<T>& s,
                       const GradientStrip& strip, float* deltas) {
  const int64_t row = Products<T>::depth(strip.offset);
  Products<T>::load_queries(a.q, block, s.rows, s.padded_D, strip.queries, s.queries + row * s.padded_D);
  Products<T>::load_queries(a.dout, block, s.rows, s.padded_Dv, strip.douts, s.douts + row * s.padded_Dv);
  load_statistics<T>(a, block, is_plain(a) ? kLog2E : 1.0f, strip.base, strip.delta);
  for (int64_t lane = 0; deltas != nullptr && lane < block.count; ++lane)
    deltas[delta_index(a, block, lane)] = strip.delta[lane];
  std::memset(strip.dq, 0, s.padded_D * kQueries * sizeof(float));
}

// From scores and dP of keys [0, n) of a strip to M P and dS; rows up to `rows` are filled with zeros.
template <class T>
static void differentiate(const QueryBlock& block, int64_t n, int64_t rows, const GradientScratch<T>& s,
                          const GradientStrip& strip) {
  constexpr bool kPairs = Products<T>::kPairs;
  const bool plain = is_plain(*block.args);
  const Vec factors = broadcast(exponent_factor(*block.args));
  const int64_t columns = s.columns();
  for (int64_t c = 0; c < rows; c += 2)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      const Vec base = load_vec(strip.base + lane), delta = load_vec(strip.delta + lane);
      Vec dscore[2] = {};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t from = (c + i) * kQueries + lane, to = (c + i) * columns + strip.offset + lane;
        Vec weight = {};
        if (c + i < n) {
          const Vec score = load_vec(s.scores + from);
          const Vec dropout = s.dropout == nullptr ? Vec{} : load_vec(s.dropout + from);
          Vec dprob = load_vec(s.dprobs + from);
          if (s.dropout != nullptr) dprob = dprob * dropout;
          const Vec x = plain ? exponent<true>(score, factors, base) : exponent<false>(score, factors, base);
          weight = exp2(x);
          dscore[i] = weight * (dprob - delta);
          dscore[i] = score == -kInfinity ? Vec{} : dscore[i];  // hidden: zero, also in a row of NaN
          if (s.slope != nullptr) dscore[i] = dscore[i] * load_vec(s.slope + from);
          if (s.dropout != nullptr) weight = weight * dropout;
        } else if (c + i >= rows) {
          break;
        }
        store_row(s.weights + to, weight);
        store_row(s.dscores + to, dscore[i]);
      }
      if (kPairs) store_vec(s.dscores_strip + c / 2 * kQueries + lane, pair_of(dscore[0], dscore[1]));
    }
}

// The scores and dP of a strip and keys [j0, j0 + n), and from them its columns in the group's tiles and its part of
// dq.
template <class T>
static void backward_strip(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n, int64_t rows,
                           Cover cover, const KeyIds& documents, const KeyIds& images,
                           typename Products<T>::RowOperand keys, typename Products<T>::RowOperand values,
                           typename Products<T>::ColumnOperand keys_transposed, const GradientScratch<T>& s,
                           const GradientStrip& strip) {
  using P = Products<T>;
  const int64_t width = block.width;
  if (is_plain(a))
    product<Into::kSet>(n, width, P::depth(s.D), keys, strip.queries, kQueries, s.scores, kQueries);
  else
    product<Into::kSetScaled>(n, width, P::depth(s.D), keys, strip.queries, kQueries, s.scores, kQueries, s.scale);
  product<Into::kSet>(n, width, P::depth(s.Dv), values, strip.douts, kQueries, s.dprobs, kQueries);
  finish_scores(block, j0, n, cover, documents, images, s.bias, s.scores, s.slope);
  if (a.dropout_p > 0) dropout_tile(block, j0, n, s.dropout);
  differentiate<T>(block, n, rows, s, strip);
  const float* dscores = s.dscores_strip;
  int64_t stride = kQueries;
  if constexpr (!P::kPairs) dscores = s.dscores + strip.offset, stride = s.columns();
  product<Into::kAdd>(s.D, width, P::depth(n), keys_transposed, dscores, stride, strip.dq, kQueries);
}

// All strips [begin, end) of a key head; dk and dv are fp32 sums (T, padded_D) and (T, padded_Dv).
template <class T>
static void backward_unit(const AttentionArgs& a, const QueryWork& work, const Sequence& sequence, int64_t kv_head,
                          int64_t begin, int64_t end, GradientScratch<T>& s, float* deltas, float* dk, float* dv) {
  using P = Products<T>;
  std::memset(dk, 0, sequence.T * s.padded_D * sizeof(float));
  std::memset(dv, 0, sequence.T * s.padded_Dv * sizeof(float));
  for (int64_t lane = 0; lane < kQueries; ++lane) s.scale[lane] = a.scale;
  for (int64_t first = begin; first < end; first += s.group) {
    const int64_t count = min_of(s.group, end - first);
    QueryBlock blocks[kStrips];
    int64_t offset = 0, key_begin = INT64_MAX, key_end = 0;
    for (int64_t i = 0; i < count; ++i) {
      work.get_strip(sequence, kv_head, first + i, blocks[i]);
      s.strips[i].offset = offset, offset += blocks[i].width;
      load_strip<T>(a, blocks[i], s, s.strips[i], deltas);
      key_begin = min_of(key_begin, blocks[i].key_begin()), key_end = max_of(key_end, blocks[i].key_end());
    }
    for (int64_t j0 = key_begin; j0 < key_end; j0 += kKeys) {
      const int64_t rows = min_of(kKeys, key_end - j0);
      const KeyIds documents(a.key_documents, sequence, j0, rows), images(a.key_images, sequence, j0, rows);
      int64_t n[kStrips], low = count, high = -1;  // the first and last strip that see any of the keys
      Cover cover[kStrips];
      for (int64_t i = 0; i < count; ++i) {
        n[i] = min_of(rows, blocks[i].key_end() - j0);
        cover[i] = n[i] <= 0 ? Cover::kNone : cover_of(blocks[i], j0, n[i], documents, images);
        if (cover[i] != Cover::kNone) low = min_of(low, i), high = i;
      }
      if (high < 0) continue;
      const Rows<const T> k = key_rows<const T>(a.k, sequence, kv_head, j0);
      const auto keys = P::rows_of(k, rows, s.D, s.keys, s.padded_D);
      const auto values = P::rows_of(key_rows<const T>(a.v, sequence, kv_head, j0), rows, s.Dv, s.values, s.padded_Dv);
      typename P::ColumnOperand keys_transposed;
      if constexpr (P::kPairs)
        keys_transposed = P::columns_of(k, rows, s.D, s.keys_transposed, s.padded_D);
      else
        keys_transposed = {keys.data, keys.stride};
      for (int64_t i = low; i <= high; ++i) {
        const GradientStrip& strip = s.strips[i];
        if (cover[i] == Cover::kNone)
          differentiate<T>(blocks[i], 0, rows, s, strip);  // zeros
        else
          backward_strip<T>(a, blocks[i], j0, n[i], rows, cover[i], documents, images, keys, values, keys_transposed, s,
                            strip);
      }
      const int64_t column = s.strips[low].offset;
      const int64_t depth = P::depth(s.strips[high].offset + blocks[high].width - column), row = P::depth(column);
      product<Into::kAdd>(rows, s.padded_Dv, depth, typename P::RowOperand{s.weights + column, s.columns()},
                          s.douts + row * s.padded_Dv, s.padded_Dv, dv + j0 * s.padded_Dv, s.padded_Dv);
      product<Into::kAdd>(rows, s.padded_D, depth, typename P::RowOperand{s.dscores + column, s.columns()},
                          s.queries + row * s.padded_D, s.padded_D, dk + j0 * s.padded_D, s.padded_D);
    }
    for (int64_t i = 0; i < count; ++i) {
      transpose(s.strips[i].dq, kQueries, s.D, blocks[i].count, s.rows, s.padded_D);
      for (int64_t lane = 0; lane < blocks[i].count; ++lane)
        unpack<T>(s.rows + lane * s.padded_D, s.padded_D, 1, s.D, a.scale, query_row<T>(a.dq, blocks[i], lane));
    }
  }
}

template <class T>
static void backward_qkv(const AttentionArgs& a, int threads, float* deltas) {
  const int64_t B = sequence_count(a), Hkv = a.k.size[1];
  if (B == 0) return;
  const QueryWork work(a, 1);
  const int64_t shares = ceil_div(kUnits, min_of(kUnits, B * Hkv)), units = B * Hkv * shares;
  const int team = static_cast<int>(min_of(threads, units));
  const GradientScratch<T> sizes(a, nullptr);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) longest = max_of(longest, sequence_at(a, b).T);
  // With one unit a key head its sums are written at once, and the next unit of that thread takes their place.
  const int64_t sums_size = longest * (sizes.padded_D + sizes.padded_Dv);
  const Buffer<float> sums((shares == 1 ? team : units) * sums_size);
  const Buffer<float> scratch(team * sizes.size);
  const auto write = [&](const Sequence& sequence, int64_t kv_head, int64_t j0, int64_t n, const float* dk,
                         const float* dv) {
    unpack<T>(dk + j0 * sizes.padded_D, sizes.padded_D, n, sizes.D, a.scale, key_rows<T>(a.dk, sequence, kv_head, j0));
    unpack<T>(dv + j0 * sizes.padded_Dv, sizes.padded_Dv, n, sizes.Dv, 1.0f, key_rows<T>(a.dv, sequence, kv_head, j0));
  };
#pragma omp parallel num_threads(team)
  {
    GradientScratch<T> s(a, scratch.get() + omp_get_thread_num() * sizes.size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t head = unit / shares, share = unit % shares;
      const Sequence sequence = sequence_at(a, head / Hkv);
      const int64_t strips = work.strips(sequence);
      float* dk = sums.get() + (shares == 1 ? omp_get_thread_num() : unit) * sums_size;
      float* dv = dk + sequence.T * s.padded_D;
      backward_unit<T>(a, work, sequence, head % Hkv, strips * share / shares, strips * (share + 1) / shares, s, deltas,
                       dk, dv);
      if (shares == 1) write(sequence, head % Hkv, 0, sequence.T, dk, dv);
    }
    const int64_t key_blocks = ceil_div(longest, kKeys);
    if (shares > 1) {
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t head = 0; head < B * Hkv; ++head) {
        for (int64_t key_block = 0; key_block < key_blocks; ++key_block) {
          const Sequence sequence = sequence_at(a, head / Hkv);
          const int64_t j0 = key_block * kKeys, n = min_of(kKeys, sequence.T - j0);
          if (n <= 0) continue;
          float* dk = sums.get() + head * shares * sums_size;
          float* dv = dk + sequence.T * s.padded_D;
          for (int64_t share = 1; share < shares; ++share) {
            const int64_t next = share * sums_size;
            for (int64_t i = j0 * s.padded_D; i < (j0 + n) * s.padded_D; ++i) dk[i] += dk[next + i];
            for (int64_t i = j0 * s.padded_Dv; i < (j0 + n) * s.padded_Dv; ++i) dv[i] += dv[next + i];
          }
          write(sequence, head % Hkv, j0, n, dk, dv);
        }
      }
    }
  }
}

// deltas (batch, H, Nq) as load_queries left them.
static void backward_sinks(const AttentionArgs& a, int threads, const float* deltas) {
  const int64_t H = a.q.size[1], N = a.q.size[2];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < H; ++head) {
    const float sink = static_cast<const float*>(a.sinks.data)[head * a.sinks.stride[0]];
    double sum = 0.0;
    for (int64_t batch = 0; batch < a.q.size[0]; ++batch)
      for (int64_t i = 0; i < N; ++i) {
        const float lse = static_cast<const float*>(
            a.lse.data)[batch * a.lse.stride[0] + head * a.lse.stride[1] + i * a.lse.stride[2]];
        if (lse != -kInfinity) sum -= expf(sink - lse) * deltas[(batch * H + head) * N + i];
      }
    static_cast<float*>(a.dsinks.data)[head * a.dsinks.stride[0]] = static_cast<float>(sum);
  }
}

template <class T>
static void attention_backward_as(const AttentionArgs& a, int threads) {
  const int64_t rows = a.dsinks.defined ? a.q.size[0] * a.q.size[1] * a.q.size[2] : 0;
  const Buffer<float> deltas(rows);
  for (int64_t i = 0; i < rows; ++i) deltas[i] = 0.0f;
  backward_qkv<T>(a, threads, a.dsinks.defined ? deltas.get() : nullptr);
  if (a.dbias.defined) backward_bias<T>(a, threads);
  if (a.dsinks.defined) backward_sinks(a, threads, deltas.get());
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
