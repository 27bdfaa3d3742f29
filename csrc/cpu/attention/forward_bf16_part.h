// A slice of rows and kRows keys in the forward in bf16: scores, probabilities, and the values that
// these weigh.
#pragma once

#include "cpu/attention/bf16.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// Probabilities are taken from a row_max that the sums of later blocks may pass by this factor
// before it is raised: so far, neither floats nor bf16 lose precision, and it saves a search for
// the largest score of each block.
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

// A slice at work on a block of keys.
struct Visit {
  const Forward& w;
  const bf16* q;
  float* out;
  int64_t next_q, next_keys;       // from one region to the next
  int64_t dim_tiles, value_tiles;  // of head_dim, of v's
  int64_t key_tiles, keys;         // of the key block
  float softcap;                   // to base 2
  bool fresh;                      // out, row_max and row_sum hold nothing yet
  floats row_max[kSliceVectors], row_sum[kSliceVectors], scale[kSliceVectors];
  SliceValues hidden;  // the scores of keys that a row does not see
};

// How many keys of the block from `key` on are more than padding, rounded up to pairs.
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

// Caps scores and brings them to base 2, so that those of hidden keys, filled in later, need no
// cap.
inline void cap_scores(const Visit& v, float* scores) {
  const float softcap = v.softcap;  // the compiler keeps what no store can change
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

// Scores as logits to base 2: those that are capped are so already.
template <bool Capped>
EXTROPE_INLINE floats logits(const Visit& v, const float* at, int j) {
  return Capped ? load<floats>(at) : load<floats>(at) * v.scale[j];
}

// The scores of a block of keys, which starts at key `first` of all.
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

// Scores of a block to probabilities, in pairs of keys; false if the row_max they are taken from is
// too far below them.
template <bool Capped>
EXTROPE_INLINE bool softmax_block(Visit& v, int64_t rows, bf16* weights) {
  floats sum[kSliceVectors] = {};
  for (int64_t i = 0; i < rows; i += 2) {
#pragma GCC unroll 16
    for (int j = 0; j < kSliceVectors; ++j) {
      const float* at = v.w.scores + i * kSlice + j * kFloats;
      const floats a = exp2_reduced(logits<Capped>(v, at, j) - v.row_max[j]);
      const floats b = exp2_reduced(logits<Capped>(v, at + kSlice, j) - v.row_max[j]);
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

// Takes the largest score of the block as the row_max, and scales earlier sums down to it.
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
