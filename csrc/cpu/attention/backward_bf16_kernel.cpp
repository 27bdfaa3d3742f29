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
void add_to_dq(const Visit& v, int64_t begin, int64_t end) {
  const Backward& w = v.w;
  const int64_t first = begin / kDepth, tiles = (end - begin) / kDepth;
  float* dq = w.dq + v.slice * v.dim_tiles * kDepth * kSlice;
  for (int64_t d = 0; d < v.dim_tiles; ++d) {
    for (int64_t tile = 0; tile < kSliceTiles; tile += 2) {
      add_product_of_tiles(
          {w.key_columns + (2 * d * v.key_tiles + first) * kTileValues, v.key_tiles * kTileValues,
           kTileValues, w.gradient_pairs + (first * kSliceTiles + tile) * kTileValues,
           kSliceTiles * kTileValues, tiles},
          {dq + (2 * d * kSliceTiles + tile) * kTileSums, kSliceTiles * kTileSums, kTileSums,
           kSide});
    }
  }
}

template <bool Capped>
void visit_slice(const BlockRows& block, const Backward& w, int64_t slice, int64_t region,
                 const KeyBlock& key_block) {
  SliceBlocks b = slice_blocks(slice_keys(block, slice, region), key_block.first, key_block.count);
  if (b.begin >= b.end) b = {0, 0, 0, 0};
  w.seen[2 * slice] = static_cast<int32_t>(b.begin);
  w.seen[2 * slice + 1] = static_cast<int32_t>(b.end);
  if (b.begin == b.end) return;
  Visit v{.w = w,
          .slice = slice,
          .slices = block.slices,
          .dim_tiles = dim_tiles_of(block.p.q),
          .value_tiles = dim_tiles_of(block.p.v),
          .key_tiles = key_block.padded / kDepth,
          .softcap = block.p.softcap * kLog2E};
  for (int j = 0; j < kSliceVectors; ++j) {
    const int64_t at = slice * kSlice + j * kFloats;
    v.lse[j] = load<floats>(w.rows.lse + at);
    v.delta[j] = load<floats>(w.rows.delta + at);
    v.scale[j] = load<floats>(w.rows.scale + at);
    v.logit_scale[j] = load<floats>(w.rows.logit_scale + at);
  }
  RowKeys visible;
  if (b.has_shared()) visible = row_keys(block, slice, region);
  for (int64_t part = b.begin; part < b.end; part += kRows) {
    if (part >= b.full_begin && part < b.full_end) {
      visit_part<false, Capped>(v, visible, part, key_block.first);
    } else {
      visit_part<true, Capped>(v, visible, part, key_block.first);
    }
  }
  add_to_dq(v, b.begin, b.end);
}

