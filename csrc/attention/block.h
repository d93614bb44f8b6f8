// Which queries a block holds, which keys each may see, and what a block of keys means for them.
//
// A block is up to kQueries rows of one sequence and one key head. The rows of a key head are those of all query heads
// that share it, head after head, so grouped queries read a key once and a decoding step fills a block with heads.
#pragma once

#include "simd/amx.h"
#include "simd/buffer.h"
#include "simd/vec_math.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// A strip of queries is as wide as the register tile of a matrix product or a small multiple of it;
// a tile of scores is kKeys x kQueries floats (12 KiB), so that at head size 64 it and a strip of q and of out (12 KiB
// each) stay in a first-level cache while keys and values pass by. Both are multiples of every vector's length.
constexpr int kQueries = 48;
constexpr int kQueryVectors = kQueries / kLanes;
constexpr int kKeys = 64;
// The last block of keys takes in up to a quarter more: a block of few keys passes over all of out like a whole one.
constexpr int kMaxKeys = kKeys + kKeys / 4;
// Forward, out passes by half as often with blocks twice as long, and what a mask hides is left out (`TileKeys`); but
// the last kShortKeys of a sequence come in short blocks, which suit sequences that are no longer than that.
constexpr int kForwardKeys = 2 * kKeys;
constexpr int kShortKeys = 5 * kKeys;

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

// Whether decode.h takes a sequence forward: it has queries, few enough, and all rows are contiguous. More
// are better served by forward.h, which has queries in the lanes.
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
  int32_t vector_last[kQueryVectors];  // the largest of `last` in a vector of rows and in those before

  int64_t key_begin() const { return min_first / kKeys * kKeys; }
  int64_t key_end() const { return max_last + 1; }
  // Whether rows [lane, lane + n) are in use and of one head, and so evenly spaced in memory.
  bool are_even(int64_t lane, int64_t n) const { return lane + n <= count && head[lane] == head[lane + n - 1]; }
};

