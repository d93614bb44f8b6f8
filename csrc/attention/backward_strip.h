// Attention backward, one strip of queries at a time: what belongs to a strip and to its tiles, and the three products
// of a strip and a block of keys. Notation as in backward.h.
#pragma once

#include "attention/backward_bias.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// The rows of all lanes, where they are evenly spaced: those of one head; none else.
template <class T>
static Memory memory_of_queries(const View& view, const QueryBlock& block) {
  if (!block.are_even(0, block.count)) return {};
  Rows<T> rows = query_row<T>(view, block, 0);
  rows.row_stride = view.stride[2];
  return memory_of(rows, block.count, view.size[3]);
}

// What the next group and block of keys need is asked for between the steps of a strip's products.
using PrefetchWork = PrefetchList<1, 1>;

// What belongs to a strip while its key blocks pass.
struct GradientStrip {
  float *queries, *douts, *dq;  // [D][query] or pairs [D / 2][query]; dq always [D][query]
  float *base, *delta;          // of the weights' exponents, and delta as above
  int64_t offset;               // of its first column in the group's tiles
  bool has_dq;
  // Per vector of queries: the first and the last key that one of them may see, and the least and the greatest
  // document.
  int32_t first[kQueryVectors], last[kQueryVectors], min_document[kQueryVectors], max_document[kQueryVectors];
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
    const int64_t tile = kMaxKeys * kQueries;
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
    keys = arena.take(kMaxKeys * padded_D);
    values = arena.take(kMaxKeys * padded_Dv);
    keys_transposed = arena.take(Products<T>::kPairs ? kMaxKeys * padded_D : 0);
    slope = a.softcap > 0 ? arena.take(tile) : nullptr;
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = a.dropout_p > 0 ? arena.take(tile) : nullptr;
    scale = arena.take(kQueries);  // the softmax scale in every lane
    rows = arena.take(kQueries * max_of(padded_D, padded_Dv));
    size = arena.used();
    for (int64_t lane = 0; base != nullptr && lane < kQueries; ++lane) scale[lane] = a.scale;
  }
  int64_t columns() const { return kStrips * kQueries; }  // of the group's tiles
};

// Where the rows' delta is kept for dsinks: that of q's row (batch, head, row) is delta[(batch H + head) Nq + row].
static inline int64_t delta_index(const AttentionArgs& a, const QueryBlock& block, int64_t lane) {
  return (block.sequence.batch * a.q.size[1] + block.head[lane]) * a.q.size[2] + block.sequence.query0 +
         block.index[lane];
}

static void load_bounds(const QueryBlock& block, GradientStrip& strip) {
  for (int64_t v = 0; v < block.width / kLanes; ++v) {
    int32_t first = INT32_MAX, last = -1, low = INT32_MAX, high = INT32_MIN;
#pragma omp simd reduction(min : first, low) reduction(max : last, high)
    for (int64_t lane = v * kLanes; lane < (v + 1) * kLanes; ++lane) {
      first = block.first[lane] < first ? block.first[lane] : first;
      last = block.last[lane] > last ? block.last[lane] : last;
      low = block.document[lane] < low ? block.document[lane] : low;
      high = block.document[lane] > high ? block.document[lane] : high;
    }
    strip.first[v] = first, strip.last[v] = last, strip.min_document[v] = low, strip.max_document[v] = high;
  }
}

// Fills what belongs to the queries of a strip: q and dout both ways round, lse and delta. `deltas` may be null.
template <class T>
static void load_strip(const AttentionArgs& a, const QueryBlock& block, const GradientScratch<T>& s,
                       GradientStrip& strip, float* deltas) {
  const int64_t row = Products<T>::depth(strip.offset);
  Products<T>::load_queries(a.q, block, s.rows, s.padded_D, strip.queries, s.queries + row * s.padded_D);
  Products<T>::load_queries(a.dout, block, s.rows, s.padded_Dv, strip.douts, s.douts + row * s.padded_Dv);
  load_statistics<T>(a, block, is_plain(a) ? kLog2E : 1.0f, strip.base, strip.delta);
  for (int64_t lane = 0; deltas != nullptr && lane < block.count; ++lane)
    deltas[delta_index(a, block, lane)] = strip.delta[lane];
  load_bounds(block, strip);
  strip.has_dq = false;
}

// The keys [0, n) of a tile that each vector of a strip may see; both ends 0 where there are none.
static void tile_ranges(const QueryBlock& block, const GradientStrip& strip, Cover cover, int64_t j0, int64_t n,
                        const KeyIds& documents, KeyRange* ranges) {
  for (int64_t v = 0; v < block.width / kLanes; ++v) {
    ranges[v] = {0, cover == Cover::kNone ? 0 : n};
    if (cover == Cover::kPart)
      ranges[v] = seen_keys(n, strip.first[v] - j0, strip.last[v] - j0, documents, strip.min_document[v],
                            strip.max_document[v]);
  }
}

// Calls run(lane, width, range) for neighbouring vectors of a strip that see the same keys.
template <class Run>
ALWAYS_INLINE static void for_each_run(const KeyRange* ranges, int64_t strip_width, const Run& run) {
  for (int64_t lane = 0, next; lane < strip_width; lane = next) {
    const KeyRange range = ranges[lane / kLanes];
    next = lane + kLanes;
    while (next < strip_width && ranges[next / kLanes] == range) next += kLanes;
    if (range.begin < range.end) run(lane, next - lane, range);
  }
}

