// Attention forward for few queries against many keys, as in decoding: Flash-Decoding (Dao, Haziza, Massa, Sizov 2023).
//
// The rows of a key head (all query heads that share it times S queries, at most kDecodeRows) meet each of its keys in
// turn. For R rows, T keys and b bytes an element this reads T (D + Dv) b bytes once and does 2 R T (D + Dv) flops, R / b
// per byte twice: with R / b below some 4 a core waits for memory, so everything here serves to keep it reading.
//   - K and V are read in place, from any layout and from pages, and widened in registers; nothing is packed.
//   - Keys are split into stretches of stretch_length() keys. A stretch leaves (maximum, sum, unnormalised out) of every
//     row in fp32, and the stretches of a row are merged in their order. How keys are split depends on T alone, so that
//     the result's bits do not depend on the number of threads; a stretch is work for one thread.
//   - Scores of a chunk of 64 keys are [row][key]: lanes are keys. kLanes dot products at a time run along D and are
//     added up across lanes together (sums_of). The softmax of a row then costs 1 / kLanes of an exponential a key.
//   - The product with V runs along Dv with the sums of a few rows in registers.
//   - While the scores of a chunk are made its values are prefetched, and with its values the next chunk's keys: one
//     thread has several kB under way at any time, whatever the distance of the rows.
#pragma once

#include <omp.h>

#include <cmath>

#include "kernels/attention_scores.h"
#include "simd/slice.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// More rows are better served by attention_forward.h, which has queries in the lanes.
constexpr int64_t kDecodeRows = 16;

// Keys of a stretch: the partial results of 16 rows are some 3% of the bytes of 512 keys. Past 64 stretches they grow
// instead, which bounds the scratch memory.
static inline int64_t stretch_length(int64_t T) { return max_of(512, round_up(ceil_div(T, 64), kKeys)); }

static inline bool has_contiguous_rows(const View& view) { return view.stride[3] == 1 || view.size[3] <= 1; }

// Whether every sequence of the call has few enough rows. Rows of q, k and v must be contiguous too.
static bool is_decoding(const AttentionArgs& a) {
  const int64_t group = a.q.size[1] / a.k.size[1];
  if (!has_contiguous_rows(a.q) || !has_contiguous_rows(a.k) || !has_contiguous_rows(a.v)) return false;
  if (!a.cu_seqlens_q.defined) return group * a.q.size[2] <= kDecodeRows;
  for (int64_t b = 0; b < sequence_count(a); ++b)
    if (group * sequence_at(a, b).S > kDecodeRows) return false;
  return true;
}

template <int kNumber>
struct Constant {
  static constexpr int kValue = kNumber;
};

// The work of a call: (sequence, stretch of keys, key head), and where each leaves its partial result.
struct DecodeWork {
  const AttentionArgs& args;
  int64_t rows, padded_Dv;  // the most rows of a key head; Dv up to whole slices
  Buffer<int64_t> first;    // item of each sequence, and the end

  explicit DecodeWork(const AttentionArgs& a)
      : args(a), rows(0), padded_Dv(round_up(a.v.size[3], kSlice)), first(sequence_count(a) + 1) {
    first[0] = 0;
    for (int64_t b = 0; b < sequence_count(a); ++b) {
      const Sequence sequence = sequence_at(a, b);
      rows = max_of(rows, row_count(sequence));
      first[b + 1] = first[b] + (sequence.S > 0 ? a.k.size[1] * stretches(sequence) : 0);
    }
  }
  int64_t row_count(const Sequence& s) const { return args.q.size[1] / args.k.size[1] * s.S; }
  static int64_t stretches(const Sequence& s) { return max_of(1, ceil_div(s.visible_keys, stretch_length(s.T))); }
  int64_t count() const { return first[sequence_count(args)]; }

  // The sequence that owns an item.
  int64_t sequence_of(int64_t item) const {
    int64_t low = 0, high = sequence_count(args);  // first[low] <= item < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= item ? low : high) = middle;
    }
    return low;
  }
};

// What a stretch of keys leaves of its rows. `out` is relative to exp(maximum), in the order of slices of V.
struct Partial {
  float *maximum, *sum, *out;

  Partial(const DecodeWork& work, float* base, int64_t item)
      : maximum(base + item * size(work)), sum(maximum + kDecodeRows), out(sum + kDecodeRows) {}
  static int64_t size(const DecodeWork& work) { return 2 * kDecodeRows + work.rows * work.padded_Dv; }
};

// The rows of keys [j0, j0 + n), each found by itself: pages may lie anywhere.
template <class T>
struct KeyChunk {
  int64_t n;
  const T* key[kKeys];  // up to a whole number of vectors: the last one is repeated
  const T* value[kKeys];

