// Attention forward: FlashAttention-2 (Dao 2023, algorithm 1) with queries in the lanes.
//
// A block of 64 queries is transposed once; key blocks of 64 pass by. Per pair of blocks
//     scores[key][query]  = K Q^T                      64 x 64 x D multiply-adds
//     weights[key][query] = exp(scores - running maximum), all keys of a query in one lane
//     out[d][query]       = out alpha + V^T weights     64 x 64 x Dv multiply-adds
// so both products broadcast K and V from their natural layout and no reduction crosses lanes. Blocks of keys that no
// query of the block sees are skipped. Bytes: q and out once, k and v once per block of queries of their key head
// (which holds every query head that shares it). Work is divided by (sequence, key head, block of queries); nothing
// depends on who does which. Scratch is a few tiles a thread; no S x T buffer.
#pragma once

#include <omp.h>

#include <cmath>

#include "kernels/attention_scores.h"
#include "kernels/attention_tile.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Up to so many queries, as in a decoding step, the products run along D and Dv instead of across queries, where most
// lanes would be idle: about 2 count / kLanes of the work.
constexpr int64_t kFewQueries = kLanes / 4;

// Hands out consecutive pieces of one thread's scratch; with no base it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t count) {
    float* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 16);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

struct ForwardScratch {
  int64_t padded_D, padded_Dv;  // to whole vectors
  float *queries, *keys, *values, *scores, *out, *bias, *dropout, *maximum, *sum, *alpha, *scale;
  int64_t size;

  ForwardScratch(const AttentionArgs& a, float* base) {
    const int64_t tile = kKeys * kQueries;
    padded_D = round_up(a.q.size[3], kLanes), padded_Dv = round_up(a.v.size[3], kLanes);
    Arena arena(base);
    queries = arena.take(padded_D * kQueries);  // [D][query], scaled; [query][D] where they are few
    keys = arena.take(kKeys * padded_D);
    values = arena.take(kKeys * padded_Dv);
    scores = arena.take(tile);
    out = arena.take(padded_Dv * kQueries);  // [Dv][query]; [query][Dv] where they are few
    bias = arena.take(a.bias.defined ? tile : 0);
    dropout = arena.take(a.dropout_p > 0 ? tile : 0);
    maximum = arena.take(kQueries);
    sum = arena.take(kQueries);
    alpha = arena.take(kQueries);
    scale = arena.take(kQueries);  // the softmax scale in every lane
    size = arena.used();
  }
};

// The rows of a block's lanes are one to one those of q, out and what has their shape (B, H, S, ...).
static inline int64_t row_offset(const View& view, const QueryBlock& block, int64_t lane) {
  return block.sequence.batch * view.stride[0] + block.head[lane] * view.stride[1] +
         (block.sequence.query0 + block.index[lane]) * view.stride[2];
}

template <class T>
static Rows<T> query_row(const View& view, const QueryBlock& block, int64_t lane) {
  return {static_cast<T*>(view.data) + row_offset(view, block, lane), 0, view.stride[3]};
}

// Rows j0 and on of k or v, or of their gradients.
template <class T>
static Rows<T> key_rows(const View& view, const Sequence& sequence, int64_t kv_head, int64_t j0) {
  T* data = static_cast<T*>(view.data) + sequence.batch * view.stride[0] + kv_head * view.stride[1] +
            (sequence.key0 + j0) * view.stride[2];
  return {data, view.stride[2], view.stride[3]};
}

// to[lane * width + d] = factor * the row of `view` behind each lane; zeros behind lanes not in use.
template <class T>
static void pack_queries(const View& view, const QueryBlock& block, float factor, float* to, int64_t width) {
  const int64_t cols = view.size[3];
  for (int64_t lane = 0; lane < block.count; ++lane)
    pack<T>(query_row<const T>(view, block, lane), 1, cols, factor, to + lane * width, width);
  for (int64_t i = block.count * width; i < block.width * width; ++i) to[i] = 0.0f;
}

