// Forward of the attention over regions on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.
//
// A call of attention_tile computes a tile of queries: some tokens of a sequence in all q heads
// that share a head of k. A row is one token in one q head; rows are in the order token (slow), q
// head (fast). The tile reads keys and values in blocks, each once. In slices of kQueryLanes rows,
// a row in each lane of kQueryVectors = 3 vectors of kFloats floats, it does for each block, with
// online softmax:
//
//   S = K Q^T                    (keys, rows)   logits to base 2, or e if capped
//   P = exp2(S - row_max)        (keys, rows)
//   O = O * rescale + V^T P      (head_dim of v, rows)
//
// Products keep their sums in registers: kKeyRows keys (4 or 8) of one slice at a time. kKeyRows
// keys of a block are a part.
//
// In region r a row sees the keys [start(r), start(r + 1)), with queries and keys rotated for r.
// Starts never fall from one row to the next. So a slice sees a block, in whole parts, as
//
//          begin         full_begin      full_end        end
//   | unseen |   merged      |    full       |   merged   | unseen |
//
// In a region's full parts every row sees every key: S is one product without a mask. Merged parts
// get a product from each region that some row sees there, and every row keeps its region's: see
// merge_region(). With a single region, merging is the mask: causal, and of a sliding window.
//
// Types of the headers:
//   TileQueries   the tile: `count` rows, then padding up to `slices` slices; p is the call
//   TileKeys      the keys [begin, end) that some row of the tile sees; sees(r): any in region r
//   KeyBlock      `count` keys from key `first` on, packed as whole parts: `padded` rows
//   SliceParts    a slice's four bounds as drawn, in one region; full_begin and full_end are `end`
//                 if no part is full
//   RegionParts   of[r]: SliceParts of each region; begin and end: of all regions together
//   RowKeys       begin and end of the keys that each row of a slice sees in one region; both 0 in
//                 padding
//   floats, ints  vectors of kFloats (4, 8 or 16) lanes; `mask ? a : b` selects by lane
// SliceParts and RegionParts count keys from the block's first one, the others from the sequence's.

#include "cpu/attention/blocks.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

// Caps on a tile's rows (a token's q heads may be more) and a block's keys.
constexpr int64_t kBlockM = 768, kBlockN = 128;
static_assert(kBlockN % kKeyRows == 0, "a block is whole parts");
static_assert(8 % kKeyRows == 0, "V^T P computes kKeyRows dims at once; 8 divides each head_dim");

// row_max starts here. It is finite, so that row_max - row_max is 0 for rows without keys too, and
// exp2(-inf - row_max) is exactly 0: exp2_vector is, from -127 down.
constexpr float kLowest = -1e30f;

// The sums of a product, in registers: at[key or dim of v][vector of rows], of one slice.
using SliceSums = Sums<kKeyRows, kQueryVectors>;

// The tile's scratch memory: arrays of floats, cut from one piece. `rows` are the tile's, with the
// padding of its last slice.
struct ForwardScratch {
  // take() returns the next piece, aligned to 64 bytes. From nullptr it only counts: space.used()
  // is the number of floats.
  ForwardScratch(const AttentionParams& p, const TilePlan& plan, float* memory) : space(memory) {
    // plan.tokens in each q head of the group, padded. A sequence's last tile may have fewer.
    const int64_t rows = rows_of(p, plan);
    q = space.take(p.regions.count * rows * p.head_dim);
    out = space.take(rows * p.v.head_dim);
    keys = space.take(plan.block_n * greater(p.regions.count * p.head_dim, p.v.head_dim));
    values = space.take(plan.block_n * p.v.head_dim);
    logits = space.take(plan.block_n * kQueryLanes);
    row_max = space.take(rows);
    row_sum = space.take(rows);
    q_scale = space.take(rows);
    out_scale = space.take(rows);
  }
  Workspace space;
  float* q;          // (regions, slices, head_dim, kQueryLanes), rotated, then times q_scale
  float* out;        // (slices, head_dim of v, kQueryLanes): O before its division
  float* keys;       // (regions, block_n, head_dim), rotated
  float* values;     // (head_dim of v / kKeyRows, key_block.padded, kKeyRows)
  float* logits;     // (block_n, kQueryLanes): S of one slice, then P
  float* row_max;    // (rows,): largest S so far
  float* row_sum;    // (rows,): sum of P
  float* q_scale;    // (rows,): the logits' factor, with log2(e) or 1 / softcap; 0 in padding
  float* out_scale;  // (rows,): v_scale / row_sum with the sink; 0 for a row without keys; not set
                     // in padding
};

