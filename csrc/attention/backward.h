// Attention backward: FlashAttention-2 (Dao 2023, algorithm 2), scores recomputed from lse, queries in the lanes.
//
// With P = exp(scores - lse), M the dropout factors (1 without dropout) and delta = rowsum(dout * out) - dlse:
//     dV = (M P)^T dout,   dP = dout V^T,   dS = P (M dP - delta),   dbias = dS,
//     dsink = -sum of exp(sink - lse) delta over the rows of a head,
//     dQ = scale (dS cap') K,   dK = scale (dS cap')^T Q,   cap' = 1 - tanh^2 with a softcap, else 1
// A task is a key head of a sequence with all or a share of its strips of queries. It walks groups of up to
// kStrips strips, and for each the key blocks. Per key block and strip it does three products: scores, dP and dQ; then
// for the key block and all of the group's strips at once dV and dK, whose sums over queries are long then. dQ belongs
// to the group; dK and dV are summed in fp32 over the task, T x (D + Dv) floats of scratch, which is not touched where
// no query sees a key. Of a tile that a mask cuts each vector of queries takes part with the keys that one of its
// queries sees, in runs. Where a call has fewer than kTasks key heads, each is shared by several tasks, whose sums
// are added in a fixed order; so the result does not depend on the number of threads, and at most max(kTasks, B Hkv)
// threads find work.
#pragma once

#include <cmath>
#include <initializer_list>

#include "attention/backward_strip.h"
#include "simd/pages.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

constexpr int64_t kTasks = 8;
// Of keys and values, before what the next group needs.
constexpr int64_t kUrgentAsks = 16;

// Neighbouring strips of a key head, whose dV and dK are made together.
struct Group {
  int64_t count = 0;
  QueryBlock blocks[kStrips];
};

// The sums of dK and dV over a task in fp32, in slots of kKeys keys, (kKeys, padded_D) and (kKeys, padded_Dv). A block
// of keys takes the next slot when it is first used, so that no memory is touched for those that no query sees (fresh
// pages cost more than the products of a sparse mask); each run of kKeyRun keys counts only once `has` says so.
struct KeySums {
  float* memory;
  int64_t dk_size, dv_size;  // of a slot
  int64_t* taken;            // slots of `memory`; tasks may share it
  int64_t* slots;            // of each block of keys; -1: none
  uint8_t* has;

  // Before the rows of key j are used.
  void take(int64_t j) const {
    int64_t& slot = slots[j / kKeys];
    if (slot >= 0) return;
    int64_t next;
#pragma omp atomic capture
    next = (*taken)++;
    slot = next;
  }
  float* dk(int64_t j) const { return memory + slots[j / kKeys] * (dk_size + dv_size) + j % kKeys * (dk_size / kKeys); }
  float* dv(int64_t j) const {
    return memory + slots[j / kKeys] * (dk_size + dv_size) + dk_size + j % kKeys * (dv_size / kKeys);
  }
};

// What the next group starts from; its task too if it is_first there.
template <class T>
static void ask_for_group(const AttentionArgs& a, const Group& group, bool is_first, PrefetchWork& work) {
  for (int64_t i = 0; i < group.count; ++i)
    for (const View* view : {&a.q, &a.dout, &a.out}) work.add(memory_of_queries<const T>(*view, group.blocks[i]));
  if (group.count == 0 || !is_first) return;
  const QueryBlock& block = group.blocks[0];
  const int64_t j0 = block.key_begin(), n = clamp(block.key_end() - j0, 0, kKeys);
  work.add(memory_of(key_rows<const T>(a.k, block.sequence, block.kv_head, j0), n, a.k.size[3]));
  work.add(memory_of(key_rows<const T>(a.v, block.sequence, block.kv_head, j0), n, a.v.size[3]));
}

