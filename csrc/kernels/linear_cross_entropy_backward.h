// Backward of linear cross-entropy: each tile of logits is computed again and turned into its gradient.
//
// For a chunk of the vocabulary and a chunk of the counted tokens: the gradient G (classes, tokens) of the
// logits, at most 4 MiB, then grad_hidden += G^T weight and grad_weight += G hidden, each shared out by rows
// of its result. The outer loop is the vocabulary's, so fp32 sums of the weight's gradient are kept for one
// chunk of it; those of hidden's are kept for all tokens, or, where a 16-bit gradient of many tokens would
// need more than kHiddenSumBytes of fp32 sums, for groups of tokens, with another pass over everything for
// the weight. 8 N V E flops (10 with the second pass).
//
// Keeping the logits' gradient in forward instead would save 2 N V E flops, and needs either all of it or all
// of the fp32 sums at once.
#pragma once

#include "kernels/linear_cross_entropy.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {
namespace loss {

constexpr int64_t kMaxClasses = 1024;
constexpr int64_t kHiddenSumBytes = 16 << 20;

// What a gradient tile needs of its tokens, lane by lane.
struct TokenSlopes {
  alignas(64) float p[kCols], all[kCols], lse[kCols], lse_low[kCols];
  int64_t row[kCols], label[kCols];  // row -1 and label -1 in unused lanes

  void load(const LinearCrossEntropyArgs& a, const Classes& classes, const int64_t* rows, int64_t count) {
    for (int c = 0; c < kCols; ++c) {
      p[c] = all[c] = lse[c] = lse_low[c] = 0.0f;
      row[c] = label[c] = -1;
      if (c >= count) continue;
      const Slopes slopes(a, classes, rows[c]);
      p[c] = slopes.p, all[c] = slopes.all;
      lse[c] = at<float>(a.lse, rows[c]), lse_low[c] = at<float>(a.lse_low, rows[c]);
      row[c] = rows[c], label[c] = at<int64_t>(a.target, rows[c]);
    }
  }

  // Turns a tile of logits into their gradients.
  template <class T>
  void differentiate(const LinearCrossEntropyArgs& a, const Classes& classes, const Cap& cap,
                     const WeightTile<T>& weight, float* tile) const {
    float of_label[kCols];
    for (int c = 0; c < kCols; ++c) {
      const int64_t r = label[c] - weight.first;
      if (r < 0 || r >= weight.count) continue;
      const float x = tile[r * kCols + c];
      const float slope = cap.active() ? tanh_and_slope(x * cap.inverse).slope : 1.0f;
      of_label[c] = slope * Slopes(a, classes, row[c]).label(exp((cap(x) - lse[c]) - lse_low[c]));
    }
    for (int64_t r = 0; r < weight.count; ++r) {
      float* x = tile + r * kCols;
      const float w = classes.smoothing > 0.0f ? weight.class_weight[r] : 0.0f;
      if (cap.active()) {
        for (int c = 0; c < kCols; ++c) {
          const TanhAndSlope t = tanh_and_slope(x[c] * cap.inverse);
          x[c] = t.slope * (p[c] * exp((cap.softcap * t.value - lse[c]) - lse_low[c]) - all[c] * w);
        }
        continue;
      }
#pragma GCC unroll 4
      for (int lane = 0; lane < kCols; lane += kLanes) {
        const Vec z = (load_vec(x + lane) - load_vec(lse + lane)) - load_vec(lse_low + lane);
        const Vec dz = load_vec(p + lane) * exp2(z * kLog2E);
        store_vec(x + lane, w == 0.0f ? dz : dz - load_vec(all + lane) * w);
      }
    }
    for (int c = 0; c < kCols; ++c) {
      const int64_t r = label[c] - weight.first;
      if (r >= 0 && r < weight.count) tile[r * kCols + c] = of_label[c];
    }
  }
};

// The gradients G of a chunk's logits as the products take them: rows (class, token) for the weight's gradient, and for
// hidden's the same fp32 rows or, with bf16, pairs of classes.
template <class T>
struct LogitGradient {
  using Element = typename Operands<T>::Element;
  static constexpr bool kPairs = Operands<T>::kPairs;
  Element* rows;   // [class][stride]
  float* columns;  // [class / 2][stride], or null
  int64_t stride;