// The work of a call: (sequence, key head, block of queries), sequences one after the other.
struct QueryWork {
  const AttentionArgs& args;
  Buffer<int64_t> first;  // of each sequence, and the end

  explicit QueryWork(const AttentionArgs& a) : args(a), first(sequence_count(a) + 1) {
    const int64_t B = sequence_count(a);
    first[0] = 0;
    for (int64_t b = 0; b < B; ++b) first[b + 1] = first[b] + a.k.size[1] * blocks(sequence_at(a, b));
  }
  int64_t count() const { return first[sequence_count(args)]; }
  int64_t rows(const Sequence& s) const { return args.q.size[1] / args.k.size[1] * s.S; }
  int64_t blocks(const Sequence& s) const { return ceil_div(rows(s), kQueries); }

  void get(int64_t item, QueryBlock& block) const {
    int64_t low = 0, high = sequence_count(args);  // first[low] <= item < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= item ? low : high) = middle;
    }
    const Sequence sequence = sequence_at(args, low);
    const int64_t local = item - first[low], per_head = blocks(sequence);
    // Last blocks first: under a causal mask they are the longest.
    const int64_t row = (per_head - 1 - local % per_head) * kQueries;
    make_query_block(args, sequence, local / per_head, row, min_of(kQueries, rows(sequence) - row), block);
  }
};

// One step of the online softmax: scores become weights relative to the new running maximum.
static void softmax_step(const QueryBlock& block, int64_t n, const ForwardScratch& s) {
  for (int64_t lane = 0; lane < block.width; lane += kLanes) {
    const Vec before = load_vec(s.maximum + lane);
    Vec maximum = before;  // a NaN never wins, and makes its weight and with it the sum NaN below
    for (int64_t c = 0; c < n; ++c) {
      const Vec score = load_vec(s.scores + c * kQueries + lane);
      maximum = score > maximum ? score : maximum;
    }
    const Vec base = maximum == -kInfinity ? Vec{} : maximum;  // nothing seen so far: exp(-inf - 0) = 0
    Vec sum = {};
    for (int64_t c = 0; c < n; ++c) {
      float* at = s.scores + c * kQueries + lane;
      const Vec weight = exp(load_vec(at) - base);
      sum += weight;
      store_vec(at, weight);
    }
    const Vec alpha = exp(before - base);
    store_vec(s.maximum + lane, maximum);
    store_vec(s.alpha + lane, alpha);
    store_vec(s.sum + lane, mul_add(load_vec(s.sum + lane), alpha, sum));
  }
}

static void multiply_tile(const QueryBlock& block, int64_t n, const float* factors, float* tile) {
  for (int64_t c = 0; c < n; ++c)
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      float* at = tile + c * kQueries + lane;
      store_vec(at, load_vec(at) * load_vec(factors + c * kQueries + lane));
    }
}

// Divides the rows [query][padded_Dv] by their sums and writes them and lse.
template <class T>
static void write_forward(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s, float* rows) {
  const int64_t Dv = a.v.size[3];
  for (int64_t lane = 0; lane < block.count; ++lane) {
    const float sum = s.sum[lane];
    float* row = rows + lane * s.padded_Dv;
    // A row that saw nothing has a sum of 0 and zeros in its output.
    if (sum != 0.0f)
      for (int64_t d = 0; d < Dv; ++d) row[d] = row[d] / sum;
    unpack<T>(row, Dv, 1, Dv, 1.0f, query_row<T>(a.out, block, lane));
    static_cast<float*>(a.lse.data)[row_offset(a.lse, block, lane)] =
        sum == 0.0f ? -kInfinity : s.maximum[lane] + logf(sum);
  }
}

