// The backward in bf16 of a slice of rows and kRows keys: probabilities and gradients of logits, as
// factors of dq, dk and dv.
#pragma once

#include "cpu/attention/backward_rows.h"
#include "cpu/attention/bf16.h"

namespace extrope {
namespace {

constexpr int64_t kRowTiles = kSlice / kDepth;  // of a slice

struct Backward {
  Backward(const AttentionParams& p, const TilePlan& plan, float* begin)
      : space(begin), rows(space, rows_of(p, plan)) {
    const int64_t block = rows_of(p, plan);
    const int64_t dim = round_up(p.head_dim, kDepth), value_dim = round_up(p.v.head_dim, kDepth);
    q = take_values(space, block * dim);
    dout = take_values(space, block * value_dim);
    q_rows = take_values(space, block * dim);
    dout_rows = take_values(space, block * value_dim);
    keys = take_values(space, plan.block_n * dim);
    key_columns = take_values(space, plan.block_n * dim);
    values = take_values(space, plan.block_n * value_dim);
    rotated = take_values(space, plan.block_n * dim);
    probabilities = take_values(space, plan.block_n * block);
    gradients = take_values(space, plan.block_n * block);
    gradient_pairs = take_values(space, plan.block_n * kSlice);
    scores = space.take(kRows * kSlice);
    products = space.take(kRows * kSlice);
    dq = space.take(block * dim);
    key_sums = space.take(plan.block_n * greater(dim, value_dim));
    seen = reinterpret_cast<int32_t*>(space.take(2 * block / kSlice));
  }
  Workspace space;
  RowValues rows;
  bf16 *q, *dout;            // (slices, dim / 32, kSliceTiles) right tiles of 16 rows, transposed
  bf16 *q_rows, *dout_rows;  // (rows / 32, dim / 16) right tiles
  bf16 *keys, *values;       // (keys / 16, dim / 32) left tiles
  bf16* key_columns;         // (dim / 16, keys / 32) left tiles, transposed
  bf16* rotated;             // (keys, dim)
  bf16 *probabilities, *gradients;  // (keys / 16, rows / 32) left tiles
  bf16* gradient_pairs;             // (keys / 32, kSliceTiles) right tiles, of a slice
  float *scores, *products;         // (kRows, kSlice)
  float* dq;                        // (slices, dim / 16, kSliceTiles) tiles of sums, transposed
  float* key_sums;                  // (keys, dim rounded up to kDepth)
  int32_t* seen;                    // (slices, 2): the keys of a block that a slice sees
};

// A slice and the block of keys that it works on.
struct Visit {
  const Backward& w;
  int64_t slice, slices, dim_tiles, value_tiles, key_tiles;
  float softcap;  // to base 2
  floats lse[kSliceVectors], delta[kSliceVectors];
  floats scale[kSliceVectors], logit_scale[kSliceVectors];
};

// Multiplies the keys from `left` on by the slice's columns: (kRows, kSlice).
EXTROPE_INLINE void multiply(const bf16* left, const bf16* right, int64_t depth, float* to) {
  for (int64_t tile = 0; tile < kSliceTiles; tile += 2) {
    product_of_tiles({left, depth * kTileValues, kTileValues, right + tile * kTileValues,
                      kSliceTiles * kTileValues, depth},
                     {to + tile * kSide, kSide * kSlice, kSide, kSlice});
  }
}

// Computes one key's probability in each row, and the gradient of its logit.
template <bool Masked, bool Capped>
EXTROPE_INLINE void differentiate(const Visit& v, int i, const RowKeys& visible, int64_t key,
                                  floats (&probability)[kSliceVectors],
                                  floats (&gradient)[kSliceVectors]) {
  floats logits[kSliceVectors], slopes[kSliceVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kSliceVectors; ++j) {
    logits[j] = load<floats>(v.w.scores + i * kSlice + j * kFloats) * v.logit_scale[j];
    slopes[j] = v.scale[j];
  }
  if constexpr (Capped) {
    cap(logits, 1.0f);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      slopes[j] *= 1.0f - logits[j] * logits[j];
      logits[j] *= v.softcap;
    }
  }
  if constexpr (Masked) {
    const ints here = ints{} + static_cast<int32_t>(key);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const ints sees = (here >= visible.first[j]) & (here < visible.last[j]);
      logits[j] = sees ? logits[j] : floats{} - __builtin_inff();
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kSliceVectors; ++j) {
    const floats product = load<floats>(v.w.products + i * kSlice + j * kFloats);
    probability[j] = exp2_reduced(logits[j] - v.lse[j]);
    gradient[j] = probability[j] * (product - v.delta[j]) * slopes[j];
  }
}

// Stores a key's row of a left factor.
EXTROPE_INLINE void store_row(const floats (&x)[kSliceVectors], bf16* to) {
#pragma GCC unroll 16
  for (int j = 0; j < kSliceVectors; j += 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh(bits_as<__m512>(x[j + 1]), bits_as<__m512>(x[j]));
    store(to + j / 2 * kTileValues, bits_as<words>(both));
  }
}

// Works on kRows keys, from key `part` of the block.
template <bool Masked, bool Capped>
EXTROPE_INLINE void visit_part(const Visit& v, const RowKeys& visible, int64_t part,
                               int64_t first) {
  const Backward& w = v.w;
  multiply(w.keys + part * v.dim_tiles * kDepth, w.q + v.slice * v.dim_tiles * kDepth * kSlice,
           v.dim_tiles, w.scores);
  multiply(w.values + part * v.value_tiles * kDepth,
           w.dout + v.slice * v.value_tiles * kDepth * kSlice, v.value_tiles, w.products);
  bf16* pairs = w.gradient_pairs + part * kSlice;
  for (int i = 0; i < kRows; i += 2) {
    floats probability[2][kSliceVectors], gradient[2][kSliceVectors];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      differentiate<Masked, Capped>(v, i + n, visible, first + part + i + n, probability[n],
                                    gradient[n]);
      const int64_t key = part + i + n, row_tiles = v.slices * kRowTiles;
      const int64_t at =
          (key / kSide * row_tiles + v.slice * kRowTiles) * kTileValues + key % kSide * kDepth;
      store_row(probability[n], w.probabilities + at);
      store_row(gradient[n], w.gradients + at);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      store(pairs + j * kTileValues + i * kSide, pair_values(gradient[0][j], gradient[1][j]));
    }
  }
}

}  // namespace
}  // namespace extrope