// dK and dV of a block of keys from the group's tiles: for each run of keys, the columns [low, high) that see them.
template <class T>
static void add_to_keys(const KeyTile<T>& tile, const int64_t* low, const int64_t* high, const GradientScratch<T>& s,
                        const KeySums& sums) {
  using P = Products<T>;
  uint8_t* has = sums.has + tile.j0 / kKeyRun;
  const int64_t runs = ceil_div(tile.rows, kKeyRun);
  for (int64_t run = 0, next; run < runs; run = next) {
    next = run + 1;
    while (next < runs && low[next] == low[run] && high[next] == high[run] && has[next] == has[run] &&
           next % (kKeys / kKeyRun) != 0)
      ++next;
    if (low[run] >= high[run]) continue;
    const int64_t begin = run * kKeyRun, count = min_of(next * kKeyRun, tile.rows) - begin, j = tile.j0 + begin;
    const int64_t column = low[run], depth = P::depth(high[run] - column), row = P::depth(column);
    const int64_t at = begin * s.columns() + column;
    sums.take(j);
    const auto add = [&](auto into) {
      product<decltype(into)::value>(count, s.padded_Dv, depth, typename P::RowOperand{s.weights + at, s.columns()},
                                     s.douts + row * s.padded_Dv, s.padded_Dv, sums.dv(j), s.padded_Dv);
      product<decltype(into)::value>(count, s.padded_D, depth, typename P::RowOperand{s.dscores + at, s.columns()},
                                     s.queries + row * s.padded_D, s.padded_D, sums.dk(j), s.padded_D);
    };
    if (has[run])
      add(std::integral_constant<Into, Into::kAdd>{});
    else
      add(std::integral_constant<Into, Into::kSet>{});
    std::memset(has + run, 1, next - run);
  }
}

// The strips of a group, which adds to `sums`; `following` is asked for on the way.
template <class T>
static void backward_group(const AttentionArgs& a, const Group& group, const Group& following, bool is_last,
                           GradientScratch<T>& s, float* deltas, const KeySums& sums) {
  using P = Products<T>;
  const int64_t count = group.count;
  if (count == 0) return;
  const Sequence& sequence = group.blocks[0].sequence;
  const int64_t kv_head = group.blocks[0].kv_head;
  int64_t columns = 0, key_begin = INT64_MAX, key_end = 0;
  int32_t min_document = INT32_MAX, max_document = INT32_MIN;
  for (int64_t i = 0; i < count; ++i) {
    const QueryBlock& block = group.blocks[i];
    s.strips[i].offset = columns;
    load_strip<T>(a, block, s, s.strips[i], deltas);
    columns += i + 1 < count ? block.width : block.count;
    key_begin = min_of(key_begin, block.key_begin()), key_end = max_of(key_end, block.key_end());
    min_document = min_of(min_document, block.min_document), max_document = max_of(max_document, block.max_document);
  }
  Memory asks[kUrgentAsks + 4 * kStrips + 2];
  PrefetchWork work(asks, kUrgentAsks);
  ask_for_group<T>(a, following, is_last, work);
  for (int64_t i = 0; i < count; ++i) work.add(memory_of_queries<T>(a.dq, group.blocks[i]));
  key_end = min_of(round_up(key_end, kKeyRun), sequence.T);  // whole runs, of which `has` tells
  for (int64_t j0 = key_begin, rows; j0 < key_end; j0 += rows) {
    rows = key_end - j0 <= kMaxKeys ? key_end - j0 : kKeys;
    KeyTile<T> tile{j0, rows, {a.key_documents, sequence, j0, rows}, {a.key_images, sequence, j0, rows}, {}, {}, {}};
    const KeyIds& documents = tile.documents;
    if (documents.data != nullptr && (documents.high < min_document || documents.low > max_document)) continue;
    int64_t n[kStrips], low = count, high = -1;  // the first and last strip that see any of the keys
    Cover cover[kStrips];
    for (int64_t i = 0; i < count; ++i) {
      const QueryBlock& block = group.blocks[i];
      n[i] = min_of(rows, block.key_end() - j0);
      cover[i] = n[i] <= 0 ? Cover::kNone : cover_of(block, j0, n[i], documents, tile.images);
      if (cover[i] != Cover::kNone) low = min_of(low, i), high = i;
    }
    if (high < 0) continue;
    const Rows<const T> k = key_rows<const T>(a.k, sequence, kv_head, j0);
    const Rows<const T> v = key_rows<const T>(a.v, sequence, kv_head, j0);
    tile.keys = P::rows_of(k, rows, s.D, s.keys, s.padded_D);
    tile.values = P::rows_of(v, rows, s.Dv, s.values, s.padded_Dv);
    if constexpr (P::kPairs)
      tile.keys_transposed = P::columns_of(k, rows, s.D, s.keys_transposed, s.padded_D);
    else
      tile.keys_transposed = {tile.keys.data, tile.keys.stride};
    int64_t run_low[kMaxKeys / kKeyRun], run_high[kMaxKeys / kKeyRun];  // columns that see a run of keys
    for (int64_t run = 0; run < kMaxKeys / kKeyRun; ++run) run_low[run] = columns, run_high[run] = 0;
    const int64_t next_keys = clamp(key_end - j0 - rows, 0, kKeys);
    work.add_first(memory_of(key_rows<const T>(a.v, sequence, kv_head, j0 + rows), next_keys, s.Dv));
    work.add_first(memory_of(key_rows<const T>(a.k, sequence, kv_head, j0 + rows), next_keys, s.D));
    for (int64_t i = low; i <= high; ++i) {
      GradientStrip& strip = s.strips[i];
      const QueryBlock& block = group.blocks[i];
      KeyRange ranges[kQueryVectors];
      tile_ranges(block, strip, cover[i], j0, n[i], documents, ranges);
      for (int64_t vector = 0; vector < block.width / kLanes; ++vector) {
        const int64_t column = strip.offset + vector * kLanes, end = min_of(column + kLanes, columns);
        for (int64_t run = ranges[vector].begin / kKeyRun; run < ceil_div(ranges[vector].end, kKeyRun); ++run)
          run_low[run] = min_of(run_low[run], column), run_high[run] = max_of(run_high[run], end);
      }
      if (cover[i] == Cover::kNone) {
        differentiate<T, false>(block, j0, ranges, rows, documents, tile.images, s, strip);  // zeros
        continue;
      }
      backward_strip<T>(a, block, tile, n[i], cover[i], ranges, s, strip, work);
    }
    add_to_keys<T>(tile, run_low, run_high, s, sums);
  }
  while (!work.is_done()) work.step();
  for (int64_t i = 0; i < count; ++i) {
    const GradientStrip& strip = s.strips[i];
    if (!strip.has_dq) std::memset(strip.dq, 0, s.padded_D * kQueries * sizeof(float));
    P::store_out(a.dq, group.blocks[i], strip.dq, s.scale, s.rows, s.padded_D);
  }
}

