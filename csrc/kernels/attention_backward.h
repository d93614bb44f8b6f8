// Attention backward: FlashAttention-2 (Dao 2023, algorithm 2), scores recomputed from lse, queries in the lanes.
//
// With P = exp(scores - lse), M the dropout factors (1 without dropout) and delta = rowsum(dout * out) - dlse:
//     dV = (M P)^T dout,   dP = dout V^T,   dS = P (M dP - delta),   dbias = dS,
//     dsink = -sum of exp(sink - lse) delta over the rows of a head,
//     dQ = scale (dS cap') K,   dK = scale (dS cap')^T Q,   cap' = 1 - tanh^2 with a softcap, else 1
// A unit of work is a key head of a sequence with all or a share of its blocks of queries. It walks query blocks, and
// for each the key blocks, and does five products a pair of blocks: scores, dP, dV, dK, dQ. dQ belongs to the query
// block; dK and dV are summed in fp32 over the unit, T x (D + Dv) floats of scratch. Where a call has fewer than kUnits
// key heads, each is shared by several units, whose sums are added in a fixed order; so the result does not depend on
// the number of threads, and at most max(kUnits, B Hkv) threads find work.
//
// dbias is a pass of its own, made only when asked for: every element of it belongs to one unit, which recomputes the
// two products of each pair of blocks that reaches it. Two products more, but no S x T scratch for a bias that
// broadcasts.
#pragma once

#include "kernels/attention_forward.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kUnits = 16;

struct BackwardScratch {
  int64_t D, Dv, padded_D, padded_Dv;  // padded to whole vectors
  float *queries, *queries_t, *douts, *douts_t, *keys, *values, *scores, *dscores, *slope, *bias, *dropout, *dq;
  float *lse, *delta, *sum;
  int64_t size;

  BackwardScratch(const AttentionArgs& a, float* base) {
    const int64_t tile = kKeys * kQueries;
    D = a.q.size[3], Dv = a.v.size[3];
    padded_D = round_up(D, kLanes), padded_Dv = round_up(Dv, kLanes);
    Arena arena(base);
    queries = arena.take(kQueries * padded_D);  // [query][D], scaled
    queries_t = arena.take(D * kQueries);       // [D][query]
    douts = arena.take(kQueries * padded_Dv);
    douts_t = arena.take(Dv * kQueries);
    keys = arena.take(kKeys * padded_D);
    values = arena.take(kKeys * padded_Dv);
    scores = arena.take(tile);   // then weights M P
    dscores = arena.take(tile);  // first dP
    slope = arena.take(a.softcap > 0 ? tile : 0);
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = arena.take(a.dropout_p > 0 ? tile : 0);
    dq = arena.take(D * kQueries);  // [D][query]
    lse = arena.take(kQueries);
    delta = arena.take(kQueries);
    sum = arena.take(a.dbias.defined ? tile : 0);
    size = arena.used();
  }
};

// Where the rows' delta is kept for dsinks: that of q's row (batch, head, row) is delta[(batch H + head) Nq + row].
static inline int64_t delta_index(const AttentionArgs& a, const QueryBlock& block, int64_t lane) {
  return (block.sequence.batch * a.q.size[1] + block.head[lane]) * a.q.size[2] + block.sequence.query0 +
         block.index[lane];
}

