// Backward of linear cross-entropy: each tile of logits, kept (kept_logits.h) or computed again, is turned into its
// gradient.
//
// For a block of classes and a block of the counted tokens: the gradient G of their logits, at most 4 MiB, then
// grad_weight += G H and grad_hidden += G^T W. A thread makes the rows of G whose grad_weight it computes, and adds up
// the same features of grad_hidden in every block (team_tasks.h); what others have written of G and W is fetched during
// the product with H, and what the next block starts with during the one with W. Products of AMX tiles wait for memory
// themselves: beside the one with H, which then comes last, the next rows of W are fetched. The outer loop is the
// vocabulary's.
// Tokens that are a single block give grad_weight whole, a tile of it at a time in first-level cache; else fp32 sums of
// it are kept for a block of classes. Those of hidden's are kept for all tokens, or, where a 16-bit gradient of many
// tokens would need more than kHiddenSumBytes of fp32 sums, for groups of tokens, with another pass over everything for
// the weight. 6 N V E flops with forward's where all logits were kept, 8 where none were (10 with the second pass).
#pragma once

#include "loss/gradient.h"
#include "loss/gradient_memory.h"
#include "loss/linear_cross_entropy.h"
#include "product/team_tasks.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// One backward call: its scratch, and the passes over (vocabulary, tokens).
template <class T>
class LinearBackward {
 public:
  LinearBackward(const LinearCrossEntropyArgs& args, const Classes& classes_of_call, const Counted& rows, int threads,
                 PartOfTokens part_of_call)
      : a(args),
        part(part_of_call),
        classes(classes_of_call),
        cap(args.softcap),
        counted(rows),
        weight(args.weight, nullptr),
        hidden(args.hidden, rows.rows.get()),
        E(args.hidden.size[1]),
        V(args.weight.size[0]),
        tokens(rows.count),
        features(E, !kHasAmx),
        kept(KeptLogits<T>::filled(args, tokens)),
        sizes(BackwardSizes<T>::of(rows.count, E, V)),
        thread_floats(copied_weight_floats(args, weight, sizes.tile_rows)),
        team(team_size(threads, thread_floats)),
        tasks(team),
        scratch(team * thread_floats),
        token_lanes(sizes.strips * strip_size<T>(E)),
        token_columns(args.grad_weight.defined ? sizes.token_column_floats() * features.count : 0),
        weight_columns(args.grad_hidden.defined ? sizes.weight_column_floats() * features.count : 0),
        gradient_rows(LogitGradient<T>::row_elements(sizes.strips, sizes.classes)),
        gradient_others(LogitGradient<T>::other_elements(sizes.strips, sizes.classes)),
        gradient{gradient_rows.get(), gradient_others.get(), sizes.strips, sizes.classes},
        bias_sums(args.grad_bias.defined ? sizes.classes * sizes.strips : 0),
        slopes(sizes.strips),
        hidden_sums(needs_hidden_sums() ? min_of(sizes.group, tokens.count) * kStripCols * sum_stride(E) : 0),
        weight_sums(args.grad_weight.defined && needs_weight_sums() ? sizes.classes * E : 0) {}

  void run() {
    const bool wants_rows = a.grad_weight.defined || a.grad_bias.defined;
    if (tokens.count == 0) return clear_rows<T>(a);
    if (needs_hidden_sums() && sizes.group < tokens.count) {
      for (int64_t s = 0; s < tokens.count; s += sizes.group)
        pass(s, min_of(s + sizes.group, tokens.count), true, false);
      if (wants_rows) pass(0, tokens.count, false, true);
    } else if (a.grad_hidden.defined || wants_rows) {
      pass(0, tokens.count, a.grad_hidden.defined, wants_rows);
    }
  }

 private:
  bool needs_hidden_sums() const { return a.grad_hidden.defined && !holds_sums(a.grad_hidden); }
  // Beside grad_weight: a block of tokens must leave the logits alone that it keeps for the next.
  bool needs_weight_sums() const {
    return sizes.strips < tokens.count && (!holds_sums(a.grad_weight) || kept.uses_gradient());
  }