  void find(const AttentionArgs& a, const Sequence& sequence, int64_t kv_head, int64_t j0, int64_t count) {
    n = count;
    const T* k = static_cast<const T*>(a.k.data) + kv_head * a.k.stride[1];
    const T* v = static_cast<const T*>(a.v.data) + kv_head * a.v.stride[1];
    if (a.block_table.defined) {
      const int64_t page = a.k.size[2];
      const int32_t* table =
          static_cast<const int32_t*>(a.block_table.data) + sequence.b * a.block_table.stride[0];
      int64_t entry = j0 / page, slot = j0 % page;
      for (int64_t c = 0; c < n; ++entry, slot = 0) {
        // Python checked these; clamped, a later change of the table cannot lead out of the pool.
        const int64_t at = clamp(table[entry * a.block_table.stride[1]], 0, a.k.size[0] - 1);
        for (; slot < page && c < n; ++slot, ++c) {
          key[c] = k + at * a.k.stride[0] + slot * a.k.stride[2];
          value[c] = v + at * a.v.stride[0] + slot * a.v.stride[2];
        }
      }
    } else {
      k += sequence.batch * a.k.stride[0] + (sequence.key0 + j0) * a.k.stride[2];
      v += sequence.batch * a.v.stride[0] + (sequence.key0 + j0) * a.v.stride[2];
      for (int64_t c = 0; c < n; ++c) key[c] = k + c * a.k.stride[2], value[c] = v + c * a.v.stride[2];
    }
    for (int64_t c = n; c < round_up(n, kLanes); ++c) key[c] = key[n - 1];
  }
};

// Asks for the cache lines of `size` elements.
template <class T>
static inline void prefetch_row(const T* row, int64_t size) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < size; i += kLine) __builtin_prefetch(row + i);
}

// scores[row][c] = scale * row . key c, for kRows rows and kLanes / kRows keys.
template <class T, int kRows>
static inline void score_tile(const T* const* keys, const typename Dot<T>::Part* rows, int64_t D, float scale,
                              float* scores) {
  constexpr int kTileKeys = kLanes / kRows, kStep = 4;  // keys at a time: their addresses stay in registers
  const int64_t whole = D / kSlice, parts = ceil_div(D, kSlice);
  const int tail = static_cast<int>(D % kSlice);
  Vec sum[kLanes] = {};  // [row][key]
#pragma GCC unroll 4
  for (int first = 0; first < kTileKeys; first += kStep) {
    const auto add = [&](int64_t i, auto load) {
      typename Dot<T>::Part key[kStep];
#pragma GCC unroll 4
      for (int c = 0; c < kStep; ++c) key[c] = load(keys[first + c] + i * kSlice);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const typename Dot<T>::Part row = rows[r * parts + i];
#pragma GCC unroll 4
        for (int c = 0; c < kStep; ++c) {
          Vec& to = sum[r * kTileKeys + first + c];
          to = Dot<T>::multiply_add(key[c], row, to);
        }
      }
    };
    for (int64_t i = 0; i < whole; ++i) add(i, [](const T* from) { return Dot<T>::load(from); });
    if (tail != 0) add(whole, [tail](const T* from) { return Dot<T>::load(from, tail); });
  }
  const Vec products = sums_of(sum) * scale;
  for (int r = 0; r < kRows; ++r)
    std::memcpy(scores + r * kKeys, reinterpret_cast<const float*>(&products) + r * kTileKeys,
                kTileKeys * sizeof(float));
}

// The most rows whose dot products share a tile.
constexpr int kScoreRows = kLanes / 4;

template <class T>
static void score_chunk(const KeyChunk<T>& chunk, const typename Dot<T>::Part* rows, int64_t count,
                        const AttentionArgs& a, float* scores) {
  const int64_t D = a.q.size[3], Dv = a.v.size[3], parts = ceil_div(D, kSlice);
  for (int64_t c = 0; c < chunk.n; c += kLanes) {
    for (int64_t i = c; i < min_of(c + kLanes, chunk.n); ++i) prefetch_row(chunk.value[i], Dv);
    int64_t r = 0;
    const auto tiles = [&](auto rows_of_tile) {
      constexpr int kRows = decltype(rows_of_tile)::kValue;
      for (; r + kRows <= count; r += kRows)
        for (int64_t i = c; i < c + kLanes; i += kLanes / kRows)
          score_tile<T, kRows>(chunk.key + i, rows + r * parts, D, a.scale, scores + r * kKeys + i);
    };
    if constexpr (kScoreRows >= 4) tiles(Constant<4>{});
    if constexpr (kScoreRows >= 2) tiles(Constant<2>{});
    tiles(Constant<1>{});
  }
}