  // A tile of gradients, (count, kCols), whose first class is even.
  void store(const float* tile, int64_t count, int64_t first, int64_t column) const {
    for (int64_t r = 0; r < count; r += 2)
#pragma GCC unroll 4
      for (int lane = 0; lane < kCols; lane += kLanes) {
        const float* from = tile + r * kCols + lane;
        const int64_t to = (first + r) * stride + column + lane;
        const Vec low = load_vec(from), high = r + 1 < count ? load_vec(from + kCols) : Vec{};
        gpt4v_fast::GPT4V_FAST_ISA::store_row(rows + to, low);
        if (r + 1 < count) gpt4v_fast::GPT4V_FAST_ISA::store_row(rows + to + stride, high);
        if (kPairs) store_vec(columns + (first + r) / 2 * stride + column + lane, pair_of(low, high));
      }
  }
  typename Operands<T>::RowOperand of_classes(int64_t first) const { return {rows + first * stride, stride}; }
  // Tokens [first, first + count) as rows, all classes as depth, copied to where they are close together.
  typename Operands<T>::ColumnOperand of_tokens(int64_t first, int64_t count, int64_t classes, float* scratch) const {
    const float* from = (kPairs ? columns : reinterpret_cast<const float*>(rows)) + first;
    for (int64_t d = 0; d < Operands<T>::depth(classes); ++d)
      std::memcpy(scratch + d * kTileRows, from + d * stride, count * sizeof(float));
    return {reinterpret_cast<const Element*>(scratch), kTileRows * int64_t{sizeof(float) / sizeof(Element)}};
  }
};

template <class T>
static void store_row(const float* from, int64_t count, T* to, int64_t stride) {
  if (stride == 1)
    for (int64_t e = 0; e < count; ++e) to[e] = from_float<T>(from[e]);
  else
    for (int64_t e = 0; e < count; ++e) to[e * stride] = from_float<T>(from[e]);
}

template <class T>
static T* row_of(const View& view, int64_t row) {
  return static_cast<T*>(view.data) + row * view.stride[0];
}

// A gradient that is its own fp32 sum needs no other.
static inline bool holds_sums(const View& view) { return view.dtype == DType::kFloat32 && view.stride[1] == 1; }

// One backward call: its sizes, its scratch, and the passes over (vocabulary, tokens).
template <class T>
class LinearBackward {
 public:
  LinearBackward(const LinearCrossEntropyArgs& args, const Classes& classes_of_call, const Counted& rows, int threads)
      : a(args),
        classes(classes_of_call),
        cap(args.softcap),
        counted(rows),
        weight(args.weight, nullptr),
        hidden(args.hidden, rows.rows.get()),
        E(args.hidden.size[1]),
        V(args.weight.size[0]),
        chunk(min_of(tokens_per_chunk(E), round_up(max_of(rows.count, 1), kCols))),
        tile_rows(weight_rows<T>(E)),
        classes_per_chunk(min_of(round_up(V, tile_rows), classes_in_chunk())),
        thread_floats(max_of(tile_rows * weight_stride(E), kTileRows * classes_per_chunk)),
        team(team_size(threads, thread_floats)),
        scratch(team * thread_floats),
        token_lanes(chunk / kCols * strip_size<T>(E)),
        token_columns(args.grad_weight.defined ? ceil_div(E, kCols) * strip_size<T>(chunk) : 0),
        weight_columns(args.grad_hidden.defined ? ceil_div(E, kCols) * strip_size<T>(classes_per_chunk) : 0),
        gradient_rows(classes_per_chunk * chunk),
        gradient_columns(LogitGradient<T>::kPairs ? classes_per_chunk / 2 * chunk : 0),
        gradient{gradient_rows.get(), gradient_columns.get(), chunk},
        bias_sums(args.grad_bias.defined ? classes_per_chunk * (chunk / kCols) : 0),
        slopes(chunk / kCols),
        hidden_sums(args.grad_hidden.defined && !holds_sums(args.grad_hidden) ? tokens_per_group() * E : 0),
        weight_sums(args.grad_weight.defined && !holds_sums(args.grad_weight) ? classes_per_chunk * E : 0) {}

