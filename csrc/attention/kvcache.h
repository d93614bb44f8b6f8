// Attention against a key/value cache, in one call: rotate q and the new keys, write new keys and values into the
// cache, attend to it.
//
// Rotary embedding (Su et al. 2021) turns pairs of the first R dimensions, (x1 cos - x2 sin, x2 cos + x1 sin), in fp32
// with one rounding at the end. New keys go from where they are to their place in the cache, rotated on the way;
// rotated queries go to scratch of q's dtype. That is some bytes for each new token; what counts is the attention
// behind it.
//
// A cache of pages is read where it lies by decode.h, if the rows of a key head are few. More rows have more
// to do with each key than to read it, so the keys that they see are first gathered from their pages into scratch, as
// many entries or heads at a time as fit kGatherBytes (and at least one head of one entry), for forward.h.
#pragma once

#include "attention/attention.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Of gathered keys and values: room in a second-level cache or two, and many more bytes than a team costs to wake.
constexpr int64_t kGatherBytes = 4 << 20;
// Elements below which rotating and writing are the calling thread's alone.
constexpr int64_t kTeamElements = 1 << 15;

// The row of token `position` of entry b in k_cache or v_cache, (..., token, head, element).
static int64_t cache_row(const KvCacheArgs& c, const View& cache, int64_t b, int64_t position) {
  if (!c.block_table.defined) return b * cache.stride[0] + position * cache.stride[1];
  const int64_t page = cache.size[1];
  // Checked before; clamped, a later change of the table cannot lead out of the pool.
  const int64_t index =
      clamp(int_at(c.block_table, b * c.block_table.stride[0] + position / page * c.block_table.stride[1]), 0,
            cache.size[0] - 1);
  return index * cache.stride[0] + position % page * cache.stride[1];
}

template <class T>
static void copy_row(const T* from, int64_t from_stride, int64_t n, T* to, int64_t to_stride) {
  if (n > 0 && from_stride == 1 && to_stride == 1)
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  else
    for (int64_t i = 0; i < n; ++i) to[i * to_stride] = from[i * from_stride];
}

// A row of a float tensor (rows, n) of any dtype in fp32: where it lies, or copied to `scratch`.
static const float* float_row(const View& table, int64_t row, float* scratch) {
  const int64_t at = row * table.stride[0], n = table.size[1];
  switch (table.dtype) {
    case DType::kBFloat16:
      pack<bfloat16>({static_cast<const bfloat16*>(table.data) + at, 0, table.stride[1]}, 1, n, scratch, n);
      return scratch;
    case DType::kFloat16:
      pack<float16>({static_cast<const float16*>(table.data) + at, 0, table.stride[1]}, 1, n, scratch, n);
      return scratch;
    default:
      if (table.stride[1] == 1) return static_cast<const float*>(table.data) + at;
      pack<float>({static_cast<const float*>(table.data) + at, 0, table.stride[1]}, 1, n, scratch, n);
      return scratch;
  }
}

// What turns the heads of one token.
struct Rotation {
  const float *cos, *sin;
  int64_t half;  // R / 2
  bool interleaved;

  // `first` and `second` of each pair are `step` apart from pair to pair.
  void turn(float* first, float* second, int64_t step) const {
    for (int64_t i = 0; i < half; ++i) {
      const float a = first[i * step], b = second[i * step];
      first[i * step] = mul_add(a, cos[i], -(b * sin[i]));
      second[i * step] = mul_add(b, cos[i], a * sin[i]);
    }
  }
  void turn(float* row) const {
    if (interleaved)
      turn(row, row + 1, 2);
    else
      turn(row, row + half, 1);
  }
};

// The heads of one token of q or k, (head, element) strided, turned on their way. `row` is scratch of D floats.
template <class T>
static void rotate_heads(const T* from, const int64_t* from_stride, int64_t heads, int64_t D, const Rotation& rotation,
                         float* row, T* to, const int64_t* to_stride) {
  for (int64_t h = 0; h < heads; ++h) {
    pack<T>({from + h * from_stride[0], 0, from_stride[1]}, 1, D, row, D);
    rotation.turn(row);
    unpack<T>(row, D, 1, D, 1.0f, {to + h * to_stride[0], 0, to_stride[1]});
  }
}

