// Which queries a block holds, which keys each may see, and what a block of keys means for them.
//
// A block is up to kQueries rows of one sequence and one key head. The rows of a key head are those of all query heads
// that share it, head after head, so grouped queries read a key once and a decoding step fills a block with heads.
#pragma once

#include "simd/buffer.h"
#include "simd/vec_math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// A strip of queries is as wide as the register tile of a matrix product (tile.h) or a small multiple of it;
// a tile of scores is kKeys x kQueries floats (12 KiB), so that at head size 64 it and a strip of q and of out (12 KiB
// each) stay in a first-level cache while keys and values pass by. Both are multiples of every vector's length.
constexpr int kQueries = 48;
constexpr int kKeys = 64;
// The last block of keys takes in up to a quarter more: a block of few keys passes over all of out like a whole one.
constexpr int kMaxKeys = kKeys + kKeys / 4;

static inline int32_t int_at(const View& view, int64_t index) { return static_cast<const int32_t*>(view.data)[index]; }

// One batch entry, or one sequence of a varlen call.
struct Sequence {
  int64_t b;             // index into the per-batch tensors
  int64_t batch;         // index into q, k, v and what has their shape: 0 for varlen
  int64_t query0, S;     // its rows of q
  int64_t key0, T;       // its rows of k and v
  int64_t offset;        // of the causal diagonal
  int64_t visible_keys;  // min(T, key length)
};

static int64_t sequence_count(const AttentionArgs& a) {
  return a.cu_seqlens_q.defined ? a.cu_seqlens_q.size[0] - 1 : a.q.size[0];
}

static inline int64_t clamp(int64_t value, int64_t low, int64_t high) { return max_of(low, min_of(value, high)); }

static Sequence sequence_at(const AttentionArgs& a, int64_t b) {
  const int64_t T = a.block_table.defined ? a.block_table.size[1] * a.k.size[2] : a.k.size[2];
  Sequence s{b, b, 0, a.q.size[2], 0, T, 0, 0};
  if (a.cu_seqlens_q.defined) {
    // Python checked these; clamped, a later change of the tensor cannot lead out of q and k.
    const auto bounds = [b](const View& cu, int64_t rows, int64_t* start, int64_t* length) {
      *start = clamp(int_at(cu, b * cu.stride[0]), 0, rows);
      *length = clamp(int_at(cu, (b + 1) * cu.stride[0]), *start, rows) - *start;
    };
    s.batch = 0;
    bounds(a.cu_seqlens_q, a.q.size[2], &s.query0, &s.S);
    bounds(a.cu_seqlens_k, a.k.size[2], &s.key0, &s.T);
  }
  if (a.offsets.defined)
    s.offset = int_at(a.offsets, b * a.offsets.stride[0]);
  else
    s.offset = a.bottom_right ? s.T - s.S : 0;
  s.visible_keys = s.T;
  if (a.key_lengths.defined) s.visible_keys = clamp(int_at(a.key_lengths, b * a.key_lengths.stride[0]), 0, s.T);
  return s;
}

// Whether attention_decode.h takes a sequence forward: it has queries, few enough, and all rows are contiguous. More
// are better served by attention_forward.h, which has queries in the lanes.
static inline bool is_decoding(const AttentionArgs& a, const Sequence& s) {
  const View* const views[] = {&a.q, &a.k, &a.v};
  for (const View* view : views)
    if (view->stride[3] != 1 && view->size[3] > 1) return false;
  const int64_t rows = a.q.size[1] / a.k.size[1] * s.S;
  return rows > 0 && rows <= kDecodeRows;
}

struct QueryBlock {
  const AttentionArgs* args;
  Sequence sequence;
  int64_t kv_head;
  int64_t count;  // rows in use
  int64_t width;  // count rounded up to whole vectors; the rows in between repeat the last one's place
  int64_t head[kQueries], index[kQueries];
  // Keys first <= j <= last are within window and key length, and below the diagonal unless the row is an image's,
  // whose causal keys end at `diagonal`.
  alignas(64) int32_t position[kQueries], first[kQueries], last[kQueries], diagonal[kQueries];
  alignas(64) int32_t document[kQueries], image[kQueries];
  alignas(64) float slope[kQueries];
  // Bounds over the rows, for whole blocks of keys.
  int32_t min_first, max_first, min_last, max_last, min_diagonal, max_diagonal;
  int32_t min_document, max_document, min_image, max_image;

  int64_t key_begin() const { return min_first / kKeys * kKeys; }
  int64_t key_end() const { return max_last + 1; }
};