// Vectors of sums that a tile of rows x slices of V keeps in registers, with room for a slice of V and a weight.
constexpr int kValueSlices = kLanes == 16 ? 8 : 4;

// out[row] = out[row] alpha[row] + the sum over keys of weights[row][c] value c, for slices [i, i + kSlices) of Dv; the
// products of a chunk are added up on their own first. tail: elements of the one slice that is not whole, or 0.
template <class T, int kRows, int kSlices, bool kWhole>
static inline void value_tile(const KeyChunk<T>& chunk, int64_t i, int tail, const float* weights, const float* alpha,
                              float* out, int64_t out_stride) {
  Vec sum[kRows][2 * kSlices] = {};
  for (int64_t c = 0; c < chunk.n; ++c) {
    const T* value = chunk.value[c] + i * kSlice;
    Slice slice[kSlices];
#pragma GCC unroll 8
    for (int s = 0; s < kSlices; ++s)
      slice[s] = kWhole ? load_slice(value + s * kSlice) : load_slice(value + s * kSlice, tail);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vec weight = broadcast(weights[r * kKeys + c]);
#pragma GCC unroll 8
      for (int s = 0; s < kSlices; ++s) {
        sum[r][2 * s] = mul_add(weight, slice[s].low, sum[r][2 * s]);
        sum[r][2 * s + 1] = mul_add(weight, slice[s].high, sum[r][2 * s + 1]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 16
    for (int v = 0; v < 2 * kSlices; ++v) {
      float* to = out + r * out_stride + i * kSlice + v * kLanes;
      store_vec(to, mul_add(load_vec(to), broadcast(alpha[r]), sum[r][v]));
    }
}

// The same for all slices of Dv, the widest tiles first.
template <class T, int kRows, int kSlices>
static inline void value_tiles(const KeyChunk<T>& chunk, int64_t i, int64_t Dv, const float* weights,
                               const float* alpha, float* out, int64_t out_stride) {
  for (; (i + kSlices) * kSlice <= Dv; i += kSlices)
    value_tile<T, kRows, kSlices, true>(chunk, i, 0, weights, alpha, out, out_stride);
  if constexpr (kSlices > 1) {
    value_tiles<T, kRows, kSlices / 2>(chunk, i, Dv, weights, alpha, out, out_stride);
  } else if (i * kSlice < Dv) {
    const int tail = static_cast<int>(Dv - i * kSlice);
    value_tile<T, kRows, 1, false>(chunk, i, tail, weights, alpha, out, out_stride);
  }
}

template <class T>
static void add_values(const KeyChunk<T>& chunk, int64_t count, int64_t Dv, const float* weights, const float* alpha,
                       float* out, int64_t out_stride) {
  int64_t r = 0;
  const auto tiles = [&](auto rows_of_tile) {
    constexpr int kRows = decltype(rows_of_tile)::kValue;
    for (; r + kRows <= count; r += kRows)
      value_tiles<T, kRows, kValueSlices / kRows>(chunk, 0, Dv, weights + r * kKeys, alpha + r, out + r * out_stride,
                                                  out_stride);
  };
  tiles(Constant<4>{});
  tiles(Constant<2>{});
  tiles(Constant<1>{});
}

// What finish_scores and its tile are to a block of queries, these are to one row, whose keys are in the lanes.
template <class T>
static void copy_bias(const T* from, int64_t stride, int64_t n, float* to) {
  if (stride == 1)
    for (int64_t c = 0; c < n; ++c) to[c] = to_float(from[c]);
  else
    for (int64_t c = 0; c < n; ++c) to[c] = to_float(from[c * stride]);
}

static void load_bias_row(const QueryBlock& block, int64_t row, int64_t j0, int64_t n, float* to) {
  const View& bias = block.args->bias;
  const int64_t at = block.sequence.b * bias.stride[0] + block.head[row] * bias.stride[1] +
                     block.index[row] * bias.stride[2] + j0 * bias.stride[3];
  switch (bias.dtype) {
    case DType::kBool:
      return copy_bias(static_cast<const uint8_t*>(bias.data) + at, bias.stride[3], n, to);
    case DType::kBFloat16:
      return copy_bias(static_cast<const bfloat16*>(bias.data) + at, bias.stride[3], n, to);
    case DType::kFloat16:
      return copy_bias(static_cast<const float16*>(bias.data) + at, bias.stride[3], n, to);
    default:
      return copy_bias(static_cast<const float*>(bias.data) + at, bias.stride[3], n, to);
  }
}

// Document and image ids of a chunk's keys, for vectors of them.
struct ChunkIds {
  bool has_documents, has_images;
  alignas(64) int32_t document[kKeys], image[kKeys];

  void copy(const KeyIds& documents, const KeyIds& images, int64_t n) {
    has_documents = documents.data != nullptr, has_images = images.data != nullptr;
    for (int64_t c = 0; has_documents && c < kKeys; ++c) document[c] = c < n ? documents[c] : -1;
    for (int64_t c = 0; has_images && c < kKeys; ++c) image[c] = c < n ? images[c] : -1;
  }
};

// All ones where a row sees keys j.
static inline VecInt visible_to(const QueryBlock& block, int64_t row, VecInt j, int64_t c, const ChunkIds& ids) {
  VecInt seen = j <= block.diagonal[row];
  if (ids.has_images && block.image[row] >= 0) seen |= load_vec(ids.image + c) == block.image[row];
  seen &= (j >= block.first[row]) & (j <= block.last[row]);
  if (ids.has_documents) {
    const VecInt document = load_vec(ids.document + c);
    seen &= (document == block.document[row]) & (document >= 0);
  }
  return seen;
}

// Turns a row's products into scores, as finish_scores does; those behind the n keys become -inf. `ids` may be null
// where the row sees every key of the chunk.
static void finish_row(const QueryBlock& block, int64_t row, int64_t j0, int64_t n, const ChunkIds* ids,
                       float* scores) {
  const AttentionArgs& a = *block.args;
  const bool has_bias = a.bias.defined, is_boolean = has_bias && a.bias.dtype == DType::kBool;
  const bool has_cap = a.softcap > 0.0f, has_alibi = a.alibi_slopes.defined;
  const Vec hidden = broadcast(-kInfinity);
  if (has_bias || has_cap || has_alibi || ids != nullptr) {
    alignas(64) float bias[kKeys] = {};
    if (has_bias) load_bias_row(block, row, j0, n, bias);
    for (int64_t c = 0; c < n; c += kLanes) {
      Vec s = load_vec(scores + c);
      const VecInt j = lane_numbers() + static_cast<int32_t>(j0 + c);
      if (has_cap) s = tanh(s / a.softcap) * a.softcap;
      if (has_bias) s = is_boolean ? (load_vec(bias + c) == 0.0f ? hidden : s) : s + load_vec(bias + c);
      if (has_alibi) {
        const VecInt distance = j - block.position[row];
        s = s - __builtin_convertvector(distance < 0 ? -distance : distance, Vec) * block.slope[row];
      }
      if (ids != nullptr) s = visible_to(block, row, j, c, *ids) ? s : hidden;
      store_vec(scores + c, s);
    }
  }
  for (int64_t c = n; c % kLanes != 0; ++c) scores[c] = -kInfinity;
}

// A step of the online softmax of one row: scores become weights relative to the new maximum; returns what the row's
// earlier sums are to be multiplied by.
static inline float softmax_row(int64_t n, float* scores, float* maximum, Vec* sum) {
  const float before = *maximum;
  Vec largest = broadcast(before);  // a NaN never wins, and makes its weight and with it the sum NaN below
  for (int64_t c = 0; c < n; c += kLanes) {
    const Vec score = load_vec(scores + c);
    largest = score > largest ? score : largest;
  }
  *maximum = largest_of(largest);
  const float base = *maximum == -kInfinity ? 0.0f : *maximum;  // nothing seen so far: exp(-inf - 0) = 0
  const float alpha = exp(before - base);
  Vec total = {};
  for (int64_t c = 0; c < n; c += kLanes) {
    const Vec weight = exp(load_vec(scores + c) - base);
    total += weight;
    store_vec(scores + c, weight);
  }
  *sum = mul_add(*sum, broadcast(alpha), total);
  return alpha;
}

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
    const int64_t scores_size = kDecodeRows * kKeys;
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

// One stretch of keys for all rows of a key head.
template <class T>
static void decode_stretch(const DecodeWork& work, int64_t item, const Partial& partial, const DecodeScratch<T>& s) {
  const AttentionArgs& a = work.args;
  const int64_t b = work.sequence_of(item), local = item - work.first[b], Hkv = a.k.size[1];
  const int64_t D = a.q.size[3], Dv = a.v.size[3], parts = ceil_div(D, kSlice);
  const Sequence sequence = sequence_at(a, b);
  const int64_t count = work.row_count(sequence), length = stretch_length(sequence.T);
  QueryBlock block;
  make_query_block(a, sequence, local % Hkv, 0, count, block);

  float alpha[kDecodeRows];
  Vec sum[kDecodeRows];
  for (int64_t r = 0; r < count; ++r) {
    const T* row = static_cast<const T*>(a.q.data) + row_start(a.q, block, r);
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t left = D - i * kSlice;
      s.queries[r * parts + i] = left >= kSlice ? Dot<T>::load(row + i * kSlice)
                                                : Dot<T>::load(row + i * kSlice, static_cast<int>(left));
    }
    partial.maximum[r] = -kInfinity;
    sum[r] = Vec{};
  }
  for (int64_t i = 0; i < count * work.padded_Dv; ++i) partial.out[i] = 0.0f;

  const int64_t begin = max_of(block.key_begin(), local / Hkv * length);
  const int64_t end = min_of(block.key_end(), (local / Hkv + 1) * length);
  KeyChunk<T> chunk;
  ChunkIds ids;
  for (int64_t j0 = begin; j0 < end; j0 += kKeys) {
    const int64_t n = min_of(kKeys, end - j0);
    const KeyIds documents(a.key_documents, sequence, j0, n), images(a.key_images, sequence, j0, n);
    const Cover cover = cover_of(block, j0, n, documents, images);
    if (cover == Cover::kNone) continue;
    chunk.find(a, sequence, block.kv_head, j0, n);
    score_chunk<T>(chunk, s.queries, count, a, s.scores);
    const bool is_part = cover == Cover::kPart;
    if (is_part) ids.copy(documents, images, n);
    if (a.dropout_p > 0) dropout_tile(block, j0, n, s.dropout);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = s.scores + r * kKeys;
      finish_row(block, r, j0, n, is_part ? &ids : nullptr, scores);
      alpha[r] = softmax_row(n, scores, partial.maximum + r, sum + r);
      if (a.dropout_p > 0)
        for (int64_t c = 0; c < n; ++c) scores[c] *= s.dropout[c * kQueries + r];
    }
    add_values<T>(chunk, count, Dv, s.scores, alpha, partial.out, work.padded_Dv);
  }
  for (int64_t r = 0; r < count; ++r) {
    Vec total[kLanes] = {};
    total[0] = sum[r];
    partial.sum[r] = sums_of(total)[0];
  }
}

// Adds up a key head's stretches in their order, with the sink as a key of score `sink` and value 0, and writes out and
// lse. `out` is scratch of a row.
template <class T>
static void merge_stretches(const DecodeWork& work, int64_t b, int64_t kv_head, float* partials, float* out) {
  const AttentionArgs& a = work.args;
  const int64_t Hkv = a.k.size[1], Dv = a.v.size[3];
  const Sequence sequence = sequence_at(a, b);
  const int64_t count = work.row_count(sequence), stretches = count == 0 ? 0 : DecodeWork::stretches(sequence);
  if (count == 0) return;
  QueryBlock block;
  make_query_block(a, sequence, kv_head, 0, count, block);
  for (int64_t r = 0; r < count; ++r) {
    const float sink =
        a.sinks.defined ? static_cast<const float*>(a.sinks.data)[block.head[r] * a.sinks.stride[0]] : -kInfinity;
    float maximum = sink;
    for (int64_t i = 0; i < stretches; ++i) {
      const float other = Partial(work, partials, work.first[b] + i * Hkv + kv_head).maximum[r];
      maximum = other > maximum ? other : maximum;
    }
    const float base = maximum == -kInfinity ? 0.0f : maximum;
    float sum = sink == -kInfinity ? 0.0f : exp(sink - base);
    for (int64_t d = 0; d < work.padded_Dv; ++d) out[d] = 0.0f;
    for (int64_t i = 0; i < stretches; ++i) {
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
  // A parallel region of one thread is not free: it costs as much as a small call.
  const auto stretch = [&](int64_t item, int thread) {
    const DecodeScratch<T> s(a, scratch.get() + thread * scratch_size);
    decode_stretch<T>(work, item, Partial(work, partials.get(), item), s);
  };
  const auto merge = [&](int64_t i, int thread) {
    float* row = scratch.get() + (thread + 1) * scratch_size - work.padded_Dv;
    merge_stretches<T>(work, i / Hkv, i % Hkv, partials.get(), row);
  };
  if (team == 1) {
    for (int64_t item = 0; item < count; ++item) stretch(item, 0);
    for (int64_t i = 0; i < heads; ++i) merge(i, 0);
    return;
  }
#pragma omp parallel num_threads(team)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t item = 0; item < count; ++item) stretch(item, thread);
#pragma omp for
    for (int64_t i = 0; i < heads; ++i) merge(i, thread);
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