template <class T>
static void copy_heads(const T* from, const int64_t* from_stride, int64_t heads, int64_t D, T* to,
                       const int64_t* to_stride) {
  for (int64_t h = 0; h < heads; ++h)
    copy_row(from + h * from_stride[0], from_stride[1], D, to + h * to_stride[0], to_stride[1]);
}

// Tokens of this call and what happens to each: rotated queries to `rotated` (B, S, H, D), or null where q serves as it
// is; new keys and values into the cache.
template <class T>
struct NewTokens {
  const KvCacheArgs& c;
  T* rotated;
  int64_t S, fresh;  // queries, and tokens to append, of an entry

  int64_t of_an_entry() const { return (rotated == nullptr ? 0 : S) + fresh; }
  int64_t elements() const {
    const int64_t keys = fresh * c.k_cache.size[2] * (c.k_cache.size[3] + c.v_cache.size[3]);
    return c.q.size[0] * (keys + (rotated == nullptr ? 0 : S * c.q.size[2] * c.q.size[3]));
  }
  // Of a thread: a row, and rows of cos and sin.
  int64_t scratch_size() const { return round_up(2 * c.q.size[3], 16) + 16; }

  void do_token(int64_t i, float* scratch) const {
    const int64_t b = i / of_an_entry(), local = i % of_an_entry();
    if (local < fresh)
      append(b, local, scratch);
    else
      rotate_query(b, local - fresh, scratch);
  }

 private:
  int64_t length(int64_t b) const { return int_at(c.cache_lengths, b * c.cache_lengths.stride[0]); }

  Rotation rotation_at(int64_t position, float* scratch) const {
    const int64_t half = c.rotary_cos.size[1];
    return {float_row(c.rotary_cos, position, scratch), float_row(c.rotary_sin, position, scratch + half), half,
            c.rotary_interleaved};
  }
  void append(int64_t b, int64_t s, float* scratch) const {
    const int64_t position = length(b) + s, heads = c.k_cache.size[2], D = c.k_cache.size[3];
    const T* key = static_cast<const T*>(c.k.data) + b * c.k.stride[0] + s * c.k.stride[1];
    T* to = static_cast<T*>(c.k_cache.data) + cache_row(c, c.k_cache, b, position);
    if (c.rotary_cos.defined)
      rotate_heads(key, c.k.stride + 2, heads, D, rotation_at(position, scratch + D), scratch, to,
                   c.k_cache.stride + 2);
    else
      copy_heads(key, c.k.stride + 2, heads, D, to, c.k_cache.stride + 2);
    const T* value = static_cast<const T*>(c.v.data) + b * c.v.stride[0] + s * c.v.stride[1];
    copy_heads(value, c.v.stride + 2, heads, c.v_cache.size[3],
               static_cast<T*>(c.v_cache.data) + cache_row(c, c.v_cache, b, position), c.v_cache.stride + 2);
  }
  void rotate_query(int64_t b, int64_t s, float* scratch) const {
    const int64_t H = c.q.size[2], D = c.q.size[3], strides[] = {D, 1};
    const T* from = static_cast<const T*>(c.q.data) + b * c.q.stride[0] + s * c.q.stride[1];
    T* to = rotated + (b * S + s) * H * D;
    if (c.rotary_cos.defined)
      rotate_heads(from, c.q.stride + 2, H, D, rotation_at(length(b) + fresh - S + s, scratch + D), scratch, to,
                   strides);
    else
      copy_heads(from, c.q.stride + 2, H, D, to, strides);
  }
};