// Fills what belongs to the queries of a block: q and dout both ways round, lse and delta. `deltas` may be null.
template <class T>
static void load_queries(const AttentionArgs& a, const QueryBlock& block, const BackwardScratch& s, float* deltas) {
  pack_queries<T>(a.q, block, a.scale, s.queries, s.padded_D);
  transpose(s.queries, s.padded_D, block.width, s.D, s.queries_t, kQueries);
  pack_queries<T>(a.dout, block, 1.0f, s.douts, s.padded_Dv);
  transpose(s.douts, s.padded_Dv, block.width, s.Dv, s.douts_t, kQueries);
  pack_queries<T>(a.out, block, 1.0f, s.values, s.padded_Dv);
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const float lse =
        lane < block.count ? static_cast<const float*>(a.lse.data)[row_offset(a.lse, block, lane)] : -kInfinity;
    // exp(score - inf) = 0: a row that saw nothing, and a lane not in use, give zeros whatever comes upstream.
    s.lse[lane] = lse == -kInfinity ? kInfinity : lse;
    s.delta[lane] = 0.0f;
    if (lse == -kInfinity) continue;
    Vec sums = {};
    for (int64_t d = 0; d < s.padded_Dv; d += kLanes)
      sums = mul_add(load_vec(s.douts + lane * s.padded_Dv + d), load_vec(s.values + lane * s.padded_Dv + d), sums);
    s.delta[lane] = sum_of(sums);
    if (a.dlse.defined) s.delta[lane] -= static_cast<const float*>(a.dlse.data)[row_offset(a.dlse, block, lane)];
  }
  for (int64_t lane = 0; deltas != nullptr && lane < block.count; ++lane)
    deltas[delta_index(a, block, lane)] = s.delta[lane];
}

// Loads keys [j0, j0 + n) and leaves M P in s.scores and dS in s.dscores. False, and nothing done, where no row sees
// them.
template <class T>
static bool backward_tile(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n,
                          const BackwardScratch& s) {
  const KeyIds documents(a.key_documents, block.sequence, j0, n), images(a.key_images, block.sequence, j0, n);
  const Cover cover = cover_of(block, j0, n, documents, images);
  if (cover == Cover::kNone) return false;
  pack<T>(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, s.D, 1.0f, s.keys, s.D);
  pack<T>(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, s.Dv, 1.0f, s.values, s.Dv);
  product<Into::kSet>(n, block.width, s.D, {s.keys, s.D, 1}, s.queries_t, kQueries, s.scores, kQueries);
  product<Into::kSet>(n, block.width, s.Dv, {s.values, s.Dv, 1}, s.douts_t, kQueries, s.dscores, kQueries);
  finish_scores(block, j0, n, cover, documents, images, s.bias, s.scores, s.slope);
  const bool has_dropout = a.dropout_p > 0;
  if (has_dropout) {
    dropout_tile(block, j0, n, s.dropout);
    multiply_tile(block, n, s.dropout, s.dscores);
  }
  for (int64_t c = 0; c < n; ++c)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      const int64_t at = c * kQueries + lane;
      const Vec score = load_vec(s.scores + at);
      const Vec weight = exp(score - load_vec(s.lse + lane));
      const Vec dscore = weight * (load_vec(s.dscores + at) - load_vec(s.delta + lane));
      store_vec(s.dscores + at, score == -kInfinity ? Vec{} : dscore);  // hidden: zero, also in a row of NaN
      store_vec(s.scores + at, has_dropout ? weight * load_vec(s.dropout + at) : weight);
    }
  return true;
}