// A slice's queries and a block's keys in one region.
struct RegionView {
  const float* q;     // (head_dim, kQueryLanes)
  const float* keys;  // (block_n, head_dim)
  int64_t head_dim;
  int64_t first_key;  // the block's first key, in the sequence
  float softcap;
};

// Keeps the logits of keys that a row sees in this region: `bounds` has each row's begin and end.
// The others become those of earlier regions, in `logits`, or -inf if this is the first region to
// write these keys.
EXTROPE_INLINE void merge_region(SliceSums& sums, const RowKeys& bounds, int64_t key,
                                 bool is_first_region, const float* logits) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeyRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const ints sees = (here >= bounds.begin[j]) & (here < bounds.end[j]);  // -1 or 0
      floats rest = floats{} - __builtin_inff();
      if (!is_first_region) rest = load<floats>(logits + i * kQueryLanes + j * kFloats);
      sums.at[i][j] = sees ? sums.at[i][j] : rest;
    }
  }
}

// S = K Q^T for the block's keys [begin, end), all in merged parts or all in full ones; raises
// new_max. Earlier regions have written the keys before `written`. Full parts do not read `bounds`.
template <bool Merged, bool Capped>
EXTROPE_INLINE void multiply_parts(const ForwardScratch& w, const RegionView& view, int64_t begin,
                                   int64_t end, const RowKeys& bounds, int64_t written,
                                   floats (&new_max)[kQueryVectors]) {
  for (int64_t key = begin; key < end; key += kKeyRows) {
    SliceSums sums{};
    float* logits = w.logits + key * kQueryLanes;  // (kKeyRows, kQueryLanes)
    // sums[key][row] += keys[key][d] * q[d][row], over d. keys[key][d] is a step of head_dim from
    // the next key, 1 from the next d.
    multiply_add(sums, view.keys + key * view.head_dim, view.head_dim, 1, view.q, kQueryLanes,
                 view.head_dim);
    // sums = softcap * tanh(sums)
#pragma GCC unroll 16
    for (int i = 0; Capped && i < kKeyRows; ++i) apply_softcap(sums.at[i], view.softcap);
    if constexpr (Merged) merge_region(sums, bounds, view.first_key + key, key >= written, logits);
#pragma GCC unroll 16
    for (int i = 0; i < kKeyRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) {
        new_max[j] = larger(new_max[j], sums.at[i][j]);  // the logit if either is NaN
      }
    }
    store_sums(sums, logits, kQueryLanes);  // a step of kQueryLanes from key to key
  }
}

// S = K Q^T for all of a slice's parts in one region.
template <bool Capped>
void multiply_region(const TileQueries& queries, const ForwardScratch& w, const RegionView& view,
                     int64_t slice, int64_t region, const SliceParts& parts, int64_t written,
                     floats (&new_max)[kQueryVectors]) {
  RowKeys bounds;  // not set if no part is merged: then nothing reads it
  if (parts.has_merged()) bounds = row_keys(queries, slice, region);
  const int64_t merged[2][2] = {{parts.begin, parts.full_begin}, {parts.full_end, parts.end}};
  for (const auto& [begin, end] : merged) {
    multiply_parts<true, Capped>(w, view, begin, end, bounds, written, new_max);
  }
  multiply_parts<false, Capped>(w, view, parts.full_begin, parts.full_end, bounds, written,
                                new_max);
}

