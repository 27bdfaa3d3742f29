// Backward of the attention over regions on the CPU. Compiled once per instruction set, with
// EXTROPE_ISA as its name.
//
// A tile of query rows takes the keys of each region block by block. It computes probabilities
// and gradients of logits once, and adds to its rows of dq and to dk and dv (in memory; tiles add
// in the order of their rows). For each slice of rows and block of keys:
//
//   P = exp2(K Q^T - lse)                (keys, rows)   logits and lse to base 2, or e if capped
//   dS = P * (V dO^T - delta)            (keys, rows)   times the softcap's slopes
//   dQ += K^T dS,  dV += P dO,  dK += dS Q
//
// delta = <dO, O> - dlse of each row. Types of the headers, beside those that forward_kernel.cpp
// names (TileQueries, KeyBlock, SliceParts, RowKeys, floats and ints):
//   RowValues   a tile's lse, delta and scales, (rows,) each
//   Sums        a tile of sums in registers: at[row][vector]
//   KeysDone    the key up to which a tile has added to dk and dv: `done` is this tile's,
//               `previous` that of the tile before, nullptr if there is none
//   TilePlan    how many tokens a tile has, how many keys a block, and the floats of its scratch

#include <algorithm>
#include <numeric>

#include "cpu/attention/backward_rows.h"
#include "cpu/simd/softmax.h"

namespace extrope {
namespace {

constexpr int64_t kTileFloats = 36864;  // of rows times head_dim
constexpr int64_t kMaxBlockM = 384, kBlockN = 96;
constexpr int64_t kKeyBlock = std::lcm(kKeyRows, kTallRows);

struct BackwardScratch {
  BackwardScratch(const AttentionParams& p, const TilePlan& plan, float* begin)
      : space(begin), rows(space, rows_of(p, plan)) {
    const int64_t padded_rows = rows_of(p, plan);
    const int64_t wide = round_up(p.head_dim, kWide), value_wide = round_up(p.v.head_dim, kWide);
    q = space.take(padded_rows * p.head_dim);
    dout = space.take(padded_rows * p.v.head_dim);
    dq = space.take(padded_rows * p.head_dim);
    q_rows = space.take(padded_rows * wide);
    dout_rows = space.take(padded_rows * value_wide);
    keys = space.take(plan.block_n * p.head_dim);
    key_columns = space.take(plan.block_n * p.head_dim);
    values = space.take(plan.block_n * p.v.head_dim);
    key_sums = space.take(plan.block_n * greater(wide, value_wide));
    probabilities = space.take(plan.block_n * padded_rows);
    dlogits = space.take(plan.block_n * padded_rows);
    seen = reinterpret_cast<int32_t*>(space.take(2 * padded_rows / kQueryLanes));
    unit_scale = space.take(padded_rows);
  }
  Workspace space;
  RowValues rows;
  // head_dim here is that of each tensor.
  float *q, *dout, *dq;            // (slices, head_dim, kQueryLanes)
  float *q_rows, *dout_rows;       // (head_dim / kWide, rows, kWide)
  float *keys, *values;            // (keys, head_dim)
  float* key_sums;                 // (keys, head_dim rounded up to kWide)
  float* key_columns;              // (head_dim / kKeyRows, keys, kKeyRows)
  float *probabilities, *dlogits;  // (slices, keys, kQueryLanes)
  int32_t* seen;                   // (slices, 2): the keys of a block that a slice sees
  float* unit_scale;               // (rows,), all 1: dout is packed unscaled
};

struct BackwardSlice {
  const float *q, *dout, *lse, *delta;
  float *dq, *probabilities, *dlogits;
  float softcap;
};

BackwardSlice slice_view(const TileQueries& queries, const BackwardScratch& w, int64_t slice,
                         int64_t padded_keys) {
  const AttentionParams& p = queries.p;
  const int64_t square = slice * p.head_dim * kQueryLanes, at = slice * padded_keys * kQueryLanes;
  return {.q = w.q + square,
          .dout = w.dout + slice * p.v.head_dim * kQueryLanes,
          .lse = w.rows.lse + slice * kQueryLanes,
          .delta = w.rows.delta + slice * kQueryLanes,
          .dq = w.dq + square,
          .probabilities = w.probabilities + at,
          .dlogits = w.dlogits + at,
          .softcap = p.softcap};
}

// Hides the keys that a row does not see in the region.
EXTROPE_INLINE void mask_part(Sums<kKeyRows, kQueryVectors>& sums, const RowKeys& seen,
                              int64_t key) {
#pragma GCC unroll 16
  for (int i = 0; i < kKeyRows; ++i) {
    const ints here = ints{} + static_cast<int32_t>(key + i);
#pragma GCC unroll 16
    for (int j = 0; j < kQueryVectors; ++j) {
      const ints sees = (here >= seen.begin[j]) & (here < seen.end[j]);
      sums.at[i][j] = sees ? sums.at[i][j] : floats{} - __builtin_inff();
    }
  }
}

// P = exp2(K Q^T - lse) for a slice's keys [begin, end) of the block. With a softcap, writes its
// slopes to the place of dlogits.
template <bool Masked, bool Capped>
EXTROPE_INLINE void probability_parts(const BackwardSlice& view, const float* keys, int64_t dim,
                                      int64_t begin, int64_t end, const RowKeys& seen,
                                      int64_t first) {
  for (int64_t key = begin; key < end; key += kKeyRows) {
    Sums<kKeyRows, kQueryVectors> sums{};
    multiply_add(sums, keys + key * dim, dim, 1, view.q, kQueryLanes, dim);
#pragma GCC unroll 16
    for (int i = 0; Capped && i < kKeyRows; ++i) {
      floats slopes[kQueryVectors];
      apply_softcap_with_slopes(sums.at[i], view.softcap, slopes);
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) {
        store(view.dlogits + (key + i) * kQueryLanes + j * kFloats, slopes[j]);
      }
    }
    if constexpr (Masked) mask_part(sums, seen, first + key);
#pragma GCC unroll 16
    for (int i = 0; i < kKeyRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) {
        const floats exponent = sums.at[i][j] - load<floats>(view.lse + j * kFloats);
        sums.at[i][j] = exp2_vector(Capped ? exponent * kLog2E : exponent);
      }
    }
    store_sums(sums, view.probabilities + key * kQueryLanes, kQueryLanes);
  }
}