  void run() {
    const bool wants_rows = a.grad_weight.defined || a.grad_bias.defined;
    if (a.grad_hidden.defined && tokens_per_group() < counted.count) {
      for (int64_t n = 0; n < counted.count; n += tokens_per_group())
        pass(n, min_of(n + tokens_per_group(), counted.count), true, false);
      if (wants_rows) pass(0, counted.count, false, true);
    } else if (a.grad_hidden.defined || wants_rows) {
      pass(0, counted.count, a.grad_hidden.defined, wants_rows);
    }
  }

 private:
  int64_t classes_in_chunk() const {
    const int64_t fitting = min_of(kMaxClasses, kPackBytes / (4 * max_of(E, 1)));
    return max_of(tile_rows, fitting / tile_rows * tile_rows);
  }

  // Counted tokens whose gradients are summed in one pass.
  int64_t tokens_per_group() const {
    if (holds_sums(a.grad_hidden)) return counted.count;
    return min_of(counted.count, max_of(chunk, kHiddenSumBytes / (4 * max_of(E, 1)) / chunk * chunk));
  }

  float* own_scratch() const { return scratch.get() + omp_get_thread_num() * thread_floats; }

  // Sums the gradients of hidden (of the counted tokens [begin, end)) or of weight and bias, or both.
  void pass(int64_t begin, int64_t end, bool of_hidden, bool of_rows) {
#pragma omp parallel num_threads(team)
    {
      const bool own_sums = of_hidden && !holds_sums(a.grad_hidden);
      Target hidden_target{own_sums ? hidden_sums.get() : row_of<float>(a.grad_hidden, 0),
                           own_sums ? E : a.grad_hidden.stride[0], nullptr};
      for (int64_t v = 0; v < V; v += classes_per_chunk) {
        const int64_t rows = min_of(classes_per_chunk, V - v);
        if (of_hidden) pack_columns_by_team(weight, v, rows, E, weight_columns.get());
        if (of_rows && begin == end) clear_rows_by_team(v, rows);
        for (int64_t n = begin; n < end; n += chunk) {
          const int64_t tokens = min_of(chunk, end - n);
          gradient_by_team(v, rows, n, tokens);
          if (of_hidden) {
            Target target = hidden_target;
            if (own_sums)
              target.data += (n - begin) * E;
            else if (counted.count == counted.rows_of_call)
              target.data += n * target.stride;
            else
              target.index = counted.rows.get() + n;
            const auto left = [&](int64_t first, int64_t count) {
              return gradient.of_tokens(first, count, rows, own_scratch());
            };
            product_by_team(left, tokens, Operands<T>::depth(rows), weight_columns.get(), strip_size<T>(rows), E, v > 0,
                            target);
          }
          if (of_rows) take_rows_by_team(v, rows, tokens, n > begin);
        }
        if (of_rows) store_weight_by_team(v, rows);
      }
      if (own_sums) {
#pragma omp for schedule(static)
        for (int64_t n = begin; n < end; ++n)
          store_row(hidden_sums.get() + (n - begin) * E, E, row_of<T>(a.grad_hidden, counted.rows[n]),
                    a.grad_hidden.stride[1]);
      }
    }
  }

  // The gradients of the logits of classes v + r and counted tokens n + c; and their sums over each strip of tokens.
  void gradient_by_team(int64_t v, int64_t rows, int64_t n, int64_t tokens) {
    const int64_t strips = ceil_div(tokens, kCols), strip_tasks = ceil_div(strips, kTaskStrips);
    // Tokens that are a single chunk are packed once for the whole vocabulary.
    if (v == 0 || counted.count > chunk) {
      pack_tokens_by_team(hidden, n, tokens, E, token_lanes.get());
      if (a.grad_weight.defined) pack_columns_by_team(hidden, n, tokens, E, token_columns.get());
#pragma omp for schedule(static)
      for (int64_t s = 0; s < strips; ++s)
        slopes[s].load(a, classes, counted.rows.get() + n + s * kCols, min_of(kCols, tokens - s * kCols));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < ceil_div(rows, tile_rows) * strip_tasks; ++task) {
      const int64_t first = task / strip_tasks * tile_rows, first_strip = task % strip_tasks * kTaskStrips;
      WeightTile<T> tile_weight;
      tile_weight.rows = reinterpret_cast<typename WeightTile<T>::Element*>(own_scratch());
      tile_weight.load(a, weight, classes, v + first, min_of(tile_rows, rows - first));
      for (int64_t s = first_strip; s < min_of(first_strip + kTaskStrips, strips); ++s) {
        alignas(64) float tile[kTileRows * kCols];
        tile_weight.logits(token_lanes.get() + s * strip_size<T>(E), E, tile);
        slopes[s].differentiate(a, classes, cap, tile_weight, tile);
        gradient.store(tile, tile_weight.count, first, s * kCols);
        for (int64_t r = 0; a.grad_bias.defined && r < tile_weight.count; ++r) {
          Vec sum = {};
          for (int lane = 0; lane < kCols; lane += kLanes) sum += load_vec(tile + r * kCols + lane);
          bias_sums[(first + r) * (chunk / kCols) + s] = sum_of(sum);
        }
      }
    }
  }

