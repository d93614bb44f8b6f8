// The gradient of attention's bias, a pass of its own, made only when asked for: every element of it belongs to one
// task, which recomputes the two products of each pair of blocks that reaches it. Two products more, in fp32,
// but no S x T scratch for a bias that broadcasts. Notation as in backward.h.
#pragma once

#include "attention/forward.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// The sum of a[i] b[i] in fp32.
template <class T>
static float dot(Rows<const T> a, Rows<const T> b, int64_t count) {
  Vec sums = {};
  int64_t i = 0;
  if (a.col_stride == 1 && b.col_stride == 1)
    for (; i + kLanes <= count; i += kLanes) sums = mul_add(load_wide(a.data + i), load_wide(b.data + i), sums);
  float sum = sum_of(sums);
  for (; i < count; ++i) sum += to_float(a.data[i * a.col_stride]) * to_float(b.data[i * b.col_stride]);
  return sum;
}

// The base of the weights' exponents and delta of a strip's queries.
template <class T>
static void load_statistics(const AttentionArgs& a, const QueryBlock& block, float factor, float* base, float* delta) {
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const float lse =
        lane < block.count ? static_cast<const float*>(a.lse.data)[row_offset(a.lse, block, lane)] : -kInfinity;
    // 2^(score - inf) = 0: a row that saw nothing, and a lane not in use, give zeros whatever comes upstream.
    base[lane] = lse == -kInfinity ? kInfinity : lse * factor;
    delta[lane] = 0.0f;
    if (lse == -kInfinity) continue;
    delta[lane] = dot<T>(query_row<const T>(a.dout, block, lane), query_row<const T>(a.out, block, lane), a.v.size[3]);
    if (a.dlse.defined) delta[lane] -= static_cast<const float*>(a.dlse.data)[row_offset(a.dlse, block, lane)];
  }
}

struct BiasScratch {
  int64_t D, Dv, padded_D, padded_Dv;  // padded to whole vectors
  float *queries, *douts, *rows, *keys, *values, *scores, *dscores, *slope, *bias, *dropout, *base, *delta, *sum,
      *scale;
  int64_t size;

  BiasScratch(const AttentionArgs& a, float* scratch) {
    const int64_t tile = kKeys * kQueries;
    D = a.q.size[3], Dv = a.v.size[3];
    padded_D = round_up(D, kLanes), padded_Dv = round_up(Dv, kLanes);
    Arena arena(scratch);
    queries = arena.take(padded_D * kQueries);  // [D][query]
    douts = arena.take(padded_Dv * kQueries);
    rows = arena.take(kQueries * max_of(padded_D, padded_Dv));
    keys = arena.take(kKeys * padded_D);
    values = arena.take(kKeys * padded_Dv);
    scores = arena.take(tile);
    dscores = arena.take(tile);  // first dP
    slope = a.softcap > 0 ? arena.take(tile) : nullptr;
    bias = arena.take(tile);
    dropout = arena.take(a.dropout_p > 0 ? tile : 0);
    base = arena.take(kQueries);
    delta = arena.take(kQueries);
    sum = arena.take(tile);
    scale = arena.take(kQueries);
    size = arena.used();
  }
};

// Leaves dS of keys [j0, j0 + n) in s.dscores. False, and nothing done, where no row sees them.
template <class T>
static bool bias_tile(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n, const BiasScratch& s) {
  const KeyIds documents(a.key_documents, block.sequence, j0, n), images(a.key_images, block.sequence, j0, n);
  const Cover cover = cover_of(block, j0, n, documents, images);
  if (cover == Cover::kNone) return false;
  pack<T>(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, s.D, s.keys, s.padded_D);
  pack<T>(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, s.Dv, s.values, s.padded_Dv);
  using Keys = Broadcast<Along::kDepth>;
  product<Into::kSetScaled>(n, block.width, s.D, Keys{s.keys, s.padded_D}, s.queries, kQueries, s.scores, kQueries,
                            s.scale);
  product<Into::kSet>(n, block.width, s.Dv, Keys{s.values, s.padded_Dv}, s.douts, kQueries, s.dscores, kQueries);
  finish_scores(block, j0, n, cover, documents, images, s.bias, s.scores, s.slope);
  if (a.dropout_p > 0) {
    dropout_tile(block, j0, n, s.dropout);
    multiply_tile(block, n, s.dropout, s.dscores);
  }
  for (int64_t c = 0; c < n; ++c)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      const int64_t at = c * kQueries + lane;
      const Vec score = load_vec(s.scores + at);
      const Vec weight = exp2(exponent<false>(score, broadcast(kLog2E), load_vec(s.base + lane)));
      const Vec dscore = weight * (load_vec(s.dscores + at) - load_vec(s.delta + lane));
      store_vec(s.dscores + at, score == -kInfinity ? Vec{} : dscore);  // hidden: zero, also in a row of NaN
    }
  return true;
}

// One dimension of dbias: its own index space, and the part of the full one that an index of it owns.
struct BiasDimension {
  int64_t full, step;  // step: how many of `full` one task owns
  int64_t tasks() const { return full == 0 ? 0 : ceil_div(full, step); }
  int64_t begin(int64_t task) const { return task * step; }
  int64_t end(int64_t task) const { return min_of(full, (task + 1) * step); }
};

// A task owns a (batch, head, query block, key block) of dbias, where a dimension that dbias lacks is owned whole.
template <class T>
static void backward_bias(const AttentionArgs& a, int threads) {
  const View& dbias = a.dbias;
  const int64_t steps[4] = {1, 1, kQueries, kKeys};
  BiasDimension dimension[4];
  int64_t tasks = 1;
  for (int i = 0; i < 4; ++i) {
    const int64_t full = a.bias.size[i];
    dimension[i] = {full, dbias.size[i] == full ? steps[i] : max_of(full, 1)};
    tasks *= dimension[i].tasks();
  }
  if (tasks == 0) return;
  const bool sums_queries = dbias.size[2] != a.bias.size[2], sums_keys = dbias.size[3] != a.bias.size[3];
  const int team = static_cast<int>(min_of(threads, tasks));
  const int64_t scratch_size = BiasScratch(a, nullptr).size, group = a.q.size[1] / a.k.size[1];
  const Buffer<float> scratch(team * scratch_size);
#pragma omp parallel num_threads(team)
  {
    const BiasScratch s(a, scratch.get() + omp_get_thread_num() * scratch_size);
    for (int64_t lane = 0; lane < kQueries; ++lane) s.scale[lane] = a.scale;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      int64_t rest = task, own[4];
      for (int i = 3; i >= 0; --i) own[i] = rest % dimension[i].tasks(), rest /= dimension[i].tasks();
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
            load_widened<T>(a.q, block, s.rows, s.padded_D, s.queries, nullptr);
            load_widened<T>(a.dout, block, s.rows, s.padded_Dv, s.douts, nullptr);
            load_statistics<T>(a, block, 1.0f, s.base, s.delta);
            for (int64_t j0 = begin[3]; j0 < end[3]; j0 += kKeys) {
              const int64_t n = min_of(kKeys, end[3] - j0);
              if (!bias_tile<T>(a, block, j0, n, s)) continue;
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

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
