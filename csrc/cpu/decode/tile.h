// A few query rows against a block of keys and values, read from the cache without a copy.
//
// Scores and weights are key-major, [key][row]: a vector holds all rows of some keys. So the
// softmax needs no transposition, and the sums over values read weights in order. The number of
// rows is a power of two; the first `valid` ones are queries.
#pragma once

#include <algorithm>

#include "cpu/decode/rows.h"
#include "cpu/simd/e4m3.h"
#include "cpu/simd/exp2.h"
#include "cpu/simd/pairs.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/softmax.h"
#include "cpu/simd/sum.h"

namespace extrope {
namespace {

constexpr float kNone = -1e30f;  // below any logit, and finite: differences of two are not NaN

// The number of keys that keeps at least kFloats sums in flight.
template <int rows>
constexpr int kKeysAtOnce = kFloats / rows > 2 ? kFloats / rows : 2;

// Loads rows of the cache in the cheapest form; queries and sums over values follow it. bfloat16
// comes in pairs, as 32-bit words, so that no dim has to move: in the order of order_by_words. e4m3
// comes divided by its unit.
template <typename T>
constexpr bool kReadInPairs = std::is_same_v<T, bf16>;
template <typename T>
constexpr float kUnit = std::is_same_v<T, e4m3> ? kUnitE4m3 : 1.0f;

// The number of vectors of a row that are loaded together.
template <typename T>
constexpr int kTogether = kReadInPairs<T> || (kFloats == 16 && std::is_same_v<T, e4m3>) ? 2 : 1;

template <int Count, typename T>
EXTROPE_INLINE void load_dims(const T* from, floats (&x)[Count]) {
  if constexpr (kReadInPairs<T> && Count % 2 == 0) {
    for (int i = 0; i < Count; i += 2) std::tie(x[i], x[i + 1]) = load_pairs(from + i * kFloats);
  } else if constexpr (std::is_same_v<T, e4m3>) {
    load_units(from, x);
  } else {
    load_wide(from, x);
  }
}

// sums[key][row] += q[row] * the key, for `vectors` vectors of dims from d on and at_once keys from
// j on.
template <int rows, int valid, int at_once, int vectors, typename T>
EXTROPE_INLINE void add_products(const float* q, int64_t stride, Rows<T> keys, int64_t j, int64_t d,
                                 floats (&sums)[at_once * rows]) {
  floats y[valid][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < valid; ++r) load_wide(q + r * stride, y[r]);
#pragma GCC unroll 16
  for (int k = 0; k < at_once; ++k) {
    floats x[vectors];
    load_dims(keys.row(j + k) + d, x);
#pragma GCC unroll 4
    for (int r = 0; r < valid; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sums[k * rows + r] += y[r][v] * x[v];
    }
  }
}

// scores[key][row] = <q[row], keys[key]> for `count` keys, a multiple of kKeysAtOnce. q is padded
// with zeros to whole vectors.
template <int rows, int valid, typename T, typename Cached>
void score_tile(const float* q, int64_t stride, Rows<T> keys, int64_t count, int64_t dim,
                Ahead<Cached>& ahead, float* scores) {
  Ahead<Cached> meanwhile = ahead;  // a local, to stay in registers
  constexpr int at_once = kKeysAtOnce<rows>;
  for (int64_t j = 0; j < count; j += at_once) {
    floats sums[at_once * rows] = {};
    int64_t d = 0;
    for (; d + kTogether<T> * kFloats <= dim; d += kTogether<T> * kFloats) {
      add_products<rows, valid, at_once, kTogether<T>>(q + d, stride, keys, j, d, sums);
    }
    for (; d < dim; d += kFloats) {
      add_products<rows, valid, at_once, 1>(q + d, stride, keys, j, d, sums);
    }
    sum_lanes<at_once * rows>(sums, scores + j * rows);
    meanwhile.fetch_at_scores(j, at_once);
  }
  ahead = meanwhile;
}

// Turns scores divided by the cap into capped ones.
inline void cap_tile(float softcap, float* scores, int64_t count) {
  for (int64_t i = 0; i < count; i += kFloats) {
    floats logits[1] = {load<floats>(scores + i)};
    apply_softcap(logits, softcap);
    store(scores + i, logits[0]);
  }
}

// The state of the online softmax; lane i belongs to row i % rows.
struct Softmax {
  floats row_max, row_sum;
};

// Turns `count` scores (base-2 logits), a multiple of kFloats, into weights; returns the rescale
// factor of earlier sums.
template <int rows>
floats softmax_tile(float* scores, int64_t count, Softmax& softmax) {
  floats row_max = softmax.row_max;
  for (int64_t i = 0; i < count; i += kFloats) row_max = larger(load<floats>(scores + i), row_max);
  if constexpr (rows <= 1) row_max = larger(row_max, across<1>(row_max));
  if constexpr (rows <= 2 && kFloats > 2) row_max = larger(row_max, across<2>(row_max));
  if constexpr (kFloats > 4) row_max = larger(row_max, across<kFloats == 4 ? 0 : 4>(row_max));
  if constexpr (kFloats > 8) row_max = larger(row_max, across<kFloats <= 8 ? 0 : 8>(row_max));
  floats sum{};
  for (int64_t i = 0; i < count; i += kFloats) {
    const floats weight = exp2_vector(load<floats>(scores + i) - row_max);
    store(scores + i, weight);
    sum += weight;
  }
  const floats rescale = exp2_vector(softmax.row_max - row_max);
  softmax.row_max = row_max;
  softmax.row_sum = softmax.row_sum * rescale + sum;
  return rescale;
}

// sums[row][d] = sums[row][d] * rescale[row] + the weighted sum of `count` values, in `columns`
// vectors of lanes from d on.
template <int rows, int valid, int columns, typename T>
inline void add_columns(const float* weights, Rows<T> values, int64_t count, int64_t d,
                        const floats& rescale, Ahead<T> ahead, float* sums, int64_t stride) {
  floats acc[valid * columns] = {};  // sums of this block: fewer roundings than over all keys
  for (int64_t j = 0; j < count; ++j) {
    floats x[columns];
    load_dims(values.row(j) + d, x);
#pragma GCC unroll 4
    for (int r = 0; r < valid; ++r) {
      // Subtracts zero: adding it would change -0, and cost an addition.
      const floats weight = weights[j * rows + r] - floats{};
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) acc[r * columns + c] += weight * x[c];
    }
    ahead.fetch_at_value(j);
  }
#pragma GCC unroll 4
  for (int r = 0; r < valid; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      float* sum = sums + r * stride + d + c * kFloats;
      store(sum, load<floats>(sum) * rescale[r] + acc[r * columns + c]);
    }
  }
}

template <int rows, int valid, typename T>
void add_values(const float* weights, Rows<T> values, int64_t count, int64_t dim,
                const floats& rescale, Ahead<T> ahead, float* sums, int64_t stride) {
  // Eight sums at once hide the latency of their additions.
  constexpr int columns = kFloats == 16 ? (rows == 1 ? 8 : 4) : 8 / rows;
  int64_t d = 0;
  for (; d + columns * kFloats <= dim; d += columns * kFloats) {
    add_columns<rows, valid, columns>(weights, values, count, d, rescale, ahead, sums, stride);
    ahead = {};
  }
  for (; d + kTogether<T> * kFloats <= dim; d += kTogether<T> * kFloats) {
    add_columns<rows, valid, kTogether<T>>(weights, values, count, d, rescale, ahead, sums, stride);
    ahead = {};
  }
  for (; d < dim; d += kFloats) {
    add_columns<rows, valid, 1>(weights, values, count, d, rescale, ahead, sums, stride);
    ahead = {};
  }
}

}  // namespace
}  // namespace extrope
