// The backward in bf16 of a slice of rows and kKeyRows keys: probabilities and gradients of logits,
// as factors of dq, dk and dv.
#pragma once

#include "cpu/attention/backward_rows.h"
#include "cpu/attention/bf16.h"

namespace extrope {
namespace {

constexpr int64_t kRowTiles = kQueryLanes / kDepth;  // of a slice

struct BackwardBf16Scratch {
  BackwardBf16Scratch(const AttentionParams& p, const TilePlan& plan, float* begin)
      : space(begin), rows(space, rows_of(p, plan)) {
    const int64_t rows = rows_of(p, plan);
    const int64_t dim = round_up(p.head_dim, kDepth), value_dim = round_up(p.v.head_dim, kDepth);
    q = take_values(space, rows * dim);
    dout = take_values(space, rows * value_dim);
    q_rows = take_values(space, rows * dim);
    dout_rows = take_values(space, rows * value_dim);
    keys = take_values(space, plan.block_n * dim);
    key_columns = take_values(space, plan.block_n * dim);
    values = take_values(space, plan.block_n * value_dim);
    rotated = take_values(space, plan.block_n * dim);
    probabilities = take_values(space, plan.block_n * rows);
    gradients = take_values(space, plan.block_n * rows);
    gradient_pairs = take_values(space, plan.block_n * kQueryLanes);
    logits = space.take(kKeyRows * kQueryLanes);
    products = space.take(kKeyRows * kQueryLanes);
    dq = space.take(rows * dim);
    key_sums = space.take(plan.block_n * greater(dim, value_dim));
    seen = reinterpret_cast<int32_t*>(space.take(2 * rows / kQueryLanes));
  }
  Workspace space;
  RowValues rows;
  bf16 *q, *dout;            // (slices, dim / 32, kQueryTiles) right tiles of 16 rows, transposed
  bf16 *q_rows, *dout_rows;  // (rows / 32, dim / 16) right tiles
  bf16 *keys, *values;       // (keys / 16, dim / 32) left tiles
  bf16* key_columns;         // (dim / 16, keys / 32) left tiles, transposed
  bf16* rotated;             // (keys, dim)
  bf16 *probabilities, *gradients;  // (keys / 16, rows / 32) left tiles
  bf16* gradient_pairs;             // (keys / 32, kQueryTiles) right tiles, of a slice
  float *logits, *products;         // (kKeyRows, kQueryLanes)
  float* dq;                        // (slices, dim / 16, kQueryTiles) tiles of sums, transposed
  float* key_sums;                  // (keys, dim rounded up to kDepth)
  int32_t* seen;                    // (slices, 2): the keys of a block that a slice sees
};

// A slice and the block of keys that it works on.
struct BackwardBf16Slice {
  const BackwardBf16Scratch& w;
  int64_t slice, slices, dim_tiles, value_tiles, key_tiles;
  float softcap;
  floats lse[kQueryVectors], delta[kQueryVectors];
  floats logit_scale[kQueryVectors], q_scale[kQueryVectors];
};

// Multiplies the keys from `left` on by the slice's columns: (kKeyRows, kQueryLanes).
EXTROPE_INLINE void multiply(const bf16* left, const bf16* right, int64_t depth, float* to) {
  for (int64_t tile = 0; tile < kQueryTiles; tile += 2) {
    product_of_tiles({left, depth * kTileValues, kTileValues, right + tile * kTileValues,
                      kQueryTiles * kTileValues, depth},
                     {to + tile * kSide, kSide * kQueryLanes, kSide, kQueryLanes});
  }
}

// Computes one key's probability in each row, and the gradient of its logit.
template <bool Masked, bool Capped>
EXTROPE_INLINE void differentiate(const BackwardBf16Slice& view, int i, const RowKeys& seen,
                                  int64_t key, floats (&probability)[kQueryVectors],
                                  floats (&gradient)[kQueryVectors]) {
  floats logits[kQueryVectors], slopes[kQueryVectors];
#pragma GCC unroll 16
  for (int j = 0; j < kQueryVectors; ++j) {
    logits[j] = load<floats>(view.w.logits + i * kQueryLanes + j * kFloats) * view.q_scale[j];
    slopes[j] = view.logit_scale[j];
  }
  if constexpr (Capped) {
    floats cap_slopes[kQueryVectors];
    apply_softcap_with_slopes(logits, view.softcap, cap_slopes);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) slopes[j] *= cap_slopes[j];
  }
  if constexpr (Masked) {
    const ints here = ints{} + static_cast<int32_t>(key);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const ints sees = (here >= seen.begin[j]) & (here < seen.end[j]);
      logits[j] = sees ? logits[j] : floats{} - __builtin_inff();
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < kQueryVectors; ++j) {
    const floats product = load<floats>(view.w.products + i * kQueryLanes + j * kFloats);
    const floats exponent = logits[j] - view.lse[j];
    probability[j] = exp2_avx512(Capped ? exponent * kLog2E : exponent);
    gradient[j] = probability[j] * (product - view.delta[j]) * slopes[j];
  }
}

// Stores a key's row of a left factor.
EXTROPE_INLINE void store_row(const floats (&x)[kQueryVectors], bf16* to) {
#pragma GCC unroll 16
  for (int j = 0; j < kQueryVectors; j += 2) {
    const __m512bh both = _mm512_cvtne2ps_pbh(bits_as<__m512>(x[j + 1]), bits_as<__m512>(x[j]));
    store(to + j / 2 * kTileValues, bits_as<words>(both));
  }
}

// Works on kKeyRows keys, from key `part` of the block.
template <bool Masked, bool Capped>
EXTROPE_INLINE void differentiate_part(const BackwardBf16Slice& view, const RowKeys& seen,
                                       int64_t part, int64_t first) {
  const BackwardBf16Scratch& w = view.w;
  multiply(w.keys + part * view.dim_tiles * kDepth,
           w.q + view.slice * view.dim_tiles * kDepth * kQueryLanes, view.dim_tiles, w.logits);
  multiply(w.values + part * view.value_tiles * kDepth,
           w.dout + view.slice * view.value_tiles * kDepth * kQueryLanes, view.value_tiles,
           w.products);
  bf16* pairs = w.gradient_pairs + part * kQueryLanes;
  for (int i = 0; i < kKeyRows; i += 2) {
    floats probability[2][kQueryVectors], gradient[2][kQueryVectors];
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) {
      differentiate<Masked, Capped>(view, i + n, seen, first + part + i + n, probability[n],
                                    gradient[n]);
      const int64_t key = part + i + n, row_tiles = view.slices * kRowTiles;
      const int64_t at =
          (key / kSide * row_tiles + view.slice * kRowTiles) * kTileValues + key % kSide * kDepth;
      store_row(probability[n], w.probabilities + at);
      store_row(gradient[n], w.gradients + at);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      store(pairs + j * kTileValues + i * kSide, pair_values(gradient[0][j], gradient[1][j]));
    }
  }
}

}  // namespace
}  // namespace extrope