// How a block of many queries multiplies: the three places where the element type matters.
template <class T>
struct Products {
  static void load_queries(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s) {
    pack_queries<T>(a.q, block, a.scale, s.keys, s.padded_D);
    transpose(s.keys, s.padded_D, block.width, a.q.size[3], s.queries, kQueries);
  }
  static void score(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n, const ForwardScratch& s) {
    const int64_t D = a.q.size[3];
    pack<T>(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, D, 1.0f, s.keys, s.padded_D);
    product<Into::kSet>(n, block.width, D, {s.keys, s.padded_D, 1}, s.queries, kQueries, s.scores, kQueries);
  }
  static void add_values(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n,
                         const ForwardScratch& s) {
    const int64_t Dv = a.v.size[3];
    pack<T>(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, Dv, 1.0f, s.values, s.padded_Dv);
    product<Into::kScaleAndAdd>(Dv, block.width, n, {s.values, 1, s.padded_Dv}, s.scores, kQueries, s.out, kQueries,
                                s.alpha);
  }
};

#ifdef __AVX512BF16__
// bf16 stays bf16 here, and vdpbf16ps adds up products of pairs in fp32: pairs along D for the scores, pairs of keys
// for the output, whose weights are rounded to bf16 as every flash attention does (their sum is not).
template <>
struct Products<bfloat16> {
  static void load_queries(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s) {
    const int64_t D = a.q.size[3];
    uint32_t* pairs = reinterpret_cast<uint32_t*>(s.queries);  // [D / 2][query]
    for (int64_t lane = 0; lane < block.width; ++lane) {
      const Rows<const bfloat16> row = query_row<const bfloat16>(a.q, block, min_of(lane, block.count - 1));
      const auto bits = [&](int64_t d) { return d < D ? uint32_t{row.data[d * row.col_stride].bits} : 0u; };
      for (int64_t d = 0; d < D; d += 2) pairs[d / 2 * kQueries + lane] = bits(d) | bits(d + 1) << 16;
    }
    for (int64_t lane = 0; lane < kQueries; ++lane) s.scale[lane] = a.scale;
  }
  static void score(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n, const ForwardScratch& s) {
    const int64_t D = a.q.size[3];
    const Rows<const bfloat16> rows = key_rows<const bfloat16>(a.k, block.sequence, block.kv_head, j0);
    BroadcastPairs keys{rows.data, rows.row_stride, 2};
    if (rows.col_stride != 1 || D % 2 != 0) {
      bfloat16* packed = reinterpret_cast<bfloat16*>(s.keys);
      for (int64_t c = 0; c < n; ++c)
        for (int64_t d = 0; d < D + D % 2; ++d)
          packed[c * s.padded_D + d] = d < D ? rows.data[c * rows.row_stride + d * rows.col_stride] : bfloat16{0};
      keys = {packed, s.padded_D, 2};
    }
    product<Into::kSetScaled>(n, block.width, (D + 1) / 2, keys, s.queries, kQueries, s.scores, kQueries, s.scale);
  }
  static void add_values(const AttentionArgs& a, const QueryBlock& block, int64_t j0, int64_t n,
                         const ForwardScratch& s) {
    const int64_t Dv = a.v.size[3], pairs = (n + 1) / 2;
    const Rows<const bfloat16> rows = key_rows<const bfloat16>(a.v, block.sequence, block.kv_head, j0);
    uint32_t* values = reinterpret_cast<uint32_t*>(s.values);  // [key / 2][Dv]
    for (int64_t p = 0; p < pairs; ++p) {
      const bfloat16* first = rows.data + 2 * p * rows.row_stride;
      const bfloat16* second = first + rows.row_stride;
      uint32_t* to = values + p * s.padded_Dv;
      if (rows.col_stride == 1 && 2 * p + 1 < n) {
        interleave(first, second, Dv, to);
        continue;
      }
      for (int64_t d = 0; d < Dv; ++d) {
        const uint32_t high = 2 * p + 1 < n ? second[d * rows.col_stride].bits : 0u;
        to[d] = first[d * rows.col_stride].bits | high << 16;
      }
      // The weights of the key that is not there.
      if (2 * p + 1 == n)
        for (int64_t lane = 0; lane < block.width; ++lane) s.scores[n * kQueries + lane] = 0.0f;
    }
    // In place: row p is written when rows 2 p and 2 p + 1 have been read.
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t lane = 0; lane < block.width; lane += kLanes) {
        const float* weights = s.scores + 2 * p * kQueries + lane;
        store_vec(s.scores + p * kQueries + lane, pair_of(load_vec(weights), load_vec(weights + kQueries)));
      }
    const BroadcastPairs transposed{reinterpret_cast<const bfloat16*>(values), 2, 2 * s.padded_Dv};
    product<Into::kScaleAndAdd>(Dv, block.width, pairs, transposed, s.scores, kQueries, s.out, kQueries, s.alpha);
  }
};
#endif

