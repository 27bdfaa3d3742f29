// Forward of the attention over regions in bf16, on processors with AMX or AVX512_BF16. Compiled
// once for each, with EXTROPE_ISA as its name.
//
// It works like forward_kernel.cpp, with the same transposed scores, probabilities and output. Keys
// are the left factor of the scores, in tiles without transposition. The probabilities of two keys
// are a pair in the right factor of the output. Probabilities are rounded to bf16, sums are not.

#include "cpu/attention/forward_bf16_part.h"

namespace extrope {
namespace {

constexpr int64_t kBlockM = 1024, kBlockN = 256;
// The running row_max starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;

template <bool Capped>
void visit_slice(const BlockRows& block, const TilePlan& plan, const Forward& w, int64_t slice,
                 const KeyBlock& key_block) {
  const RegionBlocks blocks(block, slice, key_block);
  if (blocks.begin >= blocks.end) return;
  const int64_t dim_tiles = dim_tiles_of(block.p.q), value_tiles = dim_tiles_of(block.p.v);
  const int64_t size = dim_tiles * kDepth * kSlice;
  Visit v{.w = w,
          .q = w.q + slice * size,
          .out = w.out + slice * value_tiles * kDepth * kSlice,
          .next_q = block.slices * size,
          .next_keys = plan.block_n * dim_tiles * kDepth,
          .dim_tiles = dim_tiles,
          .value_tiles = value_tiles,
          .key_tiles = key_block.padded / kDepth,
          .keys = key_block.count,
          .softcap = block.p.softcap * kLog2E,
          .fresh = !blocks.earlier};
  for (int j = 0; j < kSliceVectors; ++j) {
    const int64_t at = slice * kSlice + j * kFloats;
    v.row_max[j] = load<floats>(w.row_max + at);
    v.row_sum[j] = load<floats>(w.row_sum + at);
    v.scale[j] = load<floats>(w.scale + at);
    v.hidden.at[j] = floats{} - __builtin_inff();
    if (!Capped) v.hidden.at[j] = v.scale[j] < 0 ? -v.hidden.at[j] : v.hidden.at[j];
  }
  RowKeys visible[kMaxRegions];
  for (int64_t r = 0; r < block.p.regions.count; ++r) {
    if (blocks.of[r].has_shared()) visible[r] = row_keys(block, slice, r);
  }
  int64_t added = blocks.begin;
  for (int64_t key = blocks.begin; key < blocks.end; key += kRows) {
    score<Capped>(v, blocks, block.p.regions.count, visible, key, key_block.first + key);
    bf16* weights = w.weights + key * kSlice;
    const int64_t rows = rows_from(v, key);
    const bool first = v.fresh && key == blocks.begin;  // no row_max yet
    if (first || !softmax_block<Capped, false>(v, rows, weights)) {
      add_values(v, added, key);
      added = key;
      raise_row_max<Capped>(v, rows);
      softmax_block<Capped, true>(v, rows, weights);
    }
  }
  add_values(v, added, blocks.end);
  for (int j = 0; j < kSliceVectors; ++j) {
    const int64_t at = slice * kSlice + j * kFloats;
    store(w.row_max + at, v.row_max[j]);
    store(w.row_sum + at, v.row_sum[j]);
  }
}

// Divides by the sums of probabilities and writes out and lse.
void finish(const BlockRows& block, const Forward& w) {
  const int64_t sums = round_up(block.p.v.head_dim, kDepth) * kSlice;
  for (int64_t slice = 0; slice < block.slices; ++slice) {
    if (!sees_keys(block, slice)) std::memset(w.out + slice * sums, 0, sums * sizeof(float));
  }
  finish_sums(block, w.row_max, w.row_sum, w.scale);
  with_out<bf16>(
      block.p, [&](auto type) { unpack_sums<decltype(type)>(block, w.out, w.scale, block.p.out); });
}

// Returns the scale of a row's logits: to base 2, or with a softcap in units of it. It is never 0,
// which would make hidden keys NaN.
inline float scale_of(const BlockRows& block, int64_t row) {
  const float scale = block.scale(row), softcap = block.p.softcap;
  if (scale == 0.0f) return __FLT_MIN__;
  return softcap > 0 ? scale / softcap : scale * kLog2E;
}

void forward(const BlockRows& block, const TilePlan& plan, const Forward& w) {
  const AttentionParams& p = block.p;
  const auto visit = p.softcap > 0 ? visit_slice<true> : visit_slice<false>;
  const int64_t padded = block.slices * kSlice;
  std::memset(w.row_sum, 0, padded * sizeof(float));
  for (int64_t row = 0; row < padded; ++row) {
    w.row_max[row] = kLowest;
    w.scale[row] = row < block.count ? scale_of(block, row) : 1.0f;
  }
  const int64_t dim = round_up(p.head_dim, kDepth);
  const BlockKeys seen(block);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    if (seen.sees(r)) pack_query_pairs(block, p.q, p.q_cos_sin[r], w.q + r * padded * dim);
  }
  for (int64_t first = seen.first; first < seen.last; first += plan.block_n) {
    const KeyBlock key_block = seen.key_block(first, plan.block_n);
    with_rows<bf16>(p.v, [&](auto type) {
      const auto row = [&](int64_t i) {
        return key_row<decltype(type)>(block, p.v, key_block.first + i);
      };
      pack_key_columns(key_block, p.v.head_dim, row, w.values);
    });
    for (int64_t r = 0; r < p.regions.count; ++r) {
      pack_part(seen, r, key_block, [&](const KeyBlock& part, int64_t offset) {
        with_rows<bf16>(p.k[r], [&](auto type) {
          const auto row = [&](int64_t i) {
            return key_row<decltype(type)>(block, p.k[r], part.first + i);
          };
          pack_key_rows(part, p.head_dim, row, w.keys + (r * plan.block_n + offset) * dim);
        });
      });
    }
    for (int64_t slice = 0; slice < block.slices; ++slice) {
      prefetch_block<bf16>(block, seen, first + plan.block_n, plan.block_n, slice);
      visit(block, plan, w, slice, key_block);
    }
  }
  finish(block, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t longest_q = greater(p.seqlen_q, 1), longest_k = greater(p.seqlen_k, 1);
  plan.tokens = smaller(greater(kBlockM / (p.heads_q / p.heads_k), 1), longest_q);
  plan.block_n = smaller(kBlockN, round_up(longest_k, kRows));
  plan.workspace = Forward(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const ProductUnit unit;
  forward({p, tile}, plan, Forward(p, plan, workspace));
}

}  // namespace extrope
