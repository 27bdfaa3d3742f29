// Backward of the attention over regions in bf16, on processors with AMX or AVX512_BF16. Compiled
// once for each, with EXTROPE_ISA as its name.
//
// It works like backward_kernel.cpp, with products of tiles as in forward_bf16_kernel.cpp. As
// factors of dq, dk and dv, probabilities and gradients of logits are rounded to bf16. Sums are
// not.

#include "cpu/attention/backward_bf16_part.h"

namespace extrope {
namespace {

constexpr int64_t kTileElements = 65536;  // rows times head_dim
constexpr int64_t kMaxBlockM = 512, kBlockN = 128;

// dq += keys * gradients, for the keys from `begin` to `end` of the key block.
void add_to_dq(const BackwardBf16Slice& view, int64_t begin, int64_t end) {
  const BackwardBf16Scratch& w = view.w;
  const int64_t first = begin / kDepth, tiles = (end - begin) / kDepth;
  float* dq = w.dq + view.slice * view.dim_tiles * kDepth * kQueryLanes;
  for (int64_t d = 0; d < view.dim_tiles; ++d) {
    for (int64_t tile = 0; tile < kQueryTiles; tile += 2) {
      add_product_of_tiles({w.key_columns + (2 * d * view.key_tiles + first) * kTileValues,
                            view.key_tiles * kTileValues, kTileValues,
                            w.gradient_pairs + (first * kQueryTiles + tile) * kTileValues,
                            kQueryTiles * kTileValues, tiles},
                           {dq + (2 * d * kQueryTiles + tile) * kTileSums, kQueryTiles * kTileSums,
                            kTileSums, kSide});
    }
  }
}

template <bool Capped>
void differentiate_slice(const TileQueries& queries, const BackwardBf16Scratch& w, int64_t slice,
                         int64_t region, const KeyBlock& key_block) {
  SliceParts parts =
      slice_parts(slice_keys(queries, slice, region), key_block.first, key_block.count);
  if (parts.begin >= parts.end) parts = {0, 0, 0, 0};
  w.seen[2 * slice] = static_cast<int32_t>(parts.begin);
  w.seen[2 * slice + 1] = static_cast<int32_t>(parts.end);
  if (parts.begin == parts.end) return;
  BackwardBf16Slice view{.w = w,
                         .slice = slice,
                         .slices = queries.slices,
                         .dim_tiles = dim_tiles_of(queries.p.q),
                         .value_tiles = dim_tiles_of(queries.p.v),
                         .key_tiles = key_block.padded / kDepth,
                         .softcap = queries.p.softcap};
  for (int j = 0; j < kQueryVectors; ++j) {
    const int64_t at = slice * kQueryLanes + j * kFloats;
    view.lse[j] = load<floats>(w.rows.lse + at);
    view.delta[j] = load<floats>(w.rows.delta + at);
    view.logit_scale[j] = load<floats>(w.rows.logit_scale + at);
    view.q_scale[j] = load<floats>(w.rows.q_scale + at);
  }
  RowKeys seen;
  if (parts.has_merged()) seen = row_keys(queries, slice, region);
  for (int64_t part = parts.begin; part < parts.end; part += kKeyRows) {
    if (part >= parts.full_begin && part < parts.full_end) {
      differentiate_part<false, Capped>(view, seen, part, key_block.first);
    } else {
      differentiate_part<true, Capped>(view, seen, part, key_block.first);
    }
  }
  add_to_dq(view, parts.begin, parts.end);
}

// sums[key] = sum of weights[key][row] * rows[row] over the rows that see the key: (keys, dim).
void sum_over_rows(const TileQueries& queries, const KeyBlock& key_block,
                   const BackwardBf16Scratch& w, const bf16* weights, const bf16* rows,
                   int64_t dim_tiles) {
  const int64_t row_tiles = queries.slices * kRowTiles, dim = dim_tiles * kDepth;
  for (int64_t key = 0; key < key_block.padded; key += kKeyRows) {
    // Ranges of keys rise with the rows: slices that see these keys are neighbours.
    int64_t first = 0, last = queries.slices;
    const auto sees = [&](int64_t slice) {
      return w.seen[2 * slice] <= key && key < w.seen[2 * slice + 1];
    };
    while (first < last && !sees(first)) ++first;
    while (first < last && !sees(last - 1)) --last;
    if (first == last) {
      std::memset(w.key_sums + key * dim, 0, kKeyRows * dim * sizeof(float));
      continue;
    }
    const bf16* left = weights + (key / kSide * row_tiles + first * kRowTiles) * kTileValues;
    for (int64_t d = 0; d < dim; d += kDepth) {
      product_of_tiles({left, row_tiles * kTileValues, kTileValues,
                        rows + (first * kRowTiles * 2 * dim_tiles + d / kSide) * kTileValues,
                        2 * dim_tiles * kTileValues, (last - first) * kRowTiles},
                       {w.key_sums + key * dim + d, kSide * dim, kSide, dim});
    }
  }
}

void write_dq(const TileQueries& queries, const BackwardBf16Scratch& w, int64_t region) {
  RowBuffer rows;
  for (int64_t first = 0; first < queries.count; first += kSide) {
    each_sum(queries, w.dq, first, queries.p.head_dim,
             [&](int64_t i, int64_t d, floats sums) { store(rows[i] + d, sums); });
    for (int64_t i = 0; i < smaller(kSide, queries.count - first); ++i) {
      write_dq_row(queries, region, first + i, rows[i]);
    }
  }
}

// Packs the keys of a region's block, and values, as factors.
void pack_key_block(const TileQueries& queries, const BackwardBf16Scratch& w, int64_t region,
                    const KeyBlock& key_block) {
  const AttentionParams& p = queries.p;
  const auto rows_of_tensor = [&](const AttentionTensor& x) {
    return [&](int64_t i) { return key_row<bf16>(queries, x, key_block.first + i); };
  };
  pack_key_rows(key_block, p.v.head_dim, rows_of_tensor(p.v), w.values);
  const auto pack = [&](const auto& row) {
    pack_key_rows(key_block, p.head_dim, row, w.keys);
    pack_key_columns(key_block, p.head_dim, row, w.key_columns);
  };
  if (!p.k_cos_sin[region].cos) return pack(rows_of_tensor(p.k[region]));
  const int64_t dim = round_up(p.head_dim, kDepth);
  for (int64_t i = 0; i < key_block.count; ++i) {
    const int64_t token = queries.tile.first_k + key_block.first + i;
    rotate_values(p.rotation, key_row<bf16>(queries, p.k[region], key_block.first + i),
                  cos_sin_at(queries, p.k_cos_sin[region], token), w.rotated + i * dim);
  }
  pack([&](int64_t i) { return w.rotated + i * dim; });
}

void backward_region(const TileQueries& queries, const TilePlan& plan, const BackwardBf16Scratch& w,
                     int64_t region, KeysDone* previous, KeysDone* done) {
  const AttentionParams& p = queries.p;
  const auto visit = p.softcap > 0 ? differentiate_slice<true> : differentiate_slice<false>;
  const int64_t dim_tiles = dim_tiles_of(p.q), value_tiles = dim_tiles_of(p.v);
  std::memset(w.dq, 0, queries.slices * kQueryLanes * dim_tiles * kDepth * sizeof(float));
  const SliceKeys keys = tile_keys(queries, region);
  if (keys.begin < keys.end) {
    pack_query_pairs(queries, p.q, p.q_cos_sin[region], w.q);
    pack_row_pairs(queries, p.q, p.q_cos_sin[region], w.q_rows);
  }
  for (int64_t first = keys.begin; first < keys.end; first += plan.block_n) {
    const int64_t count = smaller(plan.block_n, keys.end - first);
    const KeyBlock key_block{first, count, round_up(count, kKeyRows)};
    pack_key_block(queries, w, region, key_block);
    const int64_t next = first + count, next_count = smaller(plan.block_n, keys.end - next);
    for (int64_t slice = 0; slice < queries.slices; ++slice) {
      prefetch_share<bf16>(queries, p.k[region], next, next_count, slice);
      prefetch_share<bf16>(queries, p.v, next, next_count, slice);
      prefetch_share<float>(queries, p.dk, first, count, slice);
      prefetch_share<float>(queries, p.dv, first, count, slice);
      visit(queries, w, slice, region, key_block);
    }
    sum_over_rows(queries, key_block, w, w.probabilities, w.dout_rows, value_tiles);
    wait_for_keys(previous, first + count);
    add_keys(queries, key_block, {}, w.key_sums, p.dv);
    sum_over_rows(queries, key_block, w, w.gradients, w.q_rows, dim_tiles);
    add_keys(queries, key_block, p.k_cos_sin[region], w.key_sums, p.dk);
    done->store(smaller(first + count, next_key(queries, region + 1)), std::memory_order_release);
  }
  write_dq(queries, w, region);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t rows = kTileElements / greater(p.head_dim, p.v.head_dim);
  plan.tokens =
      tokens_per_tile(p, greater(smaller(rows, kMaxBlockM) / kQueryLanes, 1) * kQueryLanes);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kKeyRows));
  plan.workspace = BackwardBf16Scratch(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)(const AttentionParams& p,
                                                           const QueryTile& tile,
                                                           const TilePlan& plan, float* workspace,
                                                           KeysDone* previous, KeysDone* done) {
  const ProductUnit unit;
  const TileQueries queries{p, tile};
  const BackwardBf16Scratch w(p, plan, workspace);
  load_row_values<bf16>(queries, w.rows);
  pack_query_pairs(queries, p.dout, {}, w.dout);
  pack_row_pairs(queries, p.dout, {}, w.dout_rows);
  for (int64_t region = 0; region < p.regions.count; ++region) {
    backward_region(queries, plan, w, region, previous, done);
  }
  wait_for_keys(previous, kAllKeys);
  done->store(kAllKeys, std::memory_order_release);
}

}  // namespace extrope
