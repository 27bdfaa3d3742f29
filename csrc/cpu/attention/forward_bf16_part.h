// The forward in bf16 of a slice of queries and a part of keys: logits S, probabilities P and
// weighted values O.
//
//   S = K Q^T         P = exp2(S - row_max)         O = O * rescale + V^T P
//
// Products are of tiles. A left tile is 16 x 32 bf16, a right one 32 x 16, with each two values of
// a column side by side (a pair). Sums are tiles of 16 x 16 floats, of which product_of_tiles()
// computes four:
//
//   left tiles of                        right tiles of Q^T (dims, rows), or P (keys, rows)
//   K (keys, dims), or V^T (dims of v, keys)        | 16 rows | 16 rows |
//   16 keys            16 dims                      |  sums   |  sums   |
//   16 keys            16 dims                      |  sums   |  sums   |
//
// Names of the headers:
//   row            a token in one q head
//   slice          kQueryLanes = 64 rows: kQueryTiles = 4 tiles, or kQueryVectors = 4 vectors
//   part           kKeyRows = 32 keys of a block
//   floats, ints   vectors of kFloats = 16 lanes
//   kSide, kDepth  16 and 32; a tile has kTileValues = 512 values, or kTileSums = 256 sums
//   Factors        a: two left tiles, a_next apart; b: two right tiles in sequence; `depth` times,
//                  in steps of a_step and b_step
//   SumsAt         where the sums go: offsets of the tile below, the tile beside, the next line
//   RegionParts    of[r]: some row sees the keys [begin, end) in region r, every row [full_begin,
//                  full_end); in whole parts, from the block's first key on
//   RowKeys        begin and end of each row's keys in one region, counted in the sequence
//   merge_region   keeps a region's logits of the keys that a row sees there
//   pair_values    rounds two vectors to bf16, as pairs
//   exp2_avx512    2**x within 1.5e-7; 0 for -inf
#pragma once

#include "cpu/attention/bf16.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// The sum of a later part's P may be as large as this before the row_max is raised. Up to it
// neither floats nor bf16 lose precision, and parts need no search for their largest logit.
constexpr float kHeadroom = 4096.0f;
static_assert(kHeadroom > kKeyRows);

struct ForwardBf16Scratch {
  ForwardBf16Scratch(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
    const int64_t rows = rows_of(p, plan);
    const int64_t dim = round_up(p.head_dim, kDepth), value_dim = round_up(p.v.head_dim, kDepth);
    q = take_values(space, p.regions.count * rows * dim);
    keys = take_values(space, p.regions.count * plan.block_n * dim);
    values = take_values(space, plan.block_n * value_dim);
    weights = take_values(space, plan.block_n * kQueryLanes);
    logits = space.take(kKeyRows * kQueryLanes);
    product = space.take(kKeyRows * kQueryLanes);
    out = space.take(rows * value_dim);
    row_max = space.take(rows);
    row_sum = space.take(rows);
    q_scale = space.take(rows);
    out_scale = space.take(rows);
  }
  Workspace space;
  bf16* q;         // (regions, slices, dim / 32, kQueryTiles) right tiles
  bf16* keys;      // (regions, keys / 16, dim / 32) left tiles
  bf16* values;    // (v's dim / 16, keys / 32) left tiles
  bf16* weights;   // (keys / 32, kQueryTiles) right tiles: P of one slice
  float* logits;   // (kKeyRows, kQueryLanes): S of one part
  float* product;  // (kKeyRows, kQueryLanes): S of one region, until merged into logits
  float* out;      // (slices, v's dim / 16, kQueryTiles) tiles of sums
  float *row_max, *row_sum, *q_scale;  // (rows,), to base 2
  float* out_scale;                    // (rows,): v_scale / row_sum
};

// A slice and the block of keys that it works on.
struct ForwardBf16Slice {
  const ForwardBf16Scratch& w;
  const bf16* q;                   // the slice's, in region 0
  float* out;                      // the slice's
  int64_t next_q, next_keys;       // strides of regions
  int64_t dim_tiles, value_tiles;  // head_dim and v's head_dim over 32, rounded up
  int64_t key_tiles, keys;         // the block's padded keys over 32; its keys
  float softcap;                   // to base 2
  bool is_first;                   // out, row_max and row_sum are not yet set
  floats row_max[kQueryVectors], row_sum[kQueryVectors], q_scale[kQueryVectors];
  SliceValues hidden_logit;  // of a key that a row does not see: -inf once times q_scale
};

// Returns how many keys of the part from `key` on are no padding, rounded up to pairs; with AMX,
// where fewer save nothing (kSkipsUnusedRows false), all.
EXTROPE_INLINE int64_t keys_of_part(const ForwardBf16Slice& view, int64_t key) {
  return kSkipsUnusedRows ? smaller(round_up(view.keys - key, 2), kKeyRows) : kKeyRows;
}

EXTROPE_INLINE void multiply_region(const ForwardBf16Slice& view, int64_t region, int64_t key,
                                    float* to) {
  const bf16 *keys = view.w.keys + region * view.next_keys + key * view.dim_tiles * kDepth,
             *q = view.q + region * view.next_q;
  for (int64_t tile = 0; tile < kQueryTiles; tile += 2) {
    product_of_tiles({.a = keys,
                      .a_next = view.dim_tiles * kTileValues,
                      .a_step = kTileValues,
                      .b = q + tile * kTileValues,
                      .b_step = kQueryTiles * kTileValues,
                      .depth = view.dim_tiles,
                      .rows = keys_of_part(view, key)},
                     {.at = to + tile * kSide,
                      .below = kSide * kQueryLanes,
                      .beside = kSide,
                      .row = kQueryLanes});
  }
}