  // Sums the gradients of hidden (of the strips [begin, end) of tokens) or of weight and bias, or both.
  void pass(int64_t begin, int64_t end, bool of_hidden, bool of_rows) {
#pragma omp parallel num_threads(team)
    {
      [[maybe_unused]] const AmxTiles tiles;
      TeamTasks::Round round;
      for (int64_t v = 0; v < V; v += sizes.classes) {
        const int64_t rows = min_of(sizes.classes, V - v);
        if (of_hidden)
          pack_columns_by_team(weight, v, rows, rows, features, sizes.weight_column_floats(), weight_columns.get());
        for (int64_t first = begin; first < end; first += sizes.strips) {
          const int64_t last = min_of(end, first + sizes.strips);
          gradient_by_team(v, rows, first, last, round);
#pragma omp barrier
          const int64_t next_v = last < end ? v : v + rows;
          if (of_rows && !kHasAmx) take_rows_by_team(v, rows, first, last, V, round);
          if (of_hidden) take_hidden_by_team(v, rows, first, last, begin, next_v, round);
          if (of_rows && kHasAmx) take_rows_by_team(v, rows, first, last, of_hidden && next_v > v ? next_v : V, round);
#pragma omp barrier  // or a thread that is ahead would overwrite what another still multiplies
        }
      }
      if (of_hidden && needs_hidden_sums()) {
#pragma omp for schedule(static)
        for (int64_t n = tokens.begin(begin); n < min_of(tokens.size, tokens.begin(end)); ++n)
          store_elements(hidden_row(n, begin), E, row_of<T>(a.grad_hidden, counted.rows[n]), a.grad_hidden.stride[1]);
      }
    }
  }

  // The gradients of the logits of classes [v, v + rows) and the strips [first, last) of tokens; and their sums over
  // each strip.
  void gradient_by_team(int64_t v, int64_t rows, int64_t first, int64_t last, TeamTasks::Round& round) {
    // Tokens that are a single block are packed once for the whole vocabulary.
    if (v == 0 || sizes.strips < tokens.count) {
      pack_lanes_by_team(hidden, tokens, first, last, E, token_lanes.get(),
                         [&](int64_t s) { return !kept.has_all(s); });
      const int64_t n = tokens.begin(first), end = tokens.begin(last);
      if (a.grad_weight.defined)
        pack_columns_by_team(hidden, n, min_of(tokens.size, end) - n, end - n, features, sizes.token_column_floats(),
                             token_columns.get());
#pragma omp for schedule(static)
      for (int64_t s = first; s < last; ++s)
        slopes[s - first].load(a, classes, counted.rows.get() + tokens.begin(s), tokens.used(s));
    }
    const bool smoothing = classes.smoothing > 0.0f;
    const int64_t tiles = ceil_div(rows, sizes.tile_rows), groups = ceil_div(last - first, kTaskStrips);
    tasks.run(round, tiles * groups, [&](int64_t task) {
      const int64_t row = task / groups * sizes.tile_rows, begin = first + task % groups * kTaskStrips;
      WeightTile<T> tile_weight(a, weight, scratch.get() + omp_get_thread_num() * thread_floats);
      const int64_t count = min_of(sizes.tile_rows, rows - row);
      const int64_t end = min_of(last, begin + kTaskStrips);
      tile_weight.load(classes, v + row, count, !kept.has_all_of(begin, end, v + row));
      for (int64_t s = begin; s < end; ++s) {
        alignas(64) float own[kTileRows * kStripCols];
        float* tile = LogitGradient<T>::kPairs ? own : gradient.tile(s - first, row);
        const int64_t lanes = tokens.lanes(s);
        const char* ahead = s + 1 < last ? kept.memory(s + 1, v + row) : kept.memory(first, v + row + count);
        const GradientTile gradients{a,       classes, cap,   slopes[s - first],
                                     v + row, count,   lanes, smoothing ? tile_weight.class_weight : nullptr,
                                     ahead};
        if (!kept.has(s, v + row)) {
          NoWork nothing;
          const float* strip = token_lanes.get() + (s - first) * strip_size<T>(E);
          tile_weight.logits(strip, lanes, E, tile, nothing, s + 1 < end ? strip + strip_size<T>(E) : nullptr);
          gradients.of_logits(tile, kStripCols, tile);
        } else if (kept.is_short()) {
          gradients.of_steps(kept.origins(s, v + row), kept.steps(s, v + row), 1.0f / KeptLogits<T>::kSteps,
                             kept.label_logits(s), tile);
        } else {
          gradients.of_logits(kept.logits(s, v + row), lanes, tile);
        }
        gradient.store(tile, count, lanes, s - first, tokens.begin(s) - tokens.begin(first), row);
        for (int64_t r = 0; a.grad_bias.defined && r < count; ++r) {
          Vec sum = {};
          for (int64_t lane = 0; lane < lanes; lane += kLanes) sum += load_vec(tile + r * kStripCols + lane);
          bias_sums[(row + r) * sizes.strips + s - first] = sum_of(sum);
        }
      }
    });
  }