template <class T>
static void forward_block(const AttentionArgs& a, const QueryBlock& block, const ForwardScratch& s) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], width = block.width;
  const bool few = block.count <= kFewQueries;
  if (few)
    pack_queries<T>(a.q, block, a.scale, s.queries, s.padded_D);
  else
    Products<T>::load_queries(a, block, s);
  for (int64_t i = 0; i < s.padded_Dv * (few ? block.count : kQueries); ++i) s.out[i] = 0.0f;
  for (int64_t lane = 0; lane < width; ++lane) {
    // The sink is a key with score `sink` and value 0.
    const float sink =
        a.sinks.defined ? static_cast<const float*>(a.sinks.data)[block.head[lane] * a.sinks.stride[0]] : -kInfinity;
    s.maximum[lane] = sink;
    s.sum[lane] = sink == -kInfinity ? 0.0f : 1.0f;
  }
  for (int64_t j0 = block.key_begin(); j0 < block.key_end(); j0 += kKeys) {
    const int64_t n = min_of(kKeys, block.key_end() - j0);
    const KeyIds documents(a.key_documents, block.sequence, j0, n), images(a.key_images, block.sequence, j0, n);
    const Cover cover = cover_of(block, j0, n, documents, images);
    if (cover == Cover::kNone) continue;
    if (few) {
      pack<T>(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, D, 1.0f, s.keys, s.padded_D);
      dot_rows(n, block.count, s.padded_D, s.keys, s.queries, s.scores, kQueries);
    } else {
      Products<T>::score(a, block, j0, n, s);
    }
    finish_scores(block, j0, n, cover, documents, images, s.bias, s.scores, nullptr);
    softmax_step(block, n, s);
    if (a.dropout_p > 0) {
      dropout_tile(block, j0, n, s.dropout);
      multiply_tile(block, n, s.dropout, s.scores);
    }
    if (few) {
      pack<T>(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, Dv, 1.0f, s.values, s.padded_Dv);
      for (int64_t lane = 0; lane < block.count; ++lane)
        for (int64_t d = 0; d < s.padded_Dv; ++d) s.out[lane * s.padded_Dv + d] *= s.alpha[lane];
      product<Into::kAdd>(block.count, s.padded_Dv, n, {s.scores, 1, kQueries}, s.values, s.padded_Dv, s.out,
                          s.padded_Dv);
    } else {
      Products<T>::add_values(a, block, j0, n, s);
    }
  }
  if (!few) transpose(s.out, kQueries, Dv, block.count, s.values, s.padded_Dv);
  write_forward<T>(a, block, s, few ? s.out : s.values);
}

template <class T>
static void attention_forward_as(const AttentionArgs& a, int threads) {
  const QueryWork work(a);
  const int64_t count = work.count();
  if (count == 0) return;
  const int team = static_cast<int>(min_of(threads, count));
  const int64_t scratch_size = ForwardScratch(a, nullptr).size;
  const Buffer<float> scratch(team * scratch_size);
#pragma omp parallel num_threads(team)
  {
    const ForwardScratch s(a, scratch.get() + omp_get_thread_num() * scratch_size);
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < count; ++item) {
      QueryBlock block;
      work.get(item, block);
      forward_block<T>(a, block, s);
    }
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