// P = exp2(S - new_max) for the block's keys [begin, end). Updates the slice's row_max and row_sum;
// returns the rescale factors of its earlier sums. Capped logits are to base e, so that a row at
// its cap has an lse of it, which a change of base would round.
template <bool Capped>
EXTROPE_INLINE void softmax_slice(const ForwardScratch& w, int64_t slice, int64_t begin,
                                  int64_t end, const floats (&new_max)[kQueryVectors],
                                  floats (&rescale)[kQueryVectors]) {
  constexpr float kUnit = Capped ? kLog2E : 1.0f;
  floats sum[kQueryVectors];
  for (int j = 0; j < kQueryVectors; ++j) {
    const int64_t row = slice * kQueryLanes + j * kFloats;
    rescale[j] = exp2_vector((load<floats>(w.row_max + row) - new_max[j]) * kUnit);
    sum[j] = load<floats>(w.row_sum + row) * rescale[j];
    store(w.row_max + row, new_max[j]);
  }
  for (int64_t key = begin; key < end; ++key) {
    float* logits = w.logits + key * kQueryLanes;  // (kQueryLanes,)
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const floats probability =
          exp2_vector((load<floats>(logits + j * kFloats) - new_max[j]) * kUnit);
      store(logits + j * kFloats, probability);
      sum[j] += probability;
    }
  }
  for (int j = 0; j < kQueryVectors; ++j) {
    store(w.row_sum + slice * kQueryLanes + j * kFloats, sum[j]);
  }
}

// Attends from one slice to one block of keys.
template <bool Capped>
void attend_slice(const TileQueries& queries, const TilePlan& plan, const ForwardScratch& w,
                  int64_t slice, const KeyBlock& key_block) {
  const RegionParts block_parts(queries, slice, key_block);  // of each region, and of all
  if (block_parts.begin >= block_parts.end) return;          // no row sees a key of the block
  const AttentionParams& p = queries.p;
  floats new_max[kQueryVectors], rescale[kQueryVectors];
  for (int j = 0; j < kQueryVectors; ++j) {
    new_max[j] = load<floats>(w.row_max + slice * kQueryLanes + j * kFloats);
  }

  // S = K Q^T, region by region. Regions leave no gap: parts of two are adjacent, or share merged
  // ones. So all of [block_parts.begin, written) is written, and written never falls.
  for (int64_t r = 0, written = 0; r < p.regions.count; ++r) {
    if (block_parts.of[r].begin >= block_parts.of[r].end) continue;
    const RegionView view{.q = w.q + (r * queries.slices + slice) * p.head_dim * kQueryLanes,
                          .keys = w.keys + r * plan.block_n * p.head_dim,
                          .head_dim = p.head_dim,
                          .first_key = key_block.first,
                          .softcap = p.softcap};
    multiply_region<Capped>(queries, w, view, slice, r, block_parts.of[r], written, new_max);
    written = block_parts.of[r].end;
  }

  // P = exp2(S - new_max)
  softmax_slice<Capped>(w, slice, block_parts.begin, block_parts.end, new_max, rescale);

  // O = O * rescale + V^T P
  for (int64_t d = 0; d < p.v.head_dim; d += kKeyRows) {
    float* out = w.out + (slice * p.v.head_dim + d) * kQueryLanes;  // (kKeyRows, kQueryLanes)
    SliceSums sums;
    load_sums(sums, out, kQueryLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeyRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) sums.at[i][j] *= rescale[j];
    }
    // sums[d][row] += values[key][d] * P[key][row], over keys. values[key][d] is a step of kKeyRows
    // from the next key, 1 from the next d.
    multiply_add(sums, w.values + d * key_block.padded + block_parts.begin * kKeyRows, 1, kKeyRows,
                 w.logits + block_parts.begin * kQueryLanes, kQueryLanes,
                 block_parts.end - block_parts.begin);
    store_sums(sums, out, kQueryLanes);
  }
}

// Ends the softmax: writes lse, and out = O * out_scale, of type Out.
template <typename Out>
void finish(const TileQueries& queries, const ForwardScratch& w) {
  // Sets p.lse, to base e, and w.out_scale.
  finish_softmax(queries, w.row_max, w.row_sum, queries.p.softcap > 0 ? 1.0 : kLn2, w.out_scale);
  const AttentionTensor& out = queries.p.out;
  RowBuffer buffer;  // (kFloats, more than kMaxHeadDim): unpack_rows writes whole vectors
  for (int64_t first = 0; first < queries.count; first += kFloats) {
    // buffer[i][d] = O[row first + i][d] * out_scale[first + i]
    unpack_rows(w.out, first, out.head_dim, w.out_scale, buffer);
    // Row first + i is `token` of the sequence in q head `head`; padding is not visited. offset()
    // counts elements.
    queries.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      narrow_row(buffer[i], out.head_dim,
                 static_cast<Out*>(out.data) + queries.offset(out, token, head));
    });
  }
}