// Caps logits and converts them to base 2. Those of hidden keys are filled in later, and need no
// cap.
inline void cap_logits(const ForwardBf16Slice& view, float* at) {
  const float softcap = view.softcap;  // a local, which no store can change
  floats q_scale[kQueryVectors];
  for (int j = 0; j < kQueryVectors; ++j) q_scale[j] = view.q_scale[j];
  for (int64_t i = 0; i < kKeyRows * kQueryLanes; i += kQueryLanes) {
    floats logits[kQueryVectors];
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      logits[j] = load<floats>(at + i + j * kFloats) * q_scale[j];
    }
    apply_softcap(logits, softcap);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) store(at + i + j * kFloats, logits[j]);
  }
}

// Returns the logits at `at` to base 2; capped ones are so already.
template <bool Capped>
EXTROPE_INLINE floats scaled_logit(const ForwardBf16Slice& view, const float* at, int j) {
  return Capped ? load<floats>(at) : load<floats>(at) * view.q_scale[j];
}

// S = K Q^T for the part from the block's key `key` on, which is key `first` of the sequence.
template <bool Capped>
EXTROPE_INLINE void multiply_part(const ForwardBf16Slice& view, const RegionParts& parts,
                                  int64_t regions, const RowKeys* seen, int64_t key,
                                  int64_t first) {
  bool written = false;
  for (int64_t r = 0; r < regions; ++r) {
    const SliceParts& in_region = parts.of[r];
    if (key < in_region.begin || key >= in_region.end) continue;
    const bool full = key >= in_region.full_begin && key < in_region.full_end;
    float* product = full ? view.w.logits : view.w.product;
    multiply_region(view, r, key, product);
    if constexpr (Capped) cap_logits(view, product);
    if (!full) {
      merge_region(product, keys_of_part(view, key), seen[r], first, !written, view.hidden_logit,
                   view.w.logits);
    }
    written = true;
  }
}

// O += V^T P, for the keys from `begin` to `end` of the key block.
void add_values(ForwardBf16Slice& view, int64_t begin, int64_t end) {
  if (begin == end) return;
  const int64_t first = begin / kDepth, tiles = (end - begin) / kDepth;
  const int64_t last_keys = smaller(view.keys, end) - (end - kDepth);
  for (int64_t d = 0; d < view.value_tiles; ++d) {
    for (int64_t tile = 0; tile < kQueryTiles; tile += 2) {
      const Factors factors{.a = view.w.values + (2 * d * view.key_tiles + first) * kTileValues,
                            .a_next = view.key_tiles * kTileValues,
                            .a_step = kTileValues,
                            .b = view.w.weights + (first * kQueryTiles + tile) * kTileValues,
                            .b_step = kQueryTiles * kTileValues,
                            .depth = tiles,
                            .rows = kKeyRows,
                            .last_pairs = (last_keys + 1) / 2};
      const SumsAt sums{.at = view.out + (2 * d * kQueryTiles + tile) * kTileSums,
                        .below = kQueryTiles * kTileSums,
                        .beside = kTileSums,
                        .row = kSide};
      view.is_first ? product_of_tiles(factors, sums) : add_product_of_tiles(factors, sums);
    }
  }
  view.is_first = false;
}

// P = exp2(S - row_max) for the first `keys` keys of a part; returns false if the row_max is too
// far below them. Raised: after raise_row_max. Then in_register() keeps logit and row_max from one
// fma: logits are rounded as there, and none is above the row_max. By an fma, logits from 2**28 on
// may differ by all of kHeadroom.
template <bool Capped, bool Raised>
EXTROPE_INLINE bool softmax_part(ForwardBf16Slice& view, int64_t keys, bf16* weights) {
  const auto weight = [&](const float* at, int j) __attribute__((always_inline)) {
    const floats logit = scaled_logit<Capped>(view, at, j);
    return exp2_avx512((Raised ? in_register(logit) : logit) - view.row_max[j]);
  };
  floats sum[kQueryVectors] = {};
  for (int64_t i = 0; i < keys; i += 2) {
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const float* at = view.w.logits + i * kQueryLanes + j * kFloats;
      const floats a = weight(at, j), b = weight(at + kQueryLanes, j);
      sum[j] += a + b;
      store(weights + j * kTileValues + i * kSide, pair_values(a, b));
    }
  }
  unsigned above = 0;
#pragma GCC unroll 16
  for (int j = 0; j < kQueryVectors; ++j) {
    above |= _mm512_cmp_ps_mask(sum[j], floats{} + kHeadroom, _CMP_GT_OQ);
  }
  if (above) return false;
#pragma GCC unroll 16
  for (int j = 0; j < kQueryVectors; ++j) view.row_sum[j] += sum[j];
  return true;
}

// Raises the row_max to the part's largest logit, and rescales earlier sums.
template <bool Capped>
void raise_row_max(ForwardBf16Slice& view, int64_t keys) {
  for (int j = 0; j < kQueryVectors; ++j) {
    floats row_max = view.row_max[j];
    for (int i = 0; i < keys; ++i) {
      row_max = larger(
          row_max, scaled_logit<Capped>(view, view.w.logits + i * kQueryLanes + j * kFloats, j));
    }
    const floats rescale = exp2_avx512(view.row_max[j] - row_max);
    view.row_max[j] = row_max;
    if (view.is_first) continue;
    view.row_sum[j] *= rescale;
    for (int64_t d = 0; d < 2 * view.value_tiles; ++d) {
      float* sums = view.out + (d * kQueryTiles + j) * kTileSums;
      for (int64_t i = 0; i < kTileSums; i += kFloats) {
        store(sums + i, load<floats>(sums + i) * rescale);
      }
    }
  }
}

}  // namespace
}  // namespace extrope