// dlogits = P * (V dO^T - delta), times the slopes in its place.
template <bool Capped>
void gradient_parts(const BackwardSlice& view, const float* values, int64_t dim, int64_t begin,
                    int64_t end) {
  for (int64_t key = begin; key < end; key += kKeyRows) {
    Sums<kKeyRows, kQueryVectors> sums{};
    multiply_add(sums, values + key * dim, dim, 1, view.dout, kQueryLanes, dim);
#pragma GCC unroll 16
    for (int i = 0; i < kKeyRows; ++i) {
#pragma GCC unroll 16
      for (int j = 0; j < kQueryVectors; ++j) {
        const floats probability =
            load<floats>(view.probabilities + (key + i) * kQueryLanes + j * kFloats);
        sums.at[i][j] = probability * (sums.at[i][j] - load<floats>(view.delta + j * kFloats));
        if constexpr (Capped) {
          sums.at[i][j] *= load<floats>(view.dlogits + (key + i) * kQueryLanes + j * kFloats);
        }
      }
    }
    store_sums(sums, view.dlogits + key * kQueryLanes, kQueryLanes);
  }
}

// Clears what sum_rows reads beside the slice's keys: it takes kTallRows of them at once.
void clear_unseen(const BackwardSlice& view, const SliceParts& parts) {
  const int64_t before = parts.begin % kTallRows, end = round_up(parts.end, kTallRows);
  for (float* x : {view.probabilities, view.dlogits}) {
    std::memset(x + (parts.begin - before) * kQueryLanes, 0, before * kQueryLanes * sizeof(float));
    std::memset(x + parts.end * kQueryLanes, 0, (end - parts.end) * kQueryLanes * sizeof(float));
  }
}

template <bool Capped>
void differentiate_slice(const TileQueries& queries, const BackwardScratch& w, int64_t slice,
                         int64_t region, const KeyBlock& key_block) {
  const int64_t dim = queries.p.head_dim;
  const BackwardSlice view = slice_view(queries, w, slice, key_block.padded);
  SliceParts parts =
      slice_parts(slice_keys(queries, slice, region), key_block.first, key_block.count);
  if (parts.begin >= parts.end) parts = {0, 0, 0, 0};
  w.seen[2 * slice] = static_cast<int32_t>(parts.begin);
  w.seen[2 * slice + 1] = static_cast<int32_t>(parts.end);
  if (parts.begin == parts.end) return;
  clear_unseen(view, parts);
  RowKeys seen;
  if (parts.has_merged()) seen = row_keys(queries, slice, region);
  const int64_t first = key_block.first;
  probability_parts<true, Capped>(view, w.keys, dim, parts.begin, parts.full_begin, seen, first);
  probability_parts<false, Capped>(view, w.keys, dim, parts.full_begin, parts.full_end, seen,
                                   first);
  probability_parts<true, Capped>(view, w.keys, dim, parts.full_end, parts.end, seen, first);
  gradient_parts<Capped>(view, w.values, queries.p.v.head_dim, parts.begin, parts.end);
  for (int64_t d = 0; d < dim; d += kKeyRows) {
    Sums<kKeyRows, kQueryVectors> sums;
    load_sums(sums, view.dq + d * kQueryLanes, kQueryLanes);
    multiply_add(sums, w.key_columns + d * key_block.padded + parts.begin * kKeyRows, 1, kKeyRows,
                 view.dlogits + parts.begin * kQueryLanes, kQueryLanes, parts.end - parts.begin);
    store_sums(sums, view.dq + d * kQueryLanes, kQueryLanes);
  }
}