// sums[key] = sum of weights[key][row] * rows[row] over the rows that see the key: (keys, dim).
void sum_over_rows(const BlockRows& block, const KeyBlock& key_block, const Backward& w,
                   const bf16* weights, const bf16* rows, int64_t dim_tiles) {
  const int64_t row_tiles = block.slices * kRowTiles, dim = dim_tiles * kDepth;
  for (int64_t key = 0; key < key_block.padded; key += kRows) {
    // Ranges of keys rise with the rows: slices that see these keys are neighbours.
    int64_t first = 0, last = block.slices;
    const auto sees = [&](int64_t slice) {
      return w.seen[2 * slice] <= key && key < w.seen[2 * slice + 1];
    };
    while (first < last && !sees(first)) ++first;
    while (first < last && !sees(last - 1)) --last;
    if (first == last) {
      std::memset(w.key_sums + key * dim, 0, kRows * dim * sizeof(float));
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

void write_dq(const BlockRows& block, const Backward& w, int64_t region) {
  RowBuffer rows;
  for (int64_t first = 0; first < block.count; first += kSide) {
    each_sum(block, w.dq, first, block.p.head_dim,
             [&](int64_t i, int64_t d, floats sums) { store(rows[i] + d, sums); });
    for (int64_t i = 0; i < smaller(kSide, block.count - first); ++i) {
      write_dq_row(block, region, first + i, rows[i]);
    }
  }
}

// Packs the keys of a region's block, and values, as factors.
void pack_key_block(const BlockRows& block, const Backward& w, int64_t region,
                    const KeyBlock& key_block) {
  const AttentionParams& p = block.p;
  const auto rows_of_tensor = [&](const AttentionTensor& x) {
    return [&](int64_t i) { return key_row<bf16>(block, x, key_block.first + i); };
  };
  pack_key_rows(key_block, p.v.head_dim, rows_of_tensor(p.v), w.values);
  const auto pack = [&](const auto& row) {
    pack_key_rows(key_block, p.head_dim, row, w.keys);
    pack_key_columns(key_block, p.head_dim, row, w.key_columns);
  };
  if (!p.k_cos_sin[region].cos) return pack(rows_of_tensor(p.k[region]));
  const RowRotation rotation{p.head_dim, p.half, p.interleaved};
  const int64_t dim = round_up(p.head_dim, kDepth);
  for (int64_t i = 0; i < key_block.count; ++i) {
    const int64_t token = block.tile.first_k + key_block.first + i;
    rotate_values(rotation, key_row<bf16>(block, p.k[region], key_block.first + i),
                  cos_sin_at(block, p.k_cos_sin[region], token), w.rotated + i * dim);
  }
  pack([&](int64_t i) { return w.rotated + i * dim; });
}

void backward_region(const BlockRows& block, const TilePlan& plan, const Backward& w,
                     int64_t region, KeysDone* previous, KeysDone* done) {
  const AttentionParams& p = block.p;
  const auto visit = p.softcap > 0 ? visit_slice<true> : visit_slice<false>;
  const int64_t dim_tiles = dim_tiles_of(p.q), value_tiles = dim_tiles_of(p.v);
  std::memset(w.dq, 0, block.slices * kSlice * dim_tiles * kDepth * sizeof(float));
  const SliceKeys keys = tile_keys(block, region);
  if (keys.first < keys.last) {
    pack_query_pairs(block, p.q, p.q_cos_sin[region], w.q);
    pack_row_pairs(block, p.q, p.q_cos_sin[region], w.q_rows);
  }
  for (int64_t first = keys.first; first < keys.last; first += plan.block_n) {
    const int64_t count = smaller(plan.block_n, keys.last - first);
    const KeyBlock key_block{first, count, round_up(count, kRows)};
    pack_key_block(block, w, region, key_block);
    const int64_t next = first + count, next_count = smaller(plan.block_n, keys.last - next);
    for (int64_t slice = 0; slice < block.slices; ++slice) {
      prefetch_share<bf16>(block, p.k[region], next, next_count, slice);
      prefetch_share<bf16>(block, p.v, next, next_count, slice);
      prefetch_share<float>(block, p.dk, first, count, slice);
      prefetch_share<float>(block, p.dv, first, count, slice);
      visit(block, w, slice, region, key_block);
    }
    sum_over_rows(block, key_block, w, w.probabilities, w.dout_rows, value_tiles);
    wait_for_keys(previous, first + count);
    add_keys(block, key_block, {}, w.key_sums, p.dv);
    sum_over_rows(block, key_block, w, w.gradients, w.q_rows, dim_tiles);
    add_keys(block, key_block, p.k_cos_sin[region], w.key_sums, p.dk);
    done->store(smaller(first + count, next_key(block, region + 1)), std::memory_order_release);
  }
  write_dq(block, w, region);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_backward_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t rows = kTileElements / greater(p.head_dim, p.v.head_dim);
  plan.tokens = tile_rows(p, greater(smaller(rows, kMaxBlockM) / kSlice, 1) * kSlice);
  plan.block_n = smaller(kBlockN, round_up(greater(p.seqlen_k, 1), kRows));
  plan.workspace = Backward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_backward_tile_, EXTROPE_ISA)(const AttentionParams& p,
                                                           const QueryTile& tile,
                                                           const TilePlan& plan, float* workspace,
                                                           KeysDone* previous, KeysDone* done) {
  const ProductUnit unit;
  const BlockRows block{p, tile};
  const Backward w(p, plan, workspace);
  load_row_values<bf16>(block, w.rows);
  pack_query_pairs(block, p.dout, {}, w.dout);
  pack_row_pairs(block, p.dout, {}, w.dout_rows);
  for (int64_t region = 0; region < p.regions.count; ++region) {
    backward_region(block, plan, w, region, previous, done);
  }
  wait_for_keys(previous, kAllKeys);
  done->store(kAllKeys, std::memory_order_release);
}

}  // namespace extrope