// From scores and dP of a strip to M P and dS in its columns of the group's tiles, with zeros in the rows up to `rows`
// that a vector of queries does not see. kMasked: the mask has not been applied yet.
template <class T, bool kMasked>
static void differentiate(const QueryBlock& block, int64_t j0, const KeyRange* ranges, int64_t rows,
                          const KeyIds& documents, const KeyIds& images, const GradientScratch<T>& s,
                          const GradientStrip& strip) {
  constexpr bool kPairs = Products<T>::kPairs;
  const bool plain = is_plain(*block.args);
  const Vec factors = broadcast(exponent_factor(*block.args)), hidden = broadcast(-kInfinity);
  const int64_t columns = s.columns();
  for (int64_t lane = 0; lane < block.width; lane += kLanes) {
    const KeyRange range = ranges[lane / kLanes];
    const Vec base = load_vec(strip.base + lane), delta = load_vec(strip.delta + lane);
    typename Products<T>::Element *weights = s.weights + strip.offset + lane,
                                  *dscores = s.dscores + strip.offset + lane;
    const auto clear = [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        store_operand(weights + c * columns, Vec{});
        store_operand(dscores + c * columns, Vec{});
      }
    };
    clear(0, range.begin);
    for (int64_t c = range.begin; c < range.end; c += 2) {
      Vec dscore[2] = {};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        if (c + i >= range.end) break;
        const int64_t from = (c + i) * kQueries + lane;
        Vec score = load_vec(s.scores + from);
        if (kMasked) score = visible(block, lane, j0, c + i, documents, images) ? score : hidden;
        const Vec dropout = s.dropout == nullptr ? Vec{} : load_vec(s.dropout + from);
        Vec dprob = load_vec(s.dprobs + from);
        if (s.dropout != nullptr) dprob = dprob * dropout;
        const Vec x = plain ? exponent<true>(score, factors, base) : exponent<false>(score, factors, base);
        Vec weight = exp2(x);
        dscore[i] = weight * (dprob - delta);
        dscore[i] = score == -kInfinity ? Vec{} : dscore[i];  // hidden: zero, also in a row of NaN
        if (s.slope != nullptr) dscore[i] = dscore[i] * load_vec(s.slope + from);
        if (s.dropout != nullptr) weight = weight * dropout;
        store_operand(weights + (c + i) * columns, weight);
        store_operand(dscores + (c + i) * columns, dscore[i]);
      }
      if (kPairs) store_vec(s.dscores_strip + c / 2 * kQueries + lane, pair_of(dscore[0], dscore[1]));
    }
    clear(range.end, rows);
  }
}

// A block of keys as the products of its tiles take them.
template <class T>
struct KeyTile {
  int64_t j0, rows;
  KeyIds documents, images;
  typename Products<T>::RowOperand keys, values;
  typename Products<T>::ColumnOperand keys_transposed;
};

// The scores and dP of a strip and the first n of a block of keys, and from them its columns in the group's tiles and
// its part of dq.
template <class T>
static void backward_strip(const AttentionArgs& a, const QueryBlock& block, const KeyTile<T>& tile, int64_t n,
                           Cover cover, const KeyRange* ranges, const GradientScratch<T>& s, GradientStrip& strip,
                           PrefetchWork& work) {
  using P = Products<T>;
  const bool plain = is_plain(a);
  for_each_run(ranges, block.width, [&](int64_t lane, int64_t width, KeyRange range) {
    const int64_t count = range.end - range.begin, at = range.begin * kQueries + lane;
    const auto keys = tile.keys.rows_from(range.begin), values = tile.values.rows_from(range.begin);
    if (plain)
      product<Into::kSet>(count, width, P::depth(s.D), keys, strip.queries + lane, kQueries, s.scores + at, kQueries,
                          nullptr, work);
    else
      product<Into::kSetScaled>(count, width, P::depth(s.D), keys, strip.queries + lane, kQueries, s.scores + at,
                                kQueries, s.scale, work);
    product<Into::kSet>(count, width, P::depth(s.Dv), values, strip.douts + lane, kQueries, s.dprobs + at, kQueries,
                        nullptr, work);
  });
  if (!plain) finish_scores(block, tile.j0, n, cover, tile.documents, tile.images, s.bias, s.scores, s.slope);
  if (a.dropout_p > 0) dropout_tile(block, tile.j0, n, s.dropout);
  if (plain && cover == Cover::kPart)
    differentiate<T, true>(block, tile.j0, ranges, tile.rows, tile.documents, tile.images, s, strip);
  else
    differentiate<T, false>(block, tile.j0, ranges, tile.rows, tile.documents, tile.images, s, strip);
  const float* dscores = s.dscores_strip;
  int64_t stride = kQueries;
  if constexpr (!P::kPairs) dscores = s.dscores + strip.offset, stride = s.columns();
  bool is_whole = ranges[0].begin < ranges[0].end;
  for (int64_t v = 1; v < block.width / kLanes; ++v) is_whole &= ranges[v] == ranges[0];
  if (!strip.has_dq && !is_whole) std::memset(strip.dq, 0, s.padded_D * kQueries * sizeof(float));
  for_each_run(ranges, block.width, [&](int64_t lane, int64_t width, KeyRange range) {
    const int64_t from = P::depth(range.begin), depth = P::depth(range.end - range.begin);
    const auto keys = tile.keys_transposed.depth_from(from);
    if (is_whole && !strip.has_dq)
      product<Into::kSet>(s.D, width, depth, keys, dscores + from * stride + lane, stride, strip.dq + lane, kQueries);
    else
      product<Into::kAdd>(s.D, width, depth, keys, dscores + from * stride + lane, stride, strip.dq + lane, kQueries);
  });
  strip.has_dq = true;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