  Target weight_target(int64_t v) const {
    if (holds_sums(a.grad_weight)) return {row_of<float>(a.grad_weight, v), a.grad_weight.stride[0], nullptr};
    return {weight_sums.get(), E, nullptr};
  }

  // Where no token counts.
  void clear_rows_by_team(int64_t v, int64_t rows) {
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
      if (a.grad_bias.defined) at<float>(a.grad_bias, v + r) = 0.0f;
      if (a.grad_weight.defined) std::memset(weight_target(v).row(r), 0, E * sizeof(float));
    }
  }

  // Sets the sums of the weight's and the bias's gradients to those of a chunk of tokens, or adds them.
  void take_rows_by_team(int64_t v, int64_t rows, int64_t tokens, bool add) {
    if (a.grad_bias.defined) {
#pragma omp for schedule(static)
      for (int64_t r = 0; r < rows; ++r) {
        float sum = 0.0f;
        for (int64_t s = 0; s < ceil_div(tokens, kCols); ++s) sum += bias_sums[r * (chunk / kCols) + s];
        float& total = at<float>(a.grad_bias, v + r);
        total = add ? total + sum : sum;
      }
    }
    if (!a.grad_weight.defined) return;
    const auto left = [&](int64_t first, int64_t) { return gradient.of_classes(first); };
    product_by_team(left, rows, Operands<T>::depth(tokens), token_columns.get(), strip_size<T>(tokens), E, add,
                    weight_target(v));
  }

  void store_weight_by_team(int64_t v, int64_t rows) {
    if (!a.grad_weight.defined || holds_sums(a.grad_weight)) return;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; ++r)
      store_row(weight_sums.get() + r * E, E, row_of<T>(a.grad_weight, v + r), a.grad_weight.stride[1]);
  }

  const LinearCrossEntropyArgs& a;
  const Classes& classes;
  const Cap cap;
  const Counted& counted;
  const RowsOf<T> weight, hidden;
  const int64_t E, V, chunk, tile_rows, classes_per_chunk, thread_floats;
  const int team;
  const Buffer<float> scratch, token_lanes, token_columns, weight_columns;
  const Buffer<typename Operands<T>::Element> gradient_rows;
  const Buffer<float> gradient_columns;
  const LogitGradient<T> gradient;
  const Buffer<float> bias_sums;  // [class][strip]
  const Buffer<TokenSlopes> slopes;
  const Buffer<float> hidden_sums, weight_sums;
};

template <class T>
static void linear_backward(const LinearCrossEntropyArgs& a, int threads) {
  const int64_t N = a.hidden.size[0], E = a.hidden.size[1], V = a.weight.size[0];
  const Classes classes(a, V);
  const Counted counted(a, classes, N);
  for (int64_t row = 0; a.grad_hidden.defined && row < N; ++row) {
    const int64_t label = at<int64_t>(a.target, row);
    if (classes.counted(label)) continue;
    const T nothing = from_float<T>(classes.ignored(label) ? 0.0f : kNaN);
    for (int64_t e = 0; e < E; ++e) row_of<T>(a.grad_hidden, row)[e * a.grad_hidden.stride[1]] = nothing;
  }
  LinearBackward<T>(a, classes, counted, threads).run();
}

}  // namespace loss

static void linear_cross_entropy_backward(const LinearCrossEntropyArgs& a, int threads) {
  loss::with_float(a.hidden.dtype, [&](auto zero) { loss::linear_backward<decltype(zero)>(a, threads); });
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
