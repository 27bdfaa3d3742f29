// The forward in bf16 of a slice of rows and kRows keys: scores, probabilities, and weighted
// values.
#pragma once

#include "cpu/attention/bf16.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// Sums of later blocks may exceed the row_max by this factor before it is raised. Up to it neither
// floats nor bf16 lose precision, and blocks need no search for their largest score.
constexpr float kHeadroom = 4096.0f;
static_assert(kHeadroom > kRows);

struct Forward {
  Forward(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t block = rows_of(p, plan);
    const int64_t dim = round_up(p.head_dim, kDepth), value_dim = round_up(p.v.head_dim, kDepth);
    q = take_values(space, p.regions.count * block * dim);
    keys = take_values(space, p.regions.count * plan.block_n * dim);
    values = take_values(space, plan.block_n * value_dim);
    weights = take_values(space, plan.block_n * kSlice);
    scores = space.take(kRows * kSlice);
    product = space.take(kRows * kSlice);
    out = space.take(block * value_dim);
    row_max = space.take(block);
    row_sum = space.take(block);
    scale = space.take(block);
  }
  Workspace space;
  bf16* q;                  // (regions, slices, dim / 32, kSliceTiles) right tiles of 16 rows
  bf16* keys;               // (regions, keys / 16, dim / 32) left tiles
  bf16* values;             // (v's dim / 16, keys / 32) left tiles, transposed
  bf16* weights;            // (keys / 32, kSliceTiles) right tiles of 16 rows
  float *scores, *product;  // (kRows, kSlice)
  float* out;               // (slices, v's dim / 16, kSliceTiles) tiles of sums, transposed
  float *row_max, *row_sum, *scale;  // (block,), to base 2
};

// A slice and the block of keys that it works on.
struct Visit {
  const Forward& w;
  const bf16* q;
  float* out;
  int64_t next_q, next_keys;       // strides of regions
  int64_t dim_tiles, value_tiles;  // tiles of head_dim and of v's head_dim
  int64_t key_tiles, keys;         // in the key block
  float softcap;                   // to base 2
  bool fresh;                      // out, row_max and row_sum are not yet set
  floats row_max[kSliceVectors], row_sum[kSliceVectors], scale[kSliceVectors];
  SliceValues hidden;  // scores for keys that a row does not see
};

// Returns how many keys of the block from `key` on are no padding, rounded up to pairs.
EXTROPE_INLINE int64_t rows_from(const Visit& v, int64_t key) {
  return kSpares ? smaller(round_up(v.keys - key, 2), kRows) : kRows;
}

EXTROPE_INLINE void multiply_block(const Visit& v, int64_t region, int64_t key, float* to) {
  const bf16 *keys = v.w.keys + region * v.next_keys + key * v.dim_tiles * kDepth,
             *q = v.q + region * v.next_q;
  for (int64_t tile = 0; tile < kSliceTiles; tile += 2) {
    product_of_tiles({.a = keys,
                      .a_next = v.dim_tiles * kTileValues,
                      .a_step = kTileValues,
                      .b = q + tile * kTileValues,
                      .b_step = kSliceTiles * kTileValues,
                      .depth = v.dim_tiles,
                      .rows = rows_from(v, key)},
                     {to + tile * kSide, kSide * kSlice, kSide, kSlice});
  }
}

// Caps scores and converts them to base 2. Scores of hidden keys are filled in later, and need no
// cap.
inline void cap_scores(const Visit& v, float* scores) {
  const float softcap = v.softcap;  // a local, which no store can change
  floats scale[kSliceVectors];
  for (int j = 0; j < kSliceVectors; ++j) scale[j] = v.scale[j];
  for (int64_t i = 0; i < kRows * kSlice; i += kSlice) {
    floats logits[kSliceVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      logits[j] = load<floats>(scores + i + j * kFloats) * scale[j];
    }
    cap(logits, softcap);
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) store(scores + i + j * kFloats, logits[j]);
  }
}

// Returns scores as logits to base 2; capped ones are so already.
template <bool Capped>
EXTROPE_INLINE floats logits(const Visit& v, const float* at, int j) {
  return Capped ? load<floats>(at) : load<floats>(at) * v.scale[j];
}

