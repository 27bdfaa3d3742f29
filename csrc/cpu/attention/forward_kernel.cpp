// Forward of the attention over regions on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.
//
// A call of attention_tile computes a tile of queries: some tokens of a sequence in all q heads
// that share a head of k. A row is one token in one q head; rows are in the order token (slow), q
// head (fast). The tile reads keys and values in blocks. In slices of kQueryLanes rows, a row in
// each lane of kQueryVectors vectors, it does for each block, with online softmax:
//
//   S = K Q^T                    (keys, rows)   logits to base 2
//   P = exp2(S - row_max)        (keys, rows)
//   O = O * rescale + V^T P      (head_dim of v, rows)
//
// In region r a row sees the keys [start(r), start(r + 1)), with queries and keys rotated for r.
// Later rows have later starts. So a slice sees a block, in parts of kKeyRows keys, as
//
//          begin         full_begin      full_end        end
//   | unseen |   merged      |    full       |   merged   | unseen |
//
// In a region's full parts every row sees every key: S is one product without a mask. Merged parts
// get a product from each region that some row sees there, and every row keeps its region's: see
// merge_region(). Without a score method there is one region, and merging is the causal mask.

#include "cpu/attention/blocks.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd/exp2.h"

namespace extrope {
namespace {

constexpr int64_t kBlockM = 768, kBlockN = 128;  // the most rows of a tile, and keys of a block
static_assert(8 % kKeyRows == 0, "V^T P takes kKeyRows dims at once of a head_dim that 8 divides");

// row_max starts here. It is finite, so that row_max - row_max is 0 for rows without keys too, and
// exp2(-inf - row_max) is exactly 0.
constexpr float kLowest = -1e30f;

// The sums of a product: kKeyRows keys (or dims of v) of kQueryLanes rows, in registers.
using SliceSums = Sums<kKeyRows, kQueryVectors>;

// The tile's scratch memory: arrays of floats, cut from one piece. `slices` cover the tile's rows.
struct Scratch {
  Scratch(const AttentionParams& p, const TilePlan& plan, float* begin) : space(begin) {
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
  float* q;       // (regions, slices, head_dim, kQueryLanes), rotated, times q_scale
  float* out;     // (slices, head_dim of v, kQueryLanes): O before its division
  float* keys;    // (regions, block_n, head_dim), rotated; before that the block's values
  float* values;  // (head_dim of v / kKeyRows, keys of the block, kKeyRows)
  float* logits;  // (block_n, kQueryLanes): S of one slice, then P
  float *row_max, *row_sum;  // (rows,), to base 2
  float* q_scale;    // (rows,): the logits' factor, with log2(e) or 1 / softcap; 0 in padding
  float* out_scale;  // (rows,): v_scale / row_sum
};

// A slice's queries and a block's keys in one region.
struct RegionView {
  const float* q;     // (head_dim, kQueryLanes)
  const float* keys;  // (block_n, head_dim)
  int64_t head_dim;
  int64_t first_key;  // the block's first key, in the sequence
  float softcap;      // to base 2
};

// Keeps the logits of keys that a row sees in this region. The others become those of earlier
// regions, in `logits`, or -inf if this is the first region to write these keys.
EXTROPE_INLINE void merge_region(SliceSums& sums, const RowKeys& seen, int64_t key,
                                 bool is_first_region, const float* logits) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeyRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const ints sees = (here >= seen.begin[j]) & (here < seen.end[j]);
      floats rest = floats{} - __builtin_inff();
      if (!is_first_region) rest = load<floats>(logits + i * kQueryLanes + j * kFloats);
      sums.at[i][j] = sees ? sums.at[i][j] : rest;
    }
  }
}