// Writes dk and dv of keys [begin, end), begin a multiple of kKeyRun, from the sums of all `shares` of a key head,
// added up in their order in the place of the first.
template <class T>
static void write_keys(const AttentionArgs& a, const Sequence& sequence, int64_t kv_head, int64_t begin, int64_t end,
                       int64_t shares, const KeySums* sums, const GradientScratch<T>& s) {
  std::memset(s.rows, 0, max_of(s.padded_D, s.padded_Dv) * sizeof(float));
  const auto add = [](const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  };
  for (int64_t j = begin; j < end; j += kKeyRun) {
    const int64_t n = min_of(kKeyRun, end - j);
    const KeySums* found = nullptr;
    for (int64_t share = 0; share < shares; ++share) {
      if (!sums[share].has[j / kKeyRun]) continue;
      if (found == nullptr) {
        found = &sums[share];
        continue;
      }
      add(sums[share].dk(j), n * s.padded_D, found->dk(j));
      add(sums[share].dv(j), n * s.padded_Dv, found->dv(j));
    }
    const Rows<T> dk = key_rows<T>(a.dk, sequence, kv_head, j), dv = key_rows<T>(a.dv, sequence, kv_head, j);
    if (found != nullptr) {
      unpack<T>(found->dk(j), s.padded_D, n, s.D, a.scale, dk);
      unpack<T>(found->dv(j), s.padded_Dv, n, s.Dv, 1.0f, dv);
    } else {  // one row of zeros again and again
      unpack<T>(s.rows, 0, n, s.D, 1.0f, dk);
      unpack<T>(s.rows, 0, n, s.Dv, 1.0f, dv);
    }
  }
}

template <class T>
static void backward_qkv(const AttentionArgs& a, int threads, float* deltas) {
  const int64_t B = sequence_count(a), Hkv = a.k.size[1];
  if (B == 0) return;
  const QueryWork work(a, 1);
  const int64_t shares = ceil_div(kTasks, min_of(kTasks, B * Hkv)), tasks = B * Hkv * shares;
  const int team = static_cast<int>(min_of(threads, tasks));
  const GradientScratch<T> sizes(a, nullptr);
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) longest = max_of(longest, sequence_at(a, b).T);
  // With one task a key head its sums are written at once, and the next task of that thread takes their place.
  const int64_t places = shares == 1 ? team : tasks, runs = ceil_div(longest, kKeyRun),
                blocks = ceil_div(longest, kKeys);
  const int64_t dk_size = kKeys * sizes.padded_D, dv_size = kKeys * sizes.padded_Dv,
                size = blocks * (dk_size + dv_size);
  const Buffer<float> all_sums(places * size);
  expect_writes(all_sums.get(), places * size * static_cast<int64_t>(sizeof(float)));
  const Buffer<uint8_t> all_has(places * runs);
  const Buffer<int64_t> all_slots(places * blocks), all_taken(places);
  for (int64_t i = 0; i < places; ++i) all_taken[i] = 0;
  const Buffer<float> scratch(team * sizes.size);
  const auto sums_of = [&](int64_t task) {
    const int64_t place = shares == 1 ? omp_get_thread_num() : task, owner = shares == 1 ? place : 0;
    return KeySums{all_sums.get() + owner * size, dk_size, dv_size, &all_taken[owner], all_slots.get() + place * blocks,
                   all_has.get() + place * runs};
  };
  // Fills the group `index` of a task; returns how many that has, 1 if it has no queries.
  const auto get_group = [&](int64_t task, int64_t index, Group& group) {
    group.count = 0;
    if (task >= tasks) return int64_t{0};
    const Sequence sequence = sequence_at(a, task / shares / Hkv);
    const int64_t strips = work.strips(sequence), share = task % shares;
    const int64_t begin = strips * share / shares, count = strips * (share + 1) / shares - begin;
    const int64_t groups = max_of(ceil_div(count, sizes.group), 1);
    for (int64_t i = count * index / groups; i < count * (index + 1) / groups; ++i)
      work.get_strip(sequence, task / shares % Hkv, begin + i, group.blocks[group.count++]);
    return groups;
  };
  int64_t claimed = 0;