// Packs a block's values, and its keys rotated for each region: a region's keys lie where they are
// in the block, and the rest of its part of w.keys is not read. Rows from `count` to `padded` are
// zero. A row that pack_rows rotates is rounded to T, like a rotated tensor; one of e4m3 stays in
// float.
template <typename T>
void pack_block(const TileQueries& queries, const TilePlan& plan, const ForwardScratch& w,
                const TileKeys& seen, const KeyBlock& key_block) {
  const AttentionParams& p = queries.p;
  // The type is T, or e4m3 in a quantized cache: k_scale is in q_scale, v_scale in out_scale.
  // `{}`: no rotation. w.keys holds the values, (padded, head_dim of v), until pack_columns has
  // read them.
  with_element_type<T>(
      p.v, [&](auto type) { pack_rows<decltype(type)>(queries, p.v, {}, key_block, w.keys); });
  pack_columns<kKeyRows>(w.keys, p.v.head_dim, key_block.padded, w.values);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    // In region r the tile sees only region_block, if anything: whole parts, from the block's key
    // `offset` on.
    pack_region(seen, r, key_block, [&](const KeyBlock& region_block, int64_t offset) {
      // k[r] is the same k in all regions, or a copy rotated ahead: k_cos_sin[r] is then empty.
      with_element_type<T>(p.k[r], [&](auto type) {
        pack_rows<decltype(type)>(queries, p.k[r], p.k_cos_sin[r], region_block,
                                  w.keys + (r * plan.block_n + offset) * p.head_dim);
      });
    });
  }
}

template <typename T, bool Capped>
void forward(const TileQueries& queries, const TilePlan& plan, const ForwardScratch& w) {
  const AttentionParams& p = queries.p;
  const int64_t padded_rows = queries.slices * kQueryLanes;  // queries.count rows, then padding
  std::memset(w.out, 0, padded_rows * p.v.head_dim * sizeof(float));
  std::memset(w.row_sum, 0, padded_rows * sizeof(float));
  for (int64_t row = 0; row < padded_rows; ++row) {
    w.row_max[row] = kLowest;
    // logit_scale() is softmax_scale times query_scale and k_scale. With a softcap, S is in units
    // of it until apply_softcap(). The backward scales alike: its logits have to be those of lse.
    const float scale = row < queries.count ? queries.logit_scale(row) : 0.0f;
    w.q_scale[row] = Capped ? scale / p.softcap : scale * kLog2E;
  }
  const TileKeys seen(queries);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    if (!seen.sees(r)) continue;
    // Rotates by the cosines and sines of r's map of q, rounds to T, multiplies by q_scale. Padding
    // gets 0.
    pack_slices<T>(queries, p.q, p.q_cos_sin[r], w.q_scale, w.q + r * padded_rows * p.head_dim);
  }
  for (int64_t first = seen.begin; first < seen.end; first += plan.block_n) {
    const KeyBlock key_block = seen.key_block(first, plan.block_n);  // shorter if the last one
    pack_block<T>(queries, plan, w, seen, key_block);
    for (int64_t slice = 0; slice < queries.slices; ++slice) {
      // Every slice prefetches its share of the next block, if there is one.
      prefetch_block<T>(queries, seen, first + plan.block_n, plan.block_n, slice);
      attend_slice<Capped>(queries, plan, w, slice, key_block);
    }
  }
  // The type is T, or float if p.float32_out.
  with_out_type<T>(p, [&](auto type) { finish<decltype(type)>(queries, w); });
}

template <typename T>
void forward(const TileQueries& queries, const TilePlan& plan, const ForwardScratch& w) {
  if (queries.p.softcap > 0) return forward<T, true>(queries, plan, w);
  forward<T, false>(queries, plan, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  // At least 1. Fewer than fit in kBlockM rows if there would be too few tiles for the threads.
  plan.tokens = tokens_per_tile(p, kBlockM);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kKeyRows));
  plan.workspace = ForwardScratch(p, plan, nullptr).space.used();  // floats
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  // The tile is tile.tokens tokens of one sequence, in the q heads of one head of k, tile.head.
  const TileQueries queries{p, tile};
  const ForwardScratch w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return forward<bf16>(queries, plan, w);
    case DType::f16:
      return forward<f16>(queries, plan, w);
    default:
      return forward<float>(queries, plan, w);
  }
}

}  // namespace extrope
