// How a call of attention is divided: rows of tensors behind a block's lanes, and the strips and tasks.
#pragma once

#include "attention/scores.h"
#include "product/packing.h"
#include "product/register_tile.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Hands out one consecutive place after another of a thread's scratch; with no base it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t count) {
    float* place = base_ == nullptr ? nullptr : base_ + used_;
    used_ += round_up(count, 16);
    return place;
  }
  int64_t used() const { return used_; }

 private:
  float* base_;
  int64_t used_ = 0;
};

// Strips of queries in a task.
constexpr int kStrips = 4;

// The rows of a block's lanes are one to one those of q, out and what has their shape (B, H, S, ...).
static inline int64_t row_offset(const View& view, const QueryBlock& block, int64_t lane) {
  return block.sequence.batch * view.stride[0] + block.head[lane] * view.stride[1] +
         (block.sequence.query0 + block.index[lane]) * view.stride[2];
}

template <class T>
static Rows<T> query_row(const View& view, const QueryBlock& block, int64_t lane) {
  return {static_cast<T*>(view.data) + row_offset(view, block, lane), 0, view.stride[3]};
}

// The rows of all lanes, where they are evenly spaced: those of one head; none else.
template <class T>
ALWAYS_INLINE static void prefetch_queries(const View& view, const QueryBlock& block) {
  if (!block.are_even(0, block.count)) return;
  Rows<T> rows = query_row<T>(view, block, 0);
  rows.row_stride = view.stride[2];
  prefetch_rows(rows, 0, block.count, view.size[3]);
}

// Rows j0 and on of k or v, or of their gradients.
template <class T>
static Rows<T> key_rows(const View& view, const Sequence& sequence, int64_t kv_head, int64_t j0) {
  T* data = static_cast<T*>(view.data) + sequence.batch * view.stride[0] + kv_head * view.stride[1] +
            (sequence.key0 + j0) * view.stride[2];
  return {data, view.stride[2], view.stride[3]};
}

// to[i * width + d] = the row of `view` behind lane + i, for i < lanes; zeros behind lanes not in use.
template <class T>
static void pack_queries(const View& view, const QueryBlock& block, int64_t lane, int64_t lanes, float* to,
                         int64_t width) {
  const int64_t cols = view.size[3], used = clamp(block.count - lane, 0, lanes);
  for (int64_t i = 0; i < used; ++i) pack<T>(query_row<const T>(view, block, lane + i), 1, cols, to + i * width, width);
  for (int64_t i = used * width; i < lanes * width; ++i) to[i] = 0.0f;
}

// The same with queries in the lanes, transposed[d * kQueries + lane], and as rows where these are asked for.
template <class T>
static void load_widened(const View& view, const QueryBlock& block, float* scratch, int64_t width, float* transposed,
                         float* rows) {
  const int64_t cols = view.size[3];
  for (int64_t lane = 0; lane < block.width; lane += kLanes) {
    if constexpr (sizeof(T) == sizeof(float))
      if (rows == nullptr && block.are_even(lane, kLanes) && view.stride[3] == 1 && cols >= kLanes) {
        transpose_rows(query_row<const T>(view, block, lane).data, view.stride[2], cols, transposed + lane, kQueries);
        continue;
      }
    float* to = rows == nullptr ? scratch : rows + lane * width;
    pack_queries<T>(view, block, lane, kLanes, to, width);
    transpose(to, width, kLanes, cols, transposed + lane, kQueries);
  }
}

// The other way: the row of `view` behind each lane becomes from[d * kQueries + lane] factors[lane]. `scratch` takes
// kLanes * width floats, width being that of whole vectors.
template <class T>
static void store_queries(const View& view, const QueryBlock& block, const float* from, const float* factors,
                          float* scratch, int64_t width) {
  const int64_t cols = view.size[3];
  const bool is_whole = view.stride[3] == 1 && cols >= kLanes;
  for (int64_t lane = 0; lane < block.count; lane += kLanes) {
    const int64_t used = min_of(kLanes, block.count - lane);
    const Vec factor = load_vec(factors + lane);
    for (int64_t begin = 0; begin < cols; begin += kLanes) {
      const int64_t c = is_whole && begin + kLanes > cols ? cols - kLanes : begin;
      Vec square[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) square[i] = load_vec(from + (c + i) * kQueries + lane) * factor;
      exchange<1>(square);
      if (is_whole)
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          if (i < used) store_narrow(query_row<T>(view, block, lane + i).data + c, square[i]);
        }
      else
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_vec(scratch + i * width + c, square[i]);
    }
    for (int64_t i = 0; !is_whole && i < used; ++i)
      unpack<T>(scratch + i * width, width, 1, cols, 1.0f, query_row<T>(view, block, lane + i));
  }
}

// The work of a call: strips of (sequence, key head), sequences one after the other. The vectors of queries are divided
// evenly among a key head's strips: 577 queries are 11 strips of 48 and two of 32, not 12 of 48 and one of 16.
struct QueryWork {
  const AttentionArgs& args;
  int64_t strips_per_task;
  Buffer<int64_t> first;  // task of each sequence, and the end

  QueryWork(const AttentionArgs& a, int64_t strips_per_task)
      : args(a), strips_per_task(strips_per_task), first(sequence_count(a) + 1) {
    const int64_t B = sequence_count(a);
    first[0] = 0;
    for (int64_t b = 0; b < B; ++b) first[b + 1] = first[b] + a.k.size[1] * tasks(sequence_at(a, b));
  }
  int64_t count() const { return first[sequence_count(args)]; }
  int64_t rows(const Sequence& s) const { return args.q.size[1] / args.k.size[1] * s.S; }
  int64_t strips(const Sequence& s) const { return ceil_div(rows(s), kQueries); }
  int64_t tasks(const Sequence& s) const { return ceil_div(strips(s), strips_per_task); }
  // The first row of a strip; of the one past the last, the end.
  int64_t strip_begin(const Sequence& s, int64_t strip) const {
    return min_of(rows(s), ceil_div(rows(s), kLanes) * strip / max_of(strips(s), 1) * kLanes);
  }
  void get_strip(const Sequence& s, int64_t kv_head, int64_t strip, QueryBlock& block) const {
    const int64_t row = strip_begin(s, strip);
    make_query_block(args, s, kv_head, row, strip_begin(s, strip + 1) - row, block);
  }

  // Fills `blocks` with the task's strips; returns how many.
  int64_t get(int64_t task, QueryBlock* blocks) const {
    int64_t low = 0, high = sequence_count(args);  // first[low] <= task < first[high]
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first[middle] <= task ? low : high) = middle;
    }
    const Sequence sequence = sequence_at(args, low);
    const int64_t local = task - first[low], per_head = tasks(sequence);
    // Last rows first: under a causal mask they see most keys.
    const int64_t place = per_head - 1 - local % per_head;
    const int64_t begin = strips(sequence) * place / per_head, end = strips(sequence) * (place + 1) / per_head;
    for (int64_t strip = begin; strip < end; ++strip)
      get_strip(sequence, local / per_head, strip, blocks[strip - begin]);
    return end - begin;
  }
};

static int64_t total_strips(const AttentionArgs& a) {
  const QueryWork work(a, 1);
  return work.count();
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
