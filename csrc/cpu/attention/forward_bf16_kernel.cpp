// Forward of the attention over regions in bf16, on processors with AMX or AVX512_BF16. Compiled
// once for each, with EXTROPE_ISA as its name.
//
// It works like forward_kernel.cpp, with the same transposed logits, probabilities and output. Keys
// are the left factor of the logits, in tiles without transposition. The probabilities of two keys
// are a pair in the right factor of the output. Probabilities are rounded to bf16, sums are not.

#include "cpu/attention/forward_bf16_part.h"

namespace extrope {
namespace {

constexpr int64_t kBlockM = 1024, kBlockN = 256;
// The running row_max starts here rather than at -inf, so that differences are never NaN.
constexpr float kLowest = -1e30f;

template <bool Capped>
void attend_slice(const TileQueries& queries, const TilePlan& plan, const ForwardBf16Scratch& w,
                  int64_t slice, const KeyBlock& key_block) {
  const RegionParts parts(queries, slice, key_block);
  if (parts.begin >= parts.end) return;
  const int64_t dim_tiles = dim_tiles_of(queries.p.q), value_tiles = dim_tiles_of(queries.p.v);
  const int64_t size = dim_tiles * kDepth * kQueryLanes;
  ForwardBf16Slice view{.w = w,
                        .q = w.q + slice * size,
                        .out = w.out + slice * value_tiles * kDepth * kQueryLanes,
                        .next_q = queries.slices * size,
                        .next_keys = plan.block_n * dim_tiles * kDepth,
                        .dim_tiles = dim_tiles,
                        .value_tiles = value_tiles,
                        .key_tiles = key_block.padded / kDepth,
                        .keys = key_block.count,
                        .softcap = queries.p.softcap * kLog2E,
                        .is_first = !parts.sees_earlier};
  for (int j = 0; j < kQueryVectors; ++j) {
    const int64_t at = slice * kQueryLanes + j * kFloats;
    view.row_max[j] = load<floats>(w.row_max + at);
    view.row_sum[j] = load<floats>(w.row_sum + at);
    view.q_scale[j] = load<floats>(w.q_scale + at);
    const floats lowest = floats{} - __builtin_inff();
    view.hidden_logit.at[j] = Capped ? lowest : view.q_scale[j] < 0 ? -lowest : lowest;
  }
  RowKeys seen[kMaxRegions];
  for (int64_t r = 0; r < queries.p.regions.count; ++r) {
    if (parts.of[r].has_merged()) seen[r] = row_keys(queries, slice, r);
  }
  int64_t added = parts.begin;
  for (int64_t key = parts.begin; key < parts.end; key += kKeyRows) {
    multiply_part<Capped>(view, parts, queries.p.regions.count, seen, key, key_block.first + key);
    bf16* weights = w.weights + key * kQueryLanes;
    const int64_t keys = keys_of_part(view, key);
    const bool is_first = view.is_first && key == parts.begin;  // no row_max yet
    if (is_first || !softmax_part<Capped, false>(view, keys, weights)) {
      add_values(view, added, key);
      added = key;
      raise_row_max<Capped>(view, keys);
      softmax_part<Capped, true>(view, keys, weights);
    }
  }
  add_values(view, added, parts.end);
  for (int j = 0; j < kQueryVectors; ++j) {
    const int64_t at = slice * kQueryLanes + j * kFloats;
    store(w.row_max + at, view.row_max[j]);
    store(w.row_sum + at, view.row_sum[j]);
  }
}

inline bool sees_keys(const TileQueries& queries, int64_t slice) {
  for (int64_t r = 0; r < queries.p.regions.count; ++r) {
    const SliceKeys keys = slice_keys(queries, slice, r);
    if (keys.begin < keys.end) return true;
  }
  return false;
}

// Writes lse, and out = O * out_scale.
void finish(const TileQueries& queries, const ForwardBf16Scratch& w) {
  const int64_t sums = round_up(queries.p.v.head_dim, kDepth) * kQueryLanes;
  for (int64_t slice = 0; slice < queries.slices; ++slice) {
    if (!sees_keys(queries, slice)) std::memset(w.out + slice * sums, 0, sums * sizeof(float));
  }
  finish_softmax(queries, w.row_max, w.row_sum, kLn2, w.out_scale);
  with_out_type<bf16>(queries.p, [&](auto type) {
    unpack_sums<decltype(type)>(queries, w.out, w.out_scale, queries.p.out);
  });
}

// Returns the scale of a row's logits: to base 2, or with a softcap in units of it. It is never 0,
// which would make hidden keys NaN.
inline float q_scale_of(const TileQueries& queries, int64_t row) {
  const float scale = queries.logit_scale(row), softcap = queries.p.softcap;
  if (scale == 0.0f) return __FLT_MIN__;
  return softcap > 0 ? scale / softcap : scale * kLog2E;
}

void forward(const TileQueries& queries, const TilePlan& plan, const ForwardBf16Scratch& w) {
  const AttentionParams& p = queries.p;
  const auto visit = p.softcap > 0 ? attend_slice<true> : attend_slice<false>;
  const int64_t padded = queries.slices * kQueryLanes;
  std::memset(w.row_sum, 0, padded * sizeof(float));
  for (int64_t row = 0; row < padded; ++row) {
    w.row_max[row] = kLowest;
    w.q_scale[row] = row < queries.count ? q_scale_of(queries, row) : 1.0f;
  }
  const int64_t dim = round_up(p.head_dim, kDepth);
  const TileKeys seen(queries);
  for (int64_t r = 0; r < p.regions.count; ++r) {
    if (seen.sees(r)) pack_query_pairs(queries, p.q, p.q_cos_sin[r], w.q + r * padded * dim);
  }
  for (int64_t first = seen.begin; first < seen.end; first += plan.block_n) {
    const KeyBlock key_block = seen.key_block(first, plan.block_n);
    with_element_type<bf16>(p.v, [&](auto type) {
      const auto row = [&](int64_t i) {
        return key_row<decltype(type)>(queries, p.v, key_block.first + i);
      };
      pack_key_columns(key_block, p.v.head_dim, row, w.values);
    });
    for (int64_t r = 0; r < p.regions.count; ++r) {
      pack_region(seen, r, key_block, [&](const KeyBlock& part, int64_t offset) {
        with_element_type<bf16>(p.k[r], [&](auto type) {
          const auto row = [&](int64_t i) {
            return key_row<decltype(type)>(queries, p.k[r], part.first + i);
          };
          pack_key_rows(part, p.head_dim, row, w.keys + (r * plan.block_n + offset) * dim);
        });
      });
    }
    for (int64_t slice = 0; slice < queries.slices; ++slice) {
      prefetch_block<bf16>(queries, seen, first + plan.block_n, plan.block_n, slice);
      visit(queries, plan, w, slice, key_block);
    }
  }
  finish(queries, w);
}

}  // namespace

TilePlan EXTROPE_EXPAND(attention_plan_, EXTROPE_ISA)(const AttentionParams& p) {
  TilePlan plan{};
  const int64_t longest_q = greater(p.seqlen_q, 1), longest_k = greater(p.seqlen_k, 1);
  plan.tokens = smaller(greater(kBlockM / (p.heads_q / p.heads_k), 1), longest_q);
  plan.block_n = smaller(kBlockN, round_up(longest_k, kKeyRows));
  plan.workspace = ForwardBf16Scratch(p, plan, nullptr).space.used();
  return plan;
}

void EXTROPE_EXPAND(attention_tile_, EXTROPE_ISA)(const AttentionParams& p, const QueryTile& tile,
                                                  const TilePlan& plan, float* workspace) {
  const ProductUnit unit;
  forward({p, tile}, plan, ForwardBf16Scratch(p, plan, workspace));
}

}  // namespace extrope