template <class T>
static void write_new_tokens(const NewTokens<T>& tokens, int threads) {
  const int64_t count = tokens.c.q.size[0] * tokens.of_an_entry(), size = tokens.scratch_size();
  if (count == 0) return;
  const int team = tokens.elements() < kTeamElements ? 1 : static_cast<int>(min_of(threads, count));
  const Buffer<float> scratch(team * size);
  if (team == 1) {
    for (int64_t i = 0; i < count; ++i) tokens.do_token(i, scratch.get());
    return;
  }
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t i = 0; i < count; ++i) tokens.do_token(i, scratch.get() + omp_get_thread_num() * size);
}

// A (B, N, heads, D) tensor as the kernels' (B, heads, N, D).
static View heads_first(const View& x) {
  View y = x;
  y.size[1] = x.size[2], y.size[2] = x.size[1];
  y.stride[1] = x.stride[2], y.stride[2] = x.stride[1];
  return y;
}

static View int32_view(int32_t* data, int64_t n) { return {data, DType::kInt32, 1, true, {n}, {1}}; }

// Entries [entry, entry + entries) and key heads [head, head + heads) of a paged call: the keys that their rows see,
// from `first` of each entry on, in dense scratch of `length` keys.
template <class T>
struct Gathered {
  const KvCacheArgs& c;
  int64_t entry, entries, head, heads, length;
  const int32_t *first, *total;  // of each entry of the call: the first key that is gathered, and the end

  // Elements of an entry's keys or values, D to each.
  int64_t entry_size(int64_t D) const { return heads * length * D; }

  View gather(const View& cache, T* to, int threads) const {
    const int64_t D = cache.size[3], blocks = ceil_div(length, kKeys), items = entries * blocks;
    const auto copy_block = [&](int64_t item) {
      const int64_t b = entry + item / blocks, j0 = first[b] + item % blocks * kKeys;
      T* rows = to + item / blocks * entry_size(D) + item % blocks * kKeys * D;
      for (int64_t j = j0; j < min_of(j0 + kKeys, total[b]); ++j, rows += D)
        for (int64_t h = 0; h < heads; ++h)
          copy_row(static_cast<const T*>(cache.data) + cache_row(c, cache, b, j) + (head + h) * cache.stride[2],
                   cache.stride[3], D, rows + h * length * D, 1);
    };
    if (threads == 1 || entries * entry_size(D) < kTeamElements) {
      for (int64_t item = 0; item < items; ++item) copy_block(item);
    } else {
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t item = 0; item < items; ++item) copy_block(item);
    }
    return {to, c.q.dtype, 4, true, {entries, heads, length, D}, {entry_size(D), length * D, D, 1}};
  }
  // The entries and heads of q, out or lse.
  template <class Element>
  View part(const View& x, int64_t group) const {
    View y = x;
    y.data = static_cast<Element*>(x.data) + entry * x.stride[0] + head * group * x.stride[1];
    y.size[0] = entries, y.size[1] = heads * group;
    return y;
  }
};

