// From products q.k to scores: softcap, bias, ALiBi, masks; and the dropout stream. A tile of scores is
// [key][query], so that everything per query is a vector and a softmax over keys has no reduction across lanes.
#pragma once

#include "attention/block.h"
#include "simd/slice.h"

namespace gpt4v_fast::GPT4V_FAST_ISA {

// Whether anything but the scale and a mask comes between the product q.k and the score.
static inline bool has_terms(const AttentionArgs& a) {
  return a.bias.defined || a.softcap > 0.0f || a.alibi_slopes.defined;
}

template <class T>
static void load_bias(const QueryBlock& block, int64_t j0, int64_t n, float* tile) {
  const View& bias = block.args->bias;
  for (int64_t lane = 0; lane < block.width; ++lane) {
    const int64_t start = block.sequence.b * bias.stride[0] + block.head[lane] * bias.stride[1] +
                          block.index[lane] * bias.stride[2] + j0 * bias.stride[3];
    const T* row = static_cast<const T*>(bias.data) + start;
    for (int64_t c = 0; c < n; ++c) tile[c * kQueries + lane] = to_float(row[c * bias.stride[3]]);
  }
}

// tile[c][lane] = the bias; of a boolean one, 0 where it hides the key and 1 where it does not.
static void load_bias_tile(const QueryBlock& block, int64_t j0, int64_t n, float* tile) {
  switch (block.args->bias.dtype) {
    case DType::kBool:
      return load_bias<uint8_t>(block, j0, n, tile);
    case DType::kBFloat16:
      return load_bias<bfloat16>(block, j0, n, tile);
    case DType::kFloat16:
      return load_bias<float16>(block, j0, n, tile);
    default:
      return load_bias<float>(block, j0, n, tile);
  }
}

// Turns the products scale * q.k of keys [j0, j0 + n) into scores; a hidden key's is -inf. `bias` is scratch of a
// tile's size. With a softcap, `slope` (may be null) gets the derivative of the capped score by the product.
static void finish_scores(const QueryBlock& block, int64_t j0, int64_t n, Cover cover, const KeyIds& documents,
                          const KeyIds& images, float* bias, float* scores, float* slope) {
  const AttentionArgs& a = *block.args;
  const bool has_bias = a.bias.defined, is_boolean = has_bias && a.bias.dtype == DType::kBool;
  const bool has_cap = a.softcap > 0.0f, has_alibi = a.alibi_slopes.defined, has_mask = cover != Cover::kWhole;
  if (!has_terms(a) && !has_mask) return;
  if (has_bias) load_bias_tile(block, j0, n, bias);
  const Vec hidden = broadcast(-kInfinity);
  for (int64_t c = 0; c < n; ++c) {
    for (int64_t lane = 0; lane < block.width; lane += kLanes) {
      const int64_t at = c * kQueries + lane;
      Vec s = load_vec(scores + at);
      if (has_cap) {
        const VecTanh t = tanh_and_slope(s / a.softcap);
        s = t.value * a.softcap;
        if (slope != nullptr) store_vec(slope + at, t.slope);
      }
      if (has_bias) {
        const Vec b = load_vec(bias + at);
        s = is_boolean ? (b == 0.0f ? hidden : s) : s + b;
      }
      if (has_alibi) {
        const VecInt distance = static_cast<int32_t>(j0 + c) - load_vec(block.position + lane);
        const Vec length = __builtin_convertvector(distance < 0 ? -distance : distance, Vec);
        s = s - load_vec(block.slope + lane) * length;
      }
      if (has_mask) s = visible(block, lane, j0, c, documents, images) ? s : hidden;
      store_vec(scores + at, s);
    }
  }
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

// Document and image ids of a block's keys, for vectors of them.
struct BlockIds {
  bool has_documents, has_images;
  alignas(64) int32_t document[kKeys], image[kKeys];

  void copy(const KeyIds& documents, const KeyIds& images, int64_t n) {
    has_documents = documents.data != nullptr, has_images = images.data != nullptr;
    for (int64_t c = 0; has_documents && c < kKeys; ++c) document[c] = c < n ? documents[c] : -1;
    for (int64_t c = 0; has_images && c < kKeys; ++c) image[c] = c < n ? images[c] : -1;
  }
};

// All ones where a row sees keys j.
static inline VecInt visible_to(const QueryBlock& block, int64_t row, VecInt j, int64_t c, const BlockIds& ids) {
  VecInt seen = j <= block.diagonal[row];
  if (ids.has_images && block.image[row] >= 0) seen |= load_vec(ids.image + c) == block.image[row];
  seen &= (j >= block.first[row]) & (j <= block.last[row]);
  if (ids.has_documents) {
    const VecInt document = load_vec(ids.document + c);
    seen &= (document == block.document[row]) & (document >= 0);
  }
  return seen;
}

// Turns a row's products with keys [j0, j0 + n) into scores, as finish_scores does. `ids` is null where the row sees
// every one of them.
static void finish_row(const QueryBlock& block, int64_t row, int64_t j0, int64_t n, const BlockIds* ids,
                       float* scores) {
  const AttentionArgs& a = *block.args;
  const bool has_bias = a.bias.defined, is_boolean = has_bias && a.bias.dtype == DType::kBool;
  const bool has_cap = a.softcap > 0.0f, has_alibi = a.alibi_slopes.defined;
  const Vec hidden = broadcast(-kInfinity);
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

// finish_scores of a tile that nothing but a mask changes, of which vector v of the queries has n[v] keys.
static void hide_scores(const QueryBlock& block, int64_t j0, const int64_t* n, const KeyIds& documents,
                        const KeyIds& images, float* scores) {
  const Vec hidden = broadcast(-kInfinity);
  // The first keys that all queries see, if only the end of what they see is in the tile.
  const bool only_end = documents.data == nullptr && j0 >= block.max_first;
  const int64_t begin = only_end ? clamp(min_of(block.min_last, block.min_diagonal) + 1 - j0, 0, kForwardKeys) : 0;
  for (int64_t lane = 0; lane < block.width; lane += kLanes)
    for (int64_t c = begin; c < n[lane / kLanes]; ++c) {
      float* at = scores + c * kQueries + lane;
      store_vec(at, visible(block, lane, j0, c, documents, images) ? load_vec(at) : hidden);
    }
}

static inline uint32_t high_word(uint64_t x) { return static_cast<uint32_t>(x >> 32); }

// tile[c][lane] = 1 / (1 - p) where the weight of key j0 + c survives dropout, else 0. Philox4x32-10 (Salmon et al.
// 2011): counter (j div 4, i, b H + h, 0), key the seed's two words; key j takes word j mod 4 and survives when it is
// at least floor(p 2^32). j0 is a multiple of 4.
static void dropout_tile(const QueryBlock& block, int64_t j0, int64_t n, float* tile) {
  const AttentionArgs& a = *block.args;
  const uint32_t threshold = static_cast<uint32_t>(a.dropout_p * 0x1p32);
  const float factor = static_cast<float>(1.0 / (1.0 - a.dropout_p));
  const int64_t width = block.width;
  uint32_t x[4][kQueries];
  for (int64_t c = 0; c < n; c += 4) {
    for (int64_t lane = 0; lane < width; ++lane) {
      x[0][lane] = static_cast<uint32_t>((j0 + c) / 4);
      x[1][lane] = static_cast<uint32_t>(block.index[lane]);
      x[2][lane] = static_cast<uint32_t>(block.sequence.b * a.q.size[1] + block.head[lane]);
      x[3][lane] = 0;
    }
    uint32_t key0 = static_cast<uint32_t>(a.seed), key1 = high_word(a.seed);
    for (int round = 0; round < 10; ++round) {
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane) {
        const uint64_t first = uint64_t{0xD2511F53u} * x[0][lane], second = uint64_t{0xCD9E8D57u} * x[2][lane];
        x[0][lane] = high_word(second) ^ x[1][lane] ^ key0;
        x[1][lane] = static_cast<uint32_t>(second);
        x[2][lane] = high_word(first) ^ x[3][lane] ^ key1;
        x[3][lane] = static_cast<uint32_t>(first);
      }
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    for (int64_t word = 0; word < 4 && c + word < n; ++word)
#pragma omp simd
      for (int64_t lane = 0; lane < width; ++lane)
        tile[(c + word) * kQueries + lane] = x[word][lane] >= threshold ? factor : 0.0f;
  }
}

}  // namespace gpt4v_fast::GPT4V_FAST_ISA