// S = K Q^T for the block's keys [begin, end), all in merged parts or all in full ones; raises
// row_max. Earlier regions have written the keys before `written`.
template <bool Merged, bool Capped>
EXTROPE_INLINE void multiply_parts(const Scratch& w, const RegionView& view, int64_t begin,
                                   int64_t end, const RowKeys& seen, int64_t written,
                                   floats (&row_max)[kQueryVectors]) {
  for (int64_t key = begin; key < end; key += kKeyRows) {
    SliceSums sums{};
    float* logits = w.logits + key * kQueryLanes;  // (kKeyRows, kQueryLanes)
    // sums[key][row] += keys[key][d] * q[d][row], over d
    multiply_add(sums, view.keys + key * view.head_dim, view.head_dim, 1, view.q, kQueryLanes,
                 view.head_dim);
#pragma GCC unroll 16
    for (int i = 0; Capped && i < kKeyRows; ++i) apply_softcap(sums.at[i], view.softcap);
    if constexpr (Merged) merge_region(sums, seen, view.first_key + key, key >= written, logits);
#pragma GCC unroll 16
    for (int i = 0; i < kKeyRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) row_max[j] = larger(row_max[j], sums.at[i][j]);
    }
    store_sums(sums, logits, kQueryLanes);
  }
}

// S = K Q^T for all of a slice's parts in one region.
template <bool Capped>
void multiply_region(const TileQueries& queries, const Scratch& w, const RegionView& view,
                     int64_t slice, int64_t region, const SliceParts& parts, int64_t written,
                     floats (&row_max)[kQueryVectors]) {
  RowKeys seen;
  if (parts.has_merged()) seen = row_keys(queries, slice, region);
  const int64_t merged[2][2] = {{parts.begin, parts.full_begin}, {parts.full_end, parts.end}};
  for (const auto& [begin, end] : merged) {
    multiply_parts<true, Capped>(w, view, begin, end, seen, written, row_max);
  }
  multiply_parts<false, Capped>(w, view, parts.full_begin, parts.full_end, seen, written, row_max);
}

// P = exp2(S - row_max) for the block's keys [begin, end). Updates the slice's row_max and row_sum;
// returns the rescale factors of its earlier sums.
EXTROPE_INLINE void softmax_slice(const Scratch& w, int64_t slice, int64_t begin, int64_t end,
                                  const floats (&row_max)[kQueryVectors],
                                  floats (&rescale)[kQueryVectors]) {
  floats sum[kQueryVectors];
  for (int j = 0; j < kQueryVectors; ++j) {
    const int64_t row = slice * kQueryLanes + j * kFloats;
    rescale[j] = exp2_vector(load<floats>(w.row_max + row) - row_max[j]);
    sum[j] = load<floats>(w.row_sum + row) * rescale[j];
    store(w.row_max + row, row_max[j]);
  }
  for (int64_t key = begin; key < end; ++key) {
    float* logits = w.logits + key * kQueryLanes;  // (kQueryLanes,)
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const floats probability = exp2_vector(load<floats>(logits + j * kFloats) - row_max[j]);
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
void attend_slice(const TileQueries& queries, const TilePlan& plan, const Scratch& w, int64_t slice,
                  const KeyBlock& key_block) {
  const RegionParts parts(queries, slice, key_block);
  if (parts.begin >= parts.end) return;
  const AttentionParams& p = queries.p;
  floats row_max[kQueryVectors], rescale[kQueryVectors];
  for (int j = 0; j < kQueryVectors; ++j) {
    row_max[j] = load<floats>(w.row_max + slice * kQueryLanes + j * kFloats);
  }

  // S = K Q^T, region by region. Regions rise with the keys, so each writes up to its last part.
  for (int64_t r = 0, written = 0; r < p.regions.count; ++r) {
    if (parts.of[r].begin >= parts.of[r].end) continue;
    const RegionView view{.q = w.q + (r * queries.slices + slice) * p.head_dim * kQueryLanes,
                          .keys = w.keys + r * plan.block_n * p.head_dim,
                          .head_dim = p.head_dim,
                          .first_key = key_block.first,
                          .softcap = p.softcap * kLog2E};
    multiply_region<Capped>(queries, w, view, slice, r, parts.of[r], written, row_max);
    written = parts.of[r].end;
  }

  // P = exp2(S - row_max)
  softmax_slice(w, slice, parts.begin, parts.end, row_max, rescale);

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
    // sums[d][row] += values[key][d] * P[key][row], over keys
    multiply_add(sums, w.values + d * key_block.padded + parts.begin * kKeyRows, 1, kKeyRows,
                 w.logits + parts.begin * kQueryLanes, kQueryLanes, parts.end - parts.begin);
    store_sums(sums, out, kQueryLanes);
  }
}

// Writes lse, and out = O * out_scale, of type Out.
template <typename Out>
void finish(const TileQueries& queries, const Scratch& w) {
  finish_softmax(queries, w.row_max, w.row_sum, w.out_scale);
  const AttentionTensor& out = queries.p.out;
  RowBuffer rows;  // (kFloats, head_dim of v)
  for (int64_t first = 0; first < queries.count; first += kFloats) {
    unpack_rows(w.out, first, out.head_dim, w.out_scale, rows);
    queries.each_of_vector(first, [&](int64_t i, int64_t token, int64_t head) {
      narrow_row(rows[i], out.head_dim,
                 static_cast<Out*>(out.data) + queries.offset(out, token, head));
    });
  }
}

// Packs a block's values, and its keys rotated for each region: a region's keys lie where they are
// in the block, and the rest of its part of w.keys is not read.
template <typename T>
void pack_block(const TileQueries& queries, const TilePlan& plan, const Scratch& w,
                const TileKeys& seen, const KeyBlock& key_block) {
  const AttentionParams& p = queries.p;
  // The type is T, or e4m3 in a quantized cache: k_scale is in q_scale, v_scale in out_scale.
  with_element_type<T>(
      p.v, [&](auto type) { pack_rows<decltype(type)>(queries, p.v, {}, key_block, w.keys); });
  pack_columns<kKeyRows>(w.keys, p.v.head_dim, key_block.padded, w.values);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    pack_region(seen, r, key_block, [&](const KeyBlock& keys, int64_t offset) {
      with_element_type<T>(p.k[r], [&](auto type) {
        pack_rows<decltype(type)>(queries, p.k[r], p.k_cos_sin[r], keys,
                                  w.keys + (r * plan.block_n + offset) * p.head_dim);
      });
    });
  }
}