void write_dq(const TileQueries& queries, const BackwardScratch& w, int64_t region) {
  RowBuffer rows;
  for (int64_t row = 0; row < queries.count; ++row) {
    if (row % kFloats == 0) unpack_rows(w.dq, row, queries.p.head_dim, w.rows.logit_scale, rows);
    write_dq_row(queries, region, row, rows[row % kFloats]);
  }
}

template <typename T>
void backward_region(const TileQueries& queries, const TilePlan& plan, const BackwardScratch& w,
                     int64_t region, KeysDone* previous, KeysDone* done) {
  const AttentionParams& p = queries.p;
  const auto visit = p.softcap > 0 ? differentiate_slice<true> : differentiate_slice<false>;
  std::memset(w.dq, 0, queries.slices * kQueryLanes * p.head_dim * sizeof(float));
  const SliceKeys keys = tile_keys(queries, region);
  if (keys.begin < keys.end) {
    pack_slices<T>(queries, p.q, p.q_cos_sin[region], w.rows.q_scale, w.q);
    pack_wide<T>(queries, p.q, p.q_cos_sin[region], w.rows.logit_scale, w.q_rows);
  }
  for (int64_t first = keys.begin; first < keys.end; first += plan.block_n) {
    const int64_t count = smaller(plan.block_n, keys.end - first);
    const KeyBlock key_block{first, count, round_up(count, kKeyBlock)};
    pack_rows<T>(queries, p.v, {}, key_block, w.values);
    pack_rows<T>(queries, p.k[region], p.k_cos_sin[region], key_block, w.keys);
    pack_columns<kKeyRows>(w.keys, p.head_dim, key_block.padded, w.key_columns);
    const int64_t next = first + count, next_count = smaller(plan.block_n, keys.end - next);
    for (int64_t slice = 0; slice < queries.slices; ++slice) {
      prefetch_share<T>(queries, p.k[region], next, next_count, slice);
      prefetch_share<T>(queries, p.v, next, next_count, slice);
      prefetch_share<float>(queries, p.dk, first, count, slice);
      prefetch_share<float>(queries, p.dv, first, count, slice);
      visit(queries, w, slice, region, key_block);
    }
    // Sums of this tile's rows need no other tile: only adding them waits for the tile before. Then
    // `done` lets the next tile add to these keys, but to none that a later region touches again.
    sum_rows(queries, key_block, w.seen, w.probabilities, w.dout_rows, p.v.head_dim, w.key_sums);
    wait_for_keys(previous, first + count);
    add_keys(queries, key_block, {}, w.key_sums, p.dv);
    sum_rows(queries, key_block, w.seen, w.dlogits, w.q_rows, p.head_dim, w.key_sums);
    add_keys(queries, key_block, p.k_cos_sin[region], w.key_sums, p.dk);
    done->store(smaller(first + count, next_key(queries, region + 1)), std::memory_order_release);
  }
  write_dq(queries, w, region);
}

template <typename T>
void backward(const TileQueries& queries, const TilePlan& plan, const BackwardScratch& w,
              KeysDone* previous, KeysDone* done) {
  load_row_values<T>(queries, w.rows);
  std::fill_n(w.unit_scale, queries.slices * kQueryLanes, 1.0f);
  pack_slices<T>(queries, queries.p.dout, {}, w.unit_scale, w.dout);
  pack_wide<T>(queries, queries.p.dout, {}, w.unit_scale, w.dout_rows);
  for (int64_t region = 0; region < queries.p.regions.count; ++region) {
    backward_region<T>(queries, plan, w, region, previous, done);
  }
  wait_for_keys(previous, kAllKeys);
  done->store(kAllKeys, std::memory_order_release);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t rows = kTileFloats / greater(p.head_dim, p.v.head_dim);
  const int64_t block_m = greater(smaller(rows, kMaxBlockM) / kQueryLanes, 1) * kQueryLanes;
  plan.tokens = tokens_per_tile(p, block_m);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kKeyBlock));
  plan.workspace = BackwardScratch(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)(const AttentionParams& p,
                                                           const QueryTile& tile,
                                                           const TilePlan& plan, float* workspace,
                                                           KeysDone* previous, KeysDone* done) {
  const TileQueries queries{p, tile};
  const BackwardScratch w(p, plan, workspace);
  switch (p.dtype) {
    case DType::bf16:
      return backward<bf16>(queries, plan, w, previous, done);
    case DType::f16:
      return backward<f16>(queries, plan, w, previous, done);
    default:
      return backward<float>(queries, plan, w, previous, done);
  }
}

}  // namespace extrope