// All query blocks [begin, end) of a key head; dk and dv are fp32 sums (T, padded_D) and (T, padded_Dv).
template <class T>
static void backward_unit(const AttentionArgs& a, const QueryWork& work, const Sequence& sequence, int64_t kv_head,
                          int64_t begin, int64_t end, const BackwardScratch& s, float* deltas, float* dk, float* dv) {
  for (int64_t i = 0; i < sequence.T * s.padded_D; ++i) dk[i] = 0.0f;
  for (int64_t i = 0; i < sequence.T * s.padded_Dv; ++i) dv[i] = 0.0f;
  for (int64_t row = begin * kQueries; row < min_of(end * kQueries, work.rows(sequence)); row += kQueries) {
    QueryBlock block;
    make_query_block(a, sequence, kv_head, row, min_of(kQueries, work.rows(sequence) - row), block);
    load_queries<T>(a, block, s, deltas);
    for (int64_t i = 0; i < s.D * kQueries; ++i) s.dq[i] = 0.0f;
    for (int64_t j0 = block.key_begin(); j0 < block.key_end(); j0 += kKeys) {
      const int64_t n = min_of(kKeys, block.key_end() - j0);
      if (!backward_tile<T>(a, block, j0, n, s)) continue;
      product<Into::kAdd>(n, s.padded_Dv, block.count, {s.scores, kQueries, 1}, s.douts, s.padded_Dv,
                          dv + j0 * s.padded_Dv, s.padded_Dv);
      if (a.softcap > 0) multiply_tile(block, n, s.slope, s.dscores);
      product<Into::kAdd>(n, s.padded_D, block.count, {s.dscores, kQueries, 1}, s.queries, s.padded_D,
                          dk + j0 * s.padded_D, s.padded_D);
      product<Into::kAdd>(s.D, block.width, n, {s.keys, 1, s.D}, s.dscores, kQueries, s.dq, kQueries);
    }
    transpose(s.dq, kQueries, s.D, block.count, s.keys, s.D);
    for (int64_t lane = 0; lane < block.count; ++lane)
      unpack<T>(s.keys + lane * s.D, s.D, 1, s.D, a.scale, query_row<T>(a.dq, block, lane));
  }
}

template <class T>
static void backward_qkv(const AttentionArgs& a, const QueryWork& work, int threads, float* deltas) {
  const int64_t B = sequence_count(a), Hkv = a.k.size[1];
  if (B == 0) return;
  const int64_t shares = ceil_div(kUnits, min_of(kUnits, B * Hkv)), units = B * Hkv * shares;
  const int team = static_cast<int>(min_of(threads, units));
  const BackwardScratch sizes(a, nullptr);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) longest = max_of(longest, sequence_at(a, b).T);
  // With one unit a key head its sums are written at once, and the next unit of that thread takes their place.
  const int64_t sums_size = longest * (sizes.padded_D + sizes.padded_Dv);
  const Buffer<float> sums((shares == 1 ? team : units) * sums_size);
  const Buffer<float> scratch(team * sizes.size);
  const auto write = [&](const Sequence& sequence, int64_t kv_head, int64_t j0, int64_t n, const float* dk,
                         const float* dv) {
    unpack<T>(dk + j0 * sizes.padded_D, sizes.padded_D, n, sizes.D, 1.0f, key_rows<T>(a.dk, sequence, kv_head, j0));
    unpack<T>(dv + j0 * sizes.padded_Dv, sizes.padded_Dv, n, sizes.Dv, 1.0f, key_rows<T>(a.dv, sequence, kv_head, j0));
  };