// Computes the scores of a block of keys that starts at key `first` of the sequence.
template <bool Capped>
EXTROPE_INLINE void score(const Visit& v, const RegionBlocks& blocks, int64_t regions,
                          const RowKeys* visible, int64_t key, int64_t first) {
  bool written = false;
  for (int64_t r = 0; r < regions; ++r) {
    const SliceBlocks& b = blocks.of[r];
    if (key < b.begin || key >= b.end) continue;
    const bool full = key >= b.full_begin && key < b.full_end;
    float* found = full ? v.w.scores : v.w.product;
    multiply_block(v, r, key, found);
    if constexpr (Capped) cap_scores(v, found);
    if (!full) {
      merge_rows(found, rows_from(v, key), visible[r], first, !written, v.hidden, v.w.scores);
    }
    written = true;
  }
}

// out += values * weights, for the keys from `begin` to `end` of the key block.
void add_values(Visit& v, int64_t begin, int64_t end) {
  if (begin == end) return;
  const int64_t first = begin / kDepth, tiles = (end - begin) / kDepth;
  const int64_t last_keys = smaller(v.keys, end) - (end - kDepth);
  for (int64_t d = 0; d < v.value_tiles; ++d) {
    for (int64_t tile = 0; tile < kSliceTiles; tile += 2) {
      const Factors factors{.a = v.w.values + (2 * d * v.key_tiles + first) * kTileValues,
                            .a_next = v.key_tiles * kTileValues,
                            .a_step = kTileValues,
                            .b = v.w.weights + (first * kSliceTiles + tile) * kTileValues,
                            .b_step = kSliceTiles * kTileValues,
                            .depth = tiles,
                            .rows = kRows,
                            .last_pairs = (last_keys + 1) / 2};
      const SumsAt sums{v.out + (2 * d * kSliceTiles + tile) * kTileSums, kSliceTiles * kTileSums,
                        kTileSums, kSide};
      v.fresh ? product_of_tiles(factors, sums) : add_product_of_tiles(factors, sums);
    }
  }
  v.fresh = false;
}

// Turns a block's scores into probabilities, in pairs of keys; returns false if the row_max is too
// far below them. Raised: after raise_row_max, logits are rounded as there, and none is above the
// row_max. Else an fma rounds once, which at logits from 2**28 on may differ by all of kHeadroom.
template <bool Capped, bool Raised>
EXTROPE_INLINE bool softmax_block(Visit& v, int64_t rows, bf16* weights) {
  const auto weight = [&](const float* at, int j) __attribute__((always_inline)) {
    const floats found = logits<Capped>(v, at, j);
    return exp2_reduced((Raised ? load_once(found) : found) - v.row_max[j]);
  };
  floats sum[kSliceVectors] = {};
  for (int64_t i = 0; i < rows; i += 2) {
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const float* at = v.w.scores + i * kSlice + j * kFloats;
      const floats a = weight(at, j), b = weight(at + kSlice, j);
      sum[j] += a + b;
      store(weights + j * kTileValues + i * kSide, pair_values(a, b));
    }
  }
  unsigned above = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kSliceVectors; ++j) {
    above |= _mm512_cmp_ps_mask(sum[j], floats{} + kHeadroom, _CMP_GT_OQ);
  }
  if (above) return false;
#pragma GCC unroll 16
  for (int j = 0; j < kSliceVectors; ++j) v.row_sum[j] += sum[j];
  return true;
}

// Raises the row_max to the block's largest score, and rescales earlier sums.
template <bool Capped>
void raise_row_max(Visit& v, int64_t rows) {
  for (int j = 0; j < kSliceVectors; ++j) {
    floats found = v.row_max[j];
    for (int i = 0; i < rows; ++i) {
      found = larger(found, logits<Capped>(v, v.w.scores + i * kSlice + j * kFloats, j));
    }
    const floats rescale = exp2_reduced(v.row_max[j] - found);
    v.row_max[j] = found;
    if (v.fresh) continue;
    v.row_sum[j] *= rescale;
    for (int64_t d = 0; d < 2 * v.value_tiles; ++d) {
      float* sums = v.out + (d * kSliceTiles + j) * kTileSums;
      for (int64_t i = 0; i < kTileSums; i += kFloats) {
        store(sums + i, load<floats>(sums + i) * rescale);
      }
    }
  }
}

}  // namespace
}  // namespace extrope