// `a` is the call with pages in k and v; `total` are the keys of its entries.
template <class T>
static void attend_to_gathered(const KvCacheArgs& c, const AttentionArgs& a, const int32_t* total, int threads) {
  const int64_t B = a.q.size[0], Hkv = a.k.size[1], group = a.q.size[1] / Hkv, D = a.q.size[3], Dv = a.v.size[3];
  const Buffer<int32_t> first(max_of(B, 1)), lengths(max_of(B, 1)), offsets(max_of(B, 1));
  int64_t longest = 0;
  for (int64_t b = 0; b < B; ++b) {
    const int64_t offset = int_at(a.offsets, b);
    // Whole blocks are left out, so that those that are not are divided as in a dense cache.
    first[b] = a.window_left < 0
                   ? 0
                   : static_cast<int32_t>(clamp(offset - a.window_left, 0, total[b]) / kForwardKeys * kForwardKeys);
    lengths[b] = total[b] - first[b];
    offsets[b] = static_cast<int32_t>(offset - first[b]);
    longest = max_of(longest, lengths[b]);
  }
  const int64_t head_size = longest * (D + Dv), room = max_of(kGatherBytes / int64_t{sizeof(T)}, head_size);
  const int64_t heads_at_once = clamp(room / max_of(head_size, 1), 1, Hkv);
  const int64_t entries_at_once = clamp(room / max_of(head_size * Hkv, 1), 1, max_of(B, 1));
  const Buffer<T> scratch(max_of(entries_at_once * heads_at_once * head_size, 1));
  for (int64_t b = 0; b < B; b += entries_at_once)
    for (int64_t h = 0; h < Hkv; h += heads_at_once) {
      Gathered<T> gathered{c,           b,    min_of(entries_at_once, B - b), h, min_of(heads_at_once, Hkv - h), 0,
                           first.get(), total};
      for (int64_t i = b; i < b + gathered.entries; ++i) gathered.length = max_of(gathered.length, lengths[i]);
      AttentionArgs part = a;
      part.block_table = View{};
      part.q = gathered.template part<T>(a.q, group), part.out = gathered.template part<T>(a.out, group);
      part.lse = gathered.template part<float>(a.lse, group);
      part.k = gathered.gather(c.k_cache, scratch.get(), threads);
      part.v = gathered.gather(c.v_cache, scratch.get() + gathered.entries * gathered.entry_size(D), threads);
      part.key_lengths = int32_view(lengths.get() + b, gathered.entries);
      part.offsets = int32_view(offsets.get() + b, gathered.entries);
      if (a.sinks.defined) {
        part.sinks.data = static_cast<float*>(a.sinks.data) + h * group * a.sinks.stride[0];
        part.sinks.size[0] = gathered.heads * group;
      }
      attention_forward(part, threads);
    }
}

template <class T>
static void attention_kvcache_as(const KvCacheArgs& c, int threads) {
  const int64_t B = c.q.size[0], S = c.q.size[1], H = c.q.size[2], Hkv = c.k_cache.size[2], D = c.q.size[3];
  const int64_t fresh = c.k.defined ? c.k.size[1] : 0;
  const bool needs_rotated = c.rotary_cos.defined || (c.q.stride[3] != 1 && D > 1);
  const Buffer<T> rotated(needs_rotated ? max_of(B * S * H * D, 1) : 1);
  write_new_tokens<T>({c, needs_rotated ? rotated.get() : nullptr, S, fresh}, threads);

  const Buffer<int32_t> total(max_of(B, 1)), offsets(max_of(B, 1));
  for (int64_t b = 0; b < B; ++b) {
    total[b] = static_cast<int32_t>(int_at(c.cache_lengths, b * c.cache_lengths.stride[0]) + fresh);
    offsets[b] = static_cast<int32_t>(total[b] - S);
  }
  AttentionArgs a{};
  a.q = heads_first(c.q), a.k = heads_first(c.k_cache), a.v = heads_first(c.v_cache);
  if (needs_rotated) {
    const int64_t strides[] = {S * H * D, D, H * D, 1};
    a.q.data = rotated.get();
    std::memcpy(a.q.stride, strides, sizeof(strides));
  }
  a.sinks = c.sinks, a.block_table = c.block_table;
  a.key_lengths = int32_view(total.get(), B), a.offsets = int32_view(offsets.get(), B);
  a.causal = c.causal, a.bottom_right = true;
  a.window_left = c.window_left, a.window_right = c.window_right;
  a.scale = c.scale, a.softcap = c.softcap;
  a.out = heads_first(c.out), a.lse = c.lse;
  const auto has_rows = [](const View& x) { return x.stride[3] == 1 || x.size[3] <= 1; };
  const bool in_place = H / Hkv * S <= kDecodeRows && has_rows(a.k) && has_rows(a.v) && a.k.size[0] * a.k.size[2] > 0;
  if (c.block_table.defined && !in_place)
    attend_to_gathered<T>(c, a, total.get(), threads);
  else
    attention_forward(a, threads);
}

static void attention_kvcache(const KvCacheArgs& c, int threads) {
  with_operands(c.q.dtype, [&](auto zero) { attention_kvcache_as<decltype(zero)>(c, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