#pragma omp parallel num_threads(team)
  {
    const BackwardScratch s(a, scratch.get() + omp_get_thread_num() * sizes.size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      const int64_t head = unit / shares, share = unit % shares;
      const Sequence sequence = sequence_at(a, head / Hkv);
      const int64_t blocks = work.blocks(sequence);
      float* dk = sums.get() + (shares == 1 ? omp_get_thread_num() : unit) * sums_size;
      float* dv = dk + sequence.T * s.padded_D;
      backward_unit<T>(a, work, sequence, head % Hkv, blocks * share / shares, blocks * (share + 1) / shares, s, deltas,
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

// One dimension of dbias: its own index space, and the part of the full one that an index of it owns.
struct BiasDimension {
  int64_t full, step;  // step: how many of `full` one unit owns
  int64_t units() const { return full == 0 ? 0 : ceil_div(full, step); }
  int64_t begin(int64_t unit) const { return unit * step; }
  int64_t end(int64_t unit) const { return min_of(full, (unit + 1) * step); }
};

// A unit owns a (batch, head, query block, key block) of dbias, where a dimension that dbias lacks is owned whole.
template <class T>
static void backward_bias(const AttentionArgs& a, int threads) {
  const View& dbias = a.dbias;
  const int64_t steps[4] = {1, 1, kQueries, kKeys};
  BiasDimension dimension[4];
  int64_t units = 1;
  for (int i = 0; i < 4; ++i) {
    const int64_t full = a.bias.size[i];
    dimension[i] = {full, dbias.size[i] == full ? steps[i] : max_of(full, 1)};
    units *= dimension[i].units();
  }
  if (units == 0) return;
  const bool sums_queries = dbias.size[2] != a.bias.size[2], sums_keys = dbias.size[3] != a.bias.size[3];
  const int team = static_cast<int>(min_of(threads, units));
  const int64_t scratch_size = BackwardScratch(a, nullptr).size, group = a.q.size[1] / a.k.size[1];
  const Buffer<float> scratch(team * scratch_size);
#pragma omp parallel num_threads(team)
  {
    const BackwardScratch s(a, scratch.get() + omp_get_thread_num() * scratch_size);
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) {
      int64_t rest = unit, own[4];
      for (int i = 3; i >= 0; --i) own[i] = rest % dimension[i].units(), rest /= dimension[i].units();
      int64_t begin[4], end[4];
      for (int i = 0; i < 4; ++i) begin[i] = dimension[i].begin(own[i]), end[i] = dimension[i].end(own[i]);
      for (int i = 0; i < kKeys * kQueries; ++i) s.sum[i] = 0.0f;
      QueryBlock block;
      for (int64_t b = begin[0]; b < end[0]; ++b)
        for (int64_t head = begin[1]; head < end[1]; ++head)
          for (int64_t i0 = begin[2]; i0 < end[2]; i0 += kQueries) {
            const Sequence sequence = sequence_at(a, b);
            make_query_block(a, sequence, head / group, head % group * sequence.S + i0, min_of(kQueries, end[2] - i0),
                             block);
            load_queries<T>(a, block, s, nullptr);
            for (int64_t j0 = begin[3]; j0 < end[3]; j0 += kKeys) {
              const int64_t n = min_of(kKeys, end[3] - j0);
              if (!backward_tile<T>(a, block, j0, n, s)) continue;
              for (int64_t c = 0; c < n; ++c)
                for (int64_t lane = 0; lane < block.count; ++lane)
                  s.sum[c * kQueries + lane] += s.dscores[c * kQueries + lane];
            }
          }
      const int64_t rows = min_of(kQueries, end[2] - begin[2]), keys = min_of(kKeys, end[3] - begin[3]);
      for (int64_t c = 0; sums_queries && c < keys; ++c)
        for (int64_t lane = 1; lane < rows; ++lane) s.sum[c * kQueries] += s.sum[c * kQueries + lane];
      for (int64_t c = 1; sums_keys && c < keys; ++c)
        for (int64_t lane = 0; lane < rows; ++lane) s.sum[lane] += s.sum[c * kQueries + lane];
      for (int64_t c = 0; c < (sums_keys ? 1 : keys); ++c)
        for (int64_t lane = 0; lane < (sums_queries ? 1 : rows); ++lane)
          static_cast<float*>(dbias.data)[own[0] * dbias.stride[0] + own[1] * dbias.stride[1] +
                                          (begin[2] + lane) * dbias.stride[2] + (begin[3] + c) * dbias.stride[3]] =
              s.sum[c * kQueries + lane];
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
  const QueryWork work(a);
  const int64_t rows = a.dsinks.defined ? a.q.size[0] * a.q.size[1] * a.q.size[2] : 0;
  const Buffer<float> deltas(rows);
  for (int64_t i = 0; i < rows; ++i) deltas[i] = 0.0f;
  backward_qkv<T>(a, work, threads, a.dsinks.defined ? deltas.get() : nullptr);
  if (a.dbias.defined) backward_bias<T>(a, threads);
  if (a.dsinks.defined) backward_sinks(a, threads, deltas.get());
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