template <typename T, bool Capped>
void forward(const TileQueries& queries, const TilePlan& plan, const Scratch& w) {
  const AttentionParams& p = queries.p;
  const int64_t padded_rows = queries.slices * kQueryLanes;
  // With a softcap, S is in units of it until apply_softcap(), which brings log2(e).
  const float unit = Capped ? 1.0f / p.softcap : kLog2E;
  std::memset(w.out, 0, padded_rows * p.v.head_dim * sizeof(float));
  std::memset(w.row_sum, 0, padded_rows * sizeof(float));
  for (int64_t row = 0; row < padded_rows; ++row) {
    w.row_max[row] = kLowest;
    w.q_scale[row] = row < queries.count ? queries.logit_scale(row) * unit : 0.0f;
  }
  const TileKeys seen(queries);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    if (!seen.sees(r)) continue;
    pack_slices<T>(queries, p.q, p.q_cos_sin[r], w.q_scale, w.q + r * padded_rows * p.head_dim);
  }
  for (int64_t first = seen.begin; first < seen.end; first += plan.block_n) {
    const KeyBlock key_block = seen.key_block(first, plan.block_n);
    pack_block<T>(queries, plan, w, seen, key_block);
    for (int64_t slice = 0; slice < queries.slices; ++slice) {
      prefetch_block<T>(queries, seen, first + plan.block_n, plan.block_n, slice);
      attend_slice<Capped>(queries, plan, w, slice, key_block);
    }
  }
  with_out_type<T>(p, [&](auto type) { finish<decltype(type)>(queries, w); });
}

template <typename T>
void forward(const TileQueries& queries, const TilePlan& plan, const Scratch& w) {
  if (queries.p.softcap > 0) return forward<T, true>(queries, plan, w);
  forward<T, false>(queries, plan, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  plan.tokens = tokens_per_tile(p, kBlockM);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kKeyRows));
  plan.workspace = Scratch(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const TileQueries queries{p, tile};
  const Scratch w(p, plan, workspace);
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