  // grad_hidden of the strips [first, last) += G^T W of a block of classes. The next block is that of the class
  // `next_v`.
  void take_hidden_by_team(int64_t v, int64_t rows, int64_t first, int64_t last, int64_t group, int64_t next_v,
                           TeamTasks::Round& round) {
    const int64_t groups = ceil_div(last - first, kTaskStrips), columns = ceil_div(features.count, kTaskStrips);
    const int64_t depth = Operands<T>::depth(rows);
    Memory list[kMostAsked];
    // Nothing is fetched beside products of AMX tiles, which wait for memory most
    // (docs/notes/2026-11-linear-loss-amx.md).
    PrefetchList<2, 4> next(list);
    if (!kHasAmx) ask_for_block(next_v, next_v > v ? group : last, next_v > v, next);
    tasks.run(round, groups * columns, [&](int64_t task) {
      const int64_t begin = first + task % groups * kTaskStrips, feature = task / groups * kTaskStrips;
      const int64_t end = min_of(last, begin + kTaskStrips);
      for (int64_t f = feature; f < min_of(feature + kTaskStrips, features.count); ++f) {
        if constexpr (kHasAmx) take_hidden_rows(v, first, begin, end, group, f, depth);
        for (int64_t s = begin; !kHasAmx && s < end; ++s) {
          alignas(64) float tile[kStripCols * kStripCols];
          const int64_t n = tokens.begin(s), count = tokens.used(s), e = features.begin(f);
          Then<PrefetchToWrite, PrefetchList<2, 4>> ahead{
              PrefetchToWrite({reinterpret_cast<const char*>(hidden_row(n, group) + e),
                               features.used(f) * int64_t{sizeof(float)}, hidden_stride(), count}),
              next};
          const float* strip = weight_columns.get() + f * sizes.weight_column_floats();
          multiply_strip(gradient.of_tokens(s - first, n - tokens.begin(first)), count, features.lanes(f) / kLanes,
                         strip, depth, tile, kStripCols, ahead,
                         s + 1 == end && f + 1 < features.count ? strip + sizes.weight_column_floats() : strip);
          next = ahead.second;
          for (int64_t i = 0; i < count; ++i)
            add_row(tile + i * kStripCols, features.used(f), v > 0, hidden_row(n + i, group) + e);
        }
      }
    });
  }

  // The same of strips [begin, end), of whose block `first` is the first, and a strip of features, where there are
  // tiles: one product, added to sums that are whole vectors where they stand.
  void take_hidden_rows(int64_t v, int64_t first, int64_t begin, int64_t end, int64_t group, int64_t f,
                        int64_t depth) const {
    alignas(64) float tile[kTaskStrips * kStripCols * kStripCols];
    const int64_t n = tokens.begin(begin), count = min_of(tokens.size, tokens.begin(end)) - n, e = features.begin(f);
    const bool stays = needs_hidden_sums() && E % kLanes == 0;
    float* const to = stays ? hidden_row(n, group) + e : tile;
    amx_product(gradient.of_tokens(begin - first, n - tokens.begin(first)), count, features.lanes(f) / kLanes, depth,
                weight_columns.get() + f * sizes.weight_column_floats(), kStripCols, to,
                stays ? sum_stride(E) : kStripCols, stays && v > 0);
    for (int64_t i = 0; !stays && i < count; ++i)
      add_row(tile + i * kStripCols, features.used(f), v > 0, hidden_row(n + i, group) + e);
  }

