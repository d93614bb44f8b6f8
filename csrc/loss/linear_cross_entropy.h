// Cross-entropy of logits = hidden @ weight^T + bias that are never written whole: forward here, backward in
// linear_cross_entropy_backward.h.
//
// Tokens stand in the lanes. Some strips of counted tokens (ignored rows are dropped first) are packed
// once, shared by all threads; a task takes a range of the vocabulary, kTileRows rows of the weight at a
// time, and turns each tile of logits (kTileRows x kStripCols, in first-level cache) into the running statistics
// of loss/loss.h: no horizontal sums. The ranges' statistics are merged in the order of the vocabulary. 2
// N V E flops; bytes: the weight once per kMaxForwardStrips strips of tokens, hidden once.
//
// Ranges, tiles and depths follow from N, V and E alone, and every sum has one thread, so results do not
// depend on how many threads there are. Scratch: packed tokens and statistics, 4 MiB each (sizes.h), with AMX
// and many features another 16 MiB (deep.h), and per-token scalars.
#pragma once

#include <omp.h>

#include "args.h"
#include "loss/deep.h"
#include "loss/kept_logits.h"
#include "loss/statistics.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

// What is fetched beside the products of a tile of the weight with so many strips: the next tile before `end`.
template <class T>
static auto next_weight(const WeightTile<T>& rows, int64_t tile_rows, int64_t end, int64_t strips) {
  const Memory next = rows.next_tile(tile_rows, end);
  if constexpr (kHasAmx)
    return PrefetchEvenly(next, strips * amx_steps(rows.count, Operands<T>::depth(rows.args.weight.size[1])));
  else
    return PrefetchLines<2>(next);
}

template <class T>
static void linear_forward(const LinearCrossEntropyArgs& a, int threads) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Cap cap(a.softcap);
  const Counted counted(a, classes, N);
  // An empty header; and small memory whole, so that a small call returns the same bytes whenever it is repeated.
  if (a.kept.defined && a.kept.size[0] > 0) std::memset(a.kept.data, 0, min_of(a.kept.size[0], 64 << 10));
  for (int64_t row = 0; row < N; ++row)
    if (!classes.counted(at<int64_t>(a.target, row))) write_uncounted_row(a, classes, row);
  if (counted.count == 0) return;

  const RowsOf<T> weight(a.weight, nullptr), hidden(a.hidden, counted.rows.get());
  const Strips strips(counted.count);
  const int64_t block = forward_strips<T>(E, strips.count), tile_rows = weight_rows<T>(E);
  const int64_t range_rows = round_up(max_of(kMinRangeRows, ceil_div(V, kMaxRanges)), tile_rows);
  const int64_t ranges = ceil_div(V, range_rows), thread_floats = copied_weight_floats(a, weight, tile_rows);
  const int team = team_size(threads, thread_floats);
  const int64_t packed_floats = block * strip_size<T>(E);
  const Buffer<float> packed(packed_floats), scratch(team * thread_floats), target_z(block * kStripCols);
  const Buffer<Lanes> partial(ranges * block);
  const Buffer<double> range_weight(ranges);
  const bool smoothing = classes.smoothing > 0.0f;
  const DeepLogits<T> deep(a, weight, block, team);
  const int64_t scratch_bytes =
      max_of(packed_floats * 4 + ranges * block * int64_t{sizeof(Lanes)} + deep.bytes(E, block),
             BackwardSizes<T>::of(counted.count, E, V).bytes(counted.count, E, a.keeps_in_gradient));
  const int64_t thread_bytes = thread_floats > 0 ? kThreadBytes : 0;  // however many threads there are
  const auto kept = KeptLogits<T>::to_fill(a, strips, kExtraBytes - scratch_bytes - thread_bytes, threads);

#pragma omp parallel num_threads(team)
  for (int64_t first = 0; first < strips.count; first += block) {
    [[maybe_unused]] const AmxTiles tiles;
    const int64_t last = min_of(strips.count, first + block);
    const auto strip_of = [&](int64_t s) { return packed.get() + (s - first) * strip_size<T>(E); };
    pack_lanes_by_team(hidden, strips, first, last, E, packed.get(), [](int64_t) { return true; });
#pragma omp for schedule(dynamic, 1)
    for (int64_t range = 0; range < ranges; ++range) {
      Lanes* lanes = partial.get() + range * block;
      for (int64_t s = first; s < last; ++s) lanes[s - first].clear();
      WeightTile<T> rows(a, weight, scratch.get() + omp_get_thread_num() * thread_floats);
      double weight_before = 0.0;
      const int64_t end = min_of(V, (range + 1) * range_rows);
      for (int64_t v = range * range_rows; v < end; v += tile_rows) {
        rows.load(classes, v, min_of(tile_rows, end - v));
        // Of other ranges' tiles the first may be another thread's: not beside products of AMX tiles.
        auto weight_ahead = next_weight(rows, tile_rows, kHasAmx ? end : V, last - first);
        const int64_t index = (v - range * range_rows) / tile_rows;
        deep.multiply(index, v, end, tile_rows, packed.get(), strips, first, last);
        for (int64_t s = first; s < last; ++s) {
          alignas(64) float own[kTileRows * kStripCols];
          float* const tile = deep ? deep.tile(index, s - first) : own;
          Then<PrefetchToWrite, decltype(weight_ahead)> ahead{PrefetchToWrite(kept.ahead(s, v)), weight_ahead};
          while (kHasAmx && ahead.first.left > 0) ahead.step();
          if (deep)
            rows.add_bias(strips.lanes(s), tile);
          else
            rows.logits(strip_of(s), strips.lanes(s), E, tile, ahead, strip_of(s + 1 < last ? s + 1 : first));
          weight_ahead = ahead.second;
          Lanes& statistics = lanes[s - first];
          if (!kept.is_short()) kept.store(s, v, rows.count, tile, nullptr);
          statistics.take(tile, v, rows.count, strips.lanes(s), rows.class_weight, weight_before, cap, smoothing);
          if (kept.is_short()) kept.store(s, v, rows.count, tile, statistics.largest_of_tile);
          for (int64_t c = 0; c < strips.used(s); ++c) {
            const int64_t r = at<int64_t>(a.target, counted.rows[strips.begin(s) + c]) - v;
            if (r >= 0 && r < rows.count) target_z[(s - first) * kStripCols + c] = tile[r * kStripCols + c];
          }
        }
        weight_before += rows.class_weight_sum;
      }
      range_weight[range] = weight_before;
    }
#pragma omp for schedule(static)
    for (int64_t s = first; s < last; ++s)
      for (int64_t c = 0; c < strips.used(s); ++c) {
        Statistics total;
        for (int64_t range = 0; range < ranges; ++range)
          total.merge(partial[range * block + s - first].of(c, range_weight[range]), cap);
        const float z = target_z[(s - first) * kStripCols + c];
        write_counted_row(a, classes, counted.rows[strips.begin(s) + c], total, z);
        if (kept.has_any()) kept.label_logits(s)[c] = z;
      }
  }
}

}  // namespace loss

static void linear_cross_entropy_forward(const LinearCrossEntropyArgs& a, int threads) {
  with_operands(a.hidden.dtype, [&](auto zero) { loss::linear_forward<decltype(zero)>(a, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA

#include "loss/linear_cross_entropy_backward.h"
#include "loss/linear_cross_entropy_gradients.h"