// The rows [row, row + count) of one key head, count <= kQueries.
static void make_query_block(const AttentionArgs& a, const Sequence& sequence, int64_t kv_head, int64_t row,
                             int64_t count, QueryBlock& block) {
  const int64_t group = a.q.size[1] / a.k.size[1];
  block.args = &a, block.sequence = sequence, block.kv_head = kv_head;
  block.count = count, block.width = round_up(count, kLanes);
  block.min_first = block.min_last = block.min_diagonal = block.min_document = block.min_image = INT32_MAX;
  block.max_first = block.max_last = block.max_diagonal = block.max_document = block.max_image = INT32_MIN;
  int64_t head = kv_head * group + row / sequence.S, index = row % sequence.S - 1;
  for (int64_t lane = 0; lane < block.width; ++lane) {
    if (lane < count && ++index == sequence.S) ++head, index = 0;
    const int64_t position = clamp(index + sequence.offset, -(1 << 30), 1 << 30);
    const int64_t end = sequence.visible_keys - 1;
    const int64_t first = a.window_left < 0 ? 0 : clamp(position - min_of(a.window_left, 1 << 30), 0, sequence.T);
    int64_t last = a.window_right < 0 ? end : min_of(end, position + min_of(a.window_right, 1 << 30));
    const int64_t diagonal = a.causal ? position : INT32_MAX;
    const int32_t image =
        a.query_images.defined && a.causal
            ? int_at(a.query_images, sequence.b * a.query_images.stride[0] + index * a.query_images.stride[1])
            : -1;
    if (image < 0) last = min_of(last, diagonal);
    last = max_of(last, -1);
    block.head[lane] = head, block.index[lane] = index;
    block.position[lane] = static_cast<int32_t>(position);
    block.first[lane] = static_cast<int32_t>(first), block.last[lane] = static_cast<int32_t>(last);
    block.diagonal[lane] = static_cast<int32_t>(image < 0 ? last : diagonal);
    block.image[lane] = image;
    block.document[lane] =
        a.query_documents.defined
            ? int_at(a.query_documents, sequence.b * a.query_documents.stride[0] + index * a.query_documents.stride[1])
            : 0;
    block.slope[lane] =
        a.alibi_slopes.defined
            ? static_cast<const float*>(
                  a.alibi_slopes.data)[sequence.b * a.alibi_slopes.stride[0] + head * a.alibi_slopes.stride[1]]
            : 0.0f;
    const auto widen = [lane](const int32_t* values, int32_t& low, int32_t& high) {
      if (values[lane] < low) low = values[lane];
      if (values[lane] > high) high = values[lane];
    };
    widen(block.first, block.min_first, block.max_first);
    widen(block.last, block.min_last, block.max_last);
    widen(block.diagonal, block.min_diagonal, block.max_diagonal);
    widen(block.document, block.min_document, block.max_document);
    if (image >= 0) widen(block.image, block.min_image, block.max_image);
  }
}

enum class Cover { kNone, kPart, kWhole };

// The ids of keys [j0, j0 + n), which are those of one sequence, and their bounds; negative ids are counted apart.
struct KeyIds {
  const int32_t* data;
  int64_t stride;
  int32_t low = INT32_MAX, high = INT32_MIN;
  bool has_negative = false;

  KeyIds(const View& ids, const Sequence& sequence, int64_t j0, int64_t n)
      : data(ids.defined ? static_cast<const int32_t*>(ids.data) + sequence.b * ids.stride[0] + j0 * ids.stride[1]
                         : nullptr),
        stride(ids.stride[1]) {
    for (int64_t c = 0; data != nullptr && c < n; ++c) {
      const int32_t id = data[c * stride];
      has_negative |= id < 0;
      if (id >= 0 && id < low) low = id;
      if (id > high) high = id;
    }
  }
  int32_t operator[](int64_t c) const { return data[c * stride]; }
};

// What keys [j0, j0 + n) are to the block: seen by none of its rows, by some, or all by all.
static Cover cover_of(const QueryBlock& block, int64_t j0, int64_t n, const KeyIds& documents, const KeyIds& images) {
  const int64_t j1 = j0 + n - 1;
  if (j0 > block.max_last || j1 < block.min_first) return Cover::kNone;
  Cover cover = j0 >= block.max_first && j1 <= block.min_last ? Cover::kWhole : Cover::kPart;
  if (documents.data != nullptr) {
    if (documents.high < block.min_document || documents.low > block.max_document) return Cover::kNone;
    const bool same = documents.low == documents.high && block.min_document == block.max_document;
    if (!same || documents.has_negative) cover = Cover::kPart;
  }
  if (j1 > block.min_diagonal) {
    const bool shared_image = images.data != nullptr && images.high >= block.min_image && images.low <= block.max_image;
    if (j0 > block.max_diagonal && !shared_image) return Cover::kNone;
    cover = Cover::kPart;
  }
  return cover;
}

// All ones where the rows at `lane` see key j0 + c.
static inline VecInt visible(const QueryBlock& block, int64_t lane, int64_t j0, int64_t c, const KeyIds& documents,
                             const KeyIds& images) {
  const VecInt j = broadcast(static_cast<int32_t>(j0 + c));
  VecInt seen = (j <= load_vec(block.diagonal + lane));
  if (images.data != nullptr && images[c] >= 0) seen |= load_vec(block.image + lane) == images[c];
  seen &= (j >= load_vec(block.first + lane)) & (j <= load_vec(block.last + lane));
  if (documents.data != nullptr) seen &= documents[c] < 0 ? VecInt{} : load_vec(block.document + lane) == documents[c];
  return seen;
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
