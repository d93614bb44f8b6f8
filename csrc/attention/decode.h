// Attention forward for few queries against many keys, as in decoding: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
//
// The rows of a key head (all query heads that share it times S queries, at most kDecodeRows) meet each of its keys in
// turn. For R rows, T keys and b bytes an element this reads T (D + Dv) b bytes once and does 2 R T (D + Dv) flops.
// With few rows a core waits for memory, so everything here serves to keep it reading.
//   - K and V are read in place, from any layout and from pages, and widened in registers; nothing is packed.
//   - Keys are split into spans of span_length() keys. A span leaves (maximum, sum, unnormalised out) of each
//     row in fp32, and the spans of a row are merged in their order. How keys are split depends on T alone, so that
//     the result's bits do not depend on the number of threads; a span is work for one thread.
//   - Scores of a chunk of kChunkKeys keys are [row][key]: lanes are keys. kLanes dot products at a time run along D
//     and are added up across lanes together (sums_of). The softmax of a row then costs 1 / kLanes of an exponential a
//     key.
//   - The product with V runs along Dv with the sums of a few rows in registers.
//   - The rows of a chunk's K, then of its V, then of the next chunk's K form one sequence, and every loop asks for the
//     row some kB further on in it, and for where a later page lies, so that memory is busy while the core computes,
//     whatever the rows' distance. Chunks are long because memory is not busy in their softmax: a few hundred cycles
//     for each row.
#pragma once

#include <omp.h>

#include <cmath>

#include "attention/decode_rows.h"
#include "product/team_tasks.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Keys of a span: the partial results of 16 rows are some 3% of the bytes of 512 keys. Past 64 spans they grow
// instead, which bounds the scratch memory.
static inline int64_t span_length(int64_t T) { return max_of(512, round_up(ceil_div(T, 64), kKeys)); }

// The work of a call: (sequence, span of keys, key head), and where each leaves its partial result.
struct DecodeWork {
  const AttentionArgs& args;
  int64_t rows, padded_Dv;  // the most rows of a key head; Dv up to whole slices
  Buffer<int64_t> first;    // task of each sequence, and the end

  explicit DecodeWork(const AttentionArgs& a)
      : args(a), rows(0), padded_Dv(round_up(a.v.size[3], kSlice)), first(sequence_count(a) + 1) {
    first[0] = 0;
    for (int64_t b = 0; b < sequence_count(a); ++b) {
      const Sequence sequence = sequence_at(a, b);
      first[b + 1] = first[b];
      if (!is_decoding(a, sequence)) continue;
      rows = max_of(rows, row_count(sequence));
      first[b + 1] += a.k.size[1] * spans(sequence);
    }
  }
  int64_t row_count(const Sequence& s) const { return args.q.size[1] / args.k.size[1] * s.S; }
  static int64_t spans(const Sequence& s) { return max_of(1, ceil_div(s.visible_keys, span_length(s.T))); }
  int64_t count() const { return first[sequence_count(args)]; }

  // The sequence that owns a task.
  int64_t sequence_of(int64_t task) const {
    int64_t low = 0, high = sequence_count(args);  // first[low] <= task < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= task ? low : high) = middle;
    }
    return low;
  }
};

// What a span of keys leaves of its rows. `out` is relative to exp(maximum), in the order of slices of V.
struct Partial {
  float *maximum, *sum, *out;

  Partial(const DecodeWork& work, float* base, int64_t task)
      : maximum(base + task * size(work)), sum(maximum + kDecodeRows), out(sum + kDecodeRows) {}
  static int64_t size(const DecodeWork& work) { return 2 * kDecodeRows + work.rows * work.padded_Dv; }
};

// A thread's scratch; with no base it only counts.
template <class T>
struct DecodeScratch {
  typename Dot<T>::Part* queries;  // [row][part]
  float* scores;                   // [row][key]
  float* dropout;                  // a tile of dropout_tile
  int64_t size;                    // in floats

  DecodeScratch(const AttentionArgs& a, float* base) {
    const int64_t parts = ceil_div(a.q.size[3], kSlice);
    const int64_t queries_size = kDecodeRows * parts * int64_t{sizeof(typename Dot<T>::Part) / sizeof(float)};
    const int64_t scores_size = kDecodeRows * kChunkKeys;
    queries = reinterpret_cast<typename Dot<T>::Part*>(base);
    scores = base + round_up(queries_size, 16);
    dropout = scores + scores_size;
    size = round_up(queries_size, 16) + scores_size + (a.dropout_p > 0 ? kKeys * kQueries : 0);
  }
};