#pragma omp parallel num_threads(team)
  {
    [[maybe_unused]] const AmxTiles tiles;
    GradientScratch<T> s(a, scratch.get() + omp_get_thread_num() * sizes.size);
    const auto claim = [&] {
      int64_t task;
#pragma omp atomic capture
      task = claimed++;
      return task;
    };
    // Units are claimed a group ahead, so that what comes next can be asked for.
    Group groups[2];
    int64_t task = claim(), index = 0, count = get_group(task, 0, groups[0]);
    for (int current = 0; task < tasks; current ^= 1) {
      const bool is_last = index + 1 == count;
      const int64_t next = is_last ? claim() : task, next_index = is_last ? 0 : index + 1;
      const int64_t next_count = get_group(next, next_index, groups[current ^ 1]);
      const Sequence sequence = sequence_at(a, task / shares / Hkv);
      const KeySums sums = sums_of(task);
      if (index == 0) {
        std::memset(sums.has, 0, runs);
        for (int64_t block = 0; block < blocks; ++block) sums.slots[block] = -1;
        if (shares == 1) *sums.taken = 0;
      }
      backward_group<T>(a, groups[current], groups[current ^ 1], is_last, s, deltas, sums);
      if (is_last && shares == 1) write_keys(a, sequence, task % Hkv, 0, sequence.T, 1, &sums, s);
      task = next, index = next_index, count = next_count;
    }
#pragma omp barrier
    if (shares > 1) {
#pragma omp for schedule(dynamic) collapse(2)
      for (int64_t head = 0; head < B * Hkv; ++head) {
        for (int64_t block = 0; block < blocks; ++block) {
          const Sequence sequence = sequence_at(a, head / Hkv);
          const int64_t begin = block * kKeys, end = min_of(begin + kKeys, sequence.T);
          KeySums sums[kTasks];
          for (int64_t share = 0; share < shares; ++share) sums[share] = sums_of(head * shares + share);
          write_keys(a, sequence, head % Hkv, begin, end, shares, sums, s);
        }
      }
    }
  }
}

// deltas (batch, H, Nq) as load_queries left them.
static void backward_sinks(const AttentionArgs& a, int threads, const float* deltas) {
  const int64_t H = a.q.size[1], N = a.q.size[2];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t head = 0; head < H; ++head) {
    const float sink = static_cast<const float*>(a.sinks.data)[head * a.sinks.stride[0]];
    double sum = 0.0;
    for (int64_t batch = 0; batch < a.q.size[0]; ++batch)
      for (int64_t i = 0; i < N; ++i) {
        const float lse = static_cast<const float*>(
            a.lse.data)[batch * a.lse.stride[0] + head * a.lse.stride[1] + i * a.lse.stride[2]];
        if (lse != -kInfinity) sum -= expf(sink - lse) * deltas[(batch * H + head) * N + i];
      }
    static_cast<float*>(a.dsinks.data)[head * a.dsinks.stride[0]] = static_cast<float>(sum);
  }
}

template <class T>
static void attention_backward_as(const AttentionArgs& a, int threads) {
  const int64_t rows = a.dsinks.defined ? a.q.size[0] * a.q.size[1] * a.q.size[2] : 0;
  const Buffer<float> deltas(rows);
  for (int64_t i = 0; i < rows; ++i) deltas[i] = 0.0f;
  backward_qkv<T>(a, threads, a.dsinks.defined ? deltas.get() : nullptr);
  if (a.dbias.defined) backward_bias<T>(a, threads);
  if (a.dsinks.defined) backward_sinks(a, threads, deltas.get());
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