  // This thread's share of the weight's rows in the block of classes from v on, as far as they are contiguous.
  Memory weight_of_block(int64_t v) const {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), rows = min_of(sizes.classes, V - v);
    if (rows <= 0 || weight.col_stride != 1 || weight.row_stride != E) return {};
    const int64_t begin = rows * me / threads, end = rows * (me + 1) / threads;
    return Memory::of(weight.row(v + begin), (end - begin) * E * int64_t{sizeof(T)});
  }

  // What this thread reads first of the block of classes from v on and the block of tokens from strip `first` on: kept
  // logits, and rows of the weight if they are new.
  template <class List>
  void ask_for_block(int64_t v, int64_t first, bool new_rows, List& list) const {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), rows = min_of(sizes.classes, V - v);
    if (rows <= 0) return;
    const int64_t tiles = ceil_div(rows, sizes.tile_rows);
    kept.for_memory(first, min_of(tokens.count, first + sizes.strips), v / sizes.tile_rows + tiles * me / threads,
                    v / sizes.tile_rows + tiles * (me + 1) / threads,
                    [&](const void* data, int64_t bytes) { list.add(Memory::of(data, bytes)); });
    if (new_rows) list.add(weight_of_block(v));
  }

  // The fp32 sums of counted token n, in a group that starts with strip `group`.
  float* hidden_row(int64_t n, int64_t group) const {
    return needs_hidden_sums() ? hidden_sums.get() + (n - tokens.begin(group)) * sum_stride(E)
                               : row_of<float>(a.grad_hidden, counted.rows[n]);
  }

  // In bytes; between counted tokens that are not neighbours it is larger, and only memory is fetched in vain.
  int64_t hidden_stride() const {
    return (needs_hidden_sums() ? sum_stride(E) : a.grad_hidden.stride[0]) * static_cast<int64_t>(sizeof(float));
  }

  // The gradients of weight and bias, or their sums so far, for a block of classes from the strips [first, last).
  // AmxTiles: rows of the weight from class `next_v` on are packed next.
  void take_rows_by_team(int64_t v, int64_t rows, int64_t first, int64_t last, int64_t next_v,
                         TeamTasks::Round& round) {
    if (a.grad_bias.defined) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        float sum = 0.0f;
        for (int64_t s = first; s < last; ++s) sum += bias_sums[r * sizes.strips + s - first];
        float& total = at<float>(a.grad_bias, v + r);
        total = first > 0 || !part.is_first ? total + sum : sum;
      }
    }
    if (!a.grad_weight.defined) return;
    const int64_t tiles = ceil_div(rows, kTileRows), columns = ceil_div(features.count, kTaskStrips);
    const bool is_final = part.is_last && (last == tokens.count || !needs_weight_sums());
    const bool is_streamed = is_final && StreamedRows::serves(a.grad_weight);
    Memory list[kMostAsked];
    PrefetchList<2, 1> others(list);
    if (!kHasAmx) ask_for_others(rows, last - first, others);
    const int64_t depth = (tokens.begin(last) - tokens.begin(first)) / kPerStep;
    [[maybe_unused]] PrefetchEvenly next(weight_of_block(next_v),
                                         features.count * amx_steps(rows, depth) / omp_get_num_threads());
    tasks.run(round, tiles * columns, [&](int64_t task) {
      const int64_t row = task / columns * kTileRows, count = min_of(kTileRows, rows - row);
      const int64_t feature = task % columns * kTaskStrips, end = min_of(feature + kTaskStrips, features.count);
      StreamedRows streamed;
      for (int64_t f = feature; f < end; ++f) {
        alignas(64) float tile[kTileRows * kStripCols];
        Then<PrefetchToWrite, Then<PrefetchToWrite, PrefetchList<2, 1>>> ahead{
            PrefetchToWrite(weight_rows_ahead(v, row, count, f, last)),
            {PrefetchToWrite(halves_ahead(v, row, count, f)), others}};
        const float* columns = token_columns.get() + f * sizes.token_column_floats();
        const int64_t vectors = features.lanes(f) / kLanes;
        if constexpr (kHasAmx) {
          multiply_strip(gradient.of_classes(row), count, vectors, columns, depth, tile, kStripCols, next);
        } else {
          multiply_tokens(tokens, first, last, kPerStep, count, vectors, gradient.of_classes(row),
                          sizes.classes * kStripCols, columns, tile, ahead);
        }
        others = ahead.second.second;
        for (int64_t r = 0; r < count; ++r)
          take_weight_row(v, row + r, f, first, last, tile + r * kStripCols, !is_streamed);
        if (is_streamed)
          streamed.put(tile, count, features.used(f), f + 1 == end,
                       row_of<T>(a.grad_weight, v + row) + features.begin(f), a.grad_weight.stride[0]);
      }
    });
    if (is_streamed) StreamedRows::finish();
  }

  // What this thread's products for grad_hidden will read and others have written: gradients of logits, and packed rows
  // of the weight.
  template <class List>
  void ask_for_others(int64_t rows, int64_t strips, List& list) const {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t groups = ceil_div(strips, kTaskStrips), products = groups * ceil_div(features.count, kTaskStrips);
    const int64_t begin = products * me / threads, end = products * (me + 1) / threads;
    if (!a.grad_hidden.defined || threads == 1 || begin == end) return;
    // Without the part of the depth, rows of the weight, that this thread has written.
    const auto add_strip = [&](const char* data, int64_t bytes) {
      const int64_t depth = Operands<T>::depth(rows);
      const int64_t own = depth * me / threads * bytes, after = depth * (me + 1) / threads * bytes;
      list.add(Memory::of(data, own));
      list.add(Memory::of(data + after, depth * bytes - after));
    };
    constexpr int64_t kBytes = kStripCols * sizeof(float);
    for (int64_t f = begin / groups * kTaskStrips; f < min_of(features.count, ceil_div(end, groups) * kTaskStrips); ++f)
      add_strip(reinterpret_cast<const char*>(weight_columns.get() + f * sizes.weight_column_floats()), kBytes);
    for (int64_t i = 0; i < min_of(strips, (end - begin) * kTaskStrips); ++i)
      add_strip(gradient.of_products((begin % groups * kTaskStrips + i) % strips), kBytes);
  }

  // What take_weight_row is about to write.
  Memory weight_rows_ahead(int64_t v, int64_t row, int64_t count, int64_t f, int64_t last) const {
    const int64_t e = features.begin(f), used = features.used(f), stride = a.grad_weight.stride[0];
    if (needs_weight_sums() && last < tokens.count)
      return memory_of(Rows<float>{weight_sums.get() + row * E + e, E, 1}, count, used);
    return memory_of(Rows<T>{row_of<T>(a.grad_weight, v + row) + e, stride, a.grad_weight.stride[1]}, count, used);
  }
  Memory halves_ahead(int64_t v, int64_t row, int64_t count, int64_t f) const {
    if (a.weight_sum_halves == nullptr) return {};
    return memory_of(Rows<uint16_t>{halves_of(v + row, features.begin(f)).low, E, 1}, count, features.used(f));
  }

  Halves halves_of(int64_t row, int64_t e) const {
    return {static_cast<uint16_t*>(a.grad_weight.data) + row * E + e, a.weight_sum_halves + row * E + e};
  }

  // Adds what is known of a row's strip and stores it, unless it is whole and to be stored elsewhere.
  void take_weight_row(int64_t v, int64_t row, int64_t f, int64_t first, int64_t last, float* from,
                       bool stores_whole) const {
    const int64_t e = features.begin(f), used = features.used(f);
    float* sums = weight_sums.get() + row * E + e;
    const bool has_sums = needs_weight_sums();
    if (has_sums && last < tokens.count) return add_row(from, used, first > 0, sums);
    if (has_sums && first > 0) add_row(sums, used, true, from);
    if (holds_sums(a.grad_weight))
      return add_row(from, used, !part.is_first || (first > 0 && !has_sums), row_of<float>(a.grad_weight, v + row) + e);
    if (!part.is_first) halves_of(v + row, e).add_to(from, used);
    if (!part.is_last) return halves_of(v + row, e).store(from, used);
    if (!stores_whole) return;
    store_elements(from, used, row_of<T>(a.grad_weight, v + row) + e * a.grad_weight.stride[1],
                   a.grad_weight.stride[1]);
  }

  static constexpr int64_t kMostAsked = 4 * kMaxBackwardStrips;
  static constexpr int64_t kPerStep = Operands<T>::kPairs ? 2 : 1;  // tokens

  const LinearCrossEntropyArgs& a;
  const PartOfTokens part;
  const Classes& classes;
  const Cap cap;
  const Counted& counted;
  const RowsOf<T> weight, hidden;
  const int64_t E, V;
  const Strips tokens, features;
  const KeptLogits<T> kept;
  const BackwardSizes<T> sizes;
  const int64_t thread_floats;
  const int team;
  const TeamTasks tasks;
  const Buffer<float> scratch, token_lanes, token_columns, weight_columns;
  const Buffer<typename Operands<T>::Element> gradient_rows, gradient_others;
  const LogitGradient<T> gradient;
  const Buffer<float> bias_sums;  // [class][strip]
  const Buffer<TokenSlopes> slopes;
  const Buffer<float> hidden_sums, weight_sums;
};

template <class T>
static void linear_backward(const LinearCrossEntropyArgs& a, int threads, PartOfTokens part = {}) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Counted counted(a, classes, N);
  for (int64_t row = 0; a.grad_hidden.defined && row < N; ++row) {
    const int64_t label = at<int64_t>(a.target, row);
    if (classes.counted(label)) continue;
    const T nothing = from_float<T>(classes.ignored(label) ? 0.0f : kNaN);
    for (int64_t e = 0; e < E; ++e) row_of<T>(a.grad_hidden, row)[e * a.grad_hidden.stride[1]] = nothing;
  }
  LinearBackward<T>(a, classes, counted, threads, part).run();
}

}  // namespace loss

static void linear_cross_entropy_backward(const LinearCrossEntropyArgs& a, int threads) {
  loss::get_gradients(a, threads);
  with_operands(a.hidden.dtype, [&](auto zero) { loss::linear_backward<decltype(zero)>(a, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