// The element (row of a block, 0) of q, out or lse.
static inline int64_t row_start(const View& view, const QueryBlock& block, int64_t row) {
  return block.sequence.batch * view.stride[0] + block.head[row] * view.stride[1] +
         (block.sequence.query0 + block.index[row]) * view.stride[2];
}

// The chunks of the spans that a thread works on, one after another: the last chunk of one looks ahead to the first
// of the next.
template <class T>
class ChunkReader {
 public:
  explicit ChunkReader(const DecodeWork& work) : work_(work) {}

  // Goes to a span. `following` is the one that probably comes next, or -1.
  void start(int64_t task, int64_t following) {
    if (task != opened_) open(task, chunks_[turn_]);
    following_ = following;
    block_ = opened_block_, j_ = opened_j_, end_ = opened_end_;
  }

  const QueryBlock& block() const { return block_; }
  KeyChunk<T>& chunk() { return chunks_[turn_]; }
  // Looks ahead of the chunk; next() then goes on, to a chunk of no keys behind the last.
  void look_ahead(Ahead ahead) {
    KeyChunk<T>& next = chunks_[1 - turn_];
    next.collect(block_, &j_, end_);
    is_last_ = next.n == 0;
    if (is_last_ && following_ >= 0) open(following_, next);
    chunk().look_ahead(next, ahead);
  }
  bool next() {
    turn_ = 1 - turn_;
    return !is_last_;
  }

 private:
  void open(int64_t task, KeyChunk<T>& chunk) {
    const AttentionArgs& a = work_.args;
    const int64_t b = work_.sequence_of(task), local = task - work_.first[b], Hkv = a.k.size[1];
    const Sequence sequence = sequence_at(a, b);
    const int64_t length = span_length(sequence.T), begin = local / Hkv * length;
    make_query_block(a, sequence, local % Hkv, 0, work_.row_count(sequence), opened_block_);
    opened_j_ = max_of(opened_block_.key_begin(), begin), opened_end_ = min_of(opened_block_.key_end(), begin + length);
    chunk.collect(opened_block_, &opened_j_, opened_end_);
    opened_ = task;
  }

  const DecodeWork& work_;
  KeyChunk<T> chunks_[2];
  int turn_ = 0;
  bool is_last_ = true;
  QueryBlock block_, opened_block_;  // of the span that is worked on; of the one whose first chunk was collected
  int64_t j_ = 0, end_ = 0, opened_j_ = 0, opened_end_ = 0, opened_ = -1, following_ = -1;
};

// One span of keys for all rows of a key head.
template <class T>
static void decode_span(const AttentionArgs& a, ChunkReader<T>& reader, int64_t padded_Dv, const Partial& partial,
                        const DecodeScratch<T>& s) {
  const QueryBlock& block = reader.block();
  const int64_t D = a.q.size[3], Dv = a.v.size[3], parts = ceil_div(D, kSlice), count = block.count;
  const Ahead ahead(D * int64_t{sizeof(T)});
  const int64_t group = clamp(kValueBytes / max_of(1, Dv * int64_t{sizeof(T)}), 8, kKeys);  // keys

  float alpha[2][kDecodeRows];  // of a chunk's first keys, and of the others: 1
  Vec sum[kDecodeRows];
  for (int64_t r = 0; r < count; ++r) {
    const T* row = static_cast<const T*>(a.q.data) + row_start(a.q, block, r);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t left = D - i * kSlice;
      s.queries[r * parts + i] =
          left >= kSlice ? Dot<T>::load(row + i * kSlice) : Dot<T>::load(row + i * kSlice, static_cast<int>(left));
    }
    partial.maximum[r] = -kInfinity;
    sum[r] = Vec{};
    alpha[1][r] = 1.0f;
  }
  for (int64_t i = 0; i < count * padded_Dv; ++i) partial.out[i] = 0.0f;

  for (bool more = reader.chunk().n > 0; more; more = reader.next()) {
    reader.look_ahead(ahead);
    const KeyChunk<T>& chunk = reader.chunk();
    score_chunk<T>(chunk, ahead, s.queries, count, a, s.scores);
    finish_chunk(block, chunk, count, s.scores);
    for (int64_t r = 0; r < count; ++r)
      alpha[0][r] = softmax_row(chunk.n, s.scores + r * kChunkKeys, partial.maximum + r, sum + r);
    for (int i = 0; i < chunk.blocks; ++i) {
      const int64_t n = chunk.keys_of(i);
      float* weights = s.scores + i * kKeys;
      if (a.dropout_p > 0) {
        dropout_tile(block, chunk.first[i], n, s.dropout);
        for (int64_t r = 0; r < count; ++r)
          for (int64_t c = 0; c < n; ++c) weights[r * kChunkKeys + c] *= s.dropout[c * kQueries + r];
      }
      for (int64_t c = 0; c < n; c += group)
        add_values<T>({chunk.values() + i * kKeys + c, min_of(group, n - c), Dv, ahead, weights + c, alpha[i + c > 0],
                       partial.out, padded_Dv},
                      count);
    }
  }
  for (int64_t r = 0; r < count; ++r) {
    Vec total[kLanes] = {};
    total[0] = sum[r];
    partial.sum[r] = sums_of(total)[0];
  }
}