// The rows [row, row + count) of one key head, count <= kQueries.
static void make_query_block(const AttentionArgs& a, const Sequence& sequence, int64_t kv_head, int64_t row,
                             int64_t count, QueryBlock& block) {
  const int64_t group = a.q.size[1] / a.k.size[1], width = round_up(count, kLanes);
  block.args = &a, block.sequence = sequence, block.kv_head = kv_head, block.count = count, block.width = width;
  int64_t head = kv_head * group + row / sequence.S, index = row % sequence.S - 1;
  for (int64_t lane = 0; lane < width; ++lane) {
    if (lane < count && ++index == sequence.S) ++head, index = 0;
    block.head[lane] = head, block.index[lane] = index;
  }
  block.min_image = INT32_MAX, block.max_image = INT32_MIN;
  for (int64_t lane = 0; lane < width; ++lane)
    block.image[lane] = -1, block.document[lane] = 0, block.slope[lane] = 0.0f;
  const auto id_of = [&](const View& ids, int64_t lane) {
    return int_at(ids, sequence.b * ids.stride[0] + block.index[lane] * ids.stride[1]);
  };
  if (a.query_images.defined && a.causal)
    for (int64_t lane = 0; lane < width; ++lane) {
      const int32_t image = id_of(a.query_images, lane);
      block.image[lane] = image;
      if (image >= 0 && image < block.min_image) block.min_image = image;
      if (image > block.max_image) block.max_image = image;
    }
  if (a.query_documents.defined)
    for (int64_t lane = 0; lane < width; ++lane) block.document[lane] = id_of(a.query_documents, lane);
  if (a.alibi_slopes.defined)
    for (int64_t lane = 0; lane < width; ++lane)
      block.slope[lane] = static_cast<const float*>(
          a.alibi_slopes.data)[sequence.b * a.alibi_slopes.stride[0] + block.head[lane] * a.alibi_slopes.stride[1]];
  constexpr int64_t kFar = int64_t{1} << 32;  // no window
  const int64_t left = a.window_left < 0 ? kFar : min_of(a.window_left, 1 << 30);
  const int64_t right = a.window_right < 0 ? kFar : min_of(a.window_right, 1 << 30);
  const int64_t end = sequence.visible_keys - 1, offset = sequence.offset, T = sequence.T;
  const bool causal = a.causal;
#pragma omp simd
  for (int64_t lane = 0; lane < width; ++lane) {
    const int64_t position = clamp(block.index[lane] + offset, -(1 << 30), 1 << 30);
    const int64_t diagonal = causal ? position : INT32_MAX, within = min_of(end, position + right);
    const bool has_image = block.image[lane] >= 0;
    const int64_t last = max_of(has_image ? within : min_of(within, diagonal), -1);
    block.position[lane] = static_cast<int32_t>(position);
    block.first[lane] = static_cast<int32_t>(clamp(position - left, 0, T));
    block.last[lane] = static_cast<int32_t>(last);
    block.diagonal[lane] = static_cast<int32_t>(has_image ? diagonal : last);
  }
  const auto bound = [width](const int32_t* values, int32_t& least, int32_t& most) {
    int32_t low = INT32_MAX, high = INT32_MIN;
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t lane = 0; lane < width; ++lane) {
      low = values[lane] < low ? values[lane] : low;
      high = values[lane] > high ? values[lane] : high;
    }
    least = low, most = high;
  };
  bound(block.first, block.min_first, block.max_first);
  bound(block.last, block.min_last, block.max_last);
  bound(block.diagonal, block.min_diagonal, block.max_diagonal);
  bound(block.document, block.min_document, block.max_document);
  for (int64_t lane = 0, most = -1; lane < width; ++lane) {
    most = max_of(most, block.last[lane]);
    block.vector_last[lane / kLanes] = static_cast<int32_t>(most);
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
    if (data == nullptr) return;
    int32_t least = INT32_MAX, largest = INT32_MIN;
    uint32_t least_unsigned = INT32_MAX;  // negative ids are larger than all others
    if (stride == 1) {
#pragma omp simd reduction(min : least, least_unsigned) reduction(max : largest)
      for (int64_t c = 0; c < n; ++c) {
        const int32_t id = data[c];
        const uint32_t id_unsigned = static_cast<uint32_t>(id);
        least = id < least ? id : least;
        largest = id > largest ? id : largest;
        least_unsigned = id_unsigned < least_unsigned ? id_unsigned : least_unsigned;
      }
    } else {
      for (int64_t c = 0; c < n; ++c) {
        const int32_t id = data[c * stride];
        least = min_of(id, least), largest = max_of(id, largest);
        if (id >= 0) least_unsigned = min_of(id, least_unsigned);
      }
    }
    has_negative = least < 0;
    low = static_cast<int32_t>(least_unsigned), high = largest;
  }
  int32_t operator[](int64_t c) const { return data[c * stride]; }
  KeyIds from(int64_t c) const {
    KeyIds ids = *this;
    if (data != nullptr) ids.data += c * stride;
    return ids;
  }
};

// Keys of a tile are left out in runs of so many: the rows of a register tile of AVX-512, or of AMX.
constexpr int kKeyRun = kHasAmx ? kAmxSide : 8;
static_assert(kKeys % kKeyRun == 0);

// Keys [begin, end) of a tile, begin and unless it is the tile's also end a multiple of kKeyRun.
struct KeyRange {
  int64_t begin, end;
  bool operator==(const KeyRange& other) const { return begin == other.begin && end == other.end; }
};

// Of the n keys of a tile that is cut, those that queries may see whose keys are [first, last] of it and whose
// documents are [low, high]; both ends 0 where there are none.
static inline KeyRange seen_keys(int64_t n, int64_t first, int64_t last, const KeyIds& documents, int32_t low,
                                 int32_t high) {
  int64_t begin = clamp(first, 0, n), end = clamp(last + 1, 0, n);
  const auto is_other = [&](int64_t c) { return documents[c] < low || documents[c] > high; };
  while (documents.data != nullptr && begin < end && is_other(begin)) ++begin;
  while (documents.data != nullptr && begin < end && is_other(end - 1)) --end;
  if (begin >= end) return {0, 0};
  return {begin / kKeyRun * kKeyRun, min_of(round_up(end, kKeyRun), n)};
}

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