// Adds up a key head's spans in their order, with the sink as a key of score `sink` and value 0, and writes out and
// lse. `out` is scratch of a row.
template <class T>
static void merge_spans(const DecodeWork& work, int64_t b, int64_t kv_head, float* partials, float* out) {
  const AttentionArgs& a = work.args;
  const int64_t Hkv = a.k.size[1], Dv = a.v.size[3];
  const Sequence sequence = sequence_at(a, b);
  if (!is_decoding(a, sequence)) return;
  const int64_t count = work.row_count(sequence), spans = DecodeWork::spans(sequence);
  QueryBlock block;
  make_query_block(a, sequence, kv_head, 0, count, block);
  for (int64_t r = 0; r < count; ++r) {
    const float sink =
        a.sinks.defined ? static_cast<const float*>(a.sinks.data)[block.head[r] * a.sinks.stride[0]] : -kInfinity;
    float maximum = sink;
    for (int64_t i = 0; i < spans; ++i) {
      const float other = Partial(work, partials, work.first[b] + i * Hkv + kv_head).maximum[r];
      maximum = other > maximum ? other : maximum;
    }
    const float base = maximum == -kInfinity ? 0.0f : maximum;
    float sum = sink == -kInfinity ? 0.0f : exp(sink - base);
    for (int64_t d = 0; d < work.padded_Dv; ++d) out[d] = 0.0f;
    for (int64_t i = 0; i < spans; ++i) {
      const Partial partial(work, partials, work.first[b] + i * Hkv + kv_head);
      const float weight = exp(partial.maximum[r] - base);
      sum += partial.sum[r] * weight;
      const float* from = partial.out + r * work.padded_Dv;
      for (int64_t d = 0; d < work.padded_Dv; ++d) out[d] += from[d] * weight;
    }
    T* to = static_cast<T*>(a.out.data) + row_start(a.out, block, r);
    for (int64_t d = 0; d < Dv; ++d) {
      const float value = out[d / kSlice * kSlice + place_in_slice<T>(d % kSlice)];
      to[d * a.out.stride[3]] = from_float<T>(sum == 0.0f ? 0.0f : value / sum);  // a row that saw nothing: 0
    }
    static_cast<float*>(a.lse.data)[row_start(a.lse, block, r)] = sum == 0.0f ? -kInfinity : maximum + logf(sum);
  }
}

template <class T>
static void attention_decode_as(const AttentionArgs& a, int threads) {
  const DecodeWork work(a);
  const int64_t count = work.count(), Hkv = a.k.size[1], heads = sequence_count(a) * Hkv;
  if (count == 0) return;
  const int team = static_cast<int>(min_of(threads, count));
  const int64_t scratch_size = DecodeScratch<T>(a, nullptr).size + work.padded_Dv;
  const Buffer<float> scratch(team * scratch_size), partials(count * Partial::size(work));
  const auto span = [&](ChunkReader<T>& reader, int64_t task, int64_t end, int thread) {
    const DecodeScratch<T> s(a, scratch.get() + thread * scratch_size);
    reader.start(task, task + 1 < end ? task + 1 : -1);
    decode_span<T>(a, reader, work.padded_Dv, Partial(work, partials.get(), task), s);
  };
  const auto merge = [&](int64_t i, int thread) {
    float* row = scratch.get() + (thread + 1) * scratch_size - work.padded_Dv;
    merge_spans<T>(work, i / Hkv, i % Hkv, partials.get(), row);
  };
  // A parallel region of one thread is not free: it costs as much as a small call.
  if (team == 1) {
    ChunkReader<T> reader(work);
    for (int64_t task = 0; task < count; ++task) span(reader, task, count, 0);
    for (int64_t i = 0; i < heads; ++i) merge(i, 0);
    return;
  }
  const TeamTasks tasks(team);
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
    const int64_t end = count * (thread + 1) / team;
    ChunkReader<T> reader(work);
    TeamTasks::Round round;
    tasks.run(round, count, [&](int64_t task) { span(reader, task, end, thread); });
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < heads; ++i) merge(i, thread);
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
